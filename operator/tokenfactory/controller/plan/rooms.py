"""What budgets across the tree still have room for, before a replica that pays from them is given a node.

A replica that a budget cannot bear is not even wished for: the others would give up watts for what never comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.hulls import hulls_of, worthwhile
from tokenfactory.controller.plan.placing import Unplaced, Wish
from tokenfactory.controller.plan.purses import budgets_of, factory_name
from tokenfactory.controller.plan.status import watts
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.planning.placement.inputs import PodRequest
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import Demand, Entry


class Wanted:
    """What a GPU of each class should have: the least that is worth serving at."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[tuple[str, int, int], int] = {}

    def of(self, label: str, low: int, high: int) -> int:
        key = (label, low, high)
        if key not in self._known:
            self._known[key] = worthwhile(hulls_of(self._world, {label: (low, high)})[label])
        return self._known[key]

    def each(self, demand: Demand, entry: Entry) -> int:
        wanted = self.of(demand.class_name, demand.low, demand.high)
        return wanted if entry.facts.guarded else max(wanted, demand.base)


class Rooms:
    """What is left of each budget when every GPU that pays from it has the least that it must have.

    From a grant that is what is worth serving at, as from a domain's limit. From a factory's own budget it is the
    lowest cap: how many of its replicas run well on that is for the market and for parking to find (`shedding`).
    """

    def __init__(
        self, world: World, grid: Grid, ledger: Ledger, ranges: Mapping[str, tuple[int, int]]
    ) -> None:
        self._world = world
        self._wanted = Wanted(world)
        self._ranges = ranges
        self._budgets = budgets_of(world, grid)
        self._left = {name: each.milliwatts for name, each in self._budgets.allotments.items()}
        for entry in ledger.entries.values() if self._left else ():
            self._take(ledger, entry)

    def _take(self, ledger: Ledger, entry: Entry) -> None:
        line = entry.line
        heard = entry.facts.heard and entry.kind == "Charged"
        for demand in line.expected() if heard else (*line.demands, *line.pending):
            for name in self._budgets.paying(demand.class_name, line.domains):
                if not heard:
                    each = demand.each(ledger.highest(line, demand.class_name))
                elif self._is_own(name):
                    each = demand.low if entry.facts.guarded else max(demand.low, demand.base)
                else:
                    each = self._wanted.each(demand, entry)
                self._left[name] -= demand.count * each

    def _is_own(self, budget: str) -> bool:
        return self._budgets.allotments[budget].domain is None

    def _need(self, budget: str, replica: Replica, product: str) -> int:
        """What the replica must have of this budget on GPUs of this product."""
        low, high = self._ranges[product]
        each = low if self._is_own(budget) else self._wanted.of(replica.class_on(product), low, high)
        return replica.model.gpus_per_replica * each

    def refuse(self, request: PodRequest, replica: Replica) -> PodRequest:
        """Domains whose grant has no room even where the replica needs least: it may still go elsewhere."""
        factory, refused = replica.factory, dict(request.refused)
        for name in self._budgets.of(factory_name(factory)):
            needs = [self._need(name, replica, product) for product in request.offers]
            lack = min(needs, default=0) - self._left[name]
            where = self._budgets.allotments[name].domain or factory.spec.power.domain
            if lack > 0 and where not in refused:
                refused[where] = f"{name} lacks {watts(lack)}{self._even(name)}"
        return replace(request, refused=refused)

    def _even(self, budget: str) -> str:
        return " even with every GPU at its lowest cap" if self._is_own(budget) else ""

    def admit(self, wishes: list[Wish]) -> tuple[tuple[Wish, ...], list[Unplaced]]:
        """The wishes that the budgets bear one after the other."""
        fits, spent = [], []
        for wish in wishes:
            host, replica = self._world.hosts[wish.node], wish.replica
            path = host.held.spec.path if host.held else ()
            needs = {
                name: self._need(name, replica, host.product)
                for name in self._budgets.paying(replica.class_on(host.product), path)
            }
            short = next((name for name, need in needs.items() if self._left[name] < need), None)
            if short is not None:
                lack = watts(needs[short] - self._left[short])
                message = f"{short} lacks {lack} to serve on {wish.node}{self._even(short)}"
                spent.append(Unplaced(replica, "NotAdmitted", message))
                continue
            for name, need in needs.items():
                self._left[name] -= need
            fits.append(wish)
        return tuple(fits), spent
