"""The market as the controller needs it: cleared over what is for sale, with what people ask of it, into targets for the sheets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.api import names
from tokenfactory.api.quantities import parse_decimal
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.plan.domains import Grid, facility_milliwatts
from tokenfactory.controller.plan.hulls import find_model, hulls_of, worthwhile
from tokenfactory.controller.plan.purses import factory_name, for_sale
from tokenfactory.controller.plan.supplying import Coming, Supply, stands_of, supply_of
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power import budgets
from tokenfactory.planning.power.efficiency import Draw, PriceFloor, draw_of, find_price_floor, thresholds
from tokenfactory.planning.power.forest import Fleet
from tokenfactory.planning.power.goods import IntArray
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.market import Clearing, Market
from tokenfactory.planning.power.profile import Hull, lifted


@dataclass(frozen=True)
class Cleared:
    """What the market wants, and enough to explain it."""

    targets: Mapping[str, Mapping[str, Allowance]]
    settled: budgets.Settled
    hulls: Mapping[str, Hull]
    floors: Mapping[str, PriceFloor]
    """By factory that has an efficiency target."""
    supply: Supply
    price_floors: Mapping[int, float]
    """The same, as the market takes them."""


def clear(
    world: World,
    grid: Grid,
    ledger: Ledger,
    coming: Iterable[Coming],
    absent: Iterable[str] = (),
    hurried: Container[tuple[str, str, str]] = (),
) -> Cleared | None:
    """None when there is no domain at all. `absent` are classes to know of although nothing of them runs.

    `hurried` are the owners of classes whose latencies are in danger: watts that nobody else can use help them at once.
    """
    if not grid.domains:
        return None
    stands, committed = stands_of(world, grid, ledger, coming)
    ranges = {label: (each.low, each.high) for (_, label), each in stands.items()}
    for label in absent:
        idle = names.idle_class(names.class_product(label))
        if label not in ranges and idle in ranges and find_model(world, label):
            ranges[label] = ranges[idle]
    hulls = {
        label: lifted(hull, ranges[label][1]) if names.class_owner(label) in hurried else hull
        for label, hull in hulls_of(world, ranges).items()
    }
    supply = supply_of(world, grid, stands, committed, hulls, for_sale(world, grid, ledger))
    floors = _price_floors(world, grid, ledger, supply)
    index = supply.goods.factories.index if supply.goods.factories else None
    by_index = {
        index(name): floor.tokens_per_joule
        for name, floor in floors.items()
        if index and floor.tokens_per_joule
    }
    settled = supply.settle(by_index)
    lowest_limits = _lowest_limits(grid, supply)
    lower = bool((lowest_limits < supply.limits).any())
    lowest = supply.settle(by_index, lowest_limits) if lower else settled
    targets = _targets(supply, settled, lowest, hulls)
    return Cleared(targets, settled, hulls, floors, supply, by_index)


def with_added(cleared: Cleared, gpus: Mapping[tuple[str, str], int]) -> tuple[Supply, Clearing]:
    """The market as it would be with these GPUs at work instead of idle, by (domain, class).

    Budgets are settled anew: at the prices of those who work now, more of them would spend more than there is.
    """
    supply, clearing = cleared.supply, cleared.settled.clearing
    if not gpus:
        return supply, clearing
    market = clearing.market
    forest, fleet = supply.forest, market.fleet
    counts = dict(
        zip(
            zip(fleet.domain.tolist(), fleet.class_index.tolist(), strict=True),
            fleet.gpus.tolist(),
            strict=True,
        )
    )
    for (domain, label), count in gpus.items():
        at = forest.index.get(domain, -1)
        idle = supply.sale.number(at, names.idle_class(names.class_product(label)))
        number = supply.sale.number(at, label)
        if at < 0 or number is None or idle is None:
            continue
        moved = min(count, counts.get((at, idle), 0))
        counts[at, idle] = counts.get((at, idle), 0) - moved
        counts[at, number] = counts.get((at, number), 0) + moved
    pairs = sorted(pair for pair, count in counts.items() if count > 0)
    changed = Fleet(
        np.array([domain for domain, _ in pairs], dtype=np.int64),
        np.array([number for _, number in pairs], dtype=np.int64),
        np.array([counts[pair] for pair in pairs], dtype=np.int64),
    )
    supply = replace(supply, fleet=changed)
    if supply.sale.purses:
        return supply, supply.settle(cleared.price_floors).clearing
    return supply, Market(forest, market.order, changed, market.committed).clear(clearing.limits)


def recut(last: Cleared, usable: Mapping[str, int]) -> dict[str, dict[str, Allowance]]:
    """Targets of the same supply under other limits; purses and price floors as they were."""
    supply = last.supply
    limits = np.array(
        [usable.get(name, int(supply.limits[at])) for at, name in enumerate(supply.forest.names)],
        dtype=np.int64,
    )
    order = last.settled.clearing.market.order
    clearing = Market(supply.forest, order, supply.fleet, supply.committed).clear(limits)
    settled = replace(last.settled, clearing=clearing)
    return _targets(supply, settled, settled, last.hulls)


# --- efficiency


def _price_floors(world: World, grid: Grid, ledger: Ledger, supply: Supply) -> dict[str, PriceFloor]:
    """For each factory with a target: which watts it does not buy although it could."""
    found: dict[str, PriceFloor] = {}
    for factory in world.snapshot.factories.values():
        efficiency = factory.spec.efficiency
        name = factory_name(factory)
        if efficiency is None or name not in supply.goods.factories:
            continue
        number = supply.goods.factories.index(name)
        overhead = _overhead_watts(world, grid, ledger, factory)

        def draw_at(floor: float, number: int = number, name: str = name, overhead: float = overhead) -> Draw:
            return draw_of(supply.settle({number: floor}).clearing, name, overhead_watts=overhead)

        target = float(parse_decimal(efficiency.tokens_per_joule))
        found[name] = find_price_floor(target, thresholds(supply.goods, name), draw_at)
    return found


def _overhead_watts(world: World, grid: Grid, ledger: Ledger, factory: TokenFactory) -> float:
    """What counts besides its GPUs: its part of its nodes, and for Facility also of its domains' other load."""
    assert factory.spec.efficiency is not None
    scope = factory.spec.efficiency.scope
    if scope == "GPU":
        return 0.0
    total = 0.0
    held: dict[str, int] = {}
    key = (factory.metadata.namespace, factory.metadata.name)
    for entry in ledger.entries.values():
        host = world.hosts.get(entry.node.metadata.name)
        count = host.gpu_count if host else 0
        granted = sum(
            grant.gpus
            for grant in entry.node.spec.pods
            if (names.class_owner(grant.class_name) or ("", "", ""))[:2] == key
        )
        if granted:
            held[entry.node.metadata.name] = granted
        if count:
            total += entry.node.spec.overhead_milliwatts / 1000 * min(1.0, granted / count)
    return total + (facility_milliwatts(world, grid, held) / 1000 if scope == "Facility" else 0.0)


# --- targets


def _targets(
    supply: Supply, settled: budgets.Settled, lowest: budgets.Settled, hulls: Mapping[str, Hull]
) -> dict[str, dict[str, Allowance]]:
    """Per domain the classes that stand below it. What falls back keeps its SLO floor, if the lowest limit does."""
    forest = supply.forest
    below: dict[int, set[int]] = defaultdict(set)
    for domain, number in supply.named:
        for position in forest.path(domain):
            below[position].add(number)
    targets: dict[str, dict[str, Allowance]] = {}
    for position, name in enumerate(forest.names):
        numbers = sorted(below[position])
        caps = supply.sale.sheet(settled.clearing, position, numbers)
        low = supply.sale.sheet(lowest.clearing, position, numbers)
        targets[name] = {}
        for label, cap in sorted(caps.items()):
            hull = hulls[label]
            fallback = min(cap, low[label], worthwhile(hull))
            targets[name][label] = Allowance(cap, max(fallback, min(cap, hull.milliwatts[0])))
    return targets


def _lowest_limits(grid: Grid, supply: Supply) -> IntArray:
    """What must fit when nobody can say any more that a window has opened. Nothing is oversubscribed then."""
    lowest = np.array([grid.lowest[name] for name in supply.forest.names], dtype=np.int64)
    return np.minimum(supply.limits, lowest)
