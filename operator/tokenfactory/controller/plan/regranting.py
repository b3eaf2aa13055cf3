"""Replicas that run without a grant: each is charged anew where it is, or starts again elsewhere.

Somebody deleted the GPUNode under them, or their factory went and came back (`--cascade=orphan`), or a person opened a
gate. To the agent such a pod is a stranger: no cap reaches it and it may not restart, while the ledger charges its GPUs
at their default limit. So the grant is written again as soon as the agent has reported. That adds no watt to the charge of
what runs already, so it waits for none: in a domain over its limit it is what brings the pod under the sheets again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.controller.actions import Action, DeletePod
from tokenfactory.controller.plan.admitting import refusals
from tokenfactory.controller.plan.domains import UNKNOWN_GPU_MILLIWATTS
from tokenfactory.controller.plan.nodes import new_grant
from tokenfactory.controller.plan.placing import Granting, Unplaced, Wish
from tokenfactory.controller.plan.world import GpuHost, Replica, World
from tokenfactory.planning.power import grants
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.spending import Spending, lacking
from tokenfactory.planning.power.tree import Tree

PATIENCE_MILLISECONDS: Final = 60_000
"""An agent reports on a GPUNode that is new to it within seconds; what keeps a grant away for longer stays."""
Owner = tuple[str, str, str]
"""(namespace, factory, model)."""


@dataclass(frozen=True)
class Regranted:
    granted: Mapping[str, list[Replica]]
    """By node: may be charged in this round."""
    ledger: Ledger
    spent: Spending
    """Both with these grants."""
    since: Mapping[str, int] = field(default_factory=dict)
    """Pod UID → since when there is a GPUNode that could have its grant. May be lost at the cost of as long again."""
    waiting: tuple[Unplaced, ...] = ()
    actions: tuple[Action, ...] = ()
    charges: Mapping[Owner, int] = field(default_factory=dict)
    """What they may draw and no grant accounts for, in milliwatts."""
    busy: frozenset[str] = frozenset()
    """Factories, by UID, of which something waits here on a node that is heard."""

    def first(self, wishes: Iterable[Wish]) -> tuple[list[Wish], list[Unplaced]]:
        """A factory gets nothing new while nobody can say what it has.

        What is on a silent node is not waited for: it is what the new ones replace, and the domain bears its charge.
        """
        fits, waits = [], []
        for wish in wishes:
            if wish.replica.factory.metadata.uid in self.busy:
                why = "replicas of its factory run without a charge of their own, and these come first"
                waits.append(Unplaced(wish.replica, "WaitingForWatts", why))
            else:
                fits.append(wish)
        return fits, waits

    def with_new(self, granting: Granting) -> dict[str, list[Replica]]:
        found = {node: list(replicas) for node, replicas in self.granted.items()}
        for node, replicas in granting.granted.items():
            found.setdefault(node, []).extend(replicas)
        return found


def regrant(
    world: World, tree: Tree, ledger: Ledger, spent: Spending, before: Mapping[str, int]
) -> Regranted:
    now = world.snapshot.milliseconds
    since: dict[str, int] = {}
    granted: dict[str, list[Replica]] = {}
    waiting: list[Unplaced] = []
    actions: list[Action] = []
    charges: dict[Owner, int] = {}
    busy: set[str] = set()
    for replica, host in _loose(world):
        if all(grant.uid != replica.uid for grant in host.grants):
            owner = (
                replica.pod.metadata.namespace or "",
                replica.factory.metadata.name,
                replica.model.name,
            )
            charges[owner] = charges.get(owner, 0) + _may_draw(host, replica)
        why = _missing(world, tree, ledger, spent, host, replica)
        if not why:
            node = _with_grant(ledger, host, replica)
            after = ledger.with_node(node)
            spent, _ = _spend(spent, ledger, after, host.name)
            ledger = after
            granted.setdefault(host.name, []).append(replica)
            continue
        if not world.cut_off(host):
            busy.add(replica.factory.metadata.uid or "")
        # A GPUNode that is not there, or cannot be read, keeps a grant away through no fault of the replica.
        known = host.held is not None and not world.snapshot.unreadable
        since[replica.uid] = before.get(replica.uid, now) if known else now
        told = f"it runs on {host.name} without a charge of its own: {'; '.join(why)}"
        waiting.append(Unplaced(replica, "Uncharged", told))
        if now - since[replica.uid] >= PATIENCE_MILLISECONDS and not world.cut_off(host):
            actions.append(DeletePod(replica.pod, f"{told}; it starts again elsewhere"[:1024]))
    return Regranted(granted, ledger, spent, since, tuple(waiting), tuple(actions), charges, frozenset(busy))


def _loose(world: World) -> list[tuple[Replica, GpuHost]]:
    return [
        (replica, world.hosts[replica.node])
        for replica in world.replicas
        if replica.node in world.hosts
        and world.granted_on.get(replica.uid) != replica.node
        and not (replica.gated or replica.terminating or replica.finished)
    ]


def _missing(
    world: World, tree: Tree, ledger: Ledger, spent: Spending, host: GpuHost, replica: Replica
) -> tuple[str, ...]:
    """Why it cannot be charged now.

    What serves draws already, under a charge that covers any limit. What does not serve yet would draw more, and nobody
    may have let it in: it needs all that a gated pod needs.
    """
    entry = ledger.entries.get(host.name)
    if host.held is None or entry is None:
        return ("its GPUNode is gone and is made anew",)
    if entry.kind != "Charged":
        return ("its node's agent has not reported on its GPUNode, or the node is fenced",)
    node = _with_grant(ledger, host, replica)
    if replica.ready:
        return ledger.admit_spec(node).why
    domains = [name for name in entry.node.spec.path if name in tree.domains]
    barred = refusals(world, tree, replica.factory, replica.model, domains)
    admission = ledger.admit(host.name, replica.class_on(host.product), replica.model.gpus_per_replica)
    _, short = _spend(spent, ledger, ledger.with_node(node), host.name)
    return (*barred.values(), *admission.why, *short)


def _spend(spent: Spending, before: Ledger, after: Ledger, node: str) -> tuple[Spending, tuple[str, ...]]:
    return lacking(spent, after, before.entries[node].line, after.entries[node].line)


def _with_grant(ledger: Ledger, host: GpuHost, replica: Replica) -> GPUNode:
    node = ledger.entries[host.name].node
    return msgspec.structs.replace(node, spec=grants.granted(node, new_grant(replica, host)))


def _may_draw(host: GpuHost, replica: Replica) -> int:
    """Nobody caps its GPUs, so each may draw the highest limit of any there."""
    each = (
        max(gpu.enforced_milliwatts, gpu.default_milliwatts, gpu.min_milliwatts)
        for gpu in (host.held.status.gpus if host.held else ())
    )
    return replica.model.gpus_per_replica * max(each, default=UNKNOWN_GPU_MILLIWATTS)
