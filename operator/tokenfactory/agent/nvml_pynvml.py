"""`Nvml` over the real library: each GPU's calls on lanes of its own, every one bounded by a deadline.

pynvml is one library per process, so there is at most one of these per process.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import pynvml

from tokenfactory.agent import nvml_calls as calls
from tokenfactory.agent.lanes import Lane, OverdueError, StuckError
from tokenfactory.agent.nvml import (
    ClockRange,
    Driver,
    Event,
    Failure,
    FailureKind,
    Gpu,
    Identity,
    Limits,
    ProfileState,
    Reading,
    RecoveryChanged,
    Scope,
    Wear,
    Xid,
)
from tokenfactory.agent.nvml_probe import FailureError, failure

T = TypeVar("T")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
EVENT_WAIT_SECONDS = 0.5
XID_EVENTS = pynvml.nvmlEventTypeXidCriticalError
ALL_EVENTS = XID_EVENTS | pynvml.nvmlEventTypeGpuRecoveryAction
NO_INSTANCE = 0xFFFFFFFF


class _GpuLanes:
    """One GPU's lanes: a cap must not wait behind a slow sensor or another actuator, nor be kept out by one that hangs."""

    def __init__(self, index: int) -> None:
        self.control = Lane(f"GPU {index} control")
        self.sensors = Lane(f"GPU {index} sensors")
        self.tuning = Lane(f"GPU {index} tuning")
        self.settings = 0
        """Moves when a limit begins to be set and when that has ended."""

    def __iter__(self) -> Iterator[Lane]:
        return iter((self.control, self.sensors, self.tuning))


class PynvmlDriver:
    """The GPUs of this node."""

    def __init__(
        self,
        *,
        boot_id_file: Path = BOOT_ID,
        deadline_seconds: float = 2.0,
        open_deadline_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._boot_id_file = boot_id_file
        self._deadline_seconds = deadline_seconds
        self._open_deadline_seconds = open_deadline_seconds
        self._clock = clock
        self._identity = Identity("", 0)
        self._system = Lane("system")
        self._events = Lane("events")
        self._lanes: dict[int, _GpuLanes] = {}
        self._handles: dict[str, tuple[int, Any]] = {}
        self._gpus: dict[str, Gpu] = {}
        self._event_set: Any = None
        self._heard: deque[Event] = deque()
        self._unwatched: set[str] = set()
        self._missing: dict[int, Failure] = {}
        self._found_late = False
        self._is_open = asyncio.Event()
        self._opening = asyncio.Lock()
        self._initialised = False
        self._closed = False

    @property
    def identity(self) -> Identity:
        return self._identity

    @property
    def stuck(self) -> frozenset[str]:
        return frozenset(
            uuid for uuid, (index, _) in self._handles.items() if self._lanes[index].control.stuck
        )

    @property
    def missing(self) -> tuple[Failure, ...]:
        return tuple(self._missing.values())

    # ---- open and close ----

    async def open(self) -> Driver | Failure:
        async with self._opening:
            return await self._open()

    async def _open(self) -> Driver | Failure:
        self._is_open.clear()
        if self._initialised and (hanging := self._hanging()):
            # NVML may not be shut down under a running call; only a new process gets rid of it.
            return Failure(
                FailureKind.TIMEOUT,
                "nvmlShutdown",
                text=f"calls still hang in the old driver ({', '.join(hanging)}); restart the agent",
                restart_helps=True,
            )
        try:
            if self._initialised:  # nor under a wait for events
                await self._events.run(lambda: None, EVENT_WAIT_SECONDS + self._deadline_seconds)
            version, nvml_version, count = await self._system.run(self._load, self._open_deadline_seconds)
        except (OverdueError, StuckError):
            text = "has not come back; restart the agent"
            return Failure(FailureKind.TIMEOUT, "nvmlInit", text=text, restart_helps=True)
        except FailureError as error:
            return error.failure
        self._handles, self._gpus, self._missing = {}, {}, {}
        await asyncio.gather(*(self._discover(index) for index in range(count)))
        boot_id = (await asyncio.to_thread(self._boot_id_file.read_text)).strip()
        self._identity = Identity(boot_id, self._identity.driver_generation + 1)
        self._unwatched = set()
        self._is_open.set()
        return Driver(version, nvml_version, self._identity)

    def _hanging(self) -> list[str]:
        return [lane.name for lane in self._all_lanes() if lane.stuck]

    def _all_lanes(self) -> Iterator[Lane]:
        for lanes in self._lanes.values():
            yield from lanes
        yield self._system
        yield self._events

    def _load(self) -> tuple[str, str, int]:
        if self._initialised:
            self._initialised = False
            self._event_set = None
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()
        call = "nvmlInit"
        try:
            pynvml.nvmlInit()
            self._initialised = True
            call = "nvmlSystemGetDriverVersion"
            version, nvml_version = pynvml.nvmlSystemGetDriverVersion(), pynvml.nvmlSystemGetNVMLVersion()
            call = "nvmlDeviceGetCount"
            return version, nvml_version, pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            raise FailureError(failure(call, "", error)) from None

    async def _discover(self, index: int) -> None:
        """Who does not answer now is looked for again later: it may be drawing power all the while."""
        lane = self._lanes.setdefault(index, _GpuLanes(index)).sensors

        def look() -> tuple[Any, Gpu]:
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            except pynvml.NVMLError as error:
                failed = failure("nvmlDeviceGetHandleByIndex", str(index), error)
                raise FailureError(failed) from None
            return handle, calls.describe(handle, index)

        found = await self._on(
            lane, "nvmlDeviceGetHandleByIndex", str(index), look, self._open_deadline_seconds
        )
        if isinstance(found, Failure):
            self._missing[index] = found
            return
        handle, gpu = found
        self._missing.pop(index, None)
        self._handles[gpu.uuid], self._gpus[gpu.uuid] = (index, handle), gpu

    async def close(self) -> None:
        self._closed = True
        self._is_open.set()
        if self._initialised and not self._hanging():
            with contextlib.suppress(OverdueError, StuckError, pynvml.NVMLError):
                await self._events.run(lambda: None, EVENT_WAIT_SECONDS + self._deadline_seconds)
                await self._system.run(pynvml.nvmlShutdown, self._deadline_seconds)
                self._initialised = False
        for lane in self._all_lanes():
            lane.stop()

    # ---- one call on one GPU ----

    async def _on(
        self, lane: Lane, call: str, gpu: str, function: Callable[[], T], deadline_seconds: float
    ) -> T | Failure:
        try:
            return await lane.run(function, deadline_seconds)
        except FailureError as error:
            return error.failure
        except OverdueError:
            return Failure(FailureKind.TIMEOUT, call, gpu, text=f"no answer in {deadline_seconds:g} s")
        except StuckError:
            return Failure(FailureKind.TIMEOUT, call, gpu, text="an earlier call has not come back")

    async def _ask(
        self,
        gpu: str,
        call: str,
        function: Callable[[Any, _GpuLanes], T],
        *,
        on: Literal["control", "sensors", "tuning"] = "sensors",
    ) -> T | Failure:
        if gpu not in self._handles:
            return Failure(FailureKind.REFUSED, call, gpu, text="no such GPU since NVML was opened")
        index, handle = self._handles[gpu]
        lanes = self._lanes[index]
        lane: Lane = getattr(lanes, on)
        return await self._on(lane, call, gpu, lambda: function(handle, lanes), self._deadline_seconds)

    async def inventory(self) -> tuple[Gpu, ...]:
        async def again(gpu: Gpu) -> Gpu:
            fresh = await self._ask(
                gpu.uuid, "inventory", lambda handle, _: calls.describe(handle, gpu.index)
            )
            return gpu if isinstance(fresh, Failure) else fresh

        late = len(self._gpus)
        await asyncio.gather(*(self._discover(index) for index in tuple(self._missing)))
        self._found_late |= len(self._gpus) > late
        found = await asyncio.gather(*(again(gpu) for gpu in self._gpus.values()))
        self._gpus = {gpu.uuid: gpu for gpu in sorted(found, key=lambda gpu: gpu.index)}
        return tuple(self._gpus.values())

    async def limits(self, gpu: str, scope: Scope = Scope.GPU) -> Limits | Failure:
        call = "nvmlDeviceGetEnforcedPowerLimit"
        return await self._ask(gpu, call, lambda handle, _: calls.limits(handle, gpu, scope), on="control")

    async def set_limit(self, gpu: str, milliwatts: int, scope: Scope = Scope.GPU) -> Limits | Failure:
        def set_and_read_back(handle: Any, lanes: _GpuLanes) -> Limits:
            lanes.settings += 1
            try:
                return calls.set_limit(handle, gpu, milliwatts, scope)
            finally:
                lanes.settings += 1

        return await self._ask(gpu, "nvmlDeviceSetPowerManagementLimit", set_and_read_back, on="control")

    async def read(self, gpu: str) -> Reading | Failure:
        known = self._gpus.get(gpu)
        module = known is not None and known.module_limits is not None

        def look(handle: Any, lanes: _GpuLanes) -> Reading:
            before = lanes.settings
            reading = calls.read(handle, gpu, module, self._clock)
            if before % 2 == 0 and before == lanes.settings:
                return reading
            # A limit was being set meanwhile: which of the two this saw is not known.
            return replace(reading, enforced_milliwatts=None, requested_milliwatts=None)

        return await self._ask(gpu, "nvmlDeviceGetPowerUsage", look)

    async def wear(self, gpu: str) -> Wear | Failure:
        return await self._ask(gpu, "nvmlDeviceGetTotalEccErrors", lambda handle, _: calls.wear(handle, gpu))

    async def lock_clocks(self, gpu: str, clocks: ClockRange | None) -> Failure | None:
        return await self._ask(
            gpu,
            "nvmlDeviceSetGpuLockedClocks",
            lambda handle, _: calls.lock_clocks(handle, gpu, clocks),
            on="tuning",
        )

    async def set_profiles(self, gpu: str, profiles: frozenset[int]) -> ProfileState | Failure:
        return await self._ask(
            gpu,
            "nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1",
            lambda handle, _: calls.set_profiles(handle, gpu, profiles),
            on="tuning",
        )

    # ---- events ----

    async def events(self) -> AsyncIterator[Event]:
        deadline = EVENT_WAIT_SECONDS + self._deadline_seconds
        while not self._closed:
            await self._is_open.wait()
            if self._closed:
                return
            try:
                await self._events.run(self._wait_for_event, deadline)
            except FailureError as error:
                yield error.failure
                if error.failure.kind is FailureKind.DRIVER_GONE:
                    self._is_open.clear()  # until open() is called again
                elif error.failure.gpu == "":
                    await asyncio.sleep(EVENT_WAIT_SECONDS)
            except OverdueError:
                yield Failure(FailureKind.TIMEOUT, "nvmlEventSetWait", text="the event stream hangs")
            except StuckError:
                await asyncio.sleep(EVENT_WAIT_SECONDS)
            while self._heard:
                yield self._heard.popleft()

    def _watch(self) -> Any:
        events = pynvml.nvmlEventSetCreate()
        for uuid, (_, handle) in self._handles.items():
            if uuid in self._unwatched:
                continue
            try:
                offered = pynvml.nvmlDeviceGetSupportedEventTypes(handle)
                pynvml.nvmlDeviceRegisterEvents(handle, offered & ALL_EVENTS, events)
            except pynvml.NVMLError as error:
                self._unwatched.add(uuid)
                pynvml.nvmlEventSetFree(events)
                raise FailureError(failure("nvmlDeviceRegisterEvents", uuid, error)) from None
        return events

    def _wait_for_event(self) -> None:
        """Into `_heard`, not as a result: what a late wait brings must not be lost with it."""
        try:
            if self._found_late and self._event_set is not None:
                pynvml.nvmlEventSetFree(self._event_set)
                self._event_set = None
            self._found_late = False
            if self._event_set is None:
                self._event_set = self._watch()
            data = pynvml.nvmlEventSetWait_v2(self._event_set, int(EVENT_WAIT_SECONDS * 1000))
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_TIMEOUT:
                return
            failed = failure("nvmlEventSetWait", "", error)
            if failed.kind is FailureKind.LOST:
                self._drop_lost()
            raise FailureError(failed) from None
        self._heard.append(self._event(data))

    def _drop_lost(self) -> None:
        """One lost GPU makes the wait fail for all of them: go on without it, at once, to miss little."""
        for uuid, (_, handle) in self._handles.items():
            try:
                pynvml.nvmlDeviceGetSupportedEventTypes(handle)
            except pynvml.NVMLError:
                self._unwatched.add(uuid)
        old, self._event_set = self._event_set, None
        self._event_set = self._watch()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlEventSetFree(old)

    def _event(self, data: Any) -> Event:
        gpu = self._uuid_of(data.device)
        if data.eventType == XID_EVENTS:
            return Xid(
                gpu, int(data.eventData), _instance(data.gpuInstanceId), _instance(data.computeInstanceId)
            )
        return RecoveryChanged(gpu)

    def _uuid_of(self, device: Any) -> str:
        """Without asking the GPU: an XID can be its last word."""
        address = ctypes.cast(device, ctypes.c_void_p).value
        for uuid, (_, handle) in self._handles.items():
            if ctypes.cast(handle, ctypes.c_void_p).value == address:
                return uuid
        return ""


def _instance(number: int) -> int | None:
    return None if number == NO_INSTANCE else int(number)
