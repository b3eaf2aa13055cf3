"""The token-per-watt target as a floor on the price: which watts a factory does not buy although it could.

The target is on the average (all tokens over all joules, overhead included), the floor on the margin. Not
buying the worst watts raises the average until the overhead weighs more than they do: there the average is
at its best, where the margin equals it. So the lowest floor that meets the target keeps the most tokens; a
target beyond the best point cannot be met by caps, and the best point is run instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tokenfactory.planning.power.goods import FloatArray, Goods
from tokenfactory.planning.power.market import Clearing


@dataclass(frozen=True, slots=True)
class Draw:
    """What a factory makes of what."""

    tokens_per_second: float
    watts: float
    """At the meter that the target's scope names."""

    @property
    def tokens_per_joule(self) -> float:
        return self.tokens_per_second / self.watts if self.watts > 0 else 0.0


@dataclass(frozen=True, slots=True)
class PriceFloor:
    """A factory's floor: pieces with fewer tokens per joule are not bought."""

    tokens_per_joule: float
    reached: Draw
    met: bool
    """False: this is the most efficient point, and the target is still beyond it."""


def draw_of(clearing: Clearing, factory: str, *, overhead_watts: float, multiplier: float = 1.0) -> Draw:
    """A factory's tokens and watts at the caps of this clearing.

    `overhead_watts` is what its nodes draw besides GPUs (scope Node), `multiplier` what the facility adds.
    """
    market = clearing.market
    classes, fleet, caps = market.order.goods.classes, market.fleet, clearing.caps
    tokens = watts = 0.0
    for number, each in enumerate(classes):
        if each.factory != factory:
            continue
        mine = fleet.class_index == number
        tokens += float(np.interp(caps[mine], each.milliwatts, each.tokens) @ fleet.gpus[mine])
        watts += float((caps[mine] * fleet.gpus[mine]).sum()) / 1000
    return Draw(tokens, (watts + overhead_watts) * multiplier)


def thresholds(goods: Goods, factory: str) -> FloatArray:
    """The floors at which the factory buys something less, lowest first."""
    if factory not in goods.factories:
        return np.zeros(0)
    mine = goods.piece_factory == goods.factories.index(factory)
    above = goods.piece_stage >= len(goods.bands)
    # Just above a piece's own efficiency, so that the piece itself is left out.
    return np.unique(np.nextafter(goods.piece_tokens_per_watt[mine & above], np.inf))


def find_price_floor(target: float, floors: FloatArray, draw_at: Callable[[float], Draw]) -> PriceFloor:
    """The lowest floor at which the average meets the target, else the floor of the best average.

    `draw_at` clears the market with a floor and says what the factory makes then. Up to the best floor the
    average only rises, so that the lowest one is found by halving.
    """
    at_zero = draw_at(0.0)
    if at_zero.tokens_per_joule >= target or not floors.size:
        return PriceFloor(0.0, at_zero, met=at_zero.tokens_per_joule >= target)
    # Leaving out what is worse than the average raises it; leaving out anything better lowers it.
    useful = floors[floors <= np.nextafter(target, np.inf)]
    low, high = 0, useful.size - 1
    best = PriceFloor(0.0, at_zero, met=False)
    while low <= high:
        middle = (low + high) // 2
        floor = float(useful[middle])
        reached = draw_at(floor)
        met = reached.tokens_per_joule >= target
        if met or (not best.met and reached.tokens_per_joule > best.reached.tokens_per_joule):
            best = PriceFloor(floor, reached, met=met)
        if met:
            high = middle - 1
        else:
            # Still below the target: watts worse than this average are left, and leaving them out helps.
            worth = useful[useful <= np.nextafter(reached.tokens_per_joule, np.inf)].size
            if worth <= middle:
                high = middle - 1
            else:
                low = middle + 1
    return best
