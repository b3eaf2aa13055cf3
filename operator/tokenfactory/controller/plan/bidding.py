"""The market as the controller needs it: classes from profiles, GPUs from the ledger, targets for the sheets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.api import names
from tokenfactory.api.quantities import (
    Milliwatts,
    parse_decimal,
    parse_duration,
    parse_power_or_percent,
)
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.plan.admitting import DEFAULT_BAND
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.profiles import model_points
from tokenfactory.controller.plan.purses import factory_name, for_sale, payer_of
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power import budgets, catalogue
from tokenfactory.planning.power.efficiency import Draw, PriceFloor, draw_of, find_price_floor, thresholds
from tokenfactory.planning.power.forest import Fleet, Forest, muster
from tokenfactory.planning.power.goods import BoolArray, Goods, IntArray, PowerClass
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.market import Clearing, Market
from tokenfactory.planning.power.parking import caught_on_a_cliff, crossed_whole
from tokenfactory.planning.power.profile import Hull, Requirement, hull_of, lifted, parked, unknown
from tokenfactory.planning.power.zones import Allotment, Sale, put_on_sale

FactoryKey = tuple[str, str]
_LEAST_VALUE = 1e-15
"""Per token, of what is on its way out: less than anything that a factory can ask for."""


@dataclass(frozen=True)
class Coming:
    """A pod that is to be charged next: its watts are set aside before the grant is written."""

    node: str
    class_name: str
    gpus: int


@dataclass(frozen=True)
class Supply:
    """The fleet as the market takes it."""

    forest: Forest
    sale: Sale
    fleet: Fleet
    committed: IntArray
    limits: IntArray
    named: tuple[tuple[int, int], ...]
    """(domain, class) pairs whose sheets must name the class, whether or not its GPUs there are for sale."""

    @property
    def goods(self) -> Goods:
        return self.sale.goods

    def class_name(self, domain: str, label: str) -> str | None:
        """What a class of GPUs is called on the market, in this domain."""
        at = self.forest.index.get(domain)
        return None if at is None else self.sale.name(at, label)

    def settle(
        self, floors: Mapping[int, float] | None = None, limits: IntArray | None = None
    ) -> budgets.Settled:
        """Whoever runs first gets over its cliff, if that carries all who run: who was parked made room for it."""
        settled = self._settle(floors, limits)
        if caught_on_a_cliff(settled.clearing).any():
            whole = self._settle(floors, limits, crossed_whole(self.goods))
            if not caught_on_a_cliff(whole.clearing).any():
                return whole
        return settled

    def _settle(
        self,
        floors: Mapping[int, float] | None,
        limits: IntArray | None,
        firsts: BoolArray | None = None,
    ) -> budgets.Settled:
        return budgets.settle(
            self.forest,
            self.goods,
            self.fleet,
            self.committed,
            self.limits if limits is None else limits,
            self.sale.purses,
            floors,
            firsts=firsts,
        )


@dataclass(frozen=True)
class Cleared:
    """What the market wants, and enough to explain it."""

    targets: Mapping[str, Mapping[str, Allowance]]
    settled: budgets.Settled
    hulls: Mapping[str, Hull]
    floors: Mapping[str, PriceFloor]
    """By factory that has an efficiency target."""
    supply: Supply


@dataclass(frozen=True)
class _Stand:
    """GPUs of one class in one domain, and what their hardware can do."""

    count: int
    low: int
    high: int


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
    stands, committed = _stands(world, grid, ledger, coming)
    ranges = {label: (each.low, each.high) for (_, label), each in stands.items()}
    for label in absent:
        idle = names.idle_class(names.class_product(label))
        if label not in ranges and idle in ranges and find_model(world, label):
            ranges[label] = ranges[idle]
    hulls = {
        label: lifted(hull, ranges[label][1]) if names.class_owner(label) in hurried else hull
        for label, hull in hulls_of(world, ranges).items()
    }
    supply = _supply(world, grid, stands, committed, hulls, for_sale(world, grid, ledger))
    floors = _price_floors(world, grid, ledger, supply)
    index = supply.goods.factories.index if supply.goods.factories else None
    by_index = {
        index(name): floor.tokens_per_joule
        for name, floor in floors.items()
        if index and floor.tokens_per_joule
    }
    settled = supply.settle(by_index)
    lowest = (
        supply.settle(by_index, _lowest_limits(world, grid, supply))
        if grid.margins or _has_timetable(world)
        else settled
    )
    targets = _targets(supply, settled, lowest, hulls)
    return Cleared(targets, settled, hulls, floors, supply)


def with_added(cleared: Cleared, gpus: Mapping[tuple[str, str], int]) -> Clearing:
    """The market as it would be with these GPUs at work instead of idle, by (domain, class)."""
    clearing = cleared.settled.clearing
    if not gpus:
        return clearing
    supply, market = cleared.supply, clearing.market
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
    return Market(forest, market.order, changed, market.committed).clear(clearing.limits)


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


# --- classes


def hulls_of(world: World, ranges: Mapping[str, tuple[int, int]]) -> dict[str, Hull]:
    """What a GPU of each class makes of its watts, between the limits that NVML reports."""
    hulls = {}
    for label, (low, high) in ranges.items():
        found = find_model(world, label)
        if found is not None:
            hulls[label] = model_hull(world, found[1], names.class_product(label), low, high)
        else:
            # Replicas of a model that is gone finish their requests on what nobody else needs.
            hulls[label] = unknown(low, high) if names.class_owner(label) else parked(low)
    return hulls


def worthwhile(hull: Hull) -> int:
    """The least that is worth serving at: the SLO floor, or the knee where no latency was asked for."""
    return hull.milliwatts[hull.floor or hull.knee]


def find_model(world: World, label: str) -> tuple[TokenFactory, ModelSpec] | None:
    owner = names.class_owner(label)
    factory = world.snapshot.factories.get((owner[0], owner[1])) if owner else None
    if owner is None or factory is None:
        return None
    return next(((factory, model) for model in factory.spec.models if model.name == owner[2]), None)


def model_hull(world: World, model: ModelSpec, product: str, low: int, high: int) -> Hull:
    """From the PowerProfile that is named or that fits, else from the catalogue."""
    points = model_points(world, model, product, high)
    slo = model.slo
    requirement = Requirement(
        inter_token_milliseconds=float(parse_duration(slo.inter_token_latency))
        if slo.inter_token_latency
        else None,
    )
    return hull_of(
        points,
        requirement,
        minimum_milliwatts=low,
        maximum_milliwatts=high,
        gpus_per_replica=model.gpus_per_replica,
    )


# --- supply


class _Stands(dict[tuple[str, str], _Stand]):
    """GPUs for sale by (domain, class); none for sale still means that the sheets must name the class."""

    def put(self, domain: str, label: str, count: int, low: int, high: int) -> None:
        held = self.get((domain, label), _Stand(0, low, high))
        self[domain, label] = _Stand(held.count + count, max(held.low, low), max(held.high, high))

    def take(self, domain: str, label: str, count: int) -> bool:
        """Off what is there; false when there is no such stand."""
        held = self.get((domain, label))
        if held is not None:
            self[domain, label] = replace(held, count=max(0, held.count - count))
        return held is not None


def _stands(
    world: World, grid: Grid, ledger: Ledger, coming: Iterable[Coming]
) -> tuple[_Stands, dict[str, int]]:
    """GPUs that obey, by (domain, class); and what each domain owes besides, by domain."""
    stands = _Stands()
    committed: dict[str, int] = defaultdict(int)
    for entry in ledger.entries.values():
        line, spec = entry.line, entry.node.spec
        if not spec.path:
            continue
        if not (entry.kind == "Charged" and entry.facts.heard and not spec.former_paths):
            # P4: nothing that a silent node is charged can be had back, and a moving one counts on both paths.
            for path in (spec.path, *spec.former_paths):
                if path and path[-1] in grid.domains:
                    committed[path[-1]] += ledger.line_charge(line)
            continue
        if spec.path[-1] not in grid.domains:
            continue
        committed[spec.path[-1]] += line.fixed
        for demand in line.expected():
            # Where a stranger may land a cap buys nothing: the GPU is owed in full, and only named in the sheets.
            sold = demand.count if entry.facts.guarded else 0
            committed[spec.path[-1]] += (demand.count - sold) * max(demand.base, demand.high)
            stands.put(spec.path[-1], demand.class_name, sold, demand.low, demand.high)
    for pod in coming:
        _expect(stands, world, grid, ledger, pod)
    return stands, committed


def _expect(stands: _Stands, world: World, grid: Grid, ledger: Ledger, pod: Coming) -> None:
    """A pod to come takes idle GPUs of its node; on an unguarded node those are paid for already."""
    host = world.hosts[pod.node]
    if host.held is None or not host.held.status.gpus or not host.held.spec.path:
        return
    gpu, domain = host.held.status.gpus[0], host.held.spec.path[-1]
    if domain not in grid.domains:
        return
    guarded = ledger.entries[pod.node].facts.guarded
    if not guarded or stands.take(domain, names.idle_class(gpu.product), pod.gpus):
        count = pod.gpus if guarded else 0
        stands.put(domain, pod.class_name, count, gpu.min_milliwatts, gpu.max_milliwatts)


def _supply(
    world: World,
    grid: Grid,
    stands: Mapping[tuple[str, str], _Stand],
    committed: Mapping[str, int],
    hulls: Mapping[str, Hull],
    purses: tuple[Allotment, ...],
) -> Supply:
    forest = grid.tree.forest
    classes = {label: _power_class(world, label, hull) for label, hull in hulls.items()}
    sale = put_on_sale(forest, classes, purses)
    caller = {name: index for index, name in enumerate(grid.tree.domains)}
    keys = sorted(stands)
    sold_as = [sale.sold_as(forest.index[domain], label) for domain, label in keys]
    fleet = muster(
        forest,
        np.array([caller[domain] for domain, _ in keys], dtype=np.int64),
        np.array(sold_as, dtype=np.int64),
        len(sale.goods.classes),
        np.array([stands[key].count for key in keys], dtype=np.int64),
    )
    owed = np.array([committed.get(name, 0) for name in forest.names], dtype=np.int64)
    limits = np.array([grid.domains[name].usable_milliwatts for name in forest.names], dtype=np.int64)
    named = tuple((forest.index[domain], number) for (domain, _), number in zip(keys, sold_as, strict=True))
    return Supply(forest, sale, fleet, owed, limits, named)


def _power_class(world: World, label: str, hull: Hull) -> PowerClass:
    found = find_model(world, label)
    owner, payer = names.class_owner(label), payer_of(label)
    if found is None and owner is not None and owner[:2] in world.snapshot.unread_factories:
        # Nobody knows its band or its worth: it is taken for an ordinary one rather than for one on its way out.
        idle = _idle_milliwatts(label)
        return hull.to_class(
            label, band=DEFAULT_BAND, value_per_token=1e-6, factory=payer, idle_milliwatts=idle
        )
    if found is None:
        ours = label == names.idle_class(names.class_product(label))
        idle = _idle_milliwatts(label) if ours else hull.milliwatts[0]
        return hull.to_class(label, band=0, value_per_token=_LEAST_VALUE, factory=payer, idle_milliwatts=idle)
    factory, model = found
    return hull.to_class(
        label,
        band=model.band,
        value_per_token=float(parse_decimal(model.value_per_million_tokens)) / 1e6,
        factory=factory_name(factory),
        gpus_per_replica=model.gpus_per_replica,
        min_replicas=model.replicas.min,
        idle_milliwatts=_idle_milliwatts(label),
    )


def _idle_milliwatts(label: str) -> int:
    """What one of its GPUs draws without work: what an eviction can hope to free is all above that."""
    return catalogue.product_of(names.class_product(label)).idle_milliwatts


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
    """What counts besides its GPUs: its part of its nodes, and for Facility also of the domain's fixed load."""
    assert factory.spec.efficiency is not None
    scope = factory.spec.efficiency.scope
    if scope == "GPU":
        return 0.0
    total, mine, everything = 0.0, 0, 0
    key = (factory.metadata.namespace, factory.metadata.name)
    for entry in ledger.entries.values():
        host = world.hosts.get(entry.node.metadata.name)
        count = host.gpu_count if host else 0
        granted = sum(
            grant.gpus
            for grant in entry.node.spec.pods
            if (names.class_owner(grant.class_name) or ("", "", ""))[:2] == key
        )
        everything += count
        mine += granted
        if count:
            total += entry.node.spec.overhead_milliwatts / 1000 * min(1.0, granted / count)
    if scope == "Facility" and everything:
        domain = grid.tree.domains.get(factory.spec.power.domain)
        total += (domain.fixed_load_milliwatts / 1000 if domain else 0.0) * mine / everything
    return total


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


def _has_timetable(world: World) -> bool:
    return any(domain.spec.timetable for domain in world.snapshot.domains.values())


def _lowest_limits(world: World, grid: Grid, supply: Supply) -> IntArray:
    """The lowest limit that any window of a timetable will set: what must fit when nobody can say so any more. Nothing is oversubscribed then."""
    limits = supply.limits.copy()
    for position, name in enumerate(supply.forest.names):
        limits[position] = min(int(limits[position]), grid.usable(name))
        domain = world.snapshot.domains.get(("", name))
        if domain is None or not domain.spec.timetable:
            continue
        whole = grid.limit(name)
        least = min(
            int(parse_power_or_percent(entry.limit, Milliwatts(whole))) for entry in domain.spec.timetable
        )
        limits[position] = min(int(limits[position]), int(limits[position]) * least // max(1, whole))
    return limits
