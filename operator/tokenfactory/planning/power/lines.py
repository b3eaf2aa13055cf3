"""What one node is charged by: its GPUs with their classes, the pods that may yet take some, the domains it obeys.

A node's charge:

* its overhead, and for each GPU the highest cap that its agent may come to obey, or the limit it read back if that
  is higher. For one domain that is the highest cap since the epoch it acknowledged; over its path, the lowest of
  these, because the agent obeys the lowest sheet at each moment and the lowest of the highest bounds every such
  moment. Domains that it has not acknowledged bound nothing;
* its present spec stands for every older one that the agent may still be reading, because a grant or a former
  path leaves the spec only after the agent has reported without it (see `grants.py`);
* a GPU that somebody else's pod holds, or may come to hold, at its default limit, which is what a reboot leaves.

A silent node stays charged like any other. Only a fence ends that, and only while nothing is heard of the node.
Nodes that are alike in all this have equal lines, which is what makes thousands of them cheap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import msgspec

from tokenfactory.api.gpu_node import GPUNode, GPUStatus
from tokenfactory.api.names import class_product, idle_class, unmanaged_class

UNBOUNDED: Final = 10**15


@dataclass(frozen=True, slots=True)
class Domain:
    """One power domain, with what it may be charged now: its limit less reserve and fixed load."""

    name: str
    parent: str | None
    usable_milliwatts: int
    hold_milliseconds: int = 300_000


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the operator knows of a node besides its GPUNode."""

    guarded: bool = False
    """No pod that asks for GPUs lands here without our scheduling gate (a taint keeps them off)."""
    nameplate_milliwatts: int = 0
    """The most it can draw: what it is charged while no agent has reported from it."""
    heard: bool = True
    """A sign of life came within the time after which a node counts as lost."""


@dataclass(frozen=True, slots=True)
class Demand:
    """GPUs of one node that follow one class: each is charged max(base, cap within low and high).

    `unbounded` stands for the cap where no sheet bounds it: the highest limit, or for idle GPUs the lowest, because
    nothing of ours runs on them.
    """

    class_name: str
    count: int
    low: int
    high: int
    base: int
    unbounded: int

    def each(self, cap: int) -> int:
        """What one of these GPUs is charged under this cap."""
        if cap == UNBOUNDED:
            cap = self.unbounded
        return max(self.base, min(max(cap, self.low), self.high))


@dataclass(frozen=True, slots=True)
class Line:
    """What one node, or many nodes in the same position, are charged by.

    `acked` goes with `domains`. `fixed` is what no sheet can change. `demands` has every GPU once; `pending` are pods
    that may yet take some of them, nobody knows which.
    """

    domains: tuple[str, ...] = ()
    acked: tuple[int, ...] = ()
    fixed: int = 0
    demands: tuple[Demand, ...] = ()
    pending: tuple[Demand, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(demand.class_name for demand in (*self.demands, *self.pending)))

    def expected(self) -> tuple[Demand, ...]:
        """Every GPU once, as it will be when the pending pods have taken theirs: for planning, not for charging."""
        idle = [demand for demand in self.demands if demand.class_name.startswith("idle@")]
        taken: list[Demand] = []
        for pod in self.pending:
            left = pod.count
            for index, free in enumerate(idle):
                some = min(left, free.count)
                idle[index] = replace(free, count=free.count - some)
                left -= some
            if left < pod.count:
                taken.append(replace(pod, count=pod.count - left, base=pod.low))
        others = (demand for demand in self.demands if not demand.class_name.startswith("idle@"))
        return (*others, *(free for free in idle if free.count), *taken)

    def charge(self, highest: Callable[[str], int]) -> int:
        """The node's charge, given the highest cap that each class may get here."""
        total = self.fixed
        if not self.pending:
            for demand in self.demands:
                total += demand.count * demand.each(highest(demand.class_name))
            return total
        held = [(demand.each(highest(demand.class_name)), demand.count) for demand in self.demands]
        wanted = [(demand.each(highest(demand.class_name)), demand.count) for demand in self.pending]
        return total + sum(each * count for each, count in held) + most_added(held, wanted)


def most_added(held: Iterable[tuple[int, int]], wanted: Iterable[tuple[int, int]]) -> int:
    """The most that pods can add by taking GPUs: (milliwatts, how many) of what these are charged and those may draw.

    The hungriest pod on the least charged GPU, and so on: no other choice adds more, because what one adds,
    max(0, wanted - held), is convex in the difference. Nor does it add more when a GPU's own charge falls by less.
    """
    low = sorted(held)
    high = sorted(wanted, reverse=True)
    added = at = used = 0
    for milliwatts, count in high:
        left = count
        while left and at < len(low):
            base, there = low[at]
            taken = min(left, there - used)
            added += taken * max(0, milliwatts - base)
            left -= taken
            used += taken
            if used == there:
                at, used = at + 1, 0
    return added


Kind = Literal["Charged", "Fenced", "Unplaced", "Nameplate"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One node in the ledger."""

    line: Line
    kind: Kind
    node: GPUNode
    facts: NodeFacts


def path_of(domains: Mapping[str, Domain], domain: str) -> tuple[str, ...]:
    """From the root down to this domain; a cycle ends where it closes."""
    names: list[str] = []
    at: str | None = domain
    while at is not None and at in domains and at not in names:
        names.append(at)
        at = domains[at].parent
    return tuple(reversed(names))


def enter(node: GPUNode, facts: NodeFacts, domains_now: Mapping[str, Domain]) -> Entry:
    """One node's line."""
    spec, status = node.spec, node.status
    domains, obeyed = _domains_of(node, domains_now)
    acks = {entry.domain: entry.epoch for entry in status.applied}
    acked = tuple(acks.get(domain, 0) if domain in obeyed else 0 for domain in domains)
    if not domains:
        return Entry(Line(), "Unplaced", node, facts)
    if is_fenced(node, facts):
        return Entry(Line(domains, (0,) * len(domains)), "Fenced", node, facts)
    if not status.gpus:
        # Whoever has no agent cannot be capped: it is charged in full.
        fixed = max(facts.nameplate_milliwatts, spec.overhead_milliwatts)
        return Entry(Line(domains, acked, fixed), "Nameplate", node, facts)
    demands: Counter[tuple[str, int, int, int, int]] = Counter()
    held = Counter(gpu.pod_uid for gpu in status.gpus if gpu.pod_uid)
    grants = {pod.uid: pod for pod in spec.pods}
    for gpu in status.gpus:
        base = _base(gpu, facts, capped=status.capped)
        grant = grants.get(gpu.pod_uid)
        if grant is not None and held[gpu.pod_uid] <= grant.gpus:
            demands[grant.class_name, gpu.min_milliwatts, _high(gpu), base, _high(gpu)] += 1
        elif gpu.pod_uid:
            foreign = max(base, gpu.default_milliwatts)
            demands[unmanaged_class(gpu.product), foreign, foreign, foreign, foreign] += 1
        else:
            demands[idle_class(gpu.product), gpu.min_milliwatts, _high(gpu), base, gpu.min_milliwatts] += 1
    line = Line(
        domains,
        acked,
        spec.overhead_milliwatts,
        tuple(
            Demand(name, count, low, high, base, unbounded)
            for (name, low, high, base, unbounded), count in sorted(demands.items())
        ),
        tuple(
            pending(node, pod.class_name, pod.gpus - held[pod.uid])
            for pod in spec.pods
            if pod.gpus > held[pod.uid]
        ),
    )
    return Entry(line, "Charged", node, facts)


def is_fenced(node: GPUNode, facts: NodeFacts) -> bool:
    """P4: a fence holds for the boot that it ended, and only while nothing is heard of the node."""
    fence = node.spec.fence
    return fence is not None and fence.boot_id == node.status.boot_id and not facts.heard


def replace_struct(node: GPUNode, **spec: object) -> GPUNode:
    """The node with other spec fields."""
    return msgspec.structs.replace(node, spec=msgspec.structs.replace(node.spec, **spec))


def _base(gpu: GPUStatus, facts: NodeFacts, *, capped: bool) -> int:
    """What a GPU is charged at least, whatever the sheets say.

    Until its agent has capped it in this boot, nothing of ours runs on it, and on a guarded node nothing else
    either, so the limit that a reboot left there draws nothing.
    """
    if not facts.guarded:
        return max(gpu.enforced_milliwatts, gpu.default_milliwatts, gpu.min_milliwatts)
    return max(gpu.min_milliwatts, gpu.enforced_milliwatts if capped else 0)


def _high(gpu: GPUStatus) -> int:
    return max(gpu.max_milliwatts, gpu.min_milliwatts)


def pending(node: GPUNode, class_name: str, gpus: int) -> Demand:
    """GPUs that a pod may yet take."""
    product = class_product(class_name)
    fitting = [gpu for gpu in node.status.gpus if gpu.product == product] or list(node.status.gpus)
    low = min(gpu.min_milliwatts for gpu in fitting)
    high = max(_high(gpu) for gpu in fitting)
    return Demand(class_name, gpus, low, high, 0, high)


def _domains_of(node: GPUNode, domains_now: Mapping[str, Domain]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Where the node is charged, and which of these its agent obeys.

    A domain that was put under another parent draws from there at once, before the paths of its nodes say so.
    """
    obeyed = dict.fromkeys(domain for path in (node.spec.path, *node.spec.former_paths) for domain in path)
    leaf = node.spec.path[-1] if node.spec.path else None
    above = path_of(domains_now, leaf) if leaf is not None else ()
    return tuple(dict.fromkeys((*obeyed, *above))), frozenset(obeyed)
