"""One node without hardware around a real agent: GPUs, kubelet, sheets and API server are objects of the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from tests.unit.agent.virtual import VirtualClock

from tokenfactory.agent.loop import Agent
from tokenfactory.agent.nodepower import MeterError
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
    Wear,
)
from tokenfactory.agent.pace import Pace
from tokenfactory.agent.parts import PodDevices, PodResourcesError
from tokenfactory.agent.sources import SheetBook
from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec, ClassCap, Renewal, renewal_name
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec, GPUNodeStatus, PodGrant
from tokenfactory.api.meta import ObjectMeta

PRODUCT = "NVIDIA H100 80GB HBM3"
IDLE = f"idle@{PRODUCT}"
CHAT = f"inference/chat/llama@{PRODUCT}"
LOWEST, DEFAULT = 200_000, 700_000


@dataclass
class HollowGpu:
    uuid: str
    limit: int = DEFAULT
    draw: Callable[[HollowGpu], int] = lambda gpu: min(gpu.limit, 400_000)
    energy: int = 0
    failure: FailureKind | None = None
    stubborn: bool = False
    """Takes a limit and enforces the old one."""
    hang: asyncio.Event | None = None
    clocks: ClockRange | None = None
    profiles: frozenset[int] = frozenset()
    untunable: Failure | None = None
    """Why neither clocks nor profiles can be set."""
    clings: bool = False
    """A profile that is cleared stays, and nothing is said."""
    sm_mhz: int = 1_000
    hidden: FailureKind | None = None
    """NVML counts it and does not hand it out."""


class HollowNvml:
    """NVML with faults that a test turns on and off."""

    def __init__(self, count: int) -> None:
        self.gpus = {f"GPU-{n}": HollowGpu(f"GPU-{n}") for n in range(count)}
        self.boot = "boot-1"
        self.generation = 0
        self.gone = False
        self.sets: list[tuple[float, str, int]] = []
        self.reads = 0
        self.read_seconds = 0.001
        self.highest: dict[str, int] = {}
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.wears: dict[str, Wear] = {}
        self.tunings: list[tuple[str, object]] = []
        self.offered = frozenset(range(8))
        self._hanging: set[str] = set()

    @property
    def identity(self) -> Identity:
        return Identity(self.boot, self.generation)

    @property
    def stuck(self) -> frozenset[str]:
        return frozenset(self._hanging)

    @property
    def missing(self) -> tuple[Failure, ...]:
        return tuple(
            Failure(gpu.hidden, "nvmlDeviceGetHandleByIndex", str(n))
            for n, gpu in enumerate(self.gpus.values())
            if gpu.hidden
        )

    async def open(self) -> Driver | Failure:
        await asyncio.sleep(0)
        if self.gone:
            return Failure(FailureKind.DRIVER_GONE, "nvmlInit")
        self.generation += 1
        return Driver("570.1", "12.570", self.identity)

    async def close(self) -> None:
        pass

    async def inventory(self) -> tuple[Gpu, ...]:
        await asyncio.sleep(0)
        return tuple(
            Gpu(
                index=n,
                uuid=gpu.uuid,
                product=PRODUCT,
                limits=None if gpu.failure else self._limits(gpu),
                profiles=self.offered,
            )
            for n, gpu in enumerate(self.gpus.values())
            if not gpu.hidden
        )

    def _limits(self, gpu: HollowGpu) -> Limits:
        return Limits(LOWEST, DEFAULT, DEFAULT, gpu.limit, gpu.limit)

    def _fails(self, call: str, gpu: str) -> Failure | None:
        if self.gone:
            return Failure(FailureKind.DRIVER_GONE, call, gpu)
        if gpu not in self.gpus:
            return Failure(FailureKind.REFUSED, call, gpu)
        if gpu in self._hanging:
            return Failure(FailureKind.TIMEOUT, call, gpu)
        kind = self.gpus[gpu].failure
        return Failure(kind, call, gpu) if kind else None

    async def set_limit(self, gpu: str, milliwatts: int, scope: object = None) -> Limits | Failure:
        await asyncio.sleep(0.015)
        if failure := self._fails("set_limit", gpu):
            return failure
        held = self.gpus[gpu]
        self.sets.append((asyncio.get_running_loop().time(), gpu, milliwatts))
        if held.hang is not None:
            self._hanging.add(gpu)
            held.hang.clear()
            self._late = asyncio.ensure_future(self._come_back(held, milliwatts))
            await asyncio.sleep(2.0)
            return Failure(FailureKind.TIMEOUT, "set_limit", gpu)
        if not held.stubborn:
            held.limit = milliwatts
        return self._limits(held)

    async def _come_back(self, held: HollowGpu, milliwatts: int) -> None:
        assert held.hang is not None
        await held.hang.wait()
        held.limit = milliwatts  # a call that comes back late has its effect late
        held.hang = None
        self._hanging.discard(held.uuid)

    async def limits(self, gpu: str, scope: object = None) -> Limits | Failure:
        await asyncio.sleep(0)
        return self._fails("limits", gpu) or self._limits(self.gpus[gpu])

    async def read(self, gpu: str) -> Reading | Failure:
        """A sensor is slow: the reading is of when it began. A call that sets a limit and hangs does not hold it up."""
        self.reads += 1
        failure = self._fails("read", gpu)
        if failure is None or failure.kind is FailureKind.TIMEOUT:
            held = self.gpus[gpu]
            now = asyncio.get_running_loop().time()
            reading = Reading(
                monotonic_seconds=now,
                power_milliwatts=held.draw(held),
                energy_millijoules=int(now * 400_000),
                enforced_milliwatts=held.limit,
                sm_mhz=min(held.sm_mhz, held.clocks.max_mhz) if held.clocks else held.sm_mhz,
            )
            await asyncio.sleep(self.read_seconds)
            return reading
        await asyncio.sleep(self.read_seconds)
        return failure

    async def wear(self, gpu: str) -> Wear | Failure:
        await asyncio.sleep(0)
        return self._fails("wear", gpu) or self.wears.get(gpu, Wear())

    async def lock_clocks(self, gpu: str, clocks: ClockRange | None) -> Failure | None:
        await asyncio.sleep(0.015)
        self.tunings.append((gpu, clocks))
        if failure := self._fails("lock_clocks", gpu) or self.gpus[gpu].untunable:
            return failure
        self.gpus[gpu].clocks = clocks
        return None

    async def set_profiles(self, gpu: str, profiles: frozenset[int]) -> ProfileState | Failure:
        await asyncio.sleep(0.015)
        self.tunings.append((gpu, profiles))
        if failure := self._fails("set_profiles", gpu) or self.gpus[gpu].untunable:
            return failure
        if not self.gpus[gpu].clings or profiles:
            self.gpus[gpu].profiles = profiles
        return ProfileState(self.gpus[gpu].profiles, self.gpus[gpu].profiles)

    async def events(self) -> AsyncIterator[Event]:
        while True:
            yield await self.queue.get()

    def reboot(self, boot: str) -> None:
        """The machine boots: limits are at their default."""
        self.boot, self.generation = boot, 0
        self.reload()

    def reload(self) -> None:
        """The driver is loaded anew under a running agent."""
        self.gone = False
        for gpu in self.gpus.values():
            gpu.limit, gpu.clocks, gpu.profiles = DEFAULT, None, frozenset()


class HollowKubelet:
    def __init__(self) -> None:
        self.pods: tuple[PodDevices, ...] = ()
        self.silent = False
        self.asked = 0

    async def list(self, gpus: tuple[Gpu, ...]) -> tuple[PodDevices, ...]:
        await asyncio.sleep(0)
        self.asked += 1
        if self.silent:
            raise PodResourcesError("connection refused")
        return self.pods


class HollowMeter:
    """A node's meter that measures what its GPUs and the rest of it draw."""

    def __init__(self, nvml: HollowNvml, rest: int) -> None:
        self.nvml = nvml
        self.rest = rest
        self.says: int | None = None
        self.problem = ""
        self.asked = 0
        self.closed = False

    async def read(self) -> int:
        self.asked += 1
        await asyncio.sleep(0.5)
        if self.problem:
            raise MeterError(self.problem)
        draws = sum(gpu.draw(gpu) for gpu in self.nvml.gpus.values())
        return draws + self.rest if self.says is None else self.says

    async def close(self) -> None:
        self.closed = True


class HollowApi:
    """The API server as one agent sees it; `cut` takes it away."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.object: GPUNode | None = None
        self.book = SheetBook()
        self.stored: dict[str, CapSheet] = {}
        self.cut = False
        self.writes: list[tuple[float, GPUNodeStatus]] = []
        self.synced = True
        self._listeners: list[Callable[[], None]] = []
        self._missed: dict[str, CapSheet | None] = {}
        self._seen_node: GPUNode | None = None
        self._sequence = 0

    # what the agent uses

    def node(self) -> GPUNode | None:
        return self._seen_node

    def subscribe(self, changed: Callable[[], None]) -> None:
        self._listeners.append(changed)

    def follow(self, trees: frozenset[str]) -> None:
        pass

    def ready(self, trees: frozenset[str]) -> bool:
        return self.synced

    @property
    def sheets(self) -> Mapping[str, Any]:
        return self.book.sheets

    @property
    def renewals(self) -> Mapping[str, int]:
        return self.book.renewals

    async def write(self, held: GPUNode, status: GPUNodeStatus) -> bool:
        await asyncio.sleep(0.002)
        if self.cut:
            return False
        assert self.object is not None
        self.object = msgspec.structs.replace(self.object, status=status)
        self.writes.append((asyncio.get_running_loop().time(), status))
        self._tell_node()
        return True

    # what a test does

    def _tell_node(self) -> None:
        if not self.cut:
            self._seen_node = self.object
            for listener in self._listeners:
                listener()

    def grant(self, path: tuple[str, ...] = ("site", "rack"), **spec: Any) -> None:
        generation = self.object.metadata.generation + 1 if self.object else 1
        status = self.object.status if self.object else GPUNodeStatus()
        self.object = GPUNode(
            metadata=ObjectMeta(name=self.name, uid="u", generation=generation),
            spec=GPUNodeSpec(path=path, **spec),
            status=status,
        )
        self._tell_node()

    def publish(
        self,
        domain: str,
        epoch: int,
        caps: Mapping[str, tuple[int, int]],
        hold: int = 60_000,
        tree: str = "site",
    ) -> None:
        spec = CapSheetSpec(
            domain=domain,
            tree=tree,
            term=1,
            epoch=epoch,
            hold_milliseconds=hold,
            caps=tuple(
                ClassCap(class_name=name, cap=cap, fallback=fallback)
                for name, (cap, fallback) in caps.items()
            ),
        )
        self._store(CapSheet(metadata=ObjectMeta(name=domain), spec=spec))

    def renew(self, tree: str = "site") -> None:
        self._sequence += 1
        spec = CapSheetSpec(domain=tree, tree=tree, term=1, epoch=1, renewal=Renewal(sequence=self._sequence))
        self._store(CapSheet(metadata=ObjectMeta(name=renewal_name(tree)), spec=spec))

    def _store(self, sheet: CapSheet) -> None:
        name = sheet.metadata.name
        old = self.stored.get(name)
        self.stored[name] = sheet
        if self.cut:
            self._missed.setdefault(name, old)
            return
        self.book.take(old, sheet)
        for listener in self._listeners:
            listener()

    def partition(self) -> None:
        self.cut = True

    def heal(self) -> None:
        self.cut = False
        for name, old in self._missed.items():
            self.book.take(old, self.stored[name])
        self._missed.clear()
        self._tell_node()

    @property
    def status(self) -> GPUNodeStatus:
        assert self.object is not None
        return self.object.status


@dataclass
class Node:
    """All of it, with an agent that can be killed and started."""

    gpus: int = 8
    pace: Pace = field(default_factory=Pace)
    name: str = "node-1"
    rest: int | None = None
    """What the node draws besides its GPUs, where a meter measures it."""

    def __post_init__(self) -> None:
        self.nvml = HollowNvml(self.gpus)
        self.kubelet = HollowKubelet()
        self.api = HollowApi(self.name)
        self.meter = HollowMeter(self.nvml, self.rest) if self.rest is not None else None
        self.tokens: dict[str, float] = {}
        self.agent: Agent
        self._task: asyncio.Task[None] | None = None

    def start(self) -> Agent:
        self.nvml.generation = 0
        self.api._listeners.clear()
        if not self.api.cut:
            book = SheetBook()
            for sheet in self.api.stored.values():
                book.take(None, sheet)
            self.api.book = book
        else:
            self.api.book, self.api._seen_node = SheetBook(), None
        self.agent = Agent(
            self.name,
            nvml=self.nvml,
            pods=self.kubelet,
            nodes=self.api,
            sheets=self.api,
            writer=self.api,
            clock=VirtualClock(),
            pace=self.pace,
            scrape=self._scrape,
            node_meter=self.meter,
        )
        self._task = asyncio.create_task(self.agent.run())
        return self.agent

    async def _scrape(self, url: str) -> Any:
        from tests.unit.agent.test_metering import reading

        self.tokens[url] = self.tokens.get(url, 0.0) + 1_000
        return reading(self.tokens[url])

    async def kill(self) -> None:
        """As kill -9: nothing is tidied up."""
        if self._task is not None:
            self.agent.reporter.last_words = _nothing  # type: ignore[method-assign]
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def use(
        self,
        pod: str,
        *gpus: int,
        released: bool = False,
        granted: int | None = None,
        url: str = "",
        **more: Any,
    ) -> PodGrant:
        """The kubelet has given these GPUs to the pod; the grant for it."""
        devices = PodDevices("inference", pod, tuple(f"GPU-{n}" for n in gpus))
        self.kubelet.pods = (*(it for it in self.kubelet.pods if it.name != pod), devices)
        return PodGrant(
            namespace="inference",
            name=pod,
            uid=f"uid-{pod}",
            class_name=CHAT,
            gpus=granted or len(gpus),
            released=released,
            metrics=url,
            **more,
        )

    def limits(self) -> list[int]:
        return [gpu.limit for gpu in self.nvml.gpus.values()]

    async def until(self, condition: Callable[[], bool], within: float = 30.0) -> float:
        """Wait for it in virtual time; returns how long that took."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while not condition():
            if loop.time() - begin > within:
                raise AssertionError(
                    f"not within {within} s: limits {self.limits()}, status {self.api.status}"
                )
            await asyncio.sleep(0.001 if loop.time() - begin < 0.5 else 0.05)
        return loop.time() - begin

    async def settle(self, hold: int = 60_000) -> None:
        """The usual beginning: a path, two sheets, two renewals, and the agent obeying."""
        if self.api.object is None:
            self.api.grant()
        self.api.publish("site", 1, {CHAT: (600_000, 300_000), IDLE: (250_000, 250_000)}, hold)
        self.api.publish("rack", 1, {CHAT: (650_000, 350_000), IDLE: (250_000, 250_000)}, hold)
        self.api.renew()
        self.start()
        await self.until(lambda: self.agent.state.decision is not None)
        self.api.renew()
        await self.until(lambda: self.api.status.mode == "Obeying" and self.api.status.capped)


async def _nothing() -> None:
    pass


def with_status(node: GPUNode, **fields: Any) -> GPUNode:
    return msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, **fields))


__all__ = ["CHAT", "DEFAULT", "IDLE", "LOWEST", "HollowNvml", "Node", "replace", "with_status"]
