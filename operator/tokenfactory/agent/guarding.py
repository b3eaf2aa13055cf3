"""The guard at work: what is measured, of each GPU and of the node, against what was allowed; told when it cuts.

`guard` decides and `overhead` learns, both pure. Here they are given what the agent has read, and what they decide goes
into the state, from where the short path takes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tokenfactory.agent.enforce import Enforcer
from tokenfactory.agent.guard import (
    NODE_PATIENCE_SECONDS,
    NODE_SETTLE_SECONDS,
    Guard,
    Measured,
    NodeMeasured,
    Share,
    Watched,
    guarded,
    is_above,
    take_back,
    watch,
    watch_node,
)
from tokenfactory.agent.nodepower import MeterError, PowerMeter
from tokenfactory.agent.nvml import Nvml, Reading
from tokenfactory.agent.overhead import Learned, Sample, learn, resume
from tokenfactory.agent.parts import Clock
from tokenfactory.agent.state import ABOVE, AgentState, NodePower
from tokenfactory.planning.power.governor import CapOrder

log = logging.getLogger(__name__)


def remember(state: AgentState, boot_id: str, now: float) -> None:
    """What an agent before us withheld in this boot stays so: that it has ended makes no node draw less."""
    status = state.node.status if state.node is not None else None
    if status is None or status.boot_id != boot_id:
        return
    for gpu in status.gpus:
        if gpu.withheld_milliwatts:
            state.guard = {**state.guard, gpu.uuid: Watched(gpu.withheld_milliwatts, 0, now)}
            state.inherited[gpu.uuid] = gpu.withheld_milliwatts
            text = f"{gpu.withheld_milliwatts} mW are withheld from the cap since before the agent began"
            state.faults.take_guard(gpu.uuid, text)
    if state.metered:
        said = (it.message for it in status.conditions if (it.type, it.reason) == ("NodePower", ABOVE))
        state.node_power.above = next(said, "")


def cap_before(state: AgentState, order: CapOrder) -> int | None:
    """The cap before anything is withheld from it."""
    if order.cap_milliwatts is None or order.reason.why != "Kept":
        return order.cap_milliwatts
    return order.cap_milliwatts + state.inherited.get(order.uuid, 0)


class GpuGuard:
    """Looks at each GPU after every round of readings."""

    def __init__(self, state: AgentState, enforcer: Enforcer, clock: Clock, wake: Callable[[], None]) -> None:
        self._state = state
        self._enforcer = enforcer
        self._clock = clock
        self._wake = wake

    def look(self) -> None:
        state = self._state
        measured = {}
        for gpu, reading in state.readings.items():
            enforced, held = self._enforcer.enforced(gpu), self._enforcer.held.get(gpu)
            if reading.power_milliwatts is not None and enforced is not None and held is not None:
                least = held.limits.min_milliwatts if held.limits else 0
                measured[gpu] = Measured(reading.power_milliwatts, enforced, least, held.since)
        power = state.node_power
        blind = bool(power.above) and power.draw_milliwatts is None  # nobody could see what giving back does
        kept = any(gpu in state.inherited for gpu in measured)  # no limit would rise by it yet
        release = not blind and not kept
        guard = watch(state.guard, measured, self._clock.monotonic(), release=release)
        self.take(guard, "draws more than its cap allows")

    def take(self, guard: Guard, why: str) -> None:
        """What is withheld from now on; every change of it is told."""
        state, before = self._state, self._state.guard
        state.guard = guard
        for gpu, watched in guard.items():
            withheld = watched.withheld_milliwatts
            if withheld == (before[gpu].withheld_milliwatts if gpu in before else 0):
                continue
            text = None
            if withheld:
                text = f"{why}; {withheld} mW are withheld from the cap"
                log.warning(
                    "guard withholds power", extra={"node": state.name, "gpu": gpu, "milliwatts": withheld}
                )
            state.faults.take_guard(gpu, text)
            self._wake()


@dataclass
class NodeGuard:
    """Reads the node's meter, learns its overhead, and takes back what is too much."""

    meter: PowerMeter
    state: AgentState
    enforcer: Enforcer
    nvml: Nvml
    gpus: GpuGuard
    clock: Clock
    wake: Callable[[], None]
    _learned: Learned | None = None
    _strikes: int = 0
    _settled_at: float = 0.0
    """When limits had last been still for long enough to judge by, or were last taken back."""
    _said: NodePower = field(default_factory=NodePower)

    def __post_init__(self) -> None:
        self._settled_at = self.clock.monotonic()

    async def round(self) -> None:
        """One reading, between two of the GPUs."""
        if self.state.node is None:
            return  # what was learned before is in its status
        before = await self._gpu_draw()
        try:
            draw = await self.meter.read()
        except MeterError as error:
            self._fail(str(error))
            return
        after = await self._gpu_draw()
        if before is not None and after is not None:
            sample = Sample(draw, (before + after) // 2, self._most())
            if not sample.plausible:
                self._fail("its meter says less than its GPUs draw: that cannot be true")
                return
            if not self.state.missing:  # what a GPU draws that nobody can read is no overhead
                self._learn(sample)
        self._strike(draw)
        if self.state.node_power != self._said:
            self._said = replace(self.state.node_power)
            self.wake()

    def _fail(self, problem: str) -> None:
        power = self.state.node_power
        if not power.problem:
            log.warning("no reading of the node's power", extra={"node": self.state.name, "error": problem})
        power.failures += 1
        if (power.problem, power.draw_milliwatts) != (problem, None):
            power.problem, power.draw_milliwatts = problem, None
            self.wake()

    async def _gpu_draw(self) -> int | None:
        """Of all GPUs now; None when one does not tell."""
        gpus = [gpu.uuid for gpu in self.state.gpus]
        readings = await asyncio.gather(*(self.nvml.read(gpu) for gpu in gpus))
        total = 0
        for reading in readings:
            if not isinstance(reading, Reading) or reading.power_milliwatts is None:
                return None
            total += reading.power_milliwatts  # of a Grace module the GPU alone: its CPU is overhead
        return total if gpus else None

    def _most(self) -> int:
        limits = [self.enforcer.limits(gpu) for gpu in self.state.gpus]
        return sum(it.max_milliwatts for it in limits if it is not None)

    def _learn(self, sample: Sample) -> None:
        node = self.state.node
        assert node is not None
        if self._learned is None:
            said = node.status
            self._learned = resume(said.overhead_milliwatts, proven=said.overhead_proven)
        self._learned = learn(self._learned, sample, node.spec.overhead_milliwatts)
        self.state.node_power.overhead_milliwatts = self._learned.reported_milliwatts
        self.state.node_power.overhead_proven = self._learned.proven

    def _strike(self, draw: int) -> None:
        power = self.state.node_power
        power.draw_milliwatts, power.problem = draw, ""
        allowed = self._allowed()
        if allowed is None:
            return
        now = self.clock.monotonic()
        seen = NodeMeasured(draw, allowed, self._since(now))
        self._strikes, excess = watch_node(self._strikes, seen, now)
        if excess:
            power.cuts += 1
            self._settled_at = now
            power.above = (
                f"{draw} mW were measured, {allowed} mW are allowed by its caps and charged overhead"
            )
            log.warning("the node draws too much", extra={"node": self.state.name, "why": power.above})
            guard = take_back(self.state.guard, self._shares(), excess, now)
            self.gpus.take(guard, "the node draws more than its caps and charged overhead allow")
        elif power.above and not is_above(seen) and not self._withheld():
            power.above = ""

    def _since(self, now: float) -> float:
        """Since when the draw can be judged by: the last change of a limit, but not put off for ever."""
        changed = max((held.since for held in self.enforcer.held.values()), default=0.0)
        if now - changed >= NODE_SETTLE_SECONDS:
            self._settled_at = now
        return changed if now - self._settled_at < NODE_PATIENCE_SECONDS else self._settled_at

    def _allowed(self) -> int | None:
        """What the node is charged for as its agent knows it; None while it does not know."""
        node, decision = self.state.node, self.state.decision
        if node is None or decision is None or not node.spec.overhead_milliwatts:
            return None
        total = node.spec.overhead_milliwatts
        for gpu, order in decision.caps.items():
            cap = cap_before(self.state, order)
            if cap is None:
                cap = self.enforcer.enforced(gpu)
            if cap is None:
                return None
            total += cap
        return total

    def _shares(self) -> dict[str, Share]:
        decision = self.state.decision
        found = {}
        for gpu, order in decision.caps.items() if decision else ():
            held, reading = self.enforcer.held.get(gpu), self.state.readings.get(gpu)
            cap = cap_before(self.state, order)
            if cap is None or held is None or held.limits is None:
                continue
            drawn = reading.power_milliwatts if reading is not None else None
            binding = guarded(self.state.guard, gpu, cap) if drawn is None else drawn
            found[gpu] = Share(cap, binding, held.limits.min_milliwatts)
        return found

    def _withheld(self) -> bool:
        return any(watched.withheld_milliwatts for watched in self.state.guard.values())
