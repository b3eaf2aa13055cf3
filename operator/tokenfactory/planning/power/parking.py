"""Which replicas to drain and park, where the watts do not carry all of them.

Below an SLO floor, and on the bridge over a cliff, it is better that some replicas run well and the others are
parked at NVML's minimum than that all run badly. The caps alone already fit the limits; parking makes more
of the same watts. Per class and binding domain, as many replicas stay as the group's watts carry to the end
of the stretch; what is left over goes back to the market. Where groups are small that rounds too coarsely: there the
best whole numbers are searched for (`whole.py`), and of both plans the one that makes more is taken.

A curve may have a second cliff further up. A class has one cap in a domain, so between two knees all of its GPUs make
little more than at the lower one: there fewer replicas at the upper knee are tried, and kept where they make more.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.planning.power.forest import Fleet
from tokenfactory.planning.power.goods import BoolArray, Goods, IntArray, PowerClass, firsts_first
from tokenfactory.planning.power.market import Clearing, Market
from tokenfactory.planning.power.purses import Purse
from tokenfactory.planning.power.whole import Effort, best_whole, grouped, site_of

# Watts left over by one round of parking can ask for another; by then they are less than a replica's.
ROUNDS = 8
# How often the budgets are settled anew, at most, to see who of the parked may run again.
GIVING_BACK = 32


@dataclass(frozen=True)
class Parking:
    """What runs where after parking."""

    clearing: Clearing
    """Of the GPUs that keep running; the parked ones are part of `committed`."""
    parked: Mapping[tuple[str, str], int]
    """Replicas by (domain, class)."""

    def value(self) -> float:
        return self.clearing.value()


def park(
    clearing: Clearing,
    clear: Callable[[Market], Clearing] | None = None,
    purses: Sequence[Purse] = (),
) -> Parking:
    """Parks replicas until no class that should not be is caught on a stretch that a GPU cannot use.

    `clear` clears the market of what keeps running; with purses it must be one that settles them anew
    (`budgets.settle`, with the order's `firsts`), since fewer GPUs may spend more each. Default: the same order, the same limits.
    """
    market = clearing.market
    limits = clearing.limits
    clear_again = clear or (lambda running: running.clear(limits))
    classes, fleet = market.order.goods.classes, market.fleet
    may_park = _may_park(classes, fleet)
    nobody = np.zeros(fleet.gpus.size, dtype=np.int64)
    after, parked = _in_rounds(clearing, clearing, nobody, may_park, clear_again)
    if parked.any():
        found, firsts = _searched(clearing, may_park, purses)
        if found.any():
            ordered = Market(
                market.forest, firsts_first(market.order, firsts), market.fleet, market.committed
            )
            begun = clear_again(_running(ordered, found))
            other, sleeping = _in_rounds(begun, clearing, found, may_park, clear_again)
            if _made(other) > _made(after):
                after, parked = other, sleeping
    if purses and parked.any():
        after, parked = _given_back(clearing, after, parked, clear_again)
    clearing = after
    names = market.forest.names
    replicas = {
        (names[int(fleet.domain[pair])], classes[int(fleet.class_index[pair])].name): int(
            parked[pair] // classes[int(fleet.class_index[pair])].gpus_per_replica
        )
        for pair in np.flatnonzero(parked)
    }
    return Parking(clearing, replicas)


def _in_rounds(
    clearing: Clearing,
    whole: Clearing,
    parked: IntArray,
    may_park: IntArray,
    clear_again: Callable[[Market], Clearing],
) -> tuple[Clearing, IntArray]:
    """Parks until nobody is caught any more. `whole` is the market with nobody parked, `parked` who is already."""
    everything = replace(clearing.market, fleet=whole.market.fleet, committed=whole.market.committed)
    for _ in range(ROUNDS):
        more = _one_round(clearing, parked, may_park)
        needed = more.any()
        if not needed:
            more = _over_bridges(clearing, parked, may_park)
        if not more.any():
            break
        after = clear_again(_running(everything, parked + more))
        if not needed and _made(after) <= _made(clearing):
            break
        parked, clearing = parked + more, after
    return clearing, parked


def _given_back(
    whole: Clearing, after: Clearing, parked: IntArray, clear_again: Callable[[Market], Clearing]
) -> tuple[Clearing, IntArray]:
    """What a parked replica no longer takes from a budget may carry others: as many run again as do so uncaught.

    Classes of which most are parked come first; where there are very many, the last may wait for their own watts.
    """
    classes, fleet = whole.market.order.goods.classes, whole.market.fleet
    everything = replace(after.market, fleet=fleet, committed=whole.market.committed)
    tries = GIVING_BACK
    parked_of = np.bincount(fleet.class_index, parked, len(classes))
    for number in np.argsort(-parked_of, kind="stable")[: np.count_nonzero(parked_of)].tolist():
        mine = np.flatnonzero((fleet.class_index == number) & (parked > 0))
        size = classes[number].gpus_per_replica
        asleep = parked[mine] // size
        least, most = 0, int(asleep.sum())
        while least < most and tries > 0:
            tries -= 1
            middle = (least + most + 1) // 2
            fewer = parked.copy()
            fewer[mine] = (asleep - _share_out(middle, asleep)) * size
            again = clear_again(_running(everything, fewer))
            if not caught_on_a_cliff(again).any() and _made(again) > _made(after):
                least, after, parked = middle, again, fewer
            else:
                most = middle - 1
    return after, parked


def _searched(clearing: Clearing, may_park: IntArray, purses: Sequence[Purse]) -> tuple[IntArray, BoolArray]:
    """GPUs to park by pair, and the classes of which every replica was decided on."""
    goods, fleet = clearing.market.order.goods, clearing.market.fleet
    parkable = crossed_whole(goods)
    caught = caught_on_a_cliff(clearing)
    parked = np.zeros(fleet.gpus.size, dtype=np.int64)
    decided = np.zeros(fleet.gpus.size, dtype=np.bool_)
    spare = may_park.copy()
    effort = Effort()
    for group in grouped(clearing, purses):
        pairs = np.concatenate([mine for _, mine in group])
        if not caught[pairs].any():
            decided[pairs] = True  # all of them run
            continue
        site = site_of(clearing, group, parkable, purses, effort)
        standing: dict[int, int] = {}
        for lot in site.lots:
            standing[lot.class_index] = standing.get(lot.class_index, 0) + lot.count
        needed = {number: count - int(spare[number]) for number, count in standing.items() if count}
        plan = best_whole(site, needed)
        for lot, count in zip(site.lots, plan or (), strict=plan is not None):
            decided[lot.pair] = True
            if lot.count:
                parked[lot.pair] = (lot.count - count) * goods.classes[lot.class_index].gpus_per_replica
                spare[lot.class_index] -= lot.count - count
    firsts = parkable.copy()
    firsts[fleet.class_index[~decided & (fleet.gpus > 0)]] = False
    return parked, firsts


def crossed_whole(goods: Goods) -> BoolArray:
    """Classes whose first stretch only whole replicas cross, by index: see `goods.firsts_first`."""
    return np.array([_only_whole(each) for each in goods.classes], dtype=np.bool_)


def _only_whole(each: PowerClass) -> bool:
    """Whether no cap on the first stretch is as good as a share of the replicas at its end."""
    if len(each.milliwatts) < 2 or not each.is_chord(0):
        return False
    low, high = each.milliwatts[:2]
    inside = [watts for watts, _ in each.curve if low < watts < high] or [(low + high) // 2]
    return all(parks_better(each, watts) for watts in inside)


def _made(clearing: Clearing) -> tuple[float, ...]:
    """What the running replicas really make, stage by stage: nothing on a stretch that only whole replicas cross, and on
    a bridge further up what the curve below it makes.
    """
    goods, fleet, caps = clearing.market.order.goods, clearing.market.fleet, clearing.caps
    made = np.zeros(goods.stages)
    for number, each in enumerate(goods.classes):
        mine = fleet.class_index == number
        if not mine.any():
            continue
        for at in np.flatnonzero(goods.piece_class == number):
            segment = int(goods.piece_segment[at])
            low, width = each.milliwatts[segment], int(goods.piece_width[at])
            bought = np.clip(caps[mine] - low, 0, width)
            if segment == 0 and _only_whole(each):
                bought = np.where(bought >= width, width, 0)
            gain = (each.values[segment + 1] - each.values[segment]) / width
            value = bought * gain
            if segment > 0 and each.is_chord(segment):
                value = np.array([_on_bridge(each, segment, int(part), width) for part in bought])
            made[goods.piece_stage[at]] += float((value * fleet.gpus[mine]).sum())
    # Less than a part in a million is rounding, and no reason to prefer a plan.
    scale = max(float(made.sum()), 1e-12) * 1e-6
    return tuple(float(round(value / scale)) * scale for value in made)


def _on_bridge(each: PowerClass, segment: int, bought: int, width: int) -> float:
    """Value that so many watts of a bridge bring a GPU."""
    if bought >= width:
        return each.values[segment + 1] - each.values[segment]
    tokens = each.tokens_at(each.milliwatts[segment] + bought) - each.tokens[segment]
    return max(tokens, 0.0) * each.value_per_token


def _running(market: Market, parked: IntArray) -> Market:
    """The market without the parked GPUs, which go on drawing their minimum."""
    fleet = market.fleet
    committed = market.committed.copy()
    np.add.at(committed, fleet.domain, parked * market.order.goods.minimum[fleet.class_index])
    return Market(market.forest, market.order, replace(fleet, gpus=fleet.gpus - parked), committed)


def _may_park(classes: tuple[PowerClass, ...], fleet: Fleet) -> IntArray:
    """Replicas of each class that may be drained: all but the fewest that its factory asks for."""
    per_replica = np.array([c.gpus_per_replica for c in classes], dtype=np.int64)
    least = np.array([c.min_replicas for c in classes], dtype=np.int64)
    replicas = np.zeros(per_replica.size, dtype=np.int64)
    np.add.at(replicas, fleet.class_index, fleet.gpus // per_replica[fleet.class_index])
    spare: IntArray = np.maximum(replicas - least, 0)
    return spare


@dataclass(frozen=True)
class _Group:
    """The replicas of a class that one domain binds, and what they have."""

    each: PowerClass
    count: int
    watts: int
    """Milliwatts above the minimum, of all together."""
    cap: int
    spare: int
    """How many of them may be parked."""


def _one_round(clearing: Clearing, parked: IntArray, may_park: IntArray) -> IntArray:
    """GPUs to park in addition, by pair."""
    return _all_but(_at_the_end, clearing, parked, may_park, caught_on_a_cliff(clearing))


def _at_the_end(group: _Group) -> int:
    """As many replicas as the watts carry over the first stretch."""
    low, high = group.each.milliwatts[:2]
    return min(group.watts // (group.each.gpus_per_replica * (high - low)), group.count)


def _over_bridges(clearing: Clearing, parked: IntArray, may_park: IntArray) -> IntArray:
    """GPUs to park, by pair, so that the others get over a bridge on which their watts bring little."""
    return _all_but(_beyond_the_bridge, clearing, parked, may_park, _on_bridges(clearing))


def _beyond_the_bridge(group: _Group) -> int:
    """As many replicas as make most at the end of any stretch further up; all, if none makes more."""
    each, carried = group.each, group.count
    most = group.count * each.tokens_at(group.cap)
    for end, tokens in zip(each.milliwatts, each.tokens, strict=True):
        above = each.gpus_per_replica * (end - each.milliwatts[0])
        running = group.watts // above if end > group.cap else 0
        if group.count - group.spare <= running < group.count and running * tokens > most:
            carried, most = running, running * tokens
    return carried


def _all_but(
    carried: Callable[[_Group], int],
    clearing: Clearing,
    parked: IntArray,
    may_park: IntArray,
    which: BoolArray,
) -> IntArray:
    """GPUs to park, by pair: of every group among those that are meant, the replicas that are not carried."""
    market, caps = clearing.market, clearing.caps
    classes, fleet = market.order.goods.classes, market.fleet
    more = np.zeros(caps.size, dtype=np.int64)
    left = _left(clearing, parked, may_park)
    for number, members in _groups(clearing, which):
        each = classes[number]
        replicas = fleet.gpus[members] // each.gpus_per_replica
        watts = int((fleet.gpus[members] * (caps[members] - each.milliwatts[0])).sum())
        cap, spare = int(caps[members].min()), int(left[number])
        group = _Group(each, int(replicas.sum()), watts, cap, spare)
        to_park = min(group.count - carried(group), spare)
        if to_park > 0:
            left[number] -= to_park
            more[members] = _share_out(to_park, replicas) * each.gpus_per_replica
    return more


def _groups(clearing: Clearing, which: BoolArray) -> list[tuple[int, IntArray]]:
    """Of the pairs that are meant: class, and those of it that one domain binds."""
    fleet = clearing.market.fleet
    binding = clearing.path_levels[2][fleet.domain]
    groups: dict[tuple[int, int], list[int]] = {}
    for pair in np.flatnonzero(which & (fleet.gpus > 0)):
        groups.setdefault((int(fleet.class_index[pair]), int(binding[pair])), []).append(int(pair))
    return [(number, np.array(pairs)) for (number, _), pairs in sorted(groups.items())]


def _left(clearing: Clearing, parked: IntArray, may_park: IntArray) -> IntArray:
    """Replicas of each class that may still be parked."""
    fleet = clearing.market.fleet
    left = may_park.copy()
    per_replica = _per_replica(clearing.market.order.goods.classes)
    np.subtract.at(left, fleet.class_index, parked // per_replica[fleet.class_index])
    return left


def _on_bridges(clearing: Clearing) -> BoolArray:
    """Pairs whose cap is on a bridge, but not on a first stretch."""
    market = clearing.market
    classes, fleet, caps = market.order.goods.classes, market.fleet, clearing.caps
    bridged = np.array([any(map(each.is_chord, range(1, len(each.milliwatts) - 1))) for each in classes])
    found = np.zeros(caps.size, dtype=np.bool_)
    for pair in np.flatnonzero(bridged[fleet.class_index]):
        each, cap = classes[int(fleet.class_index[pair])], int(caps[pair])
        at = bisect_right(each.milliwatts, cap) - 1
        found[pair] = 0 < at < len(each.milliwatts) - 1 and cap > each.milliwatts[at] and each.is_chord(at)
    return found


def _per_replica(classes: tuple[PowerClass, ...]) -> IntArray:
    return np.array([c.gpus_per_replica for c in classes], dtype=np.int64)


def caught_on_a_cliff(clearing: Clearing) -> BoolArray:
    """Pairs whose cap is on a first stretch that is better parked than run."""
    market = clearing.market
    classes, fleet, caps = market.order.goods.classes, market.fleet, clearing.caps
    first_end = np.array([c.milliwatts[1] if len(c.milliwatts) > 1 else 0 for c in classes], dtype=np.int64)
    caught = np.array([len(c.milliwatts) > 1 and c.is_chord(0) for c in classes], dtype=np.bool_)
    suspects = np.flatnonzero(caught[fleet.class_index] & (caps < first_end[fleet.class_index]))
    found = np.zeros(caps.size, dtype=np.bool_)
    for pair in suspects:
        each = classes[int(fleet.class_index[pair])]
        found[pair] = parks_better(each, int(caps[pair]))
    return found


def parks_better(each: PowerClass, cap: int) -> bool:
    """Whether a share of the replicas at the end of the first stretch beats all of them at this cap."""
    if each.floor > 0:
        return True  # below the SLO floor nobody is served as promised
    low, high = each.milliwatts[0], each.milliwatts[1]
    share = (cap - low) / (high - low)
    return share * each.tokens[1] > each.tokens_at(cap)


def _share_out(count: int, replicas: IntArray) -> IntArray:
    """Splits a count over domains in proportion; the largest remainders get one more, the first ones on a tie."""
    exact = count * replicas / max(int(replicas.sum()), 1)
    given = np.floor(exact).astype(np.int64)
    missing = count - int(given.sum())
    given[np.argsort(-(exact - given), kind="stable")[:missing]] += 1
    return np.minimum(given, replicas)
