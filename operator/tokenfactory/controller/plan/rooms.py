"""What budgets across the tree still have room for, before a replica that pays from them is given a node.

A replica that a budget cannot bear is not even wished for: the others would give up watts for what never comes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from tokenfactory.api.names import class_product
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.hulls import hulls_of, worthwhile
from tokenfactory.controller.plan.placing import Unplaced, Wish, together
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


class Lowest:
    """The same for whoever is content with less than that: the lowest cap."""

    def each(self, demand: Demand, entry: Entry) -> int:
        return demand.low if entry.facts.guarded else max(demand.low, demand.base)


class Rooms:
    """What is left of each budget when every GPU that pays from it has the least that it must have.

    From a grant that is what is worth serving at, as from a domain's limit. From a factory's own budget it is the
    lowest cap: how many of its replicas run well on that is for the market and for parking to find (`shedding`).
    """

    def __init__(
        self,
        world: World,
        grid: Grid,
        ledger: Ledger,
        ranges: Mapping[str, tuple[int, int]],
        following: Container[str] = (),
    ) -> None:
        """`following`: UIDs of pods that follow ones that ran, and begin also where those ran at the lowest caps."""
        self._world = world
        self._following = following
        self._wanted = Wanted(world)
        self._ranges = ranges
        self._budgets = budgets_of(world, grid)
        self._left = {name: each.milliwatts for name, each in self._budgets.allotments.items()}
        self._least_left = dict(self._left)
        """The same with every GPU at its lowest cap, for those that follow."""
        self._silent: dict[str, dict[str, int]] = {}
        """By budget and silent node what stays charged."""
        self._entries = ledger.entries
        for entry in ledger.entries.values() if self._left else ():
            self._take(ledger, entry)

    def _take(self, ledger: Ledger, entry: Entry) -> None:
        line = entry.line
        heard = entry.facts.heard and entry.kind == "Charged"
        for demand in line.expected() if heard else (*line.demands, *line.pending):
            for name in self._budgets.paying(demand.class_name, line.domains):
                if heard:
                    least = demand.low if self._is_own(name) else self._wanted.each(demand, entry)
                    uncapped = _uncapped(entry, class_product(demand.class_name))
                    each, lowest = max(least, uncapped), max(demand.low, uncapped)
                else:
                    each = lowest = demand.each(ledger.highest(line, demand.class_name))
                    node, silent = entry.node.metadata.name, self._silent.setdefault(name, {})
                    silent[node] = silent.get(node, 0) + demand.count * each
                self._left[name] -= demand.count * each
                self._least_left[name] -= demand.count * lowest

    def _is_own(self, budget: str) -> bool:
        return self._budgets.allotments[budget].domain is None

    def _need(
        self, budget: str, replica: Replica, product: str, node: str = "", *, lowest: bool = False
    ) -> int:
        """What the replica must have of this budget on GPUs of this product, on any node or on this one."""
        low, high = self._ranges[product]
        lowest = lowest or self._is_own(budget)
        each = low if lowest else self._wanted.of(replica.class_on(product), low, high)
        if node in self._entries:
            each = max(each, _uncapped(self._entries[node], product))
        return replica.model.gpus_per_replica * each

    def refuse(self, request: PodRequest, replica: Replica) -> PodRequest:
        """Domains whose grant has no room even where the replica needs least: it may still go elsewhere."""
        factory, refused = replica.factory, dict(request.refused)
        follows = replica.uid in self._following
        left = self._least_left if follows else self._left
        for name in self._budgets.of(factory_name(factory)):
            needs = [self._need(name, replica, product, lowest=follows) for product in request.offers]
            lack = min(needs, default=0) - left[name]
            where = self._budgets.allotments[name].domain or factory.spec.power.domain
            if lack > 0 and where not in refused:
                refused[where] = f"{name} lacks {watts(lack)}{self._why(name, lowest=follows)}"
        return replace(request, refused=refused)

    def _why(self, budget: str, *, lowest: bool) -> str:
        even = " even with every GPU at its lowest cap" if lowest or self._is_own(budget) else ""
        silent = self._silent.get(budget)
        if not silent:
            return even
        names = ", ".join(sorted(silent)[:3]) + (", …" if len(silent) > 3 else "")
        return f"{even}; {watts(sum(silent.values()))} stay charged to silent nodes until these are fenced: {names}"

    def admit(self, wishes: list[Wish]) -> tuple[tuple[Wish, ...], list[Unplaced]]:
        """The wishes that the budgets bear one after the other; of a group all pods or none."""
        fits: list[Wish] = []
        spent: list[Unplaced] = []
        for group in together(wishes):
            before = dict(self._left), dict(self._least_left)
            if short := next((why for wish in group if (why := self._enter(wish))), ""):
                self._left, self._least_left = before
                spent += [Unplaced(wish.replica, "NotAdmitted", short) for wish in group]
            else:
                fits += group
        return tuple(fits), spent

    def _enter(self, wish: Wish) -> str:
        """Why the budgets do not bear it; empty when it is entered."""
        host, replica = self._world.hosts[wish.node], wish.replica
        path = host.held.spec.path if host.held else ()
        follows = replica.uid in self._following
        left = self._least_left if follows else self._left
        for name in self._budgets.paying(replica.class_on(host.product), path):
            usual = self._need(name, replica, host.product, wish.node)
            lowest = self._need(name, replica, host.product, wish.node, lowest=True)
            lack = (lowest if follows else usual) - left[name]
            if lack > 0:
                why = self._why(name, lowest=follows)
                return f"{name} lacks {watts(lack)} to serve on {wish.node}{why}"
            self._left[name] -= usual
            self._least_left[name] -= lowest
        return ""


def _uncapped(entry: Entry, product: str) -> int:
    """What a GPU is charged at least where strangers may land: what it draws when nobody caps it."""
    if entry.facts.guarded:
        return 0
    gpus = [gpu for gpu in entry.node.status.gpus if gpu.product == product]
    return max((max(gpu.default_milliwatts, gpu.enforced_milliwatts) for gpu in gpus), default=0)
