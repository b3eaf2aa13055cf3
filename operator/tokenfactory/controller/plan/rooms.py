"""What the grants with a budget still have room for, before a replica that pays from them is given a node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.hulls import hulls_of, worthwhile
from tokenfactory.controller.plan.placing import Unplaced, Wish
from tokenfactory.controller.plan.purses import factory_name, grants_with_budget, payer_of
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
    """What is left of each grant with a budget when every GPU that pays from it has what is worth serving at."""

    def __init__(
        self, world: World, grid: Grid, ledger: Ledger, ranges: Mapping[str, tuple[int, int]]
    ) -> None:
        self._world = world
        self._wanted = Wanted(world)
        self._ranges = ranges
        self._grants = grants_with_budget(world, grid)
        self._left = {name: each.milliwatts for name, each in self._grants.items()}
        for entry in ledger.entries.values() if self._grants else ():
            self._take(ledger, entry)

    def _take(self, ledger: Ledger, entry: Entry) -> None:
        heard = entry.facts.heard and entry.kind == "Charged"
        for demand in entry.line.expected() if heard else (*entry.line.demands, *entry.line.pending):
            for name in self._paying(demand.class_name, entry.line.domains):
                each = (
                    self._wanted.each(demand, entry)
                    if heard
                    else demand.each(ledger.highest(entry.line, demand.class_name))
                )
                self._left[name] -= demand.count * each

    def _paying(self, label: str, path: Iterable[str]) -> list[str]:
        if not self._grants:
            return []
        payer, domains = payer_of(label), frozenset(path)
        return [
            name
            for name, grant in self._grants.items()
            if payer in grant.factories and grant.domain in domains
        ]

    def refuse(self, request: PodRequest, replica: Replica) -> PodRequest:
        """Domains whose grant has no room even where the replica needs least: it may still go elsewhere."""
        factory, refused = factory_name(replica.factory), dict(request.refused)
        needs = [
            replica.model.gpus_per_replica
            * self._wanted.of(replica.class_on(product), *self._ranges[product])
            for product in request.offers
        ]
        for name, grant in self._grants.items():
            lack = min(needs, default=0) - self._left[name]
            if factory in grant.factories and lack > 0 and grant.domain not in refused:
                refused[grant.domain or ""] = f"{name} lacks {watts(lack)}"
        return replace(request, refused=refused)

    def admit(self, wishes: list[Wish]) -> tuple[tuple[Wish, ...], list[Unplaced]]:
        """The wishes that the grants bear one after the other."""
        fits, spent = [], []
        for wish in wishes:
            host = self._world.hosts[wish.node]
            label, count = wish.replica.class_on(host.product), wish.replica.model.gpus_per_replica
            need = count * self._wanted.of(label, *self._ranges[host.product]) if self._grants else 0
            paying = self._paying(label, host.held.spec.path if host.held else ())
            short = next((name for name in paying if self._left[name] < need), None)
            if short is not None:
                message = f"{short} lacks {watts(need - self._left[short])} to serve on {wish.node}"
                spent.append(Unplaced(wish.replica, "NotAdmitted", message))
                continue
            for name in paying:
                self._left[name] -= need
            fits.append(wish)
        return tuple(fits), spent
