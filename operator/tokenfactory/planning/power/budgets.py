"""Budgets that cut across the tree: a factory's own ceiling, or a namespace's.

Such a budget (a *purse*) has a price of its own, which adds to the domains' prices for its classes.
The right price is the lowest at which the purse is not overdrawn. Between two prices at which the
order of buying changes nothing changes; at such a price pieces tie, and the purse's delay within the
tie makes what it pays change without a jump. So each purse is met to the last watt worth talking
about, and the result is still one order of buying for the whole tree.

Raising one purse's price frees watts for the others, which may then overdraw theirs: the purses take
turns until none does. Prices are compared stage by stage, so a higher band never pays for a lower.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from tokenfactory.planning.power.forest import Fleet, Forest
from tokenfactory.planning.power.goods import (
    TURN,
    Adder,
    BoolArray,
    Goods,
    IntArray,
    distinct,
    net_prices,
    put_in_order,
    ranks,
)
from tokenfactory.planning.power.market import Clearing, Market

# A search for a price ends when this part of the purse is spent; a priced purse that spends less than
# LEAST_SPENT is priced anew. Both are well inside the 0.1 % that may be lost.
SPENT = 0.999998
LEAST_SPENT = 0.99995
TURNS = 15
SPLITS = 40
CUT_STEPS = 50
# A purse whose delay moves by less from turn to turn does not take part when several are moved together.
STANDS_STILL = TURN // 500
# More than any piece is worth, in a stage's entry of a price.
PROHIBITIVE = 1 << 50


@dataclass(frozen=True)
class Purse:
    """A ceiling on the caps of all GPUs of some classes, wherever they stand."""

    name: str
    members: BoolArray
    """By class index."""
    milliwatts: int


@dataclass(frozen=True)
class Settled:
    """The market with every purse within its budget."""

    clearing: Clearing
    adders: Mapping[str, Adder]
    """By purse; those that cost nothing are left out."""
    spent: Mapping[str, int]
    """Milliwatts by purse."""
    overdrawn: tuple[str, ...]
    """Purses that not even NVML's minimum fits."""


@dataclass(frozen=True)
class _Site:
    forest: Forest
    goods: Goods
    fleet: Fleet
    committed: IntArray
    limits: IntArray
    price_floors: Mapping[int, float] | None

    def clear(self, adders: Mapping[str, Adder]) -> Clearing:
        order = put_in_order(self.goods, adders.values(), self.price_floors)
        return Market(self.forest, order, self.fleet, self.committed).clear(self.limits)

    def spent(self, clearing: Clearing, purse: Purse) -> int:
        mine = purse.members[self.fleet.class_index]
        return int((self.fleet.gpus * clearing.caps)[mine].sum())

    def overdraws(self, clearing: Clearing, purse: Purse, adders: Mapping[str, Adder]) -> bool:
        """Whether it spends too much and could still be made to spend less."""
        closed = purse.name in adders and adders[purse.name].price == _prohibitive(self.goods, purse).price
        return not closed and self.spent(clearing, purse) > purse.milliwatts


def settle(
    forest: Forest,
    goods: Goods,
    fleet: Fleet,
    committed: IntArray,
    limits: IntArray,
    purses: tuple[Purse, ...] = (),
    price_floors: Mapping[int, float] | None = None,
) -> Settled:
    """Clears the market within the limits of the tree and of every purse."""
    site = _Site(forest, goods, fleet, committed, limits, price_floors)
    adders: dict[str, Adder] = {}
    clearing = site.clear(adders)
    found: dict[str, Adder] = {}
    for turn in range(2 * TURNS):
        moved = [p for p in purses if _take_turn(site, adders, p, may_fall=turn < TURNS)]
        if not moved:
            break
        chasing = [p for p in moved if _apart(found.get(p.name), adders.get(p.name)) > STANDS_STILL]
        found = dict(adders)
        for together in _coupled(goods, adders, chasing) if turn else ():
            _move_together(site, adders, together, may_fall=turn < TURNS)
    clearing = site.clear(adders)
    # Should the turns not have come to an end, a purse buys nothing rather than too much. What it leaves may
    # overdraw another, so all are asked again.
    while overdrawn := [p for p in purses if site.overdraws(clearing, p, adders)]:
        adders[overdrawn[0].name] = _prohibitive(goods, overdrawn[0])
        clearing = site.clear(adders)
    spent = {p.name: site.spent(clearing, p) for p in purses}
    return Settled(clearing, adders, spent, tuple(p.name for p in purses if spent[p.name] > p.milliwatts))


def _take_turn(site: _Site, adders: dict[str, Adder], purse: Purse, *, may_fall: bool) -> bool:
    """Sets one purse's price anew if it is overdrawn, or priced without need."""
    spent = site.spent(site.clear(adders), purse)
    slack = may_fall and purse.name in adders and spent < LEAST_SPENT * purse.milliwatts
    if spent <= purse.milliwatts and not slack:
        return False
    before = adders.pop(purse.name, None)
    found = _lowest_price(site, adders, purse, before.price if before else ())
    if found is not None:
        adders[purse.name] = found
    return found != before


def _apart(one: Adder | None, other: Adder | None) -> int:
    """How far two prices of a purse are from each other, in delay; a whole turn if they differ in more."""
    if one is None or other is None or one.price != other.price:
        return 0 if one is other else TURN
    return abs(one.delay - other.delay)


def _coupled(goods: Goods, adders: Mapping[str, Adder], moved: list[Purse]) -> list[list[Purse]]:
    """Purses that moved and have pieces in one tie: what one gives up there the next one takes."""
    net, _ = net_prices(goods, adders.values())
    group = ranks(net)
    clusters: list[tuple[set[int], list[Purse]]] = []
    for purse in moved:
        ties = set(group[purse.members[goods.piece_class]].tolist())
        together = [purse]
        for other in [c for c in clusters if c[0] & ties]:
            clusters.remove(other)
            ties |= other[0]
            together += other[1]
        clusters.append((ties, together))
    return [c[1] for c in clusters if len(c[1]) > 1]


def _move_together(site: _Site, adders: dict[str, Adder], together: list[Purse], *, may_fall: bool) -> None:
    """Moves several purses by the same price, as far as their sum asks for: one by one they would only
    hand the overdraft to each other, in ever so small steps.
    """
    free = Adder(together[0].members, (0,) * site.goods.stages, 0)
    own = {p.name: adders.get(p.name, free) for p in together}
    least = min(own.values(), key=lambda a: (a.price, a.delay)) if may_fall else free
    for purse in together:
        adders[purse.name] = _shift(purse, own[purse.name], least, -1)
    members = np.logical_or.reduce([p.members for p in together])
    joint = _lowest_price(site, adders, Purse("\0", members, sum(p.milliwatts for p in together)))
    for purse in together if joint is not None else ():
        adders[purse.name] = _shift(purse, adders[purse.name], joint or free, 1)


def _shift(purse: Purse, adder: Adder, by: Adder, sign: int) -> Adder:
    price = tuple(min(a + sign * b, PROHIBITIVE) for a, b in zip(adder.price, by.price, strict=True))
    return Adder(purse.members, price, adder.delay + sign * by.delay)


def _prohibitive(goods: Goods, purse: Purse) -> Adder:
    return Adder(purse.members, (PROHIBITIVE,) * goods.stages, 0)


def _lowest_price(
    site: _Site, others: Mapping[str, Adder], purse: Purse, near: tuple[int, ...] = ()
) -> Adder | None:
    """The lowest price of one purse at which it is not overdrawn, with the other purses' prices as they are.

    Found stage by stage: the first entry alone decides until what lies between two of its values matters.
    `near` is where to begin looking.
    """

    def spent(price: tuple[int, ...], delay: int) -> int:
        trial = {**others, purse.name: Adder(purse.members, price, delay)}
        return site.spent(site.clear(trial), purse)

    if site.spent(site.clear(others), purse) <= purse.milliwatts:
        return None
    stages = site.goods.stages
    # Later than every tied rival, so that what fits now fits just above this price as well.
    latest = sum(abs(a.delay) for a in others.values()) + TURN
    price: tuple[int, ...] = ()
    for stage in range(stages):
        turning = _turning_prices(site.goods, others, purse.members, stage)
        guess = int(np.searchsorted(turning, near[stage])) if near else turning.size // 2

        def fits(at: int, stage_prices: IntArray = turning, so_far: tuple[int, ...] = price) -> bool:
            after = (PROHIBITIVE,) * (stages - len(so_far) - 1)
            return spent((*so_far, int(stage_prices[at]), *after), latest) <= purse.milliwatts

        first = _first_that_fits(turning.size, guess, fits)
        if first == turning.size:
            return _prohibitive(site.goods, purse)
        price = (*price, int(turning[first]))
    delay = _shortest_delay(purse.milliwatts, latest, lambda delay: spent(price, delay))
    return Adder(purse.members, price, delay)


def _first_that_fits(count: int, guess: int, fits: Callable[[int], bool]) -> int:
    """The first of `count` rising prices that fits, else `count`: ever longer strides from the guess, then halving."""
    low, high = 0, count
    at, stride = min(max(guess, 0), count - 1), 1
    while low < high and low <= at < high:
        if fits(at):
            high, at = at, at - stride
        else:
            low, at = at + 1, at + stride
        stride *= 4
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def _shortest_delay(budget: int, latest: int, spent: Callable[[int], int]) -> int:
    """The shortest delay that fits: a bracket that shrinks by false position, halved when that is slow."""
    high, low = latest, -latest
    spent_high, spent_low = spent(high), spent(low)
    if spent_low <= budget:
        return low
    for step in range(SPLITS):
        if spent_high >= SPENT * budget or high - low <= 1:
            break
        part = ((SPENT + 1) / 2 * budget - spent_high) / (spent_low - spent_high) if step % 3 else 0.5
        middle = min(max(high - round((high - low) * part), low + 1), high - 1)
        here = spent(middle)
        if here <= budget:
            high, spent_high = middle, here
        else:
            low, spent_low = middle, here
    return high


def _turning_prices(goods: Goods, others: Mapping[str, Adder], members: BoolArray, stage: int) -> IntArray:
    """Every entry at which one of the purse's pieces may tie with another piece, or with buying nothing."""
    net = goods.prices[stage].copy()
    for adder in others.values():
        net[adder.members[goods.piece_class]] -= adder.price[stage]
    mine = members[goods.piece_class]
    rest = distinct(np.concatenate(([0], net[~mine])))
    found = distinct(distinct(net[mine])[:, None] - rest[None, :])
    return found if stage else found[found >= 0]


def cut_at_root(clearing: Clearing, purse: Purse) -> dict[int, int]:
    """Caps (milliwatts by class index) that bring a purse within its budget by one write to the root's sheet.

    For a budget that was just lowered: all its classes are cut to one level of the order of buying, wherever
    they stand, with every other sheet as it is. The better split follows with the next clearing.
    """
    order, fleet = clearing.market.order, clearing.market.fleet
    mine = np.flatnonzero(purse.members[fleet.class_index])
    classes, gpus, now = fleet.class_index[mine], fleet.gpus[mine], clearing.caps[mine]

    def caps_at(numbers: IntArray, level: float) -> IntArray:
        cell = np.full(numbers.size, int(level), dtype=np.int64)
        return order.caps_at(numbers, cell, np.full(numbers.size, level - int(level)))

    def spent(level: float) -> int:
        return int((np.minimum(now, caps_at(classes, level)) * gpus).sum())

    low, high = 0.0, float(order.cells)
    if spent(high) <= purse.milliwatts:
        return {}
    for _ in range(CUT_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= purse.milliwatts else (low, middle)
    members = np.flatnonzero(purse.members)
    return dict(zip(members.tolist(), caps_at(members, low).tolist(), strict=True))
