"""The power market: which cap every class gets in every domain, so that the watts make the most tokens.

Every domain buys along the one order of `goods` until its subtree just fits its limit; that is its
fill level, and its sheet is every class's cap at that level. A node obeys the lowest sheet on its
path. Because limits nest, this greedy buying is optimal for concave profiles, and because a cap only
rises with the level, the lowest level on the path is the whole decision.

One changed limit needs only the levels of that domain and of those above it: everything else is
shared with the clearing before.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from tokenfactory.planning.power import curves as cv
from tokenfactory.planning.power.forest import Fleet, Forest
from tokenfactory.planning.power.goods import BoolArray, FloatArray, IntArray, Order


@dataclass(frozen=True)
class Market:
    """What is bought (order), by whom (fleet), where (forest)."""

    forest: Forest
    order: Order
    fleet: Fleet
    committed: IntArray
    """Milliwatts that each domain itself (not its children) owes before any cap: overheads, fixed load,
    nodes without an agent, GPUs that cannot be capped. By position."""

    @cached_property
    def base(self) -> IntArray:
        """What each subtree draws with every GPU at its minimum: no cap goes below it."""
        own = self.committed.copy()
        np.add.at(own, self.fleet.domain, self.fleet.gpus * self.order.goods.minimum[self.fleet.class_index])
        return self.forest.subtree_sums(own)

    def reordered(self, order: Order) -> "Market":
        """The same GPUs in the same places under another order of buying."""
        other = Market(self.forest, order, self.fleet, self.committed)
        other.__dict__["base"] = self.base  # it knows of minima only
        return other

    @cached_property
    def own(self) -> cv.Offer:
        """What the GPUs that stand in each domain itself take; domains by position, sorted."""
        start = self.order.class_start
        per_pair = (start[1:] - start[:-1])[self.fleet.class_index]
        pair = np.repeat(np.arange(per_pair.size), per_pair)
        offset = np.arange(pair.size) - np.repeat(np.cumsum(per_pair) - per_pair, per_pair)
        piece = start[self.fleet.class_index][pair] + offset
        nothing = cv.empty_offer()
        return replace(
            nothing,
            domain=self.fleet.domain[pair],
            cell=self.order.piece_cell[piece],
            watts=self.fleet.gpus[pair] * self.order.piece_width[piece],
        )

    def own_between(self, first: int, last: int) -> cv.Offer:
        a, b = np.searchsorted(self.own.domain, (first, last))
        return replace(
            cv.empty_offer(),
            domain=self.own.domain[a:b] - first,
            cell=self.own.cell[a:b],
            watts=self.own.watts[a:b],
        )

    def clear(self, limits: IntArray) -> "Clearing":
        """Levels of all domains. `limits` are effective limits in milliwatts, by position."""
        forest, cells = self.forest, self.order.cells
        cell = np.full(forest.count, cells, dtype=np.int64)
        fraction = np.zeros(forest.count, dtype=np.float64)
        budget = limits - self.base
        layers: list[cv.Curves] = []
        below: cv.Offer | None = None
        for layer in range(len(forest.layer_start) - 2, -1, -1):
            a, b = forest.layer_start[layer], forest.layer_start[layer + 1]
            own = self.own_between(a, b)
            curves = cv.merge(b - a, cells, own if below is None else cv.join([own, below]))
            cell[a:b], fraction[a:b] = cv.fill(curves, cells, budget[a:b])
            layers.append(curves)
            if layer:
                up = forest.parent[a:b] - forest.layer_start[layer - 1]
                below = cv.offer_upwards(curves, cell[a:b], fraction[a:b], up)
        return Clearing(self, limits, budget, cell, fraction, tuple(reversed(layers)))


@dataclass(frozen=True)
class Clearing:
    """The levels at which every domain's subtree fits, and what follows from them."""

    market: Market
    limits: IntArray
    budget: IntArray
    """Limit minus what cannot be lowered; negative where not even the minimum fits."""
    cell: IntArray
    fraction: FloatArray
    layers: tuple[cv.Curves, ...]
    changed: Mapping[int, cv.Curves] = field(default_factory=dict)
    """Curves that differ from those in `layers`, by position."""

    def with_limit(self, domain: int, milliwatts: int) -> "Clearing":
        """The same market after one limit changed: only the path from the domain to its root is computed."""
        market, forest = self.market, self.market.forest
        limits, budget = self.limits.copy(), self.budget.copy()
        cell, fraction = self.cell.copy(), self.fraction.copy()
        limits[domain] = milliwatts
        budget[domain] = milliwatts - market.base[domain]
        changed = dict(self.changed)
        for position in forest.path(domain):
            if position != domain:
                changed[position] = self._gather(position, cell, fraction, changed)
            curves = changed.get(position) or self._curves(position)
            here = slice(position, position + 1)
            cell[here], fraction[here] = cv.fill(curves, market.order.cells, budget[here])
        return Clearing(market, limits, budget, cell, fraction, self.layers, changed)

    def _curves(self, position: int) -> cv.Curves:
        layer = int(self.market.forest.depth[position])
        local = position - self.market.forest.layer_start[layer]
        return self.layers[layer].only(local, local + 1)

    def _gather(
        self, position: int, cell: IntArray, fraction: FloatArray, changed: Mapping[int, cv.Curves]
    ) -> cv.Curves:
        """The curve of one domain from its own GPUs and what its children offer now."""
        forest = self.market.forest
        first, last = forest.children[position], forest.children[position + 1]
        layer = int(forest.depth[position]) + 1
        offset = forest.layer_start[layer]
        offers = [self.market.own_between(position, position + 1)]
        differing = sorted(c for c in changed if first <= c < last)
        runs = [first, *(x for c in differing for x in (c, c + 1)), last]
        for a, b in zip(runs[::2], runs[1::2], strict=True):
            if b > a:
                part = self.layers[layer].only(int(a - offset), int(b - offset))
                to = np.zeros(part.count, dtype=np.int64)
                offers.append(cv.offer_upwards(part, cell[a:b], fraction[a:b], to))
        for c in differing:
            to = np.zeros(1, dtype=np.int64)
            offers.append(cv.offer_upwards(changed[c], cell[c : c + 1], fraction[c : c + 1], to))
        return cv.merge(1, self.market.order.cells, cv.join(offers))

    @cached_property
    def path_levels(self) -> tuple[IntArray, FloatArray, IntArray]:
        """The lowest level on each domain's path, and which domain's it is (the highest one on a tie)."""
        cell, fraction = self.cell.copy(), self.fraction.copy()
        forest = self.market.forest
        binding = np.arange(forest.count)
        for layer in range(1, len(forest.layer_start) - 1):
            here = slice(forest.layer_start[layer], forest.layer_start[layer + 1])
            up = forest.parent[here]
            lower = (cell[up] < cell[here]) | ((cell[up] == cell[here]) & (fraction[up] <= fraction[here]))
            cell[here] = np.where(lower, cell[up], cell[here])
            fraction[here] = np.where(lower, fraction[up], fraction[here])
            binding[here] = np.where(lower, binding[up], binding[here])
        return cell, fraction, binding

    @cached_property
    def caps(self) -> IntArray:
        """Milliwatts per GPU of every (domain, class) pair of the fleet."""
        cell, fraction, _ = self.path_levels
        fleet = self.market.fleet
        return self.market.order.caps_at(fleet.class_index, cell[fleet.domain], fraction[fleet.domain])

    def sheet(self, domain: int) -> IntArray:
        """What this domain alone would allow: milliwatts per GPU of every class, by class index."""
        every = np.arange(len(self.market.order.goods.classes))
        cell = np.full(every.size, self.cell[domain])
        return self.market.order.caps_at(every, cell, np.full(every.size, self.fraction[domain]))

    def path_sheet(self, domain: int) -> IntArray:
        """What the domain and all those above it allow together, by class index."""
        cell, fraction, _ = self.path_levels
        every = np.arange(len(self.market.order.goods.classes))
        return self.market.order.caps_at(
            every, np.full(every.size, cell[domain]), np.full(every.size, fraction[domain])
        )

    @cached_property
    def drawn(self) -> IntArray:
        """Milliwatts of each domain's subtree with every GPU at its cap, and all that is not capped."""
        own = self.market.committed.copy()
        np.add.at(own, self.market.fleet.domain, self.market.fleet.gpus * self.caps)
        return self.market.forest.subtree_sums(own)

    @property
    def unfit(self) -> BoolArray:
        """Domains in which not even NVML's minimum fits: watts must be switched off there."""
        return self.budget < 0

    def _at_caps(self, rates: list[tuple[float, ...]]) -> float:
        fleet, total = self.market.fleet, 0.0
        classes = self.market.order.goods.classes
        order = np.argsort(fleet.class_index, kind="stable")
        bounds = np.searchsorted(fleet.class_index[order], np.arange(len(classes) + 1))
        for number, each in enumerate(classes):
            mine = order[bounds[number] : bounds[number + 1]]
            if mine.size:
                per_gpu = np.interp(self.caps[mine], each.milliwatts, rates[number])
                total += float(per_gpu @ fleet.gpus[mine])
        return total

    def value(self) -> float:
        """Value per second along the hulls."""
        return self._at_caps([c.values for c in self.market.order.goods.classes])

    def tokens(self) -> float:
        """Tokens per second along the hulls."""
        return self._at_caps([c.tokens for c in self.market.order.goods.classes])
