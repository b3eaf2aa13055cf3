"""Budgets that cut across the tree: a factory's own ceiling, or what a domain grants to several together.

Such a budget (a *purse*) has a price of its own, which adds to the domains' prices for its classes, so that the
result is still one order of buying for the whole tree. See `pricing.py` for how the prices are found. Where those of
a settlement just before still do, they stay.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tokenfactory.planning.power.forest import Fleet, Forest
from tokenfactory.planning.power.goods import Adder, BoolArray, Goods, IntArray
from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.pricing import find_prices
from tokenfactory.planning.power.purses import Purse, Site

CUT_STEPS = 50


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
    clearings: int = 1
    """How many times the market was cleared to find the prices."""


def settle(
    forest: Forest,
    goods: Goods,
    fleet: Fleet,
    committed: IntArray,
    limits: IntArray,
    purses: tuple[Purse, ...] = (),
    price_floors: Mapping[int, float] | None = None,
    before: Settled | None = None,
    firsts: BoolArray | None = None,
) -> Settled:
    """Clears the market within the limits of the tree and of every purse.

    `before`: where prices begin; `firsts`: classes whose first stretches come first (`goods.letters`).
    """
    site = Site(forest, goods, fleet, committed, limits, purses, price_floors, firsts)
    look = find_prices(site, _as_before(before, site))
    spent = {p.name: int(each) for p, each in zip(purses, look.spent, strict=True)}
    short = tuple(p.name for p in purses if spent[p.name] > p.milliwatts)
    return Settled(look.clearing, site.adders(look.prices), spent, short, site.clearings)


def _as_before(before: Settled | None, site: Site) -> IntArray | None:
    """The prices of an earlier settlement, if they are in today's ticks and letters."""
    if before is None:
        return None
    order = before.clearing.market.order
    same = (order.goods.value_per_tick, order.goods.bands) == (site.goods.value_per_tick, site.goods.bands)
    if not same or (order.firsts is None) != (site.firsts is None):
        return None
    words = [
        before.adders[p.name].price if p.name in before.adders else (0,) * (site.letters) for p in site.purses
    ]
    return np.array(words, dtype=np.int64)


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
