"""Pods that kube-scheduler does not bind to the node that was chosen for them.

It knows things that we do not: ports, volumes, another scheduler's pods. An opened pod is bound to its node by affinity,
and that cannot be taken back, so after a while the pod is replaced, and its successor goes elsewhere: the node is left
alone for that model until it may have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tokenfactory.controller.actions import Action, DeletePod
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.kube.resources import Key, key_of

Slot = tuple[Key, str]
"""(factory, model)."""
PATIENCE_MILLISECONDS: Final = 10_000
"""A pod that ended there a moment ago may still hold its GPUs for kube-scheduler."""
MOST_PATIENCE_MILLISECONDS: Final = 160_000
"""Twice as long for each node that has refused the model lately: what no node can give (a volume that is not there)
must not make a new pod, new charges and new sheets every few seconds for ever."""
REMEMBERED_MILLISECONDS: Final = 600_000


@dataclass(frozen=True)
class Refusals:
    """What is remembered from round to round; all of it may be lost at the cost of one more try."""

    since: Mapping[str, int] = field(default_factory=dict)
    """Pod UID → when it was first seen refused."""
    until: Mapping[tuple[Slot, str], int] = field(default_factory=dict)
    """(model, node) → how long that node is left alone."""

    def nodes(self, slot: Slot) -> frozenset[str]:
        return frozenset(node for held, node in self.until if held == slot)


def refusals(world: World, before: Refusals) -> tuple[Refusals, list[Action]]:
    now = world.snapshot.milliseconds
    since: dict[str, int] = {}
    until = {pair: end for pair, end in before.until.items() if end > now}
    actions: list[Action] = []
    for replica in world.replicas:
        why = refused(replica)
        node = world.granted_on.get(replica.uid)
        if why is None or node is None:
            continue
        since[replica.uid] = before.since.get(replica.uid, now)
        slot = (key_of(replica.factory), replica.model.name)
        if now - since[replica.uid] < _patience(len(before.nodes(slot))):
            continue
        until[slot, node] = now + REMEMBERED_MILLISECONDS
        reason = f"kube-scheduler does not bind it to {node}, so it is placed anew elsewhere: {why}"
        actions.append(DeletePod(replica.pod, reason[:1024]))
    return Refusals(since, until), actions


def _patience(refusing_nodes: int) -> int:
    return min(PATIENCE_MILLISECONDS << min(refusing_nodes, 10), MOST_PATIENCE_MILLISECONDS)


def refused(replica: Replica) -> str | None:
    """Why an opened pod is not bound; None: it is, or has not been tried yet, or is on its way out."""
    if replica.gated or replica.node or replica.terminating or replica.finished:
        return None
    return next(
        (
            condition.message or condition.reason
            for condition in replica.pod.status.conditions
            if (condition.type, condition.status, condition.reason)
            == ("PodScheduled", "False", "Unschedulable")
        ),
        None,
    )
