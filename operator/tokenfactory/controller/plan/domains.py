"""The tree of power domains as the ledger needs it, and where every node belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from tokenfactory.api import names
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.quantities import parse_power
from tokenfactory.controller.plan.nodes import Place
from tokenfactory.controller.plan.world import GpuHost, World
from tokenfactory.planning.power import catalogue, tree
from tokenfactory.planning.power.lines import Domain, NodeFacts
from tokenfactory.planning.power.oversubscription import Margin

UNKNOWN_OVERHEAD_MILLIWATTS = 3_200_000
"""An 8-GPU server besides its GPUs, where not even the product of its GPUs is known."""
UNKNOWN_GPU_MILLIWATTS = 1_200_000


@dataclass(frozen=True)
class Grid:
    """The tree now, the nodes' places in it, and what is wrong."""

    tree: tree.Tree
    lowest: Mapping[str, int]
    """By domain, the least that its nodes may ever draw together: with every window of a timetable open."""
    domains: Mapping[str, Domain]
    places: Mapping[str, Place]
    facts: Mapping[str, NodeFacts]
    problems: Mapping[str, tuple[str, str]]
    """Domain or node → (reason, message)."""
    seconds_to_change: float | None
    """Until a timetable next changes a limit."""
    margins: Mapping[str, Margin] = field(default_factory=dict)
    """Domains in which charges may exceed the usable limit: `domains` has the ceiling, `tree` the limit."""

    def usable(self, domain: str) -> int:
        """What its nodes may truly draw."""
        now = self.tree.domains.get(domain)
        return now.usable_milliwatts if now else 0

    def limit(self, domain: str) -> int:
        now = self.tree.domains.get(domain)
        return now.limit_milliwatts if now else 0


def lay_out(world: World, other_wall: datetime | None = None) -> Grid:
    """`other_wall`: the time that counts as well after the wall clock has jumped."""
    wall = world.snapshot.wall
    now = tree.build(world.snapshot.domains.values(), wall)
    if other_wall is not None and other_wall != wall:
        now = tree.lower_of(now, tree.build(world.snapshot.domains.values(), other_wall))
    problems = {problem.subject: (problem.reason, problem.message) for problem in now.problems}
    if unreadable := world.snapshot.unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        message = f"nothing rises until this is repaired: {unreadable[0]}{more}"
        problems |= {name: ("Unreadable", message) for name, each in now.domains.items() if not each.parent}
    if unread := world.snapshot.unread_factories:
        (namespace, name), why = min(unread.items())
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        message = (
            f"TokenFactory {namespace}/{name} cannot be read: its pods keep their places and charges, and no change of "
            f"it is followed, until it is repaired or the operator is of its version: {why}{more}"
        )
        roots = (each.name for each in now.domains.values() if not each.parent)
        problems = dict.fromkeys(roots, ("FactoryUnreadable", message)) | problems
    domains = {
        name: Domain(name, domain.parent, domain.usable_milliwatts, domain.hold_milliseconds)
        for name, domain in now.domains.items()
    }
    places = {}
    for host in world.hosts.values():
        path = _path(now, host, problems)
        if path:
            places[host.name] = Place(path, _overhead(world, host, path))
    facts = {host.name: _facts(world, host) for host in world.hosts.values()}
    seconds = min(
        (
            (change - clock).total_seconds()
            for clock in {wall, other_wall or wall}
            if (change := tree.next_change(world.snapshot.domains.values(), clock)) is not None
        ),
        default=None,
    )
    lowest = _usable(tree.build(world.snapshot.domains.values(), None))
    return Grid(now, lowest, domains, places, facts, problems, seconds)


def _path(now: tree.Tree, host: GpuHost, problems: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    """A node whose Node object is gone stays where it was: that proves nothing about its draw."""
    if host.node is None:
        return host.held.spec.path if host.held else ()
    member = now.member(host.name, host.node.metadata.labels)
    if member.problem is not None:
        problems[host.name] = (member.problem.reason, member.problem.message)
    return now.domains[member.domain].path if member.domain else ()


def _overhead(world: World, host: GpuHost, path: tuple[str, ...]) -> int:
    """What a person says for the deepest domain, else the catalogue's worst case; a measurement above it counts at once.

    Below the catalogue it saves at most half, and nothing before it was measured under load: a meter that is wrong must
    not cost more than that, nor a figure told early because the node drew more than a person had said.
    """
    measured = host.held.status.overhead_milliwatts if host.held else 0
    proven = host.held is not None and host.held.status.overhead_proven
    for name in reversed(path):
        domain = world.snapshot.domains.get(("", name))
        if domain is not None and domain.spec.node_overhead is not None:
            return max(parse_power(domain.spec.node_overhead), measured)
    gpus = host.held.status.gpus if host.held else ()
    most = max((gpu.max_milliwatts for gpu in gpus), default=0)
    worst = catalogue.overhead(host.product, host.gpu_count, maximum_milliwatts=most).milliwatts
    worst = worst or UNKNOWN_OVERHEAD_MILLIWATTS
    return max(measured, worst // 2 if measured and proven else worst)


def facility_milliwatts(world: World, grid: Grid, held: Mapping[str, int]) -> int:
    """The part of the other load of every domain above them that falls to these GPUs, given as a number by node."""
    total = 0
    for node, gpus in held.items():
        host = world.hosts.get(node)
        for name in host.held.spec.path if host is not None and host.held is not None else ():
            domain = grid.tree.domains.get(name)
            there = world.gpus_under[name]
            total += domain.fixed_load_milliwatts * gpus // there if domain is not None and there else 0
    return total


def _strangers(host: GpuHost) -> bool:
    """The agent sees a pod on a GPU that its spec does not list, in whatever way it came by it."""
    gpus = host.held.status.gpus if host.held else ()
    return any(gpu.pod and not gpu.pod_uid for gpu in gpus)


def _was_capped(host: GpuHost) -> bool:
    """The agent has had all GPUs at their caps once: a stranger who is being bound while the taint lands starts there
    under these, and not at the default limit of a node that nobody has looked after yet.
    """
    status = host.held.status if host.held else None
    return status is not None and (status.capped or bool(status.applied))


def _facts(world: World, host: GpuHost) -> NodeFacts:
    taints = host.node.spec.taints if host.node else ()
    tainted = any(
        taint.key == names.MANAGED_TAINT and taint.effect in {"NoSchedule", "NoExecute"} for taint in taints
    )
    return NodeFacts(
        guarded=tainted and _was_capped(host) and not world.foreign.get(host.name) and not _strangers(host),
        nameplate_milliwatts=UNKNOWN_OVERHEAD_MILLIWATTS + host.gpu_count * UNKNOWN_GPU_MILLIWATTS,
        heard=host.silent_seconds is not None and not world.lost(host),
    )


def usable_now(domains: Iterable[PowerDomain], wall: datetime) -> dict[str, int]:
    """What each domain may hand out, from the domains alone."""
    return _usable(tree.build(domains, wall))


def _usable(of: tree.Tree) -> dict[str, int]:
    return {name: domain.usable_milliwatts for name, domain in of.domains.items()}
