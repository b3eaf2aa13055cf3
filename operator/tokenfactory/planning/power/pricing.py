"""The lowest price of one purse at which it is not overdrawn, with the other purses' prices as they are.

A price is a word of one entry per stage, and a delay as its last letter. What a purse spends only falls as its price
rises, by steps: at the prices at which one of its pieces ties with another piece, or with buying nothing. So each entry
is found by closing in on the step at which the purse fits, and the delay then shares out that one tie.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from tokenfactory.planning.power.forest import Fleet, Forest
from tokenfactory.planning.power.goods import (
    TURN,
    Adder,
    BoolArray,
    Goods,
    IntArray,
    distinct,
    firsts_first,
    put_in_order,
)
from tokenfactory.planning.power.market import Clearing, Market

# A search for a delay ends when this part of the purse is spent; a rough one earlier.
SPENT = 0.99999
ROUGHLY_SPENT = 0.98
SPLITS = 40
# So few turning prices are looked at one by one.
FEW = 512
# More than any piece is worth, in a stage's entry of a price.
PROHIBITIVE = 1 << 50


@dataclass(frozen=True)
class Purse:
    """A ceiling on the caps of all GPUs of some classes, wherever they stand."""

    name: str
    members: BoolArray
    """By class index."""
    milliwatts: int


@dataclass
class Site:
    """The market to be cleared at different prices of the purses; what they spend is remembered."""

    forest: Forest
    goods: Goods
    fleet: Fleet
    committed: IntArray
    limits: IntArray
    all_purses: tuple[Purse, ...]
    price_floors: Mapping[int, float] | None = None
    firsts: BoolArray | None = None
    clearings: int = 0
    _spent: dict[tuple[tuple[str, tuple[int, ...], int], ...], dict[str, int]] = field(default_factory=dict)
    _last: tuple[object, Clearing] | None = None

    @cached_property
    def purses(self) -> dict[str, Purse]:
        return {p.name: p for p in self.all_purses}

    @cached_property
    def _plain(self) -> Market:
        """What does not depend on the order of buying is worked out once, on this market."""
        return Market(self.forest, put_in_order(self.goods), self.fleet, self.committed)

    def clear(self, adders: Mapping[str, Adder]) -> Clearing:
        key = _key(adders)
        if self._last is None or self._last[0] != key:
            self.clearings += 1
            order = put_in_order(self.goods, adders.values(), self.price_floors)
            if self.firsts is not None:
                order = firsts_first(order, self.firsts)
            self._last = key, self._plain.reordered(order).clear(self.limits)
        return self._last[1]

    def spent(self, adders: Mapping[str, Adder]) -> dict[str, int]:
        """What each purse spends at these prices."""
        key = _key(adders)
        if key not in self._spent:
            self._spent[key] = self._spending(self.clear(adders))
        return self._spent[key]

    def _spending(self, clearing: Clearing) -> dict[str, int]:
        by_class = np.zeros(len(self.goods.classes), dtype=np.int64)
        np.add.at(by_class, self.fleet.class_index, self.fleet.gpus * clearing.caps)
        return {p.name: int(by_class[p.members].sum()) for p in self.all_purses}

    def spent_by(self, adders: Mapping[str, Adder], purse: Purse) -> int:
        """The same for a purse of the moment, which is none of the site's."""
        if purse.name in self.purses:
            return self.spent(adders)[purse.name]
        mine = purse.members[self.fleet.class_index]
        return int((self.fleet.gpus * self.clear(adders).caps)[mine].sum())

    def least(self, purse: Purse) -> int:
        """What its GPUs draw at their minimum."""
        mine = purse.members[self.fleet.class_index]
        return int((self.fleet.gpus * self.goods.minimum[self.fleet.class_index])[mine].sum())

    def overdraws(self, purse: Purse, adders: Mapping[str, Adder]) -> bool:
        """Whether it spends too much and could still be made to spend less."""
        closed = purse.name in adders and adders[purse.name].price == prohibitive(self.goods, purse).price
        return not closed and self.spent(adders)[purse.name] > purse.milliwatts


def _key(adders: Mapping[str, Adder]) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    return tuple(sorted((name, adder.price, adder.delay) for name, adder in adders.items()))


def prohibitive(goods: Goods, purse: Purse) -> Adder:
    return Adder(purse.members, (PROHIBITIVE,) * goods.stages, 0)


def lowest_price(
    site: Site, others: Mapping[str, Adder], purse: Purse, near: Adder | None, *, rough: bool = False
) -> Adder | None:
    """None: it is not overdrawn without a price. `near` is where to begin looking."""

    def spent(price: tuple[int, ...], delay: int) -> int:
        return site.spent_by({**others, purse.name: Adder(purse.members, price, delay)}, purse)

    budget, freely = purse.milliwatts, site.spent_by(others, purse)
    if freely <= budget:
        return None
    enough = (ROUGHLY_SPENT if rough else SPENT) * budget
    stages = site.goods.stages
    # Later than every tied rival, so that what fits now fits just above this price as well.
    latest = sum(abs(a.delay) for a in others.values()) + TURN
    price: tuple[int, ...] = ()
    for stage in range(stages):

        def at(entry: int, so_far: tuple[int, ...] = price) -> int:
            return spent((*so_far, entry, *(PROHIBITIVE,) * (stages - len(so_far) - 1)), latest)

        steps = _Steps.of(site.goods, others, purse.members, stage, from_zero=not any(price))
        first = near.price[stage] if near is not None and near.price[:stage] == price else None
        if first is None and stage < stages - 1:
            first = 0  # where an earlier band's share of the purse is not at stake
        entry = _first_that_fits(steps, at, (budget, enough), (freely, site.least(purse)), first)
        if entry is None:
            return prohibitive(site.goods, purse)
        price = (*price, entry)
    guess = near.delay if near is not None and near.price == price else None
    delay = _shortest_delay(budget, enough, latest, lambda delay: spent(price, delay), guess)
    return Adder(purse.members, price, delay)


@dataclass(frozen=True)
class _Steps:
    """The prices at which one of the purse's pieces may tie: every difference of a price of its own and another's."""

    own: IntArray
    rest: IntArray
    """Both rising, each once."""
    lowest: int
    highest: int

    @classmethod
    def of(
        cls, goods: Goods, others: Mapping[str, Adder], members: BoolArray, stage: int, *, from_zero: bool
    ) -> "_Steps":
        net = goods.prices[stage].copy()
        for adder in others.values():
            net[adder.members[goods.piece_class]] -= adder.price[stage]
        mine = members[goods.piece_class]
        own, rest = distinct(net[mine]), distinct(np.concatenate(([0], net[~mine])))
        lowest = int(own[0] - rest[-1]) if own.size else 0
        highest = int(own[-1] - rest[0]) if own.size else 0
        return cls(own, rest, max(lowest, 0) if from_zero else lowest, highest)

    def between(self, low: int, high: int) -> IntArray | None:
        """The steps above `low` up to `high`, rising; None: too many to look at."""
        first = np.searchsorted(self.rest, self.own - high, side="left")
        last = np.searchsorted(self.rest, self.own - low, side="left")
        counts = np.maximum(last - first, 0)
        if counts.sum() > FEW:
            return None
        found = [own - self.rest[a:b] for own, a, b in zip(self.own, first, last, strict=True) if b > a]
        zero = [np.zeros(1, dtype=np.int64)] if low < 0 <= high else []
        return distinct(np.concatenate((*found, *zero))) if found or zero else np.zeros(0, dtype=np.int64)


def _first_that_fits(
    steps: _Steps,
    spent: Callable[[int], int],
    bounds: tuple[int, float],
    ends: tuple[int, int],
    near: int | None,
) -> int | None:
    """The lowest entry that fits, or one that leaves so little that it is as good. None: not even the highest does.

    `bounds`: the budget, and what is enough of it; `ends`: what is spent below all steps and above.
    """
    budget, enough = bounds
    bracket = _Bracket(
        steps.lowest - 1, steps.highest + 1, max(ends[0], budget + 1) - budget, min(ends[1], budget) - budget
    )
    at: int | None = near
    stride = max(abs(near or 0) // 4096, 1)
    while True:
        inside = steps.between(bracket.low, bracket.high - 1)
        if inside is not None and not inside.size:
            return bracket.high if bracket.high <= steps.highest else None
        if at is None or not bracket.low < at < bracket.high:
            at = bracket.next_look(inside)
        here = spent(at) - budget
        if enough - budget <= here <= 0:
            return at
        bracket.closes(at, here)
        # From a guess in ever longer strides, until the answer is between two looks.
        at = None if near is None or bracket.closed else at + (stride if here > 0 else -stride)
        stride *= 8


@dataclass
class _Bracket:
    """Two looks between which the answer lies; what is too much above, what is left below. False position, where
    an end that stays counts half (Illinois), and now and then the middle.
    """

    low: int
    high: int
    too_much: float
    left: float
    """Not above 0."""
    looks: int = 0
    _lows: int = 0
    """How often in a row the low end moved; 0 only before it was looked at."""
    _highs: int = 0

    @property
    def closed(self) -> bool:
        """Both ends were looked at."""
        return bool(self._lows and self._highs)

    def next_look(self, inside: IntArray | None = None) -> int:
        part = self.too_much / max(self.too_much - self.left, 1e-9) if self.looks % 4 != 3 else 0.5
        if inside is not None:
            return int(inside[min(int(inside.size * part), inside.size - 1)])
        return min(max(self.low + int((self.high - self.low) * part), self.low + 1), self.high - 1)

    def closes(self, at: int, off: float) -> None:
        self.looks += 1
        if off > 0:
            self.low, self.too_much = at, off
            self._lows, self._highs = self._lows + 1, min(self._highs, 1)
            self.left = self.left / 2 if self._lows > 1 else self.left
        else:
            self.high, self.left = at, off
            self._highs, self._lows = self._highs + 1, min(self._lows, 1)
            self.too_much = self.too_much / 2 if self._highs > 1 else self.too_much


def _shortest_delay(
    budget: int, enough: float, latest: int, spent: Callable[[int], int], guess: int | None
) -> int:
    """The shortest delay that fits, or one that leaves so little that it is as good."""
    spent_high = spent(latest)
    if spent_high >= enough:
        return latest
    spent_low = spent(-latest)
    if spent_low <= budget:
        return -latest
    aim = (enough + budget) / 2
    bracket = _Bracket(-latest, latest, spent_low - aim, min(spent_high - aim, 0))
    at = guess
    for _ in range(SPLITS):
        if bracket.high - bracket.low <= 1:
            break
        if at is None or not bracket.low < at < bracket.high:
            at = bracket.next_look()
        here = spent(at)
        if enough <= here <= budget:
            return at
        bracket.closes(at, here - aim if here > budget else min(here - aim, 0))
        at = None
    return bracket.high
