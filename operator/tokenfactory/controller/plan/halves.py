"""Groups of which only some pods have a place: what an operator leaves that dies between two writes.

A replica that spans nodes is charged in one round or not at all, but with a write for each node. By the time that
another operator looks, the rest may find no place. Kept for ever, the half would hold watts and GPUs that serve nothing,
and two halves would wait for each other. So after a while its pods are deleted: the LeaderWorkerSet starts the group
anew, and that takes its places as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from tokenfactory.controller.actions import Action, DeletePod
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.world import Replica, World

PATIENCE_MILLISECONDS: Final = 30_000
"""Others may be giving up the watts for the rest of it, which takes seconds."""

Since = Mapping[str, int]
"""Group → when it was first seen without a place for the rest. May be lost at the cost of as long again."""


def halves(world: World, unplaced: Iterable[Unplaced], before: Since) -> tuple[Since, list[Action]]:
    now = world.snapshot.milliseconds
    since: dict[str, int] = {}
    actions: list[Action] = []
    charged = _charged(world)
    for group, why in _without_a_place(unplaced).items():
        if group not in charged:
            continue
        since[group] = before.get(group, now)
        if now - since[group] < PATIENCE_MILLISECONDS:
            continue
        reason = f"only {len(charged[group])} of the pods of its group have a place, so it begins anew: {why}"
        actions += [DeletePod(replica.pod, reason[:1024]) for replica in charged[group]]
    return since, actions


def _charged(world: World) -> dict[str, list[Replica]]:
    """Pods that hold a place, by group."""
    found: dict[str, list[Replica]] = {}
    for replica in world.replicas:
        held = replica.uid in world.granted_on and not (replica.terminating or replica.finished)
        if replica.group and held:
            found.setdefault(replica.group, []).append(replica)
    return found


def _without_a_place(unplaced: Iterable[Unplaced]) -> dict[str, str]:
    """Whole groups, by what they are told. Of one whose pods are not all there nobody knows yet."""
    return {
        each.replica.group: each.message
        for each in unplaced
        if each.replica.group and each.reason != "GroupIncomplete"
    }
