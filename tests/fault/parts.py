"""The things of which the searches' world is made, as plain values; what happens to them is in the other modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.controller.plan.oversubscribing import oversubscribe
from tokenfactory.planning.power import governor, grants, ledger, publish
from tokenfactory.planning.power.governor import Allowance, Memory
from tokenfactory.planning.power.ledger import Leadership
from tokenfactory.planning.power.lines import Domain, NodeFacts

W = 1000
PRODUCT = "H100"
LOW, HIGH, DEFAULT = 200 * W, 700 * W, 700 * W
OVERHEAD = 300 * W
HOLD = 60_000

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
    oversubscribe: Callable[..., Any] = oversubscribe
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

    def limits(self) -> dict[str, int | None]:
        return {f"{self.name}-{i}": gpu.limit for i, gpu in enumerate(self.gpus)}

    def clone(self) -> Machine:
        return copy_of(self)


@dataclass(frozen=True)
class Gone:
    """What a watch says of a sheet that somebody deleted. `revision` is the API server's count of writes by then."""

    name: str
    revision: int


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
    sheet_queue: list[CapSheet | Gone] = field(default_factory=list)
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
        twin = copy_of(self)
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
    sheet_queue: list[Gone] = field(default_factory=list)
    revision: int = 0
    """The API server's count of writes to sheets, up to which it knows them."""
    outstanding: dict[tuple[str, str], int] = field(default_factory=dict)
    unsettled: dict[tuple[str, str], int] = field(default_factory=dict)
    pods: frozenset[str] = frozenset()

    def clone(self) -> Leader:
        twin = copy_of(self)
        twin.sheets = dict(self.sheets)
        twin.nodes = dict(self.nodes)
        twin.node_queue = list(self.node_queue)
        twin.site_queue = list(self.site_queue)
        twin.sheet_queue = list(self.sheet_queue)
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


def copy_of(thing: Any) -> Any:
    """A shallow copy; dataclasses.replace would take most of the time of an exhaustive search."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin


def version_of(thing: AnyObject | None) -> int:
    return int(thing.metadata.resource_version or 0) if thing is not None else 0


def with_version(thing: Any, version: int, generation: int = 0) -> Any:
    meta = ObjectMeta(name=thing.metadata.name, resource_version=str(version), generation=generation)
    return msgspec.structs.replace(thing, metadata=meta)


class Parts:
    """What the world consists of. Each kind of actor is a class of its own over these."""

    kit: Kit
    now: int
    steps: int
    site: Site
    machines: dict[str, Machine]
    pods: dict[str, Pod]
    agents: dict[str, Agent]
    leaders: list[Leader]
    sheets: dict[str, CapSheet]
    renewals: dict[str, CapSheet]
    nodes: dict[str, GPUNode]
    inflight: list[Message]
    term: int
    claim_from: int
    next_pid: int
    deleted: dict[str, int]
    """The last version of every sheet that somebody deleted."""
    revision: int
    """How many writes to sheets were accepted: as in the API server, no sheet has a version above it."""
    peaks: dict[str, int]
    """Limits that were cut, until everything charged by them has been given back."""
    acked: dict[tuple[str, str], int]

    def set_gpu(self, node: str, index: int, **fields: Any) -> None:
        machine = self.machines[node]
        gpus = list(machine.gpus)
        gpus[index] = replace(gpus[index], **fields)
        machine.gpus = tuple(gpus)

    def ledger(self, leader: Leader) -> ledger.Ledger:
        """As this leader sees it."""
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
            Leadership(leader.term, leader.claim_from, unsettled, leader.revision),
        )

    def charge(self, domain: str) -> int:
        """What everything that is in the API server adds up to."""
        witness = Leader(0, self.term, 0, self.site, self.sheets, self.nodes, frozenset(self.machines))
        return self.ledger(witness).charge(domain)
