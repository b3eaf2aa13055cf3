"""How many classes a sheet may speak of. One object must hold them all, also a root's: were it too large, no more of
its writes would be taken, whoever they are for. So a new class waits long before that; those that draw never do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.placing import Unplaced, Wish
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.kube.resources import Key
from tokenfactory.planning.placement.inputs import PodRequest
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.sheets import class_bytes

MOST_CLASSES: Final = 3_500
"""A sheet holds 4,096: idle GPUs and strangers' have classes too, and some may come of what was granted before."""
MOST_BYTES: Final = 500_000
"""Of their entries; `earlier` may hold as much again, and an object has 1.5 MB in etcd."""
REASON: Final = "TooManyClasses"


class Classes:
    """By domain: the classes that its sheet lists, that some node may still obey, or that are granted there."""

    def __init__(self, world: World, grid: Grid, ledger: Ledger) -> None:
        self._world, self._grid, self._ledger = world, grid, ledger
        self._known: dict[str, set[str]] = {}
        self._bytes: dict[str, int] = {}

    def refuse(self, request: PodRequest, replica: Replica) -> PodRequest | str:
        """Without the products where its class would be one too many in its factory's domain; or why with none."""
        domain = self._grid.tree.domains.get(replica.factory.spec.power.domain)
        path = domain.path if domain else ()
        why = {product: self._why(path, replica.class_on(product)) for product in request.offers}
        if why and all(why.values()):
            return next(iter(why.values()))
        offers = {product: offer for product, offer in request.offers.items() if not why[product]}
        return replace(request, offers=offers)

    def admit(self, wishes: Iterable[Wish]) -> tuple[list[Wish], list[Unplaced]]:
        """The wishes for which there is room one after the other; of a group all or none."""
        together: dict[str, list[Wish]] = {}
        for wish in wishes:
            together.setdefault(wish.replica.group or wish.replica.uid, []).append(wish)
        fits: list[Wish] = []
        refused: list[Unplaced] = []
        for group in together.values():
            slots = [self._slot(wish) for wish in group]
            if why := next((why for path, label in slots if (why := self._why(path, label))), ""):
                refused += [Unplaced(wish.replica, REASON, why) for wish in group]
                continue
            for path, label in slots:
                for name in path:
                    self._add(name, label)
            fits += group
        return fits, refused

    def _slot(self, wish: Wish) -> tuple[tuple[str, ...], str]:
        host = self._world.hosts[wish.node]
        return (host.held.spec.path if host.held else ()), wish.replica.class_on(host.product)

    def _why(self, path: Iterable[str], label: str) -> str:
        for name in path:
            known = self._of(name)
            full = len(known) >= MOST_CLASSES or self._bytes[name] >= MOST_BYTES
            if full and label not in known:
                return (
                    f"the cap sheet of {name} speaks of {len(known)} classes (a model of a factory on a GPU product "
                    "each) and takes no new one: delete models that nobody needs, or split the domain's tree"
                )
        return ""

    def _of(self, name: str) -> set[str]:
        if name not in self._known:
            self._known[name], self._bytes[name] = set(), 0
            key: Key = ("", name)
            sheet = self._world.snapshot.sheets.get(key)
            least = self._ledger.least_acked(name) if name in self._ledger.domains else None
            listed = [sheet.spec.caps] if sheet else []
            # As the sheet will be once it is written again: what all nodes have left behind is forgotten then.
            listed += [
                entry.caps
                for entry in (sheet.spec.earlier if sheet else ())
                if least is None or entry.through >= least
            ]
            for caps in listed:
                for cap in caps:
                    self._add(name, cap.class_name)
            for host in self._world.under.get(name, ()):
                for grant in host.grants:
                    self._add(name, grant.class_name)
        return self._known[name]

    def _add(self, name: str, label: str) -> None:
        known = self._of(name)
        if label not in known:
            known.add(label)
            self._bytes[name] += class_bytes(label)
