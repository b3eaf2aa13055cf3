"""Asking NVML one thing: the call, its error as a `Failure`, and the habits of the bindings that must be undone.

`nvmlDeviceSetPowerManagementLimit_v2` throws its return code away in the bindings, so such functions are called
directly (`raw`); and field values carry an error each, which is looked at one by one (`Probe.fields`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pynvml

from tokenfactory.agent.nvml import Failure, FailureKind, Scope

KINDS = {
    pynvml.NVML_ERROR_UNINITIALIZED: FailureKind.DRIVER_GONE,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: FailureKind.DRIVER_GONE,
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: FailureKind.DRIVER_GONE,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: FailureKind.DRIVER_GONE,
    pynvml.NVML_ERROR_INVALID_ARGUMENT: FailureKind.REFUSED,
    pynvml.NVML_ERROR_NOT_FOUND: FailureKind.REFUSED,
    pynvml.NVML_ERROR_GPU_NOT_FOUND: FailureKind.REFUSED,
    pynvml.NVML_ERROR_NOT_SUPPORTED: FailureKind.NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: FailureKind.NOT_SUPPORTED,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: FailureKind.NOT_SUPPORTED,
    pynvml.NVML_ERROR_DEPRECATED: FailureKind.NOT_SUPPORTED,
    pynvml.NVML_ERROR_NO_PERMISSION: FailureKind.NO_PERMISSION,
    pynvml.NVML_ERROR_GPU_IS_LOST: FailureKind.LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED: FailureKind.LOST,
}
HOPELESS = (FailureKind.LOST, FailureKind.DRIVER_GONE)
"""After one of these there is no point in asking this GPU anything else."""

VALUE_TYPES = {0: "dVal", 1: "uiVal", 2: "ulVal", 3: "ullVal", 4: "sllVal", 5: "siVal", 6: "usVal"}


class FailureError(Exception):
    """A failure on its way up to where it becomes a value."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


def failure(call: str, gpu: str, error: pynvml.NVMLError) -> Failure:
    code = int(error.value)
    kind = KINDS.get(code, FailureKind.UNKNOWN)
    if kind is FailureKind.UNKNOWN and not driver_alive():
        kind = FailureKind.DRIVER_GONE  # a driver that was swapped under us answers nonsense, not "gone"
    # A library older than the driver under it stays in this process for good.
    restart_helps = code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    return Failure(kind, call, gpu, code, str(error), restart_helps)


def driver_alive() -> bool:
    try:
        pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return False
    return True


class Probe:
    """Asks one GPU many things; what it does not tell is kept as a failure, and the answer is None."""

    def __init__(self, handle: Any, gpu: str) -> None:
        self.handle = handle
        self.gpu = gpu
        self.failures: list[Failure] = []

    def __call__(self, call: str, *arguments: Any) -> Any:
        try:
            return getattr(pynvml, call)(self.handle, *arguments)
        except pynvml.NVMLError as error:
            self.note(failure(call, self.gpu, error))
            return None

    def either(self, *calls: tuple[Any, ...]) -> Any:
        """The first of these that the driver has: older drivers lack the newer names."""
        mark = len(self.failures)
        for call in calls:
            answer = self(*call)
            if answer is not None or self.failures[-1].kind is not FailureKind.NOT_SUPPORTED:
                del self.failures[mark : -1 if answer is None else None]
                return answer
        del self.failures[mark + 1 :]
        return None

    def note(self, failed: Failure) -> None:
        if failed.kind in HOPELESS:
            raise FailureError(failed)
        self.failures.append(failed)

    def fields(self, ids: Iterable[int], scope: Scope = Scope.GPU) -> dict[int, int]:
        """The fields that this GPU has, of those asked for."""
        answers = self("nvmlDeviceGetFieldValues", [(field, int(scope)) for field in ids])
        found: dict[int, int] = {}
        for answer in answers or ():
            if answer.nvmlReturn == pynvml.NVML_SUCCESS:
                found[answer.fieldId] = int(
                    getattr(answer.value, VALUE_TYPES.get(answer.valueType, "ullVal"))
                )
            else:
                error = pynvml.NVMLError(answer.nvmlReturn)
                self.note(failure(f"nvmlDeviceGetFieldValues[{answer.fieldId}]", self.gpu, error))
        return found

    def must(self, call: str, *arguments: Any) -> Any:
        """For what nothing else makes sense without."""
        try:
            return getattr(pynvml, call)(self.handle, *arguments)
        except pynvml.NVMLError as error:
            raise FailureError(failure(call, self.gpu, error)) from None


def raw(call: str, handle: Any, gpu: str, *arguments: Any) -> None:
    """A call that the bindings have no honest wrapper for."""
    try:
        function: Callable[..., int] = pynvml._nvmlGetFunctionPointer(call)  # noqa: SLF001
        pynvml._nvmlCheckReturn(function(handle, *arguments))  # noqa: SLF001
    except pynvml.NVMLError as error:
        raise FailureError(failure(call, gpu, error)) from None
