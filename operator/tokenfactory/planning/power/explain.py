"""Why a cap is what it is, in words: which domain, which band, which price bound it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tokenfactory.planning.power.goods import TICKS, Adder, PowerClass
from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.tree import Problem

Bound = Literal["Nothing", "Domain", "Budget", "Efficiency", "Minimum"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What bound one cap."""

    class_name: str
    domain: str
    """Where the GPU stands."""
    cap_milliwatts: int
    bound: Bound
    bound_by: str
    """The domain, the purse or the factory that bound it; empty if nothing did."""
    band: int
    """The band at whose watts the binding domain's limit fell."""
    price: float
    """Value per joule of the last watt bought there; more than this must a watt be worth to get in."""
    message: str


def explain(
    clearing: Clearing, domain: str, class_name: str, adders: Mapping[str, Adder] | None = None
) -> Explanation:
    """What bound the cap of a class in a domain. `adders` are the prices of purses, from `budgets.settle`."""
    market = clearing.market
    goods, order, forest = market.order.goods, market.order, market.forest
    position, number = forest.index[domain], goods.index[class_name]
    each = goods.classes[number]
    cells, fractions, bindings = clearing.path_levels
    cell, binding = int(cells[position]), int(bindings[position])
    cap = int(order.caps_at(np.array([number]), cells[[position]], fractions[[position]])[0])
    said = _Words(each, domain, cap)
    purses = [name for name, a in (adders or {}).items() if a.members[number]]
    everything = int(order.caps[number, -1])
    short = [place for place in forest.path(position) if clearing.budget[place] < 0]
    if short and cap <= int(order.caps[number, 0]):
        # Also where the minimum is all that a class can use: there it has it for want of less.
        worst = min(short, key=lambda place: (clearing.budget[place], place))
        return said.minimum(forest.names[worst], -int(clearing.budget[worst]))
    if cap >= everything:
        useful = _useful(each)
        if everything < useful and purses:
            paid = [a for a in (adders or {}).values() if a.members[number]]
            # The first entry that is paid decides; a closed purse's price means no more than that it is closed.
            ticks = sum(next((entry for entry in a.price if entry), 0) for a in paid)
            return said.budget(purses, min(ticks, TICKS) * goods.value_per_tick * 1000)
        return said.efficiency() if everything < useful else said.nothing()
    stage = int(order.cell_stage[min(cell, order.cells - 1)])
    band = goods.band_of_stage(stage)
    price = float(order.cell_ticks[min(cell, order.cells - 1)]) * goods.value_per_tick * 1000
    return said.domain(forest.names[binding], band, price, purses, for_slo=goods.is_floor_stage(stage))


def _useful(each: PowerClass) -> int:
    """The lowest cap at which a class makes all the tokens it can: what lies above is not for sale."""
    best = max(each.values)
    first = next(w for w, v in zip(each.milliwatts, each.values, strict=True) if v >= best)
    return max(first, each.milliwatts[each.floor])


@dataclass(frozen=True, slots=True)
class _Words:
    each: PowerClass
    where: str
    cap: int

    def _say(self, bound: Bound, by: str, band: int, price: float, message: str) -> Explanation:
        return Explanation(self.each.name, self.where, self.cap, bound, by, band, price, message)

    def nothing(self) -> Explanation:
        message = f"{_watts(self.cap)} is all that brings this class more tokens: nothing holds it back"
        return self._say("Nothing", "", self.each.band, 0.0, message)

    def budget(self, purses: list[str], price: float) -> Explanation:
        together = " and that of ".join(purses)
        are = "are" if len(purses) > 1 else "is"
        message = (
            f"the budget of {together} {are} spent, at a price of {price:.3g} value per joule: this class is held at "
            f"{_watts(self.cap)}"
        )
        return self._say("Budget", purses[0], self.each.band, price, message)

    def efficiency(self) -> Explanation:
        message = (
            f"the efficiency target of {self.each.factory} leaves out what lies above {_watts(self.cap)}"
        )
        return self._say("Efficiency", self.each.factory, self.each.band, 0.0, message)

    def minimum(self, domain: str, missing: int) -> Explanation:
        message = (
            f"{domain} lacks {_watts(missing)} even with every GPU at its minimum: "
            f"this one is at its minimum of {_watts(self.cap)}"
        )
        return self._say("Minimum", domain, self.each.band, 0.0, message)

    def domain(
        self, domain: str, band: int, price: float, purses: list[str], *, for_slo: bool
    ) -> Explanation:
        stretch = "below the SLO floors" if for_slo else "above the SLO floors"
        message = (
            f"the limit of {domain} is reached at band {band}, {stretch}, where the last watt brings "
            f"{price:.3g} value per joule: this class gets {_watts(self.cap)} there"
        )
        if purses:
            message += f", and pays for the spent budget of {' and '.join(purses)} besides"
        return self._say("Domain", domain, band, price, message)


def _watts(milliwatts: int) -> str:
    return f"{milliwatts / 1000:.4g} W" if milliwatts < 10_000_000 else f"{milliwatts / 10**6:.4g} kW"


def floors_that_do_not_fit(clearing: Clearing) -> tuple[Problem, ...]:
    """Domains whose limit does not carry the SLO floors, or not even NVML's minimum, of what stands there."""
    market = clearing.market
    classes, fleet, forest = market.order.goods.classes, market.fleet, market.forest
    above = np.array([c.milliwatts[c.floor] - c.milliwatts[0] for c in classes], dtype=np.int64)
    asked = np.zeros(forest.count, dtype=np.int64)
    np.add.at(asked, fleet.domain, fleet.gpus * above[fleet.class_index])
    asked = forest.subtree_sums(asked)
    found: list[Problem] = []
    for position in np.flatnonzero(asked > clearing.budget):
        name, budget = forest.names[position], int(clearing.budget[position])
        if budget < 0:
            message = (
                f"every GPU at its minimum draws {_watts(-budget)} more than {name} may: "
                f"raise its limit, or take nodes out of it"
            )
            found.append(Problem(name, "MinimumDoesNotFit", message))
        else:
            message = (
                f"the SLO floors of the models in {name} need {_watts(int(asked[position]) - budget)} more than "
                f"it may draw: raise its limit, relax spec.models[].slo, or run fewer replicas"
            )
            found.append(Problem(name, "FloorsDoNotFit", message))
    return tuple(found)
