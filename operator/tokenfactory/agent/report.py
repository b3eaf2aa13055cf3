"""What the agent says of its node, and when: at once when something changed, else every half a minute.

Figures that move all the time (draw, energy, tokens) are carried along, but are no reason to write: a settled node
costs the API server two small writes a minute.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

from msgspec.structs import replace

from tokenfactory.agent.enforce import Enforcer
from tokenfactory.agent.nim import Meter
from tokenfactory.agent.nvml import Gpu, Identity
from tokenfactory.agent.parts import Clock, StatusWriter
from tokenfactory.agent.state import ABOVE, UNREADABLE, WITHIN, AgentState
from tokenfactory.agent.xid import Action
from tokenfactory.api.actuators import Actuators
from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode, GPUNodeStatus, GPUStatus
from tokenfactory.api.meta import Condition, ConditionStatus

log = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
LAST_WORDS_SECONDS = 2.0

try:
    VERSION = version("tokenfactory")
except PackageNotFoundError:  # run from a source tree
    VERSION = "0.0.0+source"


class Reporter:
    """Writes the newest status, one write at a time; what was overtaken meanwhile is never written."""

    def __init__(self, writer: StatusWriter, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock
        self._news = asyncio.Event()
        self._uid: str | None = None
        self._said: GPUNodeStatus | None = None
        self._status: Callable[[], GPUNodeStatus | None] | None = None
        self._node: Callable[[], GPUNode | None] | None = None
        self.writes = 0
        self.failures = 0

    def show(self, node: GPUNode | None, status: GPUNodeStatus | None) -> None:
        """Look whether there is anything new to say."""
        uid = node.metadata.uid if node is not None else None
        if uid != self._uid:
            self._uid, self._said = uid, None  # made anew: nothing was said of this one yet
        if status is not None and (self._said is None or still(status) != still(self._said)):
            self._news.set()

    async def round(
        self,
        node: Callable[[], GPUNode | None],
        status: Callable[[], GPUNodeStatus | None],
        every_seconds: float,
    ) -> None:
        """Wait for news, or for so long, and say it."""
        self._node, self._status = node, status
        try:
            async with asyncio.timeout(every_seconds):
                await self._news.wait()
        except TimeoutError:
            pass
        self._news.clear()
        if not await self._say():
            await asyncio.sleep(RETRY_SECONDS)
            self._news.set()

    async def last_words(self) -> None:
        """The agent ends: what it found out last is still said, if that is quick."""
        if self._news.is_set():
            try:
                async with asyncio.timeout(LAST_WORDS_SECONDS):
                    await self._say()
            except TimeoutError:
                log.info("the last report could not be made in time")

    async def _say(self) -> bool:
        held = self._node() if self._node else None
        status = self._status() if self._status else None
        if held is None or status is None:
            return (
                True  # nothing to report, or no GPUNode to report to: the operator makes it, and that is news
            )
        before = self._said if self._said is not None else held.status
        status = replace(status, conditions=kept_times(before.conditions, status.conditions))
        if not await self._writer.write(held, status):
            self.failures += 1
            return False
        self._said = status
        self.writes += 1
        return True


def still(status: GPUNodeStatus) -> GPUNodeStatus:
    """The part of a status whose change is news."""
    conditions = tuple(
        replace(it, last_transition_time="", observed_generation=0) for it in status.conditions
    )
    return replace(
        status, conditions=conditions, draw_milliwatts=0, peak_milliwatts=0, meters=(), reported_at=""
    )


def kept_times(before: Iterable[Condition], now: Iterable[Condition]) -> tuple[Condition, ...]:
    """A condition that says the same keeps the time at which it began to."""
    old = {it.type: it for it in before}
    return tuple(
        replace(it, last_transition_time=old[it.type].last_transition_time)
        if it.type in old and old[it.type].status == it.status and old[it.type].last_transition_time
        else it
        for it in now
    )


def status_of(
    state: AgentState, enforcer: Enforcer, meter: Meter | None, identity: Identity, clock: Clock
) -> GPUNodeStatus | None:
    """Everything that is true now; None while there is nothing to be said yet."""
    if state.node is None or (state.decision is None and state.open_failure is None):
        return None
    wall = clock.wall()
    conditions = _conditions(state, enforcer, meter, wall)
    if state.decision is None:
        # Nothing was read: what an earlier agent left behind still tells what this node may be drawing.
        before = state.node.status
        return replace(
            before,
            mode="Degraded",
            capped=False,
            draw_milliwatts=0,
            peak_milliwatts=0,
            conditions=conditions,
            reported_at=wall,
        )
    gpus = tuple(_gpu(state, enforcer, gpu) for gpu in state.gpus)
    gone = _gone(state, identity)
    overhead, proven = _overhead(state)
    now = clock.monotonic()
    draw = sum(_draw(state, gpu) for gpu in (*gpus, *gone))
    return GPUNodeStatus(
        observed_generation=state.observed_generation,
        conditions=conditions,
        mode=state.decision.mode,
        boot_id=identity.boot_id,
        capped=state.memory.capped,
        driver=(state.driver.version if state.driver else "")[:64],
        agent=VERSION[:64],
        applied=tuple(AppliedEpoch(domain=name, epoch=epoch) for name, epoch in state.memory.acked.items()),
        gpus=(*gpus, *gone),
        gpu_count=sum(enforcer.enforced(gpu.uuid) is not None for gpu in state.gpus),
        enforced_milliwatts=sum(gpu.enforced_milliwatts for gpu in (*gpus, *gone)),
        draw_milliwatts=draw,
        peak_milliwatts=max(draw, state.draws.peak(now)),
        overhead_milliwatts=overhead,
        overhead_proven=proven,
        meters=tuple(account.report(now) for account in meter.accounts.values()) if meter else (),
        reported_at=wall,
    )


def _gone(state: AgentState, identity: Identity) -> tuple[GPUStatus, ...]:
    """GPUs of which an earlier agent of this boot told, and that NVML shows no more: they may draw as they last could."""
    before = state.node.status if state.node is not None else None
    if before is None or before.boot_id != identity.boot_id:
        return ()
    shown = {gpu.uuid for gpu in state.gpus}
    text = "NVML does not show it any more"
    return tuple(
        replace(gpu, healthy=False, faults=(*(it for it in gpu.faults if it != text), text)[-16:])
        for gpu in before.gpus
        if gpu.uuid not in shown
    )


def _draw(state: AgentState, gpu: GPUStatus) -> int:
    """What a GPU draws; one that does not tell may draw all that its limit lets it."""
    reading = state.readings.get(gpu.uuid)
    told = reading.power_milliwatts if reading is not None else None
    return gpu.enforced_milliwatts if told is None else told


def measured(state: AgentState, enforcer: Enforcer, identity: Identity) -> int:
    """What all GPUs draw together now, those included that NVML shows no more."""
    gpus = (*(_gpu(state, enforcer, gpu) for gpu in state.gpus), *_gone(state, identity))
    return sum(_draw(state, gpu) for gpu in gpus)


def _overhead(state: AgentState) -> tuple[int, bool]:
    """It never falls: what an earlier agent of this node has learned stands until its meter is taken out of use."""
    if not state.metered or state.node is None:
        return 0, False
    power, before = state.node_power, state.node.status
    if power.overhead_milliwatts:
        return power.overhead_milliwatts, power.overhead_proven
    return before.overhead_milliwatts, before.overhead_proven


def _gpu(state: AgentState, enforcer: Enforcer, gpu: Gpu) -> GPUStatus:
    held, limits = enforcer.held.get(gpu.uuid), enforcer.limits(gpu)
    order = state.decision.caps.get(gpu.uuid) if state.decision else None
    holder = state.holdings.of(gpu.uuid)
    return GPUStatus(
        index=gpu.index,
        uuid=gpu.uuid[:96],
        product=gpu.product[:96],
        pci_bus_id=gpu.pci_bus_id[:32],
        min_milliwatts=limits.min_milliwatts if limits else 0,
        max_milliwatts=limits.max_milliwatts if limits else 0,
        default_milliwatts=limits.default_milliwatts if limits else 0,
        # A limit that cannot be read may be anything up to the highest that this GPU can have.
        enforced_milliwatts=enforcer.enforced(gpu.uuid) or (limits.max_milliwatts if limits else 0),
        cap_milliwatts=(held.asked_milliwatts if held else None) or 0,
        withheld_milliwatts=state.guard[gpu.uuid].withheld_milliwatts if gpu.uuid in state.guard else 0,
        class_name=(order.reason.class_name if order else "")[:253],
        pod=holder.pod[:320],
        pod_uid="" if holder.uid.startswith("?") else holder.uid[:64],
        actuators=_tuned(state, gpu.uuid),
        fabric=(gpu.fabric.name if gpu.fabric else "")[:96],
        healthy=state.faults.verdict(gpu.uuid).healthy,
        faults=tuple(text[:256] for text in state.faults.texts(gpu.uuid)),
    )


def _tuned(state: AgentState, gpu: str) -> Actuators | None:
    """Until this agent has looked, what the one before it said: it is still set, and still to be undone."""
    if gpu in state.tuned or gpu in state.looked_at or state.node is None:
        return state.tuned.get(gpu)
    return next((it.actuators for it in state.node.status.gpus if it.uuid == gpu), None)


def _conditions(
    state: AgentState, enforcer: Enforcer, meter: Meter | None, wall: str
) -> tuple[Condition, ...]:
    generation = state.node.metadata.generation if state.node else 0

    def say(kind: str, status: bool | None, reason: str, message: str = "") -> Condition:
        word: ConditionStatus = "Unknown" if status is None else "True" if status else "False"
        return Condition(
            type=kind,
            status=word,
            reason=reason,
            message=message[:4096],
            last_transition_time=wall,
            observed_generation=generation,
        )

    return (
        _capped(state, enforcer, say),
        _healthy(state, say),
        say("PodsKnown", state.pods is not None and not state.pods_problem, *_pods(state)),
        *((_metered(meter, say),) if meter else ()),
        *((_node_power(state, say),) if state.metered else ()),
        *((_actuators(state, say),) if state.tuned or state.untuned else ()),
    )


Say = Callable[..., Condition]


def _capped(state: AgentState, enforcer: Enforcer, say: Say) -> Condition:
    if state.open_failure is not None:
        return say("Capped", None, "NoDriver", str(state.open_failure))
    broken = [str(held.failure) for held in enforcer.held.values() if held.failure is not None]
    if broken:
        return say("Capped", False, "LimitDoesNotHold", "; ".join(broken))
    if state.unknown:
        return say("Capped", False, "GPUsMissing", "; ".join(map(str, state.unknown)))
    if not state.memory.capped:
        return say("Capped", False, "NotYet", "not every limit was read back in this boot")
    left = (
        [gpu for gpu, order in state.decision.caps.items() if order.cap_milliwatts is None]
        if state.decision
        else []
    )
    if left:
        return say(
            "Capped",
            True,
            "ExceptUnmanaged",
            f"{len(left)} GPUs are used by pods that the spec does not list",
        )
    return say("Capped", True, "ReadBack")


def _healthy(state: AgentState, say: Say) -> Condition:
    missing = [str(failure) for failure in state.missing]
    faults = [f"GPU {gpu.index}: {text}" for gpu in state.gpus for text in state.faults.texts(gpu.uuid)]
    verdicts = [(gpu, state.faults.verdict(gpu.uuid)) for gpu in state.gpus]
    notes = [f"GPU {gpu.index}: {note}" for gpu, verdict in verdicts for note in verdict.notes]
    needs = [
        f"GPU {gpu.index} needs {verdict.action}"
        for gpu, verdict in verdicts
        if verdict.action is not Action.NONE
    ]
    message = "; ".join([*missing, *faults, *needs, *notes])
    if missing or not all(verdict.healthy for _, verdict in verdicts):
        return say("Healthy", False, "Faults", message)
    if any(verdict.facility for _, verdict in verdicts):
        return say("Healthy", True, "FacilityPowerBrake", message)
    return say("Healthy", True, "Notes" if message else "NoFaults", message)


def _pods(state: AgentState) -> tuple[str, str]:
    if state.pods_problem:
        return "KubeletSilent", state.pods_problem
    return ("NotYet", "the kubelet was not asked yet") if state.pods is None else ("Answered", "")


def _metered(meter: Meter, say: Say) -> Condition:
    problems = [f"{pod}: {problem}" for pod, problem in sorted(meter.problems.items())]
    return say("Metered", not problems, "Unreadable" if problems else "Read", "; ".join(problems))


def _node_power(state: AgentState, say: Say) -> Condition:
    power = state.node_power
    met = {ABOVE: False, UNREADABLE: None, WITHIN: True}[power.verdict]
    return say("NodePower", met, power.verdict, power.above or power.problem)


def _actuators(state: AgentState, say: Say) -> Condition:
    problems = [str(failure) for _, failure in sorted(state.untuned.items())]
    return say("Tuned", not problems, "NotAsAsked" if problems else "AsAsked", "; ".join(problems))
