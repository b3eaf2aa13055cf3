"""The agent: one loop that obeys, and beside it, apart, everything that is slow.

Obeying is one short path without a wait in it: something changed → govern → set what must be set, each GPU on its
own → read back → report. A call that hangs holds up only its own GPU: the step never waits for NVML, it is run again
when calls come back. Whatever else the agent does (asking the kubelet, metering, health) only leaves its findings in
the state and wakes that loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from tokenfactory.agent.exposition import Reading as MetricsReading
from tokenfactory.agent.faults import Faults
from tokenfactory.agent.guarding import GpuGuard, NodeGuard
from tokenfactory.agent.nim import Meter
from tokenfactory.agent.nodepower import PowerMeter
from tokenfactory.agent.nvml import Failure, FailureKind, Gpu, Nvml, Reading, RecoveryChanged
from tokenfactory.agent.obey import ShortPath
from tokenfactory.agent.pace import Pace
from tokenfactory.agent.parts import (
    Clock,
    NodeSource,
    PodDevices,
    PodResources,
    PodResourcesError,
    SheetSource,
    StatusWriter,
    SystemClock,
)
from tokenfactory.agent.report import Reporter, measured, status_of
from tokenfactory.agent.state import AgentState
from tokenfactory.agent.tune import Tuner
from tokenfactory.agent.watchdog import Progress
from tokenfactory.api.gpu_node import GPUNodeStatus

log = logging.getLogger(__name__)

PODS_SPACING_SECONDS = 0.05
"""However many ask the gate at once, the kubelet is not asked more often than this."""
Part = Callable[[], Coroutine[Any, Any, None]]


class Agent:
    """The agent of one node. `run()` until cancelled; caps stay as they are when it ends."""

    def __init__(
        self,
        name: str,
        *,
        nvml: Nvml,
        pods: PodResources,
        nodes: NodeSource,
        sheets: SheetSource,
        writer: StatusWriter,
        scrape: Callable[[str], Awaitable[MetricsReading]] | None = None,
        node_meter: PowerMeter | None = None,
        clock: Clock | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.clock = clock or SystemClock()
        self.pace = pace or Pace()
        self.state = AgentState(name=name, faults=Faults(lambda: nvml.identity))
        self._path = ShortPath(
            self.state, nvml=nvml, nodes=nodes, sheets=sheets, clock=self.clock, called_back=self._called_back
        )
        self.enforcer = self._path.enforcer
        self.progress = Progress(self.clock)
        self.meter = (
            Meter(scrape, self.read_energy, monotonic=self.clock.monotonic, wall=self.clock.wall)
            if scrape is not None
            else None
        )
        self._nvml = nvml
        self._pods = pods
        self._nodes = nodes
        self.reporter = Reporter(writer, self.clock)
        self._gpu_guard = GpuGuard(self.state, self.enforcer, self.clock, self.wake)
        self._node_meter = node_meter
        self.state.metered = node_meter is not None
        self._wake = asyncio.Event()
        self._reopen = asyncio.Event()
        self._pods_asked = asyncio.Event()
        self._pods_answered = asyncio.Event()
        self._stepped = asyncio.Event()
        nodes.subscribe(self.wake)
        sheets.subscribe(self.wake)

    @property
    def stuck(self) -> frozenset[str]:
        return self._nvml.stuck

    def wake(self) -> None:
        """Something changed: obey anew."""
        self._wake.set()

    async def run(self) -> None:
        parts: dict[str, tuple[Part, float]] = {
            "obey": (self._obey, self.pace.tick),
            "driver": (self._keep_open, 0.0),
            "observe": (self._every(self.pace.observe, self._observe, "observe"), self.pace.observe),
            "pods": (self._follow_pods, self.pace.pods),
            "report": (self._report, self.pace.report),
            "wear": (self._every(self.pace.wear, self._look_at_wear, "wear"), self.pace.wear),
            "events": (self._follow_events, 0.0),
        }
        tuner = Tuner(self.state, self._nvml, self.clock, self.wake)
        parts["tune"] = (self._every(self.pace.tune, tuner.round, "tune"), self.pace.tune)
        if self.meter is not None:
            parts["meter"] = (self._every(self.pace.meter, self._meter, "meter"), self.pace.meter)
        if self._node_meter is not None:
            node = NodeGuard(
                self._node_meter,
                self.state,
                self.enforcer,
                self._nvml,
                self._gpu_guard,
                self.clock,
                self.wake,
            )
            parts["node_power"] = (
                self._every(self.pace.node_power, node.round, "node_power"),
                self.pace.node_power,
            )
        try:
            async with asyncio.TaskGroup() as tasks:
                for part, (loop, every) in parts.items():
                    if every:
                        self.progress.expect(part, every * 3 + 10)
                    tasks.create_task(loop(), name=f"{self.state.name} {part}")
        finally:
            self._path.abandon()
            await self.reporter.last_words()
            await self._nvml.close()
            if self._node_meter is not None:
                await self._node_meter.close()

    # --- obeying

    async def _obey(self) -> None:
        while True:
            self._wake.clear()
            self._path.step()
            self.reporter.show(self._nodes.node(), self.status())
            self._stepped.set()
            self._stepped = asyncio.Event()
            self.progress.beat("obey")
            try:
                async with asyncio.timeout(self._patience()):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _patience(self) -> float:
        """Seconds until the next step, if nothing happens: at the deadline of the hold at the latest."""
        waits = [self.pace.tick]
        decision = self.state.decision
        if decision is not None and decision.next_deadline_ms is not None:
            waits.append(max(0.001, decision.next_deadline_ms / 1000 - self.clock.monotonic()))
        if self._path.is_busy:
            waits.append(self.pace.busy)
        return min(waits)

    def _called_back(self, failure: Failure | None) -> None:
        self._ask_for_driver(failure)
        if not self._path.is_setting():
            self.wake()  # everything is back: now it can be read back as a whole

    # --- beside it: the driver

    async def _keep_open(self) -> None:
        """Opens NVML, again when the driver was reloaded, and looks through the node now and then."""
        while True:
            self._reopen.clear()
            if not await self._open():
                await asyncio.sleep(self.pace.reopen)
                continue
            gpus = await self._nvml.inventory()
            self.enforcer.adopt(gpus)
            while not self._reopen.is_set():
                self._take_inventory(gpus)
                wait = self.pace.tick if self.state.unknown else self.pace.inventory
                try:
                    async with asyncio.timeout(wait):
                        await self._reopen.wait()
                except TimeoutError:
                    gpus = await self._nvml.inventory()

    async def _open(self) -> bool:
        state = self.state
        answer = await self._nvml.open()
        if isinstance(answer, Failure):
            if state.open_failure is None or state.open_failure.kind != answer.kind:
                log.error("NVML cannot be opened", extra={"node": state.name, "error": str(answer)})
            state.open_failure = answer
            if answer.kind is FailureKind.TIMEOUT:
                raise NeedsRestartError(str(answer))
            self.wake()
            return False
        log.info("NVML open", extra={"node": state.name, "driver": answer.version})
        state.open_failure = None
        state.driver = answer
        return True

    def _take_inventory(self, gpus: tuple[Gpu, ...]) -> None:
        present = {gpu.uuid for gpu in gpus}
        # A GPU that is no longer shown may still draw what it last could: it stays, and is never acknowledged.
        self.state.gpus = (*gpus, *(gpu for gpu in self.state.gpus if gpu.uuid not in present))
        missing = self._nvml.missing
        if missing != self.state.missing:
            log.warning("GPUs are missing", extra={"node": self.state.name, "gpus": [*map(str, missing)]})
        self.state.missing = missing
        self.state.faults.take_inventory(gpus)
        self._pods_asked.set()
        self.wake()

    def _ask_for_driver(self, failure: Failure | None) -> None:
        if failure is not None and failure.kind is FailureKind.DRIVER_GONE:
            self._reopen.set()

    # --- beside it: looking

    async def _observe(self) -> None:
        """What every GPU draws and enforces now: a limit that was reset and a cap that does not bind are found here."""
        await asyncio.gather(*(self._observe_one(gpu.uuid) for gpu in self.state.gpus))
        self.state.draws.note(
            self.clock.monotonic(), measured(self.state, self.enforcer, self._nvml.identity)
        )
        self._gpu_guard.look()

    async def _observe_one(self, gpu: str) -> None:
        held = self.enforcer.held.get(gpu)
        if held is None or held.limits is None:
            limits = await self._nvml.limits(gpu)
            if not isinstance(limits, Failure):
                self.enforcer.learn(gpu, limits)
                self.wake()
            held = self.enforcer.held.get(gpu)
        reading = await self._nvml.read(gpu)
        overtaken = self._path.is_setting(gpu) or self.enforcer.held.get(gpu) is not held
        news = self.state.faults.take_reading(gpu, reading)
        if isinstance(reading, Failure):
            self._ask_for_driver(reading)
            self.state.readings.pop(gpu, None)
            news |= self.enforcer.lose(gpu)
        else:
            self.state.readings[gpu] = reading
            if not overtaken:  # a limit set meanwhile was read back after this reading began
                news |= self.enforcer.notice(gpu, reading)
        if news:
            self.wake()

    async def _look_at_wear(self) -> None:
        for gpu in self.state.gpus:
            if self.state.faults.take_wear(gpu.uuid, await self._nvml.wear(gpu.uuid)):
                self.wake()

    async def _follow_events(self) -> None:
        async for event in self._nvml.events():
            if isinstance(event, RecoveryChanged):
                await self._look_at_wear()
            elif isinstance(event, Failure):
                self._ask_for_driver(event)
            else:
                log.warning("XID", extra={"node": self.state.name, "gpu": event.gpu, "xid": event.code})
                if self.state.faults.take_event(event, self.clock.monotonic()):
                    self.wake()

    # --- beside it: the kubelet and the models

    async def _follow_pods(self) -> None:
        while True:
            self._pods_asked.clear()
            if self.state.gpus:  # their names are needed to tell whose device is which GPU
                await self._ask_for_pods()
            self._pods_answered.set()
            self._pods_answered = asyncio.Event()
            self.progress.beat("pods")
            await asyncio.sleep(PODS_SPACING_SECONDS)
            try:
                async with asyncio.timeout(self.pace.pods):
                    await self._pods_asked.wait()
            except TimeoutError:
                pass

    async def _ask_for_pods(self) -> None:
        try:
            pods = await self._pods.list(self.state.gpus)
        except PodResourcesError as error:
            self._take_pods(self.state.pods, str(error))
        else:
            self._take_pods(pods, "")

    def _take_pods(self, pods: tuple[PodDevices, ...] | None, problem: str) -> None:
        state = self.state
        if problem and not state.pods_problem:
            log.warning(
                "the kubelet does not say who holds which GPU", extra={"node": state.name, "error": problem}
            )
        if (pods, problem) != (state.pods, state.pods_problem):
            state.pods, state.pods_problem = pods, problem
            self.wake()

    async def fresh_pods(self, within_seconds: float) -> None:
        """Ask the kubelet now and return once it has answered and the answer is obeyed, or time is up."""
        answered = self._pods_answered
        self._pods_asked.set()
        try:
            async with asyncio.timeout(within_seconds):
                await answered.wait()
                await self.settled()
        except TimeoutError:
            pass

    async def fresh_limits(self, gpus: Iterable[str], within_seconds: float) -> bool:
        """Read these GPUs' limits now; what was reset is set again before this returns. False: time was up."""
        try:
            async with asyncio.timeout(within_seconds):
                await asyncio.gather(*(self._observe_one(gpu) for gpu in gpus))
                await self.settled()
        except TimeoutError:
            return False
        return True

    async def settled(self) -> None:
        """Return once everything heard so far is obeyed and read back."""
        while self._wake.is_set() or self.state.readback is None:
            await self._stepped.wait()

    async def _meter(self) -> None:
        assert self.meter is not None
        held = self.state.holdings
        await self.meter.round(held.targets, held.shares)

    async def read_energy(self) -> dict[str, int | None]:
        gpus = [gpu.uuid for gpu in self.state.gpus]
        readings = await asyncio.gather(*(self._nvml.read(gpu) for gpu in gpus))
        return {
            gpu: reading.energy_millijoules if isinstance(reading, Reading) else None
            for gpu, reading in zip(gpus, readings, strict=True)
        }

    # --- beside it: saying so

    def status(self) -> GPUNodeStatus | None:
        return status_of(self.state, self.enforcer, self.meter, self._nvml.identity, self.clock)

    async def _report(self) -> None:
        while True:
            await self.reporter.round(self._nodes.node, self.status, self.pace.report)
            self.progress.beat("report")

    def _every(self, seconds: float, work: Part, name: str) -> Part:
        """A part that does its work, then waits; one failure of it is written down and does not end the agent."""

        async def loop() -> None:
            while True:
                try:
                    await work()
                except Exception:
                    log.exception("a part of the agent failed", extra={"node": self.state.name, "part": name})
                self.progress.beat(name)
                await asyncio.sleep(seconds)

        return loop


class NeedsRestartError(RuntimeError):
    """Calls hang in a driver that is gone; only a new process gets rid of them. Caps stay in place."""
