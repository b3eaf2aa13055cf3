"""A site in which everything can go wrong: an API server, machines with GPUs, agents, leaders, and the network.

Agents run the shipped governor and leaders the shipped ledger; `Kit` names the functions they use, so that a test can
put a wrong one in. Nothing here decides about power. What is watched for are the *true* limits of GPUs that may be
working: see `draw` and `violations`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import (
    AppliedEpoch,
    Fence,
    GPUNode,
    GPUNodeSpec,
    GPUNodeStatus,
    GPUStatus,
    PodGrant,
)
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.planning.power import governor, grants, ledger, publish, sheets
from tokenfactory.planning.power.governor import Allowance, GpuView, Memory, Sheet, View
from tokenfactory.planning.power.ledger import Leadership
from tokenfactory.planning.power.lines import Domain, NodeFacts

W = 1000
PRODUCT = "H100"
LOW, HIGH, DEFAULT = 200 * W, 700 * W, 700 * W
OVERHEAD = 300 * W
HOLD = 60_000
LONGEST_QUEUE = 40

AnyObject = CapSheet | GPUNode


class Violation(AssertionError):  # noqa: N818
    """One of P1 to P6 does not hold."""


@dataclass(frozen=True)
class Kit:
    """The decisions that are on trial."""

    govern: Callable[..., Any] = governor.govern
    read_back: Callable[..., Any] = governor.read_back
    observe: Callable[..., Any] = ledger.observe
    plan_sheets: Callable[..., Any] = publish.plan_sheets
    plan_claims: Callable[..., Any] = publish.plan_claims
    moved: Callable[..., Any] = grants.moved
    settled_path: Callable[..., Any] = grants.settled_path
    collected: Callable[..., Any] = grants.collected
    epoch_rule: bool = True
    gate_reads_now: bool = True
    claims: bool = True


@dataclass(frozen=True)
class Site:
    """What people wrote: limits, where nodes stand, and (standing for the market) which caps are wanted."""

    version: int
    domains: Mapping[str, Domain]
    paths: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, Mapping[str, Allowance]]


@dataclass(frozen=True)
class Pod:
    uid: str
    node: str
    class_name: str
    gpus: int
    deleted: bool = False
    ungated: bool = False


@dataclass(frozen=True)
class Gpu:
    limit: int = DEFAULT
    pod: str = ""
    running: bool = False


@dataclass
class Machine:
    """One node as it is. `guarded`: only our pods land here."""

    name: str
    guarded: bool
    on: bool = True
    boot: int = 1
    gpus: tuple[Gpu, ...] = ()

    def draw(self) -> int:
        if not self.on:
            return 0
        return OVERHEAD + sum(gpu.limit if gpu.running else LOW for gpu in self.gpus)

    def floor(self) -> int:
        return OVERHEAD + LOW * len(self.gpus) if self.on else 0

    def clone(self) -> Machine:
        return _copy(self)


@dataclass
class Agent:
    """One agent process and its two watches: its own GPUNode, and the sheets with their renewals."""

    node: str
    alive: bool = True
    memory: Memory = field(default_factory=Memory)
    own: GPUNode | None = None
    listed: bool = False
    sheets: dict[str, CapSheet] = field(default_factory=dict)
    node_queue: list[GPUNode] = field(default_factory=list)
    sheet_queue: list[CapSheet] = field(default_factory=list)
    broken: bool = False
    decision: governor.Decision | None = None
    to_set: tuple[tuple[int, int], ...] = ()
    last_read: Mapping[str, int | None] = field(default_factory=dict)
    drift: int = 0
    """Its clock's error in parts per thousand."""
    skipped: int = 0
    first_sequence: int | None = None
    last_sequence: int = 0
    news: bool = False
    renewed_at: int | None = None
    """On its own clock, as the world saw it: independent of what the governor remembers."""

    def clone(self) -> Agent:
        twin = _copy(self)
        twin.sheets = dict(self.sheets)
        twin.node_queue = list(self.node_queue)
        twin.sheet_queue = list(self.sheet_queue)
        return twin


@dataclass
class Leader:
    """One process that believes to lead. Its caches follow three watches; its own writes are folded in."""

    pid: int
    term: int
    claim_from: int
    site: Site
    sheets: dict[str, CapSheet]
    nodes: dict[str, GPUNode]
    heard: frozenset[str]
    node_queue: list[GPUNode] = field(default_factory=list)
    site_queue: list[Site] = field(default_factory=list)
    outstanding: dict[tuple[str, str], int] = field(default_factory=dict)
    unsettled: dict[tuple[str, str], int] = field(default_factory=dict)
    pods: frozenset[str] = frozenset()

    def clone(self) -> Leader:
        twin = _copy(self)
        twin.sheets = dict(self.sheets)
        twin.nodes = dict(self.nodes)
        twin.node_queue = list(self.node_queue)
        twin.site_queue = list(self.site_queue)
        twin.outstanding = dict(self.outstanding)
        twin.unsettled = dict(self.unsettled)
        return twin


@dataclass(frozen=True)
class Message:
    """A write on its way to the API server, under optimistic concurrency. `version` 0 creates."""

    sender: str | int
    kind: str
    name: str
    body: Any
    version: int
    limits: Mapping[str, int] = field(default_factory=dict)
    """The limits that its sender knew."""
    touch: bool = False
    """It changes an annotation as well. A write that changes nothing leaves the object's version as it was."""


def _copy(thing: Any) -> Any:
    """A shallow copy; dataclasses.replace would take most of the time of an exhaustive search."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


def version_of(thing: AnyObject | None) -> int:
    return int(thing.metadata.resource_version or 0) if thing is not None else 0


def with_version(thing: Any, version: int, generation: int = 0) -> Any:
    meta = ObjectMeta(name=thing.metadata.name, resource_version=str(version), generation=generation)
    return msgspec.structs.replace(thing, metadata=meta)


class World:
    """All of it. Methods are the atomic things that can happen; the searches choose which happens next."""

    def __init__(self, site: Site, machines: Mapping[str, Machine], kit: Kit) -> None:
        self.kit = kit
        self.now = 1_000_000
        self.site = site
        self.machines = dict(machines)
        self.pods: dict[str, Pod] = {}
        self.sheets: dict[str, CapSheet] = {}
        self.renewals: dict[str, CapSheet] = {}
        self.nodes: dict[str, GPUNode] = {
            name: GPUNode(metadata=ObjectMeta(name=name, resource_version="1", generation=1))
            for name in machines
        }
        self.agents = {name: Agent(name) for name in machines}
        self.leaders: list[Leader] = []
        self.inflight: list[Message] = []
        self.term = 0
        self.claim_from = 0
        self.next_pid = 1
        self.peaks: dict[str, int] = {}
        """Limits that were cut, until everything charged by them has been given back."""
        self.acked: dict[tuple[str, str], int] = {}
        self.steps = 0

    def clone(self) -> World:
        twin = _copy(self)
        twin.machines = {name: machine.clone() for name, machine in self.machines.items()}
        twin.pods = dict(self.pods)
        twin.sheets = dict(self.sheets)
        twin.renewals = dict(self.renewals)
        twin.nodes = dict(self.nodes)
        twin.agents = {name: agent.clone() for name, agent in self.agents.items()}
        twin.leaders = [leader.clone() for leader in self.leaders]
        twin.inflight = list(self.inflight)
        twin.peaks = dict(self.peaks)
        twin.acked = dict(self.acked)
        return twin

    # -- the API server ---------------------------------------------------------------------------------------

    def deliver(self, index: int, *, keep: bool = False, answer: bool = True) -> None:
        """One write arrives: `keep` leaves a copy on the way, without `answer` its sender learns nothing."""
        message = self.inflight[index] if keep else self.inflight.pop(index)
        accepted = {"sheet": self._write_sheet, "renew": self._write_sheet, "node": self._write_spec}.get(
            message.kind, self._write_status
        )(message)
        if not answer:
            return
        if message.kind == "status":
            self._answer_agent(message)
            return
        for leader in self.leaders:
            if leader.pid == message.sender:
                self._answer_leader(leader, message, accepted=accepted)

    def _write_sheet(self, message: Message) -> bool:
        store = self.renewals if message.kind == "renew" else self.sheets
        present = store.get(message.name)
        spec = message.body
        if version_of(present) != message.version:
            return False
        if present is not None:
            old = present.spec
            same = spec.caps == old.caps and spec.hold_milliseconds == old.hold_milliseconds
            grows = spec.epoch > old.epoch or (spec.epoch == old.epoch and same)
            if spec.term < old.term or (not grows and self.kit.epoch_rule):
                return False
            if spec == old and not message.touch:
                return True
        sheet = CapSheet(
            metadata=ObjectMeta(name=message.name, resource_version=str(message.version + 1)), spec=spec
        )
        store[message.name] = sheet
        for agent in self.agents.values():
            if agent.alive and agent.listed and not agent.broken:
                agent.sheet_queue.append(sheet)
                if len(agent.sheet_queue) > LONGEST_QUEUE:
                    agent.broken = True
        return True

    def _write_spec(self, message: Message) -> bool:
        present = self.nodes[message.name]
        if version_of(present) != message.version or message.body.term < present.spec.term:
            return False
        if message.body == present.spec and not message.touch:
            return True
        generation = present.metadata.generation + (message.body != present.spec)
        self._store_node(
            with_version(msgspec.structs.replace(present, spec=message.body), message.version + 1, generation)
        )
        for domain in set(message.body.path) - set(present.spec.path):
            # People put a machine here: it draws here whether it fits or not, and only decreases may follow.
            self.peaks[domain] = max(self.peaks.get(domain, 0), self.charge(domain))
        return True

    def _write_status(self, message: Message) -> bool:
        present = self.nodes[message.name]
        if version_of(present) != message.version:
            return False
        if message.body == present.status:
            return True
        for entry in message.body.applied:
            key = (message.name, entry.domain)
            self.acked[key] = max(self.acked.get(key, 0), entry.epoch)
        self._store_node(
            with_version(
                msgspec.structs.replace(present, status=message.body),
                message.version + 1,
                present.metadata.generation,
            )
        )
        return True

    def _store_node(self, node: GPUNode) -> None:
        name = node.metadata.name
        self.nodes[name] = node
        agent = self.agents[name]
        if agent.alive and agent.own is not None:
            agent.node_queue.append(node)
        for leader in self.leaders:
            leader.node_queue.append(node)

    def _answer_agent(self, message: Message) -> None:
        agent = self.agents[message.name]
        if agent.alive and agent.own is not None:
            self._fold_own(agent, self.nodes[message.name])

    def _answer_leader(self, leader: Leader, message: Message, *, accepted: bool) -> None:
        key = (message.kind, message.name)
        if leader.outstanding.get(key) == message.version:
            del leader.outstanding[key]
        if message.kind == "node":
            self._fold_node(leader, self.nodes[message.name])
        elif message.kind == "sheet" and message.name in self.sheets:
            self._fold_sheet(leader, self.sheets[message.name])
        if message.kind != "renew" and not accepted and self._newer_term(leader, message):
            # Refused because somebody leads in a newer term: this process was deposed, and now it knows.
            self.leaders.remove(leader)

    def _newer_term(self, leader: Leader, message: Message) -> bool:
        if message.kind == "node":
            return self.nodes[message.name].spec.term > leader.term
        present = self.sheets.get(message.name)
        return present is not None and present.spec.term > leader.term

    def _fold_own(self, agent: Agent, node: GPUNode) -> None:
        if version_of(node) >= version_of(agent.own):
            agent.own = node

    def _fold_node(self, leader: Leader, node: GPUNode) -> None:
        name = node.metadata.name
        if version_of(node) >= version_of(leader.nodes.get(name)):
            leader.nodes[name] = node
        self._settle(leader, ("node", name), node)

    def _fold_sheet(self, leader: Leader, sheet: CapSheet) -> None:
        name = sheet.metadata.name
        if version_of(sheet) >= version_of(leader.sheets.get(name)):
            leader.sheets[name] = sheet
        self._settle(leader, ("sheet", name), sheet)

    def _settle(self, leader: Leader, key: tuple[str, str], seen: AnyObject) -> None:
        """A write that waited on an older version than one seen can no longer land."""
        if key in leader.unsettled and version_of(seen) > leader.unsettled[key]:
            del leader.unsettled[key]

    # -- people ---------------------------------------------------------------------------------------------------

    def change_site(self, site: Site) -> None:
        for name, domain in self.site.domains.items():
            if site.domains[name].usable_milliwatts < domain.usable_milliwatts:
                self.peaks[name] = max(self.peaks.get(name, 0), domain.usable_milliwatts)
        self.site = site
        for leader in self.leaders:
            leader.site_queue.append(site)

    # -- machines and pods ----------------------------------------------------------------------------------------

    def set_gpu(self, node: str, index: int, **fields: Any) -> None:
        machine = self.machines[node]
        gpus = list(machine.gpus)
        gpus[index] = replace(gpus[index], **fields)
        machine.gpus = tuple(gpus)

    def power_off(self, node: str) -> None:
        machine = self.machines[node]
        machine.on = False
        machine.gpus = tuple(replace(gpu, running=False) for gpu in machine.gpus)
        self.kill_agent(node)

    def power_on(self, node: str) -> None:
        machine = self.machines[node]
        machine.on = True
        machine.boot += 1
        machine.gpus = tuple(
            replace(gpu, limit=DEFAULT, running=False, pod=self._kept(gpu)) for gpu in machine.gpus
        )

    def _kept(self, gpu: Gpu) -> str:
        pod = self.pods.get(gpu.pod)
        return gpu.pod if gpu.pod.startswith("foreign") or (pod is not None and not pod.deleted) else ""

    def reload_driver(self, node: str) -> None:
        """Needs every process off the GPUs; the agent lives on."""
        machine = self.machines[node]
        machine.boot += 1
        machine.gpus = tuple(replace(gpu, limit=DEFAULT, running=False) for gpu in machine.gpus)

    def bind(self, uid: str) -> bool:
        """The kubelet gives an ungated pod its GPUs."""
        pod = self.pods[uid]
        machine = self.machines[pod.node]
        free = [i for i, gpu in enumerate(machine.gpus) if not gpu.pod]
        if not pod.ungated or pod.deleted or not machine.on or len(free) < pod.gpus:
            return False
        if any(gpu.pod == uid for gpu in machine.gpus):
            return False
        for index in free[-pod.gpus :]:
            self.set_gpu(pod.node, index, pod=uid)
        return True

    def start(self, uid: str) -> bool:
        """The pod's init container asks the node's agent whether its model may start."""
        pod = self.pods[uid]
        machine, agent = self.machines[pod.node], self.agents[pod.node]
        held = [i for i, gpu in enumerate(machine.gpus) if gpu.pod == uid]
        if not held or not machine.on or machine.gpus[held[0]].running or not agent.alive:
            return False
        if agent.decision is None:
            return False
        if self.kit.gate_reads_now:
            if agent.memory.boot_id != f"b{machine.boot}":
                return False
            limits = self.limits(pod.node)
        else:
            limits = agent.last_read
        if uid not in self.kit.read_back(agent.memory, agent.decision, limits)[1].may_start:
            return False
        for index in held:
            cap = agent.decision.caps[f"{pod.node}-{index}"].cap_milliwatts
            if cap is None or machine.gpus[index].limit > cap:
                raise Violation(
                    f"P3: {uid} starts on GPU {index} of {pod.node}, which is not at its cap {cap}"
                )
            self.set_gpu(pod.node, index, running=True)
        if uid not in {grant.uid for grant in self.nodes[pod.node].spec.pods}:
            raise Violation(f"P3: {uid} starts on {pod.node} without being charged there")
        return True

    def stop(self, uid: str) -> None:
        """A deleted pod's processes end and its GPUs come free."""
        pod = self.pods[uid]
        for index, gpu in enumerate(self.machines[pod.node].gpus):
            if gpu.pod == uid:
                self.set_gpu(pod.node, index, pod="", running=False)

    # -- agents ---------------------------------------------------------------------------------------------------

    def kill_agent(self, node: str) -> None:
        old = self.agents[node]
        self.agents[node] = Agent(node, alive=False, drift=old.drift)

    def start_agent(self, node: str) -> None:
        old = self.agents[node]
        self.agents[node] = Agent(node, drift=old.drift)

    def read_own(self, node: str) -> None:
        agent = self.agents[node]
        agent.own = self.nodes[node]
        agent.node_queue.clear()

    def list_sheets(self, node: str) -> None:
        """A consistent list: at the start, and after a watch broke."""
        agent = self.agents[node]
        agent.listed, agent.broken = True, False
        agent.sheet_queue.clear()
        agent.sheets = dict(self.sheets)
        for renewal in self.renewals.values():
            self._see_renewal(agent, renewal)

    def next_sheet(self, node: str) -> None:
        agent = self.agents[node]
        sheet = agent.sheet_queue.pop(0)
        if sheet.spec.renewal is None:
            agent.sheets[sheet.metadata.name] = sheet
        else:
            self._see_renewal(agent, sheet)

    def next_own(self, node: str) -> None:
        agent = self.agents[node]
        self._fold_own(agent, agent.node_queue.pop(0))

    def _see_renewal(self, agent: Agent, renewal: CapSheet) -> None:
        agent.sheets[renewal.metadata.name] = renewal
        sequence = renewal.spec.renewal.sequence if renewal.spec.renewal is not None else 0
        if agent.first_sequence is None:
            agent.first_sequence = sequence
        elif sequence > agent.last_sequence:
            agent.news = True
        agent.last_sequence = max(agent.last_sequence, sequence)

    def clock(self, agent: Agent) -> int:
        return self.now + self.now * agent.drift // 1000 + agent.skipped

    def limits(self, node: str) -> dict[str, int | None]:
        return {f"{node}-{i}": gpu.limit for i, gpu in enumerate(self.machines[node].gpus)}

    def govern(self, node: str) -> None:
        """The agent decides. What it then sets are separate steps."""
        agent, machine = self.agents[node], self.machines[node]
        view = self._view(agent, machine)
        now = self.clock(agent)
        if agent.news:
            agent.news, agent.renewed_at = False, now
        agent.memory, agent.decision = self.kit.govern(agent.memory, view, now)
        agent.to_set = tuple(
            (index, order.cap_milliwatts)
            for index, gpu in enumerate(machine.gpus)
            if (order := agent.decision.caps[f"{node}-{index}"]).cap_milliwatts is not None
            and order.cap_milliwatts != gpu.limit
        )
        self._check_decision(agent, view, now)

    def _view(self, agent: Agent, machine: Machine) -> View:
        sheets = {n: Sheet.of(s.spec) for n, s in agent.sheets.items() if s.spec.renewal is None}
        renewals = {
            s.spec.tree: s.spec.renewal.sequence for s in agent.sheets.values() if s.spec.renewal is not None
        }
        return View(
            boot_id=f"b{machine.boot}",
            spec=agent.own.spec if agent.own is not None else None,
            generation=agent.own.metadata.generation if agent.own is not None else 0,
            status=agent.own.status if agent.own is not None else None,
            sheets=sheets if agent.listed else None,
            renewals=renewals if agent.listed else {},
            gpus=tuple(
                GpuView(f"{machine.name}-{i}", PRODUCT, LOW, HIGH, gpu.limit, gpu.pod)
                for i, gpu in enumerate(machine.gpus)
            ),
        )

    def _check_decision(self, agent: Agent, view: View, now: int) -> None:
        """P5 and P6, from what was delivered rather than from what the governor remembers."""
        decision = agent.decision
        if decision is None or view.spec is None or view.sheets is None:
            return
        path = view.spec.path
        used = [view.sheets[d] for d in path if d in view.sheets]
        hold = min((sheet.hold_milliseconds for sheet in used), default=0)
        since = agent.renewed_at
        late = since is not None and now >= since + hold
        for order in decision.caps.values():
            if order.cap_milliwatts is None:
                continue
            highest = self._allowed(used, order.reason.class_name, low=late, complete=len(used) == len(path))
            if order.cap_milliwatts > highest:
                raise Violation(
                    f"P6: {agent.node} would set {order} above {highest} ({'after' if late else 'within'} hold)"
                )
        for domain in path:
            acked = self.acked.get((agent.node, domain), 0)
            sheet = view.sheets.get(domain)
            stale = sheet is not None and sheet.epoch < acked and domain in _applied(self.nodes[agent.node])
            if stale and any(
                (order.cap_milliwatts or 0) > LOW and order.reason.why == "Sheet"
                for order in decision.caps.values()
            ):
                raise Violation(f"P5: {agent.node} obeys {domain} epoch {sheet} after acknowledging {acked}")

    def _allowed(self, used: list[Sheet], class_name: str, *, low: bool, complete: bool) -> int:
        if not complete or not used:
            return LOW
        caps = []
        for sheet in used:
            allowance = sheet.caps.get(class_name, Allowance(0, 0))
            caps.append(min(allowance.cap, allowance.fallback) if low else allowance.cap)
        return max(LOW, min(caps))

    def set_next(self, node: str, *, fails: bool = False) -> None:
        """One call to the driver. One that fails leaves the limit as it was."""
        agent = self.agents[node]
        (index, cap), *rest = agent.to_set
        agent.to_set = tuple(rest)
        if not fails:
            self.set_gpu(node, index, limit=cap)

    def report(self, node: str) -> bool:
        """The agent reads its limits back and sends its status if that says something new."""
        agent, machine = self.agents[node], self.machines[node]
        if agent.decision is None or agent.own is None or agent.memory.boot_id != f"b{machine.boot}":
            return False
        limits = self.limits(node)
        agent.last_read = limits
        agent.memory, reading = self.kit.read_back(agent.memory, agent.decision, limits)
        status = self._status(agent, machine, reading)
        if status == agent.own.status:
            return False
        self.inflight.append(Message(node, "status", node, status, version_of(agent.own)))
        return True

    def _status(self, agent: Agent, machine: Machine, reading: governor.Readback) -> GPUNodeStatus:
        own = agent.own
        assert own is not None
        observed = reading.observed_generation
        return GPUNodeStatus(
            observed_generation=own.status.observed_generation if observed is None else observed,
            boot_id=f"b{machine.boot}",
            capped=reading.capped,
            applied=tuple(AppliedEpoch(domain=d, epoch=e) for d, e in sorted(reading.applied.items())),
            gpus=tuple(
                GPUStatus(
                    index=i,
                    uuid=f"{machine.name}-{i}",
                    product=PRODUCT,
                    min_milliwatts=LOW,
                    max_milliwatts=HIGH,
                    default_milliwatts=DEFAULT,
                    enforced_milliwatts=gpu.limit,
                    pod_uid=gpu.pod,
                )
                for i, gpu in enumerate(machine.gpus)
            ),
        )

    # -- leaders --------------------------------------------------------------------------------------------------

    def elect(self, *, clean: bool) -> Leader:
        """A new process leads. After anything but a clean hand-over, what was under way may still land."""
        self.term += 1
        if not clean:
            self.claim_from = self.term
        leader = Leader(
            pid=self.next_pid,
            term=self.term,
            claim_from=self.claim_from if self.kit.claims else 0,
            site=self.site,
            sheets=dict(self.sheets),
            nodes=dict(self.nodes),
            heard=frozenset(self.machines),
        )
        self.next_pid += 1
        self.leaders.append(leader)
        return leader

    def ledger(self, leader: Leader) -> ledger.Ledger:
        facts = {
            name: NodeFacts(
                guarded=machine.guarded,
                nameplate_milliwatts=OVERHEAD + HIGH * len(machine.gpus),
                heard=name in leader.heard,
            )
            for name, machine in self.machines.items()
        }
        kinds = {"sheet": "CapSheet", "node": "GPUNode"}
        waiting = {*leader.unsettled, *leader.outstanding}
        unsettled = frozenset((kinds[kind], name) for kind, name in waiting if kind in kinds)
        return self.kit.observe(
            leader.site.domains,
            leader.sheets,
            leader.nodes.values(),
            facts,
            Leadership(leader.term, leader.claim_from, unsettled),
        )

    def send(
        self, leader: Leader, kind: str, name: str, body: Any, version: int, *, touch: bool = False
    ) -> None:
        key = (kind, name)
        if kind != "renew":
            leader.outstanding[key] = version
        limits = {n: d.usable_milliwatts for n, d in leader.site.domains.items()}
        self.inflight.append(Message(leader.pid, kind, name, body, version, limits, touch))

    def give_up(self, leader: Leader) -> None:
        """The leader stops waiting for answers: those writes may or may not land."""
        for (kind, name), version in leader.outstanding.items():
            seen = (leader.nodes if kind == "node" else leader.sheets).get(name)
            if version_of(seen) <= version:
                leader.unsettled[kind, name] = version
        leader.outstanding.clear()

    def lead_sheets(self, leader: Leader) -> bool:
        if any(kind == "sheet" for kind, _ in leader.outstanding):
            return False
        plan = self.kit.plan_sheets(self.ledger(leader), leader.site.targets)
        for write in plan.writes:
            self.send(
                leader,
                "sheet",
                write.spec.domain,
                write.spec,
                int(write.resource_version or 0),
                touch=write.why == "Claim",
            )
        return bool(plan.writes)

    def lead_renewal(self, leader: Leader, root: str) -> None:
        present = self.renewals.get(f"{root}.renewal")
        spec = sheets.renewed(
            present.spec if present is not None else None, root, term=leader.term, wall_ms=0
        )
        self.send(leader, "renew", f"{root}.renewal", spec, version_of(present))

    def lead_nodes(self, leader: Leader) -> bool:
        """At most one new spec per node: what is due there first."""
        book = self.ledger(leader)
        sent = False
        for name, node in leader.nodes.items():
            if ("node", name) in leader.outstanding:
                continue
            spec = self._next_spec(leader, book, node)
            touch = ("node", name) in leader.unsettled
            if spec is None or (spec == node.spec and not touch):
                continue
            spec = msgspec.structs.replace(spec, term=leader.term, overhead_milliwatts=OVERHEAD)
            if spec == node.spec and not touch:
                continue
            self.send(leader, "node", name, spec, version_of(node), touch=touch)
            book = book.with_node(msgspec.structs.replace(node, spec=spec))
            sent = True
        return sent

    def _next_spec(self, leader: Leader, book: ledger.Ledger, node: GPUNode) -> GPUNodeSpec | None:
        name = node.metadata.name
        facts = book.entries[name].facts
        if node.spec.term < leader.claim_from or ("node", name) in leader.unsettled:
            return msgspec.structs.replace(node.spec, term=leader.term)
        path = leader.site.paths[name]
        if node.spec.path != path:
            return self.kit.moved(node, path)
        machine = self.machines[name]
        if node.spec.fence is None and name not in leader.heard and not machine.on:
            fence = Fence(method="PowerOff", by="bmc", at="", boot_id=node.status.boot_id)
            return msgspec.structs.replace(node.spec, fence=fence)
        if node.spec.fence is not None and name in leader.heard and book.admit_return(name):
            return msgspec.structs.replace(node.spec, fence=None)
        if node.spec.former_paths and (spec := self.kit.settled_path(node)) != node.spec:
            if book.admit_spec(msgspec.structs.replace(node, spec=spec)):
                return spec
            return None
        for grant in node.spec.pods:
            if not grant.released and self.pods[grant.uid].deleted:
                return grants.released(node, grant.uid)
        if (spec := self.kit.collected(node, facts)) != node.spec:
            return spec
        return self._next_grant(book, node)

    def _next_grant(self, book: ledger.Ledger, node: GPUNode) -> GPUNodeSpec | None:
        name = node.metadata.name
        listed = {grant.uid for grant in node.spec.pods}
        taken = sum(grant.gpus for grant in node.spec.pods)
        for pod in self.pods.values():
            if pod.node != name or pod.deleted or pod.uid in listed:
                continue
            fits = taken + pod.gpus <= len(self.machines[name].gpus)
            if fits and book.admit(name, pod.class_name, pod.gpus):
                grant = PodGrant(
                    namespace="ns", name=pod.uid, uid=pod.uid, class_name=pod.class_name, gpus=pod.gpus
                )
                return grants.granted(node, grant)
        return None

    def lead_ungate(self, leader: Leader) -> bool:
        """A pod's gate goes once its grant has landed."""
        done = False
        for node in leader.nodes.values():
            for grant in node.spec.pods:
                pod = self.pods[grant.uid]
                if not grant.released and not pod.ungated and not pod.deleted:
                    self.pods[grant.uid] = replace(pod, ungated=True)
                    done = True
        return done

    def next_node_event(self, leader: Leader) -> None:
        self._fold_node(leader, leader.node_queue.pop(0))

    def next_site_event(self, leader: Leader) -> None:
        leader.site = leader.site_queue.pop(0)

    # -- what must hold -------------------------------------------------------------------------------------------

    def draws(self) -> dict[str, int]:
        """What every domain truly draws at most: by the limits that GPUs with work on them have now."""
        total = dict.fromkeys(self.site.domains, 0)
        for name, machine in self.machines.items():
            draw = machine.draw()
            spec = self.nodes[name].spec
            if spec.fence is not None:
                # Somebody switched it on unasked: its idle draw cannot be known before it is heard of.
                draw -= machine.floor()
            for domain in {d for path in (spec.path, *spec.former_paths) for d in path}:
                total[domain] += draw
        return total

    def check(self) -> None:
        """P1 (and with it P2 and P4), after every step."""
        self.steps += 1
        if self.peaks and self.steps % 16 == 0:
            for domain in tuple(self.peaks):
                self.bound(domain)
        for domain, draw in self.draws().items():
            limit = self.site.domains[domain].usable_milliwatts
            if draw <= limit:
                continue
            if draw > self.bound(domain):
                raise Violation(f"P1: {domain} draws {draw // W} W of {limit // W} W")

    def bound(self, domain: str) -> int:
        """The limit, or after a cut the old one, until the cut is known and everything was given back."""
        limit = self.site.domains[domain].usable_milliwatts
        peak = self.peaks.get(domain, 0)
        if peak <= limit:
            self.peaks.pop(domain, None)
            return limit
        known = [leader.site.domains[domain].usable_milliwatts for leader in self.leaders]
        known += [message.limits[domain] for message in self.inflight if domain in message.limits]
        if max(known, default=0) > limit or self.charge(domain) > limit:
            return peak
        del self.peaks[domain]
        return limit

    def charge(self, domain: str) -> int:
        """What everything that is in the API server adds up to."""
        witness = Leader(0, self.term, 0, self.site, self.sheets, self.nodes, frozenset(self.machines))
        return self.ledger(witness).charge(domain)


def _applied(node: GPUNode) -> set[str]:
    return {entry.domain for entry in node.status.applied}
