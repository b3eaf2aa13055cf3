"""Rollouts where watts are short: as many replicas as ran before may run again, at no more watts than those had.

A replica that is new begins only where it finds what is worth serving at. When a limit has fallen below that, those that
run go on at lower caps. If their successors had to find more, each rollout would cost replicas, and stand still once a
quarter of them is gone. So it is written down on the workload, in the very write that begins a rollout, how many ran:
so many keep their places, and what was not there anyway does not count as lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
    begins, before = template_of(held.spec) != template, _noted(held)
    if not begins and before is None:
        return None
    replicas = world.replicas_of(factory, model)
    if begins or before is None:
        return min(max(_running(world, replicas), before or 0), count)
    # Until the last of them is bound: one that kube-scheduler refuses is made anew, and must find its place again.
    bound = _count(each for each in replicas if each.node)
    over = bound >= min(before, count) and not old_pods(replicas, template)
    return None if over else min(before, count)


def old_pods(replicas: Sequence[Replica], template: str | None) -> list[Replica]:
    """Those of an earlier template that are not being deleted yet."""
    return [
        each
        for each in replicas
        if not each.terminating
        and not each.finished
        and each.pod.metadata.annotations.get(names.TEMPLATE_ANNOTATION) != template
    ]


@dataclass(frozen=True)
class Successors:
    uids: frozenset[str]
    """Of gated pods that have the places of such as ran before, and have looked for a better one for a while."""
    more_in_seconds: float
    """Until others have looked for long enough."""


def successors(world: World) -> Successors:
    found: set[str] = set()
    soonest = math.inf
    for factory in world.snapshot.factories.values():
        for model in factory.spec.models:
            held = held_at(world, slots(factory, model).runs)
            before = _noted(held) if held is not None else None
            if held is not None and before:
                uids, seconds = _of_model(world, world.replicas_of(factory, model), held.spec, before)
                found |= uids
                soonest = min(soonest, seconds)
    return Successors(frozenset(found), soonest)


def _of_model(world: World, replicas: Sequence[Replica], spec: Object, before: int) -> tuple[set[str], float]:
    """Whose turn it is, and in how many seconds it may be another's."""
    template = template_of(spec)
    waiting: dict[tuple[int, str, str], list[Replica]] = {}
    for each in replicas:
        new = each.pod.metadata.annotations.get(names.TEMPLATE_ANNOTATION) == template
        if new and each.gated and each.uid not in world.granted_on and not each.terminating:
            waiting.setdefault(_turn(each), []).append(each)
    places = max(min(before, int(spec.get("replicas", 0))) - _running(world, replicas), 0)
    wall = world.snapshot.wall
    still = {turn: max(_still_looks(each, wall) for each in pods) for turn, pods in waiting.items()}
    patient = [turn for turn in sorted(waiting) if still[turn] <= 0]
    looking = [seconds for seconds in still.values() if seconds > 0] if places > len(patient) else []
    uids = {each.uid for turn in patient[:places] for each in waiting[turn]}
    return uids, min(looking, default=math.inf)


def _turn(replica: Replica) -> tuple[int, str, str]:
    """Who waited longest; of groups the one of the highest number, down from which their controller replaces them."""
    if replica.group:
        number = replica.pod.metadata.labels.get(names.LWS_GROUP_LABEL, "")
        return -int(number) if number.isdecimal() else 0, "", replica.group
    return 0, replica.pod.metadata.creation_timestamp or "", replica.name


def _still_looks(replica: Replica, wall: datetime) -> float:
    """For how many seconds."""
    created = replica.pod.metadata.creation_timestamp
    if created is None:
        return PATIENCE_SECONDS
    return PATIENCE_SECONDS - (wall - datetime.fromisoformat(created)).total_seconds()


def _running(world: World, replicas: Sequence[Replica]) -> int:
    """Replicas that have watts and keep them: one that ends makes room for its successor, and half a group is none."""
    waiting = {each.uid: each.group for each in replicas if each.gated and each.uid not in world.granted_on}
    halves = set(waiting.values()) - {""}
    return _count(each for each in replicas if each.uid not in waiting and each.group not in halves)


def _count(replicas: Iterable[Replica]) -> int:
    """Groups count once."""
    return len({each.group or each.uid for each in replicas if not each.terminating and not each.finished})


def _noted(held: Workload) -> int | None:
    said = held.metadata.labels.get(names.RAN_LABEL, "")
    return int(said) if said.isdecimal() else None
