"""Budgets that cut across the tree as the market sees them, and the market at any prices of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokenfactory.planning.power.forest import Fleet, Forest
from tokenfactory.planning.power.goods import (
    Adder,
    BoolArray,
    Edge,
    FloatArray,
    Goods,
    IntArray,
    letters,
    net_prices,
    put_in_order,
)
from tokenfactory.planning.power.market import Clearing, Market

# The edges with which the market is cleared in the end: so narrow that they cost nothing.
NARROW = 2.0**-20
# How much of its room may be left in a purse that is spent.
SLACK = 1e-5


@dataclass(frozen=True)
class Purse:
    """A ceiling on the caps of all GPUs of some classes, wherever they stand."""

    name: str
    members: BoolArray
    """By class index."""
    milliwatts: int


@dataclass(frozen=True)
class Look:
    """The market at some prices of the purses (by purse and letter), as far as the letter of the edge."""

    prices: IntArray
    edge: Edge
    clearing: Clearing
    spent: IntArray
    """Milliwatts by purse."""


@dataclass
class Site:
    """Who buys what, where, within which limits and purses; it counts how often it is looked at."""

    forest: Forest
    goods: Goods
    fleet: Fleet
    committed: IntArray
    limits: IntArray
    purses: tuple[Purse, ...]
    price_floors: Mapping[int, float] | None = None
    firsts: BoolArray | None = None
    clearings: int = 0

    @cached_property
    def _plain(self) -> Market:
        """What does not depend on the order of buying is worked out once, on this market."""
        return Market(self.forest, put_in_order(self.goods), self.fleet, self.committed)

    @cached_property
    def letter(self) -> IntArray:
        """By piece."""
        return letters(self.goods, self.firsts)

    @property
    def letters(self) -> int:
        return self.goods.stages * (1 if self.firsts is None else 2)

    @cached_property
    def members(self) -> BoolArray:
        """By purse and class."""
        count = len(self.goods.classes)
        return np.array([p.members for p in self.purses], dtype=np.bool_).reshape(len(self.purses), count)

    @cached_property
    def least(self) -> IntArray:
        """What each purse's GPUs draw at their minimum."""
        return self._by_purse(self.goods.minimum[self.fleet.class_index])

    @cached_property
    def room(self) -> IntArray:
        """What each purse has for watts above the minimum."""
        return np.array([p.milliwatts for p in self.purses], dtype=np.int64) - self.least

    @cached_property
    def slack(self) -> FloatArray:
        """Milliwatts that do not matter to each purse: caps are rounded down to whole ones."""
        gpus = self._by_purse(np.ones(self.fleet.gpus.size, dtype=np.int64))
        found: FloatArray = np.maximum(SLACK * self.room, 0.6 * gpus)
        return found

    @cached_property
    def offers(self) -> int:
        """How many pieces are for sale, in every domain by itself."""
        pieces = np.bincount(self.goods.piece_class, minlength=len(self.goods.classes))
        return int(pieces[self.fleet.class_index].sum())

    def _by_purse(self, per_gpu: IntArray) -> IntArray:
        by_class = np.zeros(len(self.goods.classes), dtype=np.int64)
        np.add.at(by_class, self.fleet.class_index, self.fleet.gpus * per_gpu)
        return self.members.astype(np.int64) @ by_class

    def adders(self, prices: IntArray) -> dict[str, Adder]:
        """Those that cost something, by purse."""
        return {
            purse.name: Adder(purse.members, tuple(word.tolist()))
            for purse, word in zip(self.purses, prices, strict=True)
            if word.any()
        }

    def free(self) -> Look:
        """With no prices at all, and what ties bought evenly."""
        prices = np.zeros((len(self.purses), self.letters), dtype=np.int64)
        return self._clear(prices, Edge(self.letters - 1, NARROW), (), None)

    def look(self, prices: IntArray, edge: Edge | None = None) -> Look:
        """Up to the letter of the edge; by default all of the market."""
        edge = edge or Edge(self.letters - 1, NARROW)
        adders = self.adders(prices[:, : edge.letter + 1]).values()
        return self._clear(prices, edge, tuple(adders), edge)

    def _clear(self, prices: IntArray, edge: Edge, adders: tuple[Adder, ...], bought_at: Edge | None) -> Look:
        self.clearings += 1
        order = put_in_order(self.goods, adders, self.price_floors, self.firsts, bought_at)
        clearing = self._plain.reordered(order).clear(self.limits)
        return Look(prices, edge, clearing, self._by_purse(clearing.caps))

    def worth_nothing(self, look: Look) -> BoolArray:
        """Pieces that a domain with watts left buys in part, as they are worth no more than the purses' prices."""
        at = look.edge.letter
        net = net_prices(self.goods, self.letter, self.adders(look.prices[:, : at + 1]).values(), at + 1)
        above, below = look.edge.of(self.goods, self.letter)
        tied = (self.letter <= at) & ~net[:at].any(axis=0)
        found: BoolArray = tied & (net[at] + above > 0) & (net[at] < below)
        return found

    def slopes(self, look: Look) -> FloatArray:
        """By how many milliwatts each purse (row) spends less for each tick of a price (column)."""
        fleet, order, classes = self.fleet, look.clearing.market.order, len(self.goods.classes)
        cells, _, binding = look.clearing.path_levels
        members, cell = self.members.astype(np.float64), cells[fleet.domain]
        inside = np.flatnonzero(cell < order.cells)
        here, number = cell[inside], fleet.class_index[inside]
        width = order.caps[number, here + 1] - order.caps[number, here]
        slope = fleet.gpus[inside] * width / np.maximum(order.cell_span[here], 1)
        # What one class in a domain no longer buys the others there buy.
        domain = binding[fleet.domain[inside]]
        total = np.bincount(domain, slope, self.forest.count)
        shares = [np.bincount(domain, slope * mine[number], self.forest.count) for mine in members]
        taken = np.array(shares).reshape(len(members), -1)
        found = (members * np.bincount(number, slope, classes)) @ members.T
        found -= (taken / np.where(total > 0, total, 1.0)) @ taken.T
        # Where watts are left nobody takes them.
        outside = np.flatnonzero(cell >= order.cells)
        gpus = np.bincount(fleet.class_index[outside], fleet.gpus[outside], classes)
        above, below = look.edge.of(self.goods, self.letter)
        fading = np.where(self.worth_nothing(look), self.goods.piece_width / (above + below), 0.0)
        by_class = gpus * np.bincount(self.goods.piece_class, fading, classes)
        return np.asarray(found + (members * by_class) @ members.T, dtype=np.float64)
