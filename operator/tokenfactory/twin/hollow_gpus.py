"""GPUs that are numbers in this process: what the agents of a hollow fleet take for NVML.

Thousands of nodes have no room for a library and a state file each, so nothing of pynvml is shown here; `nvml.py` is
for that. What is kept is what a cut meets on its way: each call that sets a limit takes its time, and what is read
back is what is enforced.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

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
    Scope,
    Wear,
)
from tokenfactory.twin.gpu_products import Product

SET_SECONDS: Final = 0.015
"""Real calls that set a limit take 10 to 20 ms."""


@dataclass
class HollowGpu:
    uuid: str
    limit_milliwatts: int
    idle_milliwatts: int
    busy: bool = False
    energy_millijoules: float = 0.0
    since: float = 0.0

    @property
    def milliwatts(self) -> int:
        """The most that it may draw now: idle without work, else all that its limit allows."""
        return self.limit_milliwatts if self.busy else min(self.limit_milliwatts, self.idle_milliwatts)


class HollowGpus:
    """One node's GPUs. `changed` is told of every change of what they may draw, in milliwatts, as it happens."""

    def __init__(
        self,
        node: str,
        product: Product,
        count: int,
        *,
        changed: Callable[[int], None] = lambda _: None,
        set_seconds: float = SET_SECONDS,
    ) -> None:
        self._boot = f"boot-of-{node}"
        self._product = product
        self._changed = changed
        self._set_seconds = set_seconds
        self._opened = 0
        now = time.monotonic()
        self.gpus = {
            uuid: HollowGpu(uuid, product.default_watts * 1000, product.idle_watts * 1000, since=now)
            for uuid in (f"GPU-{node}-{index}" for index in range(count))
        }
        self.sets = 0

    def set_load(self, uuid: str, share: float) -> None:
        with _Change(self, uuid) as gpu:
            gpu.busy = share > 0

    def enforced_watts(self, uuid: str) -> float:
        return self.gpus[uuid].limit_milliwatts / 1000

    def told(self, milliwatts: int) -> None:
        if milliwatts:
            self._changed(milliwatts)

    # --- as the agent sees them

    @property
    def identity(self) -> Identity:
        return Identity(self._boot, self._opened)

    @property
    def stuck(self) -> frozenset[str]:
        return frozenset()

    @property
    def missing(self) -> tuple[Failure, ...]:
        return ()

    async def open(self) -> Driver | Failure:
        self._opened += 1
        return Driver("570.00.00", "12.570", self.identity)

    async def close(self) -> None:
        pass

    async def inventory(self) -> tuple[Gpu, ...]:
        return tuple(
            Gpu(
                index=index,
                uuid=gpu.uuid,
                product=self._product.name,
                pci_bus_id=f"00000000:{index:02X}:00.0",
                limits=self._limits(gpu),
            )
            for index, gpu in enumerate(self.gpus.values())
        )

    def _limits(self, gpu: HollowGpu) -> Limits:
        product, limit = self._product, gpu.limit_milliwatts
        return Limits(
            product.min_watts * 1000, product.max_watts * 1000, product.default_watts * 1000, limit, limit
        )

    async def limits(self, gpu: str, scope: Scope = Scope.GPU) -> Limits | Failure:  # noqa: ARG002
        return self._limits(self.gpus[gpu])

    async def set_limit(self, gpu: str, milliwatts: int, scope: Scope = Scope.GPU) -> Limits | Failure:  # noqa: ARG002
        await asyncio.sleep(self._set_seconds)
        self.sets += 1
        with _Change(self, gpu) as held:
            held.limit_milliwatts = milliwatts
        return self._limits(held)

    async def read(self, gpu: str) -> Reading | Failure:
        held = self.gpus[gpu]
        now = time.monotonic()
        energy = held.energy_millijoules + held.milliwatts * (now - held.since)
        return Reading(
            monotonic_seconds=now,
            power_milliwatts=held.milliwatts,
            energy_millijoules=int(energy),
            enforced_milliwatts=held.limit_milliwatts,
            requested_milliwatts=held.limit_milliwatts,
        )

    async def wear(self, gpu: str) -> Wear | Failure:  # noqa: ARG002
        return Wear()

    async def lock_clocks(self, gpu: str, clocks: ClockRange | None) -> Failure | None:  # noqa: ARG002
        return Failure(FailureKind.NOT_SUPPORTED, "lock_clocks", gpu)

    async def set_profiles(self, gpu: str, profiles: frozenset[int]) -> ProfileState | Failure:  # noqa: ARG002
        return Failure(FailureKind.NOT_SUPPORTED, "set_profiles", gpu)

    async def events(self) -> AsyncIterator[Event]:
        """Nothing ever happens to them."""
        await asyncio.Event().wait()
        yield Failure(FailureKind.UNKNOWN, "events")


class _Change:
    """What one GPU may draw before and after, told as the difference; its energy counted up to here."""

    def __init__(self, node: HollowGpus, uuid: str) -> None:
        self._node = node
        self._gpu = node.gpus[uuid]
        self._before = self._gpu.milliwatts

    def __enter__(self) -> HollowGpu:
        gpu, now = self._gpu, time.monotonic()
        gpu.energy_millijoules += self._before * (now - gpu.since)
        gpu.since = now
        return gpu

    def __exit__(self, *_: object) -> None:
        self._node.told(self._gpu.milliwatts - self._before)
