"""Which whole replicas run, where groups are so small that rounding them one by one would waste watts.

A search by branch and bound over how many replicas of each class run in each domain. What is left of the watts goes along
the order of buying; where nothing is whole that is also the bound: because limits nest, buying in order is the best that
fractions of replicas can do. A purse is no part of that nest, so for the bound its watts have a price instead of a limit:
at any price what is bought then promises no less than the best (weak duality), and a few steps find one at which it promises
little more. Stage by stage, as everywhere: what an earlier stage reached is not given up for a later one.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tokenfactory.planning.power.goods import BoolArray, IntArray, Order
from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.purses import Purse

# So many (domain, class) pairs are searched together; more of them are split at the domains that bind.
MOST_PAIRS = 128
# Branches looked at for one site and stage. The best plan found so far is kept.
MOST_LOOKS = 2400
# And all branches of all sites and stages together: a plan that comes too late is worth nothing.
MOST_EFFORT = 2_000_000
# A branch that promises less than this much more is not looked into.
WORTH_LOOKING = 5e-4
# How often the prices of purses are bettered for the first branch, and for each later one from those of the one before.
FIRST_PRICINGS = 60
PRICINGS = 8
_NEARLY = 1e-6


@dataclass(frozen=True, slots=True)
class _Lot:
    """The replicas of one class in one domain."""

    pair: int
    domains: tuple[int, ...]
    purses: tuple[int, ...]
    count: int
    """0: not in whole replicas, all of its GPUs run."""
    whole: float
    """Milliwatts that take one replica to the end of its first stretch."""
    class_index: int

    @property
    def path(self) -> tuple[int, ...]:
        """Every room that its watts come from."""
        return self.domains + self.purses


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


Part = tuple[int, IntArray]
"""A top domain, and the (domain, class) pairs below it."""

Prices = tuple[float, ...]
"""Of each purse, per milliwatt."""

_Offers = list[tuple[_Piece, float, _Lot]]
"""Pieces, what each is worth beyond the prices of the purses that it is paid from, and whose they are."""


@dataclass(frozen=True, slots=True)
class _Promise:
    """What a branch can make at most, by the prices of purses at which that was found."""

    value: float
    running: list[float]
    prices: Prices


@dataclass
class Effort:
    """What all searches of one plan may still cost together, in pieces bought on trial: the best found by then is kept."""

    left: int = MOST_EFFORT


@dataclass
class Site:
    """What is searched together: rooms by position (purses: -1 and below), lots, and pieces in the order of buying."""

    room: dict[int, float]
    lots: list[_Lot] = field(default_factory=list)
    pieces: list[_Piece] = field(default_factory=list)
    stages: int = 1
    effort: Effort = field(default_factory=Effort)
    _last: tuple[Prices, _Offers] | None = field(default=None, init=False)

    @cached_property
    def purses(self) -> int:
        return sum(position < 0 for position in self.room)

    def in_order(self, prices: Prices) -> _Offers:
        """As they are bought where purses have these prices; without purses as they are. The last answer is kept: a
        branch asks several times.
        """
        if self._last is None or self._last[0] != prices:
            self._last = prices, self._in_order(prices)
        return self._last[1]

    def _in_order(self, prices: Prices) -> _Offers:
        if not self.purses:
            return [(piece, piece.value, self.lots[piece.lot]) for piece in self.pieces]
        dues = [sum(prices[-1 - purse] for purse in lot.purses) if prices else 0.0 for lot in self.lots]
        offers = [(piece, piece.value - dues[piece.lot], self.lots[piece.lot]) for piece in self.pieces]
        return sorted(offers, key=lambda offer: (offer[0].stage, -offer[1]))

    def bought(
        self, least: Sequence[int], most: Sequence[int], prices: Prices = ()
    ) -> tuple[list[float], list[float]] | None:
        """Value by stage and replicas that run, if between `least` and `most` of each lot do; None: do not fit."""
        self.effort.left -= len(self.pieces)
        room = self._left(least)
        if room is None:
            return None
        value, running = [0.0] * self.stages, [float(count) for count in least]
        for piece, _, lot in self.in_order(prices):
            if piece.first:
                value[piece.stage] += least[piece.lot] * piece.watts * piece.value
            taken = _take(piece, lot, room, lot.path, most, running)
            value[piece.stage] += taken * piece.value
        return value, running

    def promised(
        self, least: Sequence[int], most: Sequence[int], stage: int, prices: Prices
    ) -> tuple[float, list[float], list[float]] | None:
        """No plan makes more in this stage, if stages before it buy in order; with the replicas that would run, and what
        each purse would have left.
        """
        self.effort.left -= len(self.pieces)
        room = self._left(least)
        if room is None:
            return None
        value, running = 0.0, [float(count) for count in least]
        for piece, net, lot in self.in_order(prices):
            if piece.stage > stage:
                break
            if piece.stage == stage and piece.first:
                value += least[piece.lot] * piece.watts * piece.value
            if piece.stage < stage:
                _take(piece, lot, room, lot.path, most, running)
            elif net > 0:
                taken = _take(piece, lot, room, lot.domains, most, running)
                value += taken * piece.value
                for purse in lot.purses:
                    room[purse] -= taken
        left = [room[-1 - number] for number in range(self.purses)]
        value += sum(price * milliwatts for price, milliwatts in zip(prices, left, strict=True))
        return value, running, left

    def _left(self, running: Sequence[int]) -> dict[int, float] | None:
        """The rooms once these replicas have crossed their first stretch; None: they do not fit."""
        room = dict(self.room)
        for lot, count in zip(self.lots, running, strict=True):
            for position in lot.path if count else ():
                room[position] -= count * lot.whole
                if room[position] < -_NEARLY:
                    return None
        return room


def _take(
    piece: _Piece,
    lot: _Lot,
    room: dict[int, float],
    path: Sequence[int],
    most: Sequence[int],
    running: list[float],
) -> float:
    """What a piece takes of these rooms."""
    if not lot.count:
        wanted = piece.watts
    elif piece.first:
        wanted = (most[piece.lot] - running[piece.lot]) * piece.watts
    else:
        wanted = running[piece.lot] * piece.watts
    if wanted <= 0:
        return 0.0
    for position in path:
        left = room[position]
        wanted = min(wanted, left)
    if wanted <= 0:
        return 0.0
    for position in path:
        room[position] -= wanted
    if piece.first:
        running[piece.lot] += wanted / piece.watts
    return wanted


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
    best, reached = start, -1.0
    if start is not None and (at_start := site.bought(start, start)) is not None:
        reached = at_start[0][stage]
    first = _promise(site, least, most, stage, (0.0,) * site.purses, reached)
    if first is None:
        return best
    queue = [(-first.value, 0, tuple(least), tuple(most), first)]
    looks = 0
    while queue and looks < MOST_LOOKS and site.effort.left > 0:
        _, _, low, high, promise = heapq.heappop(queue)
        if promise.value <= reached * (1 + WORTH_LOOKING):
            break
        near = [promise.running]
        if site.purses and (filled := site.bought(low, high, promise.prices)) is not None:
            near.append(filled[1])
        for plan in [plan for running in near for plan in _rounded(site, low, high, running, promise.prices)]:
            made = site.bought(plan, plan, promise.prices)
            if made is not None and made[0][stage] > reached and _enough(site, plan, needed):
                best, reached = plan, made[0][stage]
        at = _split(site, stage, low, high, near)
        if at is None:
            continue
        number, count = at
        for lower, upper in ((low[number], count), (count + 1, high[number])):
            looks += 1
            branch_low, branch_high = list(low), list(high)
            branch_low[number], branch_high[number] = lower, upper
            worth = reached * (1 + WORTH_LOOKING)
            found = _promise(site, branch_low, branch_high, stage, promise.prices, worth)
            if found is not None and found.value > worth:
                heapq.heappush(queue, (-found.value, looks, tuple(branch_low), tuple(branch_high), found))
    return best


def _promise(
    site: Site, least: Sequence[int], most: Sequence[int], stage: int, prices: Prices, worth: float
) -> _Promise | None:
    """The least that is found to bound a branch; None: nothing of it fits. No further than to what is not worth it."""
    best: _Promise | None = None
    if worth <= 0 and site.purses and (filled := site.bought(least, most, prices)) is not None:
        worth = filled[0][stage]
    for _ in range((FIRST_PRICINGS if not any(prices) else PRICINGS) if site.purses else 1):
        found = site.promised(least, most, stage, prices)
        if found is None:
            return None
        value, running, left = found
        if best is None or value < best.value:
            best = _Promise(value, running, prices)
        # A price falls where its purse has watts left and rises where it is overdrawn, as far as it takes to get there
        # if nothing else changed (Polyak's step).
        moving = [each if price > 0 or each < 0 else 0.0 for price, each in zip(prices, left, strict=True)]
        size = sum(each * each for each in moving)
        if value <= worth or not size:
            break
        step = (value - worth) / size
        prices = tuple(max(price - step * each, 0.0) for price, each in zip(prices, moving, strict=True))
    return best


def _split(
    site: Site, stage: int, low: Sequence[int], high: Sequence[int], near: Sequence[Sequence[float]]
) -> tuple[int, int] | None:
    """The lot to branch on, and how many of its replicas run at most in the lower branch."""
    for running in near:
        broken = _most_broken(site, stage, running)
        if broken is not None:
            return broken, math.floor(running[broken] + _NEARLY)
    # All are whole, and yet more is promised than made: the purses' watts go elsewhere above the first stretches.
    open_lots = [
        (abs(near[0][at] - near[-1][at]), (high[at] - low[at]) * lot.whole, -at)
        for at, lot in enumerate(site.lots)
        if high[at] > low[at]
    ]
    if not site.purses or not open_lots:
        return None
    number = -max(open_lots)[2]
    return number, min(math.floor(near[0][number] + _NEARLY), high[number] - 1)


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
    site: Site, low: Sequence[int], high: Sequence[int], running: Sequence[float], prices: Prices
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
    for piece, _, lot in site.in_order(prices):
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
    group: Sequence[Part],
    parkable: BoolArray,
    purses: Sequence[Purse] = (),
    effort: Effort | None = None,
) -> Site:
    """The pairs below some domains, each with what its parents leave it now as its room.

    A purse is one more room for those who pay from it: no plan overdraws it.
    """
    market = clearing.market
    order, fleet, forest = market.order, market.fleet, market.forest
    goods = order.goods
    domains: dict[int, tuple[int, ...]] = {}
    pairs = np.concatenate([below for _, below in group])
    payers: dict[int, tuple[int, ...]] = {}
    for top, below in group:
        for pair in below.tolist():
            path = forest.path(int(fleet.domain[pair]))
            domains[pair] = tuple(path[: path.index(top) + 1])
    for number, purse in enumerate(purses):
        for pair in pairs[purse.members[fleet.class_index[pairs]]].tolist():
            payers[pair] = (*payers.get(pair, ()), -1 - number)
    room = {p: float(max(int(clearing.budget[p]), 0)) for path in domains.values() for p in path}
    for top in (top for top, _ in group if forest.parent[top] >= 0):
        # What the parents' limits leave is what it draws now.
        room[top] = min(room[top], float(max(int(clearing.drawn[top]) - int(market.base[top]), 0)))
    for number, purse in enumerate(purses):
        mine = purse.members[fleet.class_index]
        least = int((fleet.gpus * goods.minimum[fleet.class_index])[mine].sum())
        elsewhere = np.setdiff1d(np.flatnonzero(mine), pairs)
        more = clearing.caps[elsewhere] - goods.minimum[fleet.class_index[elsewhere]]
        spent = int((fleet.gpus[elsewhere] * more).sum())
        room[-1 - number] = float(max(purse.milliwatts - least - spent, 0))
    site = Site(room, stages=goods.stages, effort=effort or Effort())
    cells: list[tuple[int, _Piece]] = []
    on_sale = _on_sale(order, at_any_price=bool(purses))
    for pair in pairs.tolist():
        number = int(fleet.class_index[pair])
        each, gpus = goods.classes[number], int(fleet.gpus[pair])
        count = gpus // each.gpus_per_replica if parkable[number] else 0
        whole = float(each.gpus_per_replica * (each.milliwatts[1] - each.milliwatts[0])) if count else 0.0
        site.lots.append(_Lot(pair, domains[pair], payers.get(pair, ()), count, whole, number))
        size = each.gpus_per_replica if count else gpus
        seen_first = False
        for cell, segment, stage, width in on_sale[number]:
            first = bool(count) and segment == 0
            if first and seen_first:
                continue  # a first stretch that ties cut in parts is crossed as one
            seen_first = seen_first or first
            watts = whole if first else float(size * width)
            gain = each.values[segment + 1] - each.values[segment]
            value = gain / (each.milliwatts[segment + 1] - each.milliwatts[segment])
            cells.append((cell, _Piece(len(site.lots) - 1, stage, value, watts, first)))
    cells.sort(key=lambda entry: (entry[0], not entry[1].first))
    site.pieces = [piece for _, piece in cells]
    return site


def _on_sale(order: Order, *, at_any_price: bool) -> dict[int, list[tuple[int, int, int, int]]]:
    """By class: (cell, segment, stage, width) of every piece that is bought at the order's prices, or at any."""
    found: dict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
    if at_any_price:
        goods = order.goods
        kept = np.ones(goods.piece_class.size, dtype=np.bool_) if order.left_out is None else ~order.left_out
        classes, segments = goods.piece_class[kept], goods.piece_segment[kept]
        stages, widths = goods.piece_stage[kept], goods.piece_width[kept]
        cells = np.zeros(classes.size, dtype=np.int64)
    else:
        classes, segments, cells = order.piece_class, order.piece_segment, order.piece_cell
        stages, widths = order.cell_stage[cells], order.piece_width
    rows = zip(*(each.tolist() for each in (cells, segments, stages, widths)), strict=True)
    for number, row in zip(classes.tolist(), rows, strict=True):
        found[number].append(row)
    return found


def grouped(clearing: Clearing, purses: Sequence[Purse]) -> list[list[Part]]:
    """The parts, those that pay from one purse together, as far as they are few enough."""
    groups: list[list[Part]] = []
    paying: list[BoolArray] = []
    for part in parts(clearing):
        classes = clearing.market.fleet.class_index[part[1]]
        pays = np.array([purse.members[classes].any() for purse in purses], dtype=np.bool_)
        for at, group in enumerate(groups):
            if (pays & paying[at]).any() and sum(mine.size for _, mine in (*group, part)) <= MOST_PAIRS:
                group.append(part)
                paying[at] |= pays
                break
        else:
            groups.append([part])
            paying.append(pays)
    return groups


def parts(clearing: Clearing) -> list[Part]:
    """What can be searched together: whole trees, or what binds apart in them."""
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
