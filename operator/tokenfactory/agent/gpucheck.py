"""`python -m tokenfactory.agent.gpucheck`: what this machine's GPUs answer to everything the agent asks.

It reads and never sets. Two parts: what the agent would make of the node, through the code that the agent runs;
and each NVML call by itself, with its answer or its error and how long it took, as JSON with `--json`, so that
what a real GPU says can be compared with the simulated library and recorded there.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pynvml

from tokenfactory.agent.lanes import Lane, OverdueError, StuckError
from tokenfactory.agent.nvml import Driver, Failure, Nvml, Scope
from tokenfactory.agent.nvml_probe import VALUE_TYPES
from tokenfactory.agent.nvml_pynvml import BOOT_ID, PynvmlDriver

DEADLINE_SECONDS = 10.0
EVENT_WAIT_MS = 200
FIELDS_AT_ONCE = 16
SLOW_MILLISECONDS = 50.0

Report = dict[str, Any]


def _struct(kind: str, call: str) -> Callable[[Any], Any]:
    """A call that fills a versioned struct."""

    def ask(handle: Any) -> Any:
        info = getattr(pynvml, kind)()
        getattr(pynvml, call)(handle, ctypes.byref(info))
        return bytes(info).rstrip(b"\0").hex()[:400]

    return ask


def _plain(call: str, *arguments: Any) -> Callable[[Any], Any]:
    return lambda handle: getattr(pynvml, call)(handle, *arguments)


def _events(handle: Any) -> str:
    events = pynvml.nvmlEventSetCreate()
    try:
        offered = pynvml.nvmlDeviceGetSupportedEventTypes(handle)
        pynvml.nvmlDeviceRegisterEvents(handle, offered & pynvml.nvmlEventTypeXidCriticalError, events)
        try:
            data = pynvml.nvmlEventSetWait_v2(events, EVENT_WAIT_MS)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_TIMEOUT:
                raise
            return f"offers {offered:#x}; none within {EVENT_WAIT_MS} ms, as it should be"
        return f"offers {offered:#x}; event {data.eventType:#x}: {data.eventData}"
    finally:
        pynvml.nvmlEventSetFree(events)


READS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    *(
        (call, _plain(call))
        for call in (
            "nvmlDeviceGetName",
            "nvmlDeviceGetUUID",
            "nvmlDeviceGetSerial",
            "nvmlDeviceGetBoardPartNumber",
            "nvmlDeviceGetVbiosVersion",
            "nvmlDeviceGetMinorNumber",
            "nvmlDeviceGetPciInfo",
            "nvmlDeviceGetArchitecture",
            "nvmlDeviceGetCudaComputeCapability",
            "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetPersistenceMode",
            "nvmlDeviceGetPowerManagementMode",
            "nvmlDeviceGetPowerManagementLimitConstraints",
            "nvmlDeviceGetPowerManagementDefaultLimit",
            "nvmlDeviceGetPowerManagementLimit",
            "nvmlDeviceGetEnforcedPowerLimit",
            "nvmlDeviceGetPowerUsage",
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetUtilizationRates",
            "nvmlDeviceGetPerformanceState",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetSupportedClocksEventReasons",
            "nvmlDeviceGetEccMode",
            "nvmlDeviceGetRemappedRows",
            "nvmlDeviceGetMigMode",
            "nvmlDeviceGetMaxMigDeviceCount",
            "nvmlDeviceGetComputeRunningProcesses",
            "nvmlDeviceGetSupportedEventTypes",
        )
    ),
    ("nvmlDeviceGetModuleId", _plain("nvmlDeviceGetModuleId", ctypes.c_uint())),
    ("nvmlDeviceGetTemperature", _plain("nvmlDeviceGetTemperature", 0)),
    ("nvmlDeviceGetTemperatureV", _plain("nvmlDeviceGetTemperatureV", 0)),
    *(
        (f"nvmlDeviceGetTemperatureThreshold[{which}]", _plain("nvmlDeviceGetTemperatureThreshold", which))
        for which in range(4)
    ),
    *(
        (f"{call}[{which}]", _plain(call, which))
        for call in ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo")
        for which in (0, 1, 2)
    ),
    *(
        (
            f"nvmlDeviceGetTotalEccErrors[{kind},{counter}]",
            _plain("nvmlDeviceGetTotalEccErrors", kind, counter),
        )
        for kind in (0, 1)
        for counter in (0, 1)
    ),
    *(
        (f"nvmlDeviceGetViolationStatus[{policy}]", _plain("nvmlDeviceGetViolationStatus", policy))
        for policy in (0, 1)
    ),
    *(
        (f"{call}[{link}]", _plain(call, link))
        for call in ("nvmlDeviceGetNvLinkState", "nvmlDeviceGetNvLinkVersion")
        for link in (0, 17, 18)
    ),
    ("nvmlDeviceGetNvLinkErrorCounter[0,0]", _plain("nvmlDeviceGetNvLinkErrorCounter", 0, 0)),
    ("nvmlDeviceGetGpuFabricInfoV[2]", _struct("c_nvmlGpuFabricInfo_v2_t", "nvmlDeviceGetGpuFabricInfoV")),
    ("nvmlDeviceGetGpuFabricInfoV[3]", _struct("c_nvmlGpuFabricInfo_v3_t", "nvmlDeviceGetGpuFabricInfoV")),
    ("nvmlDeviceGetPlatformInfo", _struct("c_nvmlPlatformInfo_v2_t", "nvmlDeviceGetPlatformInfo")),
    (
        "nvmlDeviceWorkloadPowerProfileGetProfilesInfo",
        _struct(
            "c_nvmlWorkloadPowerProfileProfilesInfo_v1_t", "nvmlDeviceWorkloadPowerProfileGetProfilesInfo"
        ),
    ),
    (
        "nvmlDeviceWorkloadPowerProfileGetCurrentProfiles",
        _struct(
            "c_nvmlWorkloadPowerProfileCurrentProfiles_v1_t",
            "nvmlDeviceWorkloadPowerProfileGetCurrentProfiles",
        ),
    ),
    ("nvmlEventSetWait", _events),
)


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (ctypes.Structure, pynvml.nvmlFriendlyObject)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_shown(item) for item in value]
    return getattr(value, "value", value)


async def _one(lane: Lane, name: str, ask: Callable[[], Any]) -> Report:
    took = 0.0

    def timed() -> Any:
        nonlocal took
        began = time.perf_counter()
        try:
            return _shown(ask())
        finally:
            took = (time.perf_counter() - began) * 1000

    try:
        answer = await lane.run(timed, DEADLINE_SECONDS)
    except OverdueError:
        return {"call": name, "hangs": True}
    except StuckError:
        return {"call": name, "error": "not asked: an earlier call hangs"}
    except pynvml.NVMLError as error:
        return {"call": name, "error": str(error), "code": int(error.value), "ms": round(took, 3)}
    except Exception as error:
        return {"call": name, "error": f"{type(error).__name__}: {error}", "ms": round(took, 3)}
    return {"call": name, "answer": answer, "ms": round(took, 3)}


def _field_batches(scope: Scope) -> Iterator[list[tuple[int, int]]]:
    ids = range(1, pynvml.NVML_FI_MAX) if scope is Scope.GPU else range(185, 193)
    for start in range(ids.start, ids.stop, FIELDS_AT_ONCE):
        yield [(field, int(scope)) for field in range(start, min(start + FIELDS_AT_ONCE, ids.stop))]


async def _fields(lane: Lane, handle: Any, scope: Scope) -> Report:
    """Every field id there is: what it answers, or the code of its error."""
    found: Report = {"supported": {}, "errors": {}}
    for batch in _field_batches(scope):

        def ask(batch: list[tuple[int, int]] = batch) -> list[tuple[int, int, int | float]]:
            values = pynvml.nvmlDeviceGetFieldValues(handle, batch)
            return [
                (v.fieldId, v.nvmlReturn, getattr(v.value, VALUE_TYPES.get(v.valueType, "ullVal")))
                for v in values
            ]

        answer = await _one(lane, f"nvmlDeviceGetFieldValues[{batch[0][0]}…]", ask)
        if "answer" not in answer:
            found["errors"][f"{batch[0][0]}…"] = answer.get("error", "hangs")
            continue
        for field, result, value in answer["answer"]:
            if result == pynvml.NVML_SUCCESS:
                found["supported"][field] = value
            elif result != pynvml.NVML_ERROR_NOT_SUPPORTED:
                found["errors"][field] = result
    return found


async def _as_the_agent(nvml: Nvml) -> Report:
    began = time.perf_counter()
    gpus = await nvml.inventory()
    report: Report = {"inventory_ms": round((time.perf_counter() - began) * 1000, 1), "gpus": []}
    for gpu in gpus:
        began = time.perf_counter()
        reading = await nvml.read(gpu.uuid)
        middle = time.perf_counter()
        wear = await nvml.wear(gpu.uuid)
        report["gpus"].append(
            {
                "inventory": str(gpu),
                "limits": str(await nvml.limits(gpu.uuid)),
                "module_limits": str(await nvml.limits(gpu.uuid, Scope.MODULE)),
                "reading": str(reading),
                "reading_ms": round((middle - began) * 1000, 2),
                "wear": str(wear),
                "wear_ms": round((time.perf_counter() - middle) * 1000, 2),
            }
        )
    return report


async def check() -> Report:
    nvml = PynvmlDriver(deadline_seconds=DEADLINE_SECONDS)
    driver = await nvml.open()
    report: Report = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "root": os.geteuid() == 0,
        "boot_id_readable": BOOT_ID.exists(),
        "driver": str(driver),
    }
    if isinstance(driver, Failure):
        return report
    report["missing"] = [str(failure) for failure in nvml.missing]
    report["agent"] = await _as_the_agent(nvml)
    report["calls"] = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        lane = Lane(f"check {index}")
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        calls = [await _one(lane, name, functools.partial(ask, handle)) for name, ask in READS]
        fields = await _fields(lane, handle, Scope.GPU)
        module_fields = await _fields(lane, handle, Scope.MODULE)
        report["calls"].append(
            {"gpu": index, "calls": calls, "fields": fields, "module_fields": module_fields}
        )
        lane.stop()
    await nvml.close()
    return report


def render(report: Report) -> Iterator[str]:
    """For people."""
    yield f"kernel {report['kernel']}, Python {report['python']}, root: {report['root']}"
    yield report["driver"]
    if not isinstance(report.get("agent"), dict):
        return
    yield from (f"missing: {line}" for line in report["missing"])
    yield f"\nAs the agent sees it (inventory {report['agent']['inventory_ms']} ms)"
    for gpu in report["agent"]["gpus"]:
        yield ""
        for name, value in gpu.items():
            yield f"  {name}: {value}"
    for gpu in report["calls"]:
        yield f"\nGPU {gpu['gpu']}, call by call"
        for call in gpu["calls"]:
            if "answer" in call:
                slow = "  SLOW" if call["ms"] > SLOW_MILLISECONDS else ""
                yield f"  yes {call['ms']:9.3f} ms{slow}  {call['call']}: {call['answer']}"
            else:
                yield f"  NO  {call.get('ms', 0):9.3f} ms  {call['call']}: {call.get('error', 'HANGS')}"
        for name in ("fields", "module_fields"):
            yield f"  {name}: {len(gpu[name]['supported'])} supported: {gpu[name]['supported']}"
            yield f"  {name}, other errors than not supported: {gpu[name]['errors']}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpucheck", description="Read everything the agent reads; set nothing."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, to record and compare")
    arguments = parser.parse_args()
    report = asyncio.run(check())
    text = json.dumps(report, indent=1, default=str) if arguments.json else "\n".join(render(report))
    sys.stdout.write(text + "\n")
    return 0 if report["driver"].startswith(Driver.__name__) else 1


if __name__ == "__main__":
    sys.exit(main())
