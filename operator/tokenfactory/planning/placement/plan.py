"""Placement: which node for which gated pod. A pure function of a snapshot."""

from typing import Final

import numpy as np

from tokenfactory.api.quantities import Milliwatts, format_power
from tokenfactory.planning.placement.filters import allowed, explain
from tokenfactory.planning.placement.fleet import UNLIMITED, Fleet
from tokenfactory.planning.placement.improve import improve
from tokenfactory.planning.placement.inputs import Placed, PlacementPlan, PodRequest, Snapshot, Unplaced
from tokenfactory.planning.placement.preferences import WEIGHTED, preference, scores
from tokenfactory.planning.placement.room import Room
from tokenfactory.planning.placement.search import ORDERS, SYSTEMATIC, Mode, Search, Unit, better, by_density
from tokenfactory.planning.placement.shape import Shape, account_indices, power_need, shape_key

WORTH_UNITS: Final = 1_000_000
SMALL_CLUSTER: Final = 20_000
"""Pods times nodes up to which several greedy orders are tried: beyond it one pod more or less is no matter."""


def plan_placement(snapshot: Snapshot, effort: int | None = None) -> PlacementPlan:
    """`effort` bounds the evaluations of the search after the greedy pass."""
    fleet = Fleet(snapshot)
    pods = tuple(sorted(snapshot.pods, key=lambda p: (p.name, p.model)))
    room = Room(fleet, pods)
    units = _units(fleet, pods)
    small = fleet.count * len(pods) <= SMALL_CLUSTER
    search = Search(room, units, effort=0)
    search.restart(by_density, mode=Mode.COMFORT)
    if small and search.unplaced():
        _try_other_orders(search)
    search.effort = search.evaluations + (_effort(fleet.count, len(pods)) if effort is None else effort)
    improve(search)
    return _report(search, pods)


def _effort(nodes: int, pods: int) -> int:
    """Small clusters are searched well; in large ones the greedy pass is near enough, and time matters."""
    return min(12_000, 100 * nodes * pods) if nodes * pods <= SMALL_CLUSTER else 200


def _units(fleet: Fleet, pods: tuple[PodRequest, ...]) -> tuple[Unit, ...]:
    shapes: dict[tuple[object, ...], Shape] = {}
    gangs: dict[str, list[tuple[int, Shape]]] = {}
    for number, pod in enumerate(pods):
        key = shape_key(pod)
        if key not in shapes:
            each = scores(fleet, pod)
            shapes[key] = Shape(
                pod,
                allowed(fleet, pod),
                power_need(fleet, pod),
                each,
                preference(each),
                account_indices(fleet, pod),
            )
        gangs.setdefault(f"gang {pod.gang}" if pod.gang else f"pod {number:09d}", []).append(
            (number, shapes[key])
        )
    share = {shape: _share(fleet, shape) for shape in shapes.values()}
    highest = max((p.value for p in pods), default=1.0) or 1.0
    return tuple(
        Unit(
            name=name,
            band=min(shape.pod.band for _, shape in members),
            worth=max(round(sum(s.pod.value for _, s in members) / highest * WORTH_UNITS), 1),
            members=tuple(members),
            gang=name.startswith("gang "),
            share=sum(share[shape] for _, shape in members),
        )
        for name, members in gangs.items()
    )


def _share(fleet: Fleet, shape: Shape) -> float:
    """The larger of its shares of the free GPUs and of the watts that all roots together have left."""
    gpus = shape.pod.gpus / max(int(fleet.free_gpus.sum()), 1)
    needs = shape.need[shape.need < UNLIMITED]
    if not needs.size:
        return gpus
    roots = fleet.headroom[np.unique(fleet.path[:, 0])]
    watts = int(np.clip(roots[roots < UNLIMITED // 2], 0, None).sum())
    return max(gpus, int(needs.min()) / watts if watts else 0.0)


def _try_other_orders(search: Search) -> None:
    best, best_score = dict(search.where), search.score
    for mode in SYSTEMATIC:
        for order in ORDERS:
            search.restart(order, mode=mode)
            if better(search.score, best_score):
                best, best_score = dict(search.where), search.score
    search.arrange(best)


def _report(search: Search, pods: tuple[PodRequest, ...]) -> PlacementPlan:
    fleet, room = search.room.fleet, search.room
    placed: list[Placed] = []
    unplaced: list[Unplaced] = []
    woken: set[int] = set()
    told: dict[tuple[Shape, ...], tuple[str, str]] = {}
    for unit in search.units:
        if unit in search.where:
            for (number, shape), node in zip(unit.members, search.where[unit], strict=True):
                wake = 0 if node in woken else int(fleet.wake[node])
                woken.add(node)
                message = _why(shape, node)
                placed.append(
                    Placed(pods[number].name, fleet.nodes[node].name, int(shape.need[node]), wake, message)
                )
            continue
        if unit.kind not in told:
            told[unit.kind] = _explain_gang(search, unit) if unit.gang else explain(room, unit.members[0][1])
        unplaced += [Unplaced(pods[number].name, *told[unit.kind]) for number, _ in unit.members]
    placed.sort(key=lambda p: p.pod)
    unplaced.sort(key=lambda u: u.pod)
    return PlacementPlan(tuple(placed), tuple(unplaced), search.evaluations)


def _why(shape: Shape, node: int) -> str:
    parts = ", ".join(
        f"{scorer.__name__.replace('_', ' ')} {score[node]:.2f}"
        for (_, scorer), score in zip(WEIGHTED, shape.scores, strict=True)
    )
    return f"{format_power(Milliwatts(int(shape.need[node])))} charged; {parts}"


def _explain_gang(search: Search, unit: Unit) -> tuple[str, str]:
    """What stops one member; or, when each alone would fit, that no NVLink domain takes all."""
    count = len(unit.members)
    most, where = search.fullest_fabric(unit)
    reason, message = explain(search.room, unit.members[0][1])
    if most == 0:
        return reason, message
    return "NVLinkDomainTooSmall", (
        f"no NVLink domain takes all {count} pods of the replica: {where} takes most, {most} of {count}"
    )
