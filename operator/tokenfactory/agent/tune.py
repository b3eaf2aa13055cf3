"""Further actuators: locked clocks and workload power profiles, where the profile of a pod's model asks for them.

They save joules and promise nothing: the power limit alone is what the ledger counts on (P6), so nothing here
waits for, delays or replaces a limit. They are set on a lane of their own, checked by what the GPU then says, taken back
when the pod ends or no longer asks, and left alone on GPUs that we never touched.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from tokenfactory.agent.nvml import ClockRange, Failure, FailureKind, Gpu, Identity, Nvml, Reading
from tokenfactory.agent.parts import Clock
from tokenfactory.agent.state import AgentState
from tokenfactory.api.actuators import Actuators, WorkloadPowerProfile
from tokenfactory.api.gpu_node import GPUNode

log = logging.getLogger(__name__)

PROFILES: Final[Mapping[WorkloadPowerProfile, int]] = {
    "MaxP": 0,
    "MaxQ": 1,
    "Compute": 2,
    "MemoryBound": 3,
    "Network": 4,
    "Balanced": 5,
    "LLMInference": 6,
    "LLMTraining": 7,
    "HPC": 13,
}
"""NVML's numbers."""
NOTHING: Final = Actuators()
BOOST_STEP_MHZ: Final = 15
"""A clock is granted in steps: one above the lock is still within it."""
HOPELESS: Final = (FailureKind.NOT_SUPPORTED, FailureKind.REFUSED)
"""The same answer will come again until something else is asked."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """What one GPU was last asked for besides its limit, and in which life of the driver."""

    asked: Actuators = NOTHING
    in_place: Actuators = NOTHING
    """What may be set: of a wish that failed, and of one that could not be taken back, any part."""
    identity: Identity | None = None
    failure: Failure | None = None
    failures: int = 0
    retry_at: float = 0.0
    old_reading: Reading | None = None
    """Of before it was asked: it says nothing of how that went."""


class Tuner:
    """Keeps every GPU's further actuators as its pod's grant says."""

    def __init__(self, state: AgentState, nvml: Nvml, clock: Clock, wake: Callable[[], None]) -> None:
        self._state = state
        self._nvml = nvml
        self._clock = clock
        self._wake = wake
        self._tuned: dict[str, Tuned] = {}

    async def round(self) -> None:
        state = self._state
        if state.node is None or state.decision is None:
            return
        wanted = self._wanted(state.node)
        await asyncio.gather(*(self._tune(gpu, wanted.get(gpu.uuid, NOTHING)) for gpu in state.gpus))

    def _wanted(self, node: GPUNode) -> dict[str, Actuators]:
        """By GPU. One that nobody we know holds gets nothing, which undoes only what we did."""
        grants = {grant.uid: grant.actuators for grant in node.spec.pods}
        holdings = self._state.holdings
        return {
            gpu.uuid: asked
            for gpu in self._state.gpus
            if (asked := grants.get(holdings.of(gpu.uuid).uid)) is not None
        }

    async def _tune(self, gpu: Gpu, wanted: Actuators) -> None:
        identity, now = self._nvml.identity, self._clock.monotonic()
        before = self._before(gpu.uuid, identity)
        same = before.asked == wanted
        loose = self._loose(gpu.uuid, before) if same else None
        if same and (now < before.retry_at if before.failure else loose is None):
            if gpu.uuid not in self._tuned:
                self._show(gpu.uuid, before, before)
            self._tuned[gpu.uuid] = before
            return
        failure = await self._apply(gpu, before.in_place, wanted) or loose
        in_place = wanted if failure is None else _either(wanted, before.in_place)
        failures = (before.failures + 1 if same else 1) if failure else 0
        wait = math.inf if failure and failure.kind in HOPELESS else min(300.0, 5.0 * 2.0**failures)
        old = self._state.readings.get(gpu.uuid)
        self._tuned[gpu.uuid] = Tuned(wanted, in_place, identity, failure, failures, now + wait, old)
        self._show(gpu.uuid, before, self._tuned[gpu.uuid])

    def _before(self, gpu: str, identity: Identity) -> Tuned:
        """What we asked of it in this life of the driver; after a restart, what the own status says we did."""
        known = self._tuned.get(gpu)
        if known is not None and known.identity == identity:
            return known
        node, asked = self._state.node, None
        if known is None and node is not None and node.status.boot_id == identity.boot_id:
            asked = next((it.actuators for it in node.status.gpus if it.uuid == gpu), None)
        return Tuned(asked or NOTHING, asked or NOTHING, identity)  # a driver's load resets them

    def _loose(self, gpu: str, tuned: Tuned) -> Failure | None:
        """NVML does not tell locked clocks; a clock above them tells that they are not."""
        reading, clocks = self._state.readings.get(gpu), tuned.asked.locked_clocks
        if clocks is None or reading is None or reading is tuned.old_reading or reading.sm_mhz is None:
            return None
        if reading.sm_mhz <= clocks.max_mhz + BOOST_STEP_MHZ:
            return None
        text = f"locked to {clocks.max_mhz} MHz, {reading.sm_mhz} MHz seen"
        return Failure(FailureKind.UNKNOWN, "nvmlDeviceSetGpuLockedClocks", gpu, 0, text)

    async def _apply(self, gpu: Gpu, before: Actuators, wanted: Actuators) -> Failure | None:
        """Each of the two by itself: one that is not supported does not cost the other."""
        failures = []
        if wanted.locked_clocks is not None or before.locked_clocks is not None:
            asked = wanted.locked_clocks
            clocks = ClockRange(asked.min_mhz, asked.max_mhz) if asked else None
            failures.append(_undone(await self._nvml.lock_clocks(gpu.uuid, clocks), undo=clocks is None))
        if wanted.workload_power_profile is not None or before.workload_power_profile is not None:
            failures.append(await self._set_profile(gpu, wanted.workload_power_profile))
        return next((failure for failure in failures if failure is not None), None)

    async def _set_profile(self, gpu: Gpu, name: WorkloadPowerProfile | None) -> Failure | None:
        call = "nvmlDeviceWorkloadPowerProfileUpdateProfiles_v1"
        numbers = frozenset({PROFILES[name]}) if name is not None else frozenset()
        if not numbers <= gpu.profiles:
            return Failure(FailureKind.NOT_SUPPORTED, call, gpu.uuid, 0, f"{gpu.product} offers no {name}")
        answer = await self._nvml.set_profiles(gpu.uuid, numbers)
        if isinstance(answer, Failure):
            return _undone(answer, undo=name is None)
        if answer.requested != numbers:
            text = f"{sorted(numbers)} asked for, {sorted(answer.requested)} read back"
            return Failure(FailureKind.UNKNOWN, call, gpu.uuid, 0, text)
        return None

    def _show(self, gpu: str, before: Tuned, now: Tuned) -> None:
        """What may be set stays in the status, so that whoever comes after us undoes it."""
        state = self._state
        state.looked_at.add(gpu)
        state.tuned.pop(gpu, None)
        state.untuned.pop(gpu, None)
        if now.in_place != NOTHING:
            state.tuned[gpu] = now.in_place
        if now.failure is not None:
            state.untuned[gpu] = now.failure
            if now.failure != before.failure:
                error = str(now.failure)
                log.warning("an actuator is not as asked", extra={"node": state.name, "error": error})
        self._wake()


def _either(one: Actuators, other: Actuators) -> Actuators:
    return Actuators(
        locked_clocks=one.locked_clocks or other.locked_clocks,
        workload_power_profile=one.workload_power_profile or other.workload_power_profile,
    )


def _undone(failure: Failure | None, *, undo: bool) -> Failure | None:
    """What a GPU does not have need not be taken back."""
    gone = undo and failure is not None and failure.kind is FailureKind.NOT_SUPPORTED
    return None if gone else failure
