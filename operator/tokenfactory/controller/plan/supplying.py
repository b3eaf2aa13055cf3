"""The fleet as the market takes it: which GPUs are for sale in which domain, and what is owed besides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from tokenfactory.api import names
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.hulls import power_class
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power import budgets
from tokenfactory.planning.power.forest import Fleet, Forest, muster
from tokenfactory.planning.power.goods import BoolArray, Goods, IntArray
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.market import Clearing, Market
from tokenfactory.planning.power.parking import Parking, caught_on_a_cliff, crossed_whole, park
from tokenfactory.planning.power.profile import Hull
from tokenfactory.planning.power.zones import Allotment, Sale, put_on_sale

# Settling budgets clears the market many times over, and a site that stands still asks the same at every look. As many
# questions are remembered as one look asks of a site with a timetable, a shortage and a target or two.
SETTLED_KEPT = 16
PARKED_KEPT = 4


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
        question = self._question(floors or {}, self.limits if limits is None else limits)
        return _settled(question) if self.sale.purses else _settle(question)

    def budgets_of(self, domain: str, label: str) -> tuple[str, ...]:
        """Those that a class of GPUs there pays from."""
        at = self.forest.index.get(domain)
        number = None if at is None else self.sale.number(at, label)
        return tuple(purse.name for purse in self.sale.purses if number is not None and purse.members[number])

    def park(self, clearing: Clearing, floors: Mapping[int, float]) -> Parking:
        """Budgets are settled anew for those who keep running: the GPUs of a parked replica are idle, and pay nothing."""
        return (
            _parked(self._question(floors, clearing.limits, clearing)) if self.sale.purses else park(clearing)
        )

    def _question(
        self, floors: Mapping[int, float], limits: IntArray, clearing: Clearing | None = None
    ) -> _Question:
        said = (self._said, tuple(sorted(floors.items())), limits.tobytes(), id(clearing))
        return _Question(said, self, floors, limits, clearing)

    @cached_property
    def _said(self) -> tuple[object, ...]:
        """All that a settlement looks at, in values that can be compared; the limits come with the question."""
        forest, fleet = self.forest, self.fleet
        arrays = (forest.parent, fleet.domain, fleet.class_index, fleet.gpus, self.committed)
        purses = tuple((each.name, each.members.tobytes(), each.milliwatts) for each in self.sale.purses)
        return (forest.names, self.goods.classes, purses, *(array.tobytes() for array in arrays))


@dataclass(frozen=True)
class _Question:
    """What is asked of the market: the same as another that says the same, however often it was put together."""

    said: tuple[object, ...]
    supply: Supply = field(compare=False)
    floors: Mapping[int, float] = field(compare=False)
    limits: IntArray = field(compare=False)
    clearing: Clearing | None = field(compare=False)
    """Said by its identity: as long as the question is remembered, no other clearing can have it."""

    def settle(self, firsts: BoolArray | None = None, running: Market | None = None) -> budgets.Settled:
        supply = self.supply
        return budgets.settle(
            supply.forest,
            supply.goods,
            running.fleet if running else supply.fleet,
            running.committed if running else supply.committed,
            self.limits,
            supply.sale.purses,
            self.floors,
            firsts=firsts,
        )


def _settle(question: _Question) -> budgets.Settled:
    settled = question.settle()
    if caught_on_a_cliff(settled.clearing).any():
        whole = question.settle(crossed_whole(question.supply.goods))
        if not caught_on_a_cliff(whole.clearing).any():
            return whole
    return settled


_settled = lru_cache(maxsize=SETTLED_KEPT)(_settle)


@lru_cache(maxsize=PARKED_KEPT)
def _parked(question: _Question) -> Parking:
    assert question.clearing is not None

    def again(running: Market) -> Clearing:
        return question.settle(running.order.firsts, running).clearing

    return park(question.clearing, again, question.supply.sale.purses)


@dataclass(frozen=True)
class Stand:
    """GPUs of one class in one domain, and what their hardware can do."""

    count: int
    low: int
    high: int


class Stands(dict[tuple[str, str], Stand]):
    """GPUs for sale by (domain, class); none for sale still means that the sheets must name the class."""

    def put(self, domain: str, label: str, count: int, low: int, high: int) -> None:
        held = self.get((domain, label), Stand(0, low, high))
        self[domain, label] = Stand(held.count + count, max(held.low, low), max(held.high, high))

    def take(self, domain: str, label: str, count: int) -> bool:
        """Off what is there; false when there is no such stand."""
        held = self.get((domain, label))
        if held is not None:
            self[domain, label] = replace(held, count=max(0, held.count - count))
        return held is not None


def stands_of(
    world: World, grid: Grid, ledger: Ledger, coming: Iterable[Coming]
) -> tuple[Stands, dict[str, int]]:
    """GPUs that obey, by (domain, class); and what each domain owes besides, by domain."""
    stands = Stands()
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


def _expect(stands: Stands, world: World, grid: Grid, ledger: Ledger, pod: Coming) -> None:
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


def supply_of(
    world: World,
    grid: Grid,
    stands: Mapping[tuple[str, str], Stand],
    committed: Mapping[str, int],
    hulls: Mapping[str, Hull],
    purses: tuple[Allotment, ...],
) -> Supply:
    forest = grid.tree.forest
    classes = {label: power_class(world, label, hull) for label, hull in hulls.items()}
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
