"""Which whole replicas run, where groups are so small that rounding them one by one would waste watts.

A search by branch and bound over how many replicas of each class run in each domain. What is left of the watts goes along
the order of buying; where nothing is whole that is also the bound: because limits nest, buying in order is the best that
fractions of replicas can do. Stage by stage, as everywhere: what an earlier stage reached is not given up for a later one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tokenfactory.planning.power.goods import BoolArray, IntArray
from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.purses import Purse

# So many (domain, class) pairs are searched together; more of them are split at the domains that bind.
MOST_PAIRS = 128
# Branches looked at for one site and stage. The best plan found so far is kept.
MOST_LOOKS = 600
# A branch that promises less than this much more is not looked into.
WORTH_LOOKING = 5e-4
LOOSE = 0.05
_NEARLY = 1e-6


@dataclass(frozen=True, slots=True)
class _Lot:
    """The replicas of one class in one domain."""

    pair: int
    path: tuple[int, ...]
    count: int
    """0: not in whole replicas, all of its GPUs run."""
    whole: float
    """Milliwatts that take one replica to the end of its first stretch."""
    class_index: int


@dataclass(frozen=True, slots=True)
class _Piece:
    lot: int
    stage: int
    value: float
    """Per milliwatt."""
    watts: float
    """Milliwatts per running replica; of a lot that is not in whole replicas, of all of it."""
    first: bool
    """The stretch that only whole replicas cross."""


@dataclass
class Site:
    """What is searched together: rooms by position (purses: -1 and below), lots, and pieces in the order of buying."""

    room: dict[int, float]
    lots: list[_Lot] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    stages: int = 1

    def bought(self, least: Sequence[int], most: Sequence[int]) -> tuple[list[float], list[float]] | None:
        """Value by stage and replicas that run, if between `least` and `most` of each lot do; None: do not fit."""
        room, value = dict(self.room), [0.0] * self.stages
        running = [float(count) for count in least]
        for lot, count in zip(self.lots, least, strict=True):
            for position in lot.path if count else ():
                room[position] -= count * lot.whole
                if room[position] < -_NEARLY:
                    return None
        lots = self.lots
        for piece in self.pieces:
            lot = lots[piece.lot]
            if not lot.count:
                wanted = piece.watts
            elif piece.first:
                value[piece.stage] += least[piece.lot] * piece.watts * piece.value
                wanted = (most[piece.lot] - running[piece.lot]) * piece.watts
            else:
                wanted = running[piece.lot] * piece.watts
            for position in lot.path:
                wanted = min(wanted, room[position])
            if wanted <= 0:
                continue
            for position in lot.path:
                room[position] -= wanted
            value[piece.stage] += wanted * piece.value
            if piece.first:
                running[piece.lot] += wanted / piece.watts
        return value, running


def best_whole(site: Site, needed: Mapping[int, int]) -> list[int] | None:
    """How many replicas of each lot run; None where no plan was found. `needed`: at least so many of a class run."""
    least, most = [0] * len(site.lots), [lot.count for lot in site.lots]
    best: list[int] | None = None
    for stage in sorted({piece.stage for piece in site.pieces if piece.first and site.lots[piece.lot].count}):
        found = _search(site, needed, stage, least, most, best)
        if found is None:
            return best
        best = found
        for number in {piece.lot for piece in site.pieces if piece.first and piece.stage == stage}:
            least[number] = most[number] = best[number]
    return best


def _search(
    site: Site,
    needed: Mapping[int, int],
    stage: int,
    least: Sequence[int],
    most: Sequence[int],
    start: list[int] | None,
) -> list[int] | None:
    # With purses the order of buying is not quite a bound: what promises a little less is looked into as well.
    worth = 1 + (WORTH_LOOKING if min(site.room, default=0) >= 0 else -LOOSE)
    best, reached = start, -1.0
    if start is not None and (at_start := site.bought(start, start)) is not None:
        reached = at_start[0][stage]
    first = site.bought(least, most)
    if first is None:
        return best
    queue = [(-first[0][stage], 0, tuple(least), tuple(most), first[1])]
    looks = 0
    while queue and looks < MOST_LOOKS:
        promised, _, low, high, running = heapq.heappop(queue)
        if -promised <= reached * worth:
            break
        for plan in _rounded(site, low, high, running):
            made = site.bought(plan, plan)
            if made is not None and made[0][stage] > reached and _enough(site, plan, needed):
                best, reached = plan, made[0][stage]
        split = _most_broken(site, stage, running)
        if split is None:
            continue
        for lower, upper in (
            (low[split], math.floor(running[split] + _NEARLY)),
            (math.floor(running[split] + _NEARLY) + 1, high[split]),
        ):
            looks += 1
            branch_low, branch_high = list(low), list(high)
            branch_low[split], branch_high[split] = lower, upper
            found = site.bought(branch_low, branch_high) if lower <= upper else None
            if found is not None and found[0][stage] > reached * worth:
                heapq.heappush(
                    queue, (-found[0][stage], looks, tuple(branch_low), tuple(branch_high), found[1])
                )
    return best


def _most_broken(site: Site, stage: int, running: Sequence[float]) -> int | None:
    """Of the lots that run a part of a replica the one nearest to a half, weighed by what a replica draws."""
    firsts = {piece.lot for piece in site.pieces if piece.first and piece.stage == stage}
    broken = [
        (min(part, 1 - part) * site.lots[number].whole, -number)
        for number in firsts
        if _NEARLY < (part := running[number] - math.floor(running[number])) < 1 - _NEARLY
    ]
    return -max(broken)[1] if broken else None


def _rounded(
    site: Site, low: Sequence[int], high: Sequence[int], running: Sequence[float]
) -> list[list[int]]:
    """Whole plans near a broken one: cut down; and filled up again with what then fits, in the order of buying."""
    cut = [
        min(max(math.floor(count + _NEARLY), a), b) for count, a, b in zip(running, low, high, strict=True)
    ]
    room = dict(site.room)
    for lot, count in zip(site.lots, cut, strict=True):
        for position in lot.path:
            room[position] -= count * lot.whole
    filled = list(cut)
    for piece in site.pieces:
        lot = site.lots[piece.lot]
        if not piece.first or not lot.count:
            continue
        fits = min(room[position] for position in lot.path) // lot.whole if lot.whole else math.inf
        more = int(min(max(fits, 0), high[piece.lot] - filled[piece.lot]))
        filled[piece.lot] += more
        for position in lot.path:
            room[position] -= more * lot.whole
    return [cut] if filled == cut else [filled, cut]


def _enough(site: Site, plan: Sequence[int], needed: Mapping[int, int]) -> bool:
    running: dict[int, int] = {}
    for lot, count in zip(site.lots, plan, strict=True):
        if lot.count:
            running[lot.class_index] = running.get(lot.class_index, 0) + count
    return all(running.get(number, 0) >= count for number, count in needed.items() if number in running)


def site_of(
    clearing: Clearing,
    pairs: IntArray,
    parkable: BoolArray,
    top: int,
    purses: Sequence[Purse] = (),
) -> Site:
    """The pairs below one domain, with what its parents leave it now as its room.

    A purse is one more room for those who pay from it: no plan overdraws it. The bound is then no bound any more, but
    near it, as the order of buying has the purses' prices in it.
    """
    market = clearing.market
    order, fleet, forest = market.order, market.fleet, market.forest
    goods = order.goods
    paths = {}
    for pair in pairs.tolist():
        path = forest.path(int(fleet.domain[pair]))
        paths[pair] = tuple(path[: path.index(top) + 1])
    domains = dict(paths)
    for number, purse in enumerate(purses):
        for pair in pairs[purse.members[fleet.class_index[pairs]]].tolist():
            paths[pair] = (*paths[pair], -1 - number)
    room = {p: float(max(int(clearing.budget[p]), 0)) for path in domains.values() for p in path}
    if forest.parent[top] >= 0:
        # What the parents' limits leave is what it draws now.
        room[top] = min(room[top], float(max(int(clearing.drawn[top]) - int(market.base[top]), 0)))
    for number, purse in enumerate(purses):
        mine = purse.members[fleet.class_index]
        least = int((fleet.gpus * goods.minimum[fleet.class_index])[mine].sum())
        elsewhere = np.setdiff1d(np.flatnonzero(mine), pairs)
        more = clearing.caps[elsewhere] - goods.minimum[fleet.class_index[elsewhere]]
        spent = int((fleet.gpus[elsewhere] * more).sum())
        room[-1 - number] = float(max(purse.milliwatts - least - spent, 0))
    site = Site(room, stages=goods.stages)
    cells: list[tuple[int, _Piece]] = []
    for pair in pairs.tolist():
        number = int(fleet.class_index[pair])
        each, gpus = goods.classes[number], int(fleet.gpus[pair])
        count = gpus // each.gpus_per_replica if parkable[number] else 0
        whole = float(each.gpus_per_replica * (each.milliwatts[1] - each.milliwatts[0])) if count else 0.0
        site.lots.append(_Lot(pair, paths[pair], count, whole, number))
        a, b = int(order.class_start[number]), int(order.class_start[number + 1])
        size = each.gpus_per_replica if count else gpus
        seen_first = False
        for at in range(a, b):
            cell, first = int(order.piece_cell[at]), bool(count) and int(order.piece_segment[at]) == 0
            if first and seen_first:
                continue  # a first stretch that ties cut in parts is crossed as one
            seen_first = seen_first or first
            watts = whole if first else float(size * int(order.piece_width[at]))
            value = float(order.cell_ticks[cell]) * goods.value_per_tick
            segment = int(order.piece_segment[at])
            gain = each.values[segment + 1] - each.values[segment]
            value = gain / (each.milliwatts[segment + 1] - each.milliwatts[segment])
            stage = int(order.cell_stage[cell])
            cells.append((cell, _Piece(len(site.lots) - 1, stage, value, watts, first)))
    cells.sort(key=lambda entry: (entry[0], not entry[1].first))
    site.pieces = [piece for _, piece in cells]
    return site


def parts(clearing: Clearing) -> list[tuple[int, IntArray]]:
    """(top domain, pairs below it) of what can be searched together: whole trees, or what binds apart in them."""
    market = clearing.market
    forest, fleet = market.forest, market.fleet
    live = np.flatnonzero(fleet.gpus > 0)
    owner = np.full(forest.count, -1, dtype=np.int64)
    count = np.bincount(fleet.domain[live], minlength=forest.count).astype(np.int64)
    below = forest.subtree_sums(count)
    binding = clearing.path_levels[2]
    for position in range(forest.count):
        parent = int(forest.parent[position])
        if parent >= 0 and owner[parent] >= 0:
            owner[position] = owner[parent]
        elif below[position] <= MOST_PAIRS and (parent < 0 or binding[position] == position):
            owner[position] = position
    found: dict[int, list[int]] = {}
    for pair in live.tolist():
        top = int(owner[fleet.domain[pair]])
        if top >= 0:
            found.setdefault(top, []).append(pair)
    return [(top, np.array(pairs, dtype=np.int64)) for top, pairs in sorted(found.items())]
