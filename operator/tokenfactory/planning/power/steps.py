"""The order of giving up power and of giving it back, with hysteresis: nothing flaps.

    FREE → THROTTLE → DRAIN → BELOW_FLOORS → MINIMUM → EVICT

Each step comes only when the one before is not enough. Caps fall at once, whatever the step: the sheets are
the brake, and the steps say what else has to happen and what may be undone. A drain costs minutes of restart,
so a shortage must last before one is asked for. Everything is given back late and one step at a time, and
never further than the tightest moment of the time just past allows.

Memory in, memory out: the caller keeps it and passes the time.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import numpy as np

from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.parking import Parking

K = TypeVar("K", bound=Hashable)


class Step(IntEnum):
    """How far a domain had to go."""

    FREE = 0
    THROTTLE = 1
    """Classes run above their SLO floors, but below what they could use; lowest bands first."""
    DRAIN = 2
    """Replicas of the lowest band are drained and parked, so that the others keep their floors."""
    BELOW_FLOORS = 3
    """No more may be drained: what runs is throttled below its SLO floor, lowest bands first."""
    MINIMUM = 4
    """Every GPU is at NVML's minimum."""
    EVICT = 5
    """Not even that fits: pods are evicted, lowest band first."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long something must have been so before it is acted on."""

    raise_after_seconds: float = 10.0
    drain_after_seconds: float = 30.0
    give_back_after_seconds: float = 300.0
    deadband_milliwatts: int = 5_000
    """A raise smaller than this is not worth a write, unless it is the last one to the top."""


@dataclass(frozen=True, slots=True)
class Held:
    """A value that moves one way at once and the other way late."""

    value: int
    since: float
    """Since when something else has been wanted without a break."""
    bound: int
    """The most careful value wanted since then."""


def needed(clearing: Clearing, parking: Parking) -> dict[str, Step]:
    """What each domain needs now, by its own limit: `clearing` before and `parking` after parking."""
    goods, forest = clearing.market.order.goods, clearing.market.forest
    cells = clearing.market.order.cells
    after = parking.clearing
    found: dict[str, Step] = {}
    for position, name in enumerate(forest.names):
        cell = int(clearing.cell[position])
        if clearing.budget[position] < 0:
            found[name] = Step.EVICT
        elif cell >= cells:
            found[name] = Step.FREE
        elif not goods.is_floor_stage(int(clearing.market.order.cell_stage[cell])):
            found[name] = Step.THROTTLE
        elif clearing.budget[position] == 0:
            found[name] = Step.MINIMUM
        else:
            later = int(after.cell[position])
            short = later < cells and goods.is_floor_stage(int(after.market.order.cell_stage[later]))
            found[name] = Step.BELOW_FLOORS if short and _below_floor(after, position) else Step.DRAIN
    return found


def _below_floor(clearing: Clearing, position: int) -> bool:
    """Whether something that still runs is below its SLO floor because of this domain."""
    market = clearing.market
    classes, fleet = market.order.goods.classes, market.fleet
    floor = np.array([c.milliwatts[c.floor] for c in classes], dtype=np.int64)
    replica = np.array([c.gpus_per_replica for c in classes], dtype=np.int64)
    bound = clearing.path_levels[2][fleet.domain] == position
    # What is left over of a drain is less than a replica, and no reason for the next step.
    running = fleet.gpus >= replica[fleet.class_index]
    return bool((bound & running & (clearing.caps < floor[fleet.class_index])).any())


def advance(
    memory: Mapping[str, Held], wanted: Mapping[str, Step], now: float, patience: Patience
) -> dict[str, Held]:
    """The step each domain is on: up at once, down one at a time and late."""
    found: dict[str, Held] = {}
    for name, step in wanted.items():
        held = memory.get(name)
        if held is None or step >= held.value:
            found[name] = Held(int(step), now, int(step))
        elif now - held.since >= patience.give_back_after_seconds:
            found[name] = Held(held.value - 1, now, held.value - 1)
        else:
            found[name] = held
    return found


def settle_caps(
    memory: Mapping[K, Held],
    wanted: Mapping[K, int],
    ceiling: Mapping[K, int],
    now: float,
    patience: Patience,
) -> dict[K, Held]:
    """What the sheets say: a lower cap at once, a higher one late and no higher than what was wanted throughout.

    `ceiling` is the most that each is of use; what is not wanted any more is forgotten.
    """
    found: dict[K, Held] = {}
    for key, cap in wanted.items():
        held = memory.get(key)
        if held is None or cap <= held.value:
            found[key] = Held(cap, now, cap)
            continue
        far_enough = cap - held.value >= patience.deadband_milliwatts or cap >= ceiling.get(key, cap)
        if not far_enough:
            found[key] = Held(held.value, now, cap)
            continue
        bound = min(held.bound, cap) if held.bound > held.value else cap
        if now - held.since >= patience.raise_after_seconds:
            found[key] = Held(bound, now, bound)
        else:
            found[key] = Held(held.value, held.since, bound)
    return found


def settle_parked(
    memory: Mapping[K, Held], wanted: Mapping[K, int], now: float, patience: Patience
) -> dict[K, Held]:
    """How many replicas are parked: more when a shortage lasts, fewer only long after it has ended."""
    found: dict[K, Held] = {}
    for key in memory.keys() | wanted.keys():
        count = wanted.get(key, 0)
        held = memory.get(key, Held(0, now, 0))
        if count == held.value:
            if count:
                found[key] = Held(count, now, count)
            continue
        more = count > held.value
        turned = (held.bound > held.value) != more and held.bound != held.value
        since = now if turned or held.bound == held.value else held.since
        # The least further drain that the shortage asked for throughout, or the most that may come back.
        bound = count if since == now else (min(held.bound, count) if more else max(held.bound, count))
        patient = patience.drain_after_seconds if more else patience.give_back_after_seconds
        if now - since >= patient:
            bound_now = Held(bound, now, bound)
            if bound:
                found[key] = bound_now
        else:
            found[key] = Held(held.value, since, bound)
    return found


@dataclass(frozen=True, slots=True)
class Eviction:
    """GPUs to be freed of work, because not even the minimum fits."""

    domain: str
    class_name: str
    gpus: int


@dataclass(frozen=True)
class Evictions:
    """What to evict, lowest band first, and what even that leaves over a limit."""

    evictions: tuple[Eviction, ...]
    still_missing: Mapping[str, int] = field(default_factory=dict)
    """Milliwatts by domain that only switching nodes off can free."""


def evictions(clearing: Clearing) -> Evictions:
    """Which GPUs to free where the minimum does not fit: each then draws its idle watts instead of its cap."""
    market = clearing.market
    classes, fleet, forest = market.order.goods.classes, market.fleet, market.forest
    left = fleet.gpus.copy()
    freed = np.zeros(forest.count, dtype=np.int64)
    found: list[Eviction] = []
    missing: dict[str, int] = {}
    saves = np.array([max(c.milliwatts[0] - c.idle_milliwatts, 0) for c in classes], dtype=np.int64)
    order = sorted(range(fleet.gpus.size), key=lambda p: _cheapest(clearing, p))
    for position in reversed(np.flatnonzero(clearing.unfit).tolist()):
        short = -int(clearing.budget[position]) - int(freed[position])
        for pair in order:
            saved = int(saves[fleet.class_index[pair]])
            if short <= 0:
                break
            if not saved or not left[pair] or position not in forest.path(int(fleet.domain[pair])):
                continue
            count = min(-(-short // saved), int(left[pair]))
            left[pair] -= count
            short -= count * saved
            freed[forest.path(int(fleet.domain[pair]))] += count * saved
            where = forest.names[int(fleet.domain[pair])]
            found.append(Eviction(where, classes[int(fleet.class_index[pair])].name, count))
        if short > 0:
            missing[forest.names[position]] = short
    return Evictions(tuple(found), missing)


def _cheapest(clearing: Clearing, pair: int) -> tuple[int, float, int]:
    fleet, classes = clearing.market.fleet, clearing.market.order.goods.classes
    each = classes[int(fleet.class_index[pair])]
    return each.band, each.values[-1] / max(each.milliwatts[-1], 1), pair
