"""Rollouts where watts are short: as many replicas as ran before may run again, at no more watts than those had.

A replica that is new begins only where it finds what is worth serving at. When a limit has fallen below that, those that
run go on at lower caps. If their successors had to find more, each rollout would cost replicas, and stand still once a
quarter of them is gone. So it is written down on the workload, in the very write that begins a rollout, how many ran:
so many keep their places, and what was not there anyway does not count as lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from tokenfactory.api import names
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.plan.naming import Workload, held_at, slots
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.controller.workloads import Object, template_of

PATIENCE_SECONDS: Final = 10.0
"""So long a successor looks for a place with watts to spare."""


def ran_before(
    world: World, held: Workload | None, factory: TokenFactory, model: ModelSpec, count: int, template: str
) -> int | None:
    """How many of the `count` that are asked for ran when the rollout to this template began; None: none is under way."""
    if held is None:
        return None
    replicas = world.replicas_of(factory, model)
    runs, before = _running(world, replicas), _noted(held)
    if template_of(held.spec) != template:
        return min(max(runs, before or 0), count)
    if before is None or (runs >= min(before, count) and not old_pods(replicas, template)):
        return None
    return min(before, count)


def old_pods(replicas: Sequence[Replica], template: str | None) -> list[Replica]:
    """Those of an earlier template that are not being deleted yet."""
    return [
        each
        for each in replicas
        if not each.terminating
        and not each.finished
        and each.pod.metadata.annotations.get(names.TEMPLATE_ANNOTATION) != template
    ]


def successors(world: World) -> frozenset[str]:
    """UIDs of gated pods that have the places of such as ran before, and have looked for a better one for a while."""
    found: set[str] = set()
    for factory in world.snapshot.factories.values():
        for model in factory.spec.models:
            held = held_at(world, slots(factory, model).runs)
            before = _noted(held) if held is not None else None
            if held is not None and before:
                found |= _of_model(world, world.replicas_of(factory, model), held.spec, before)
    return frozenset(found)


def _of_model(world: World, replicas: Sequence[Replica], spec: Object, before: int) -> set[str]:
    template = template_of(spec)
    waiting: dict[str, list[Replica]] = {}
    for each in replicas:
        new = each.pod.metadata.annotations.get(names.TEMPLATE_ANNOTATION) == template
        if new and each.gated and each.uid not in world.granted_on and not each.terminating:
            waiting.setdefault(each.group or each.name, []).append(each)
    patient = [
        pods
        for _, pods in sorted(waiting.items())
        if all(_has_looked(each, world.snapshot.wall) for each in pods)
    ]
    open_places = max(before - _running(world, replicas), 0)
    return {each.uid for pods in patient[:open_places] for each in pods}


def _has_looked(replica: Replica, wall: datetime) -> bool:
    created = replica.pod.metadata.creation_timestamp
    return (
        created is not None and (wall - datetime.fromisoformat(created)).total_seconds() >= PATIENCE_SECONDS
    )


def _running(world: World, replicas: Sequence[Replica]) -> int:
    """Replicas that have watts and keep them: one that ends makes room for its successor."""
    return len(
        {
            each.group or each.uid
            for each in replicas
            if not each.terminating and not each.finished and (not each.gated or each.uid in world.granted_on)
        }
    )


def _noted(held: Workload) -> int | None:
    said = held.metadata.labels.get(names.RAN_LABEL, "")
    return int(said) if said.isdecimal() else None
