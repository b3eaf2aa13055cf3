"""Purses that hold in a part of the tree: there a class of GPUs is sold as a class of its own.

A factory's budget holds wherever its GPUs stand, a domain's grant (`spec.admits[].budget`) only below that domain. The
same class then has one price inside and another outside, so it is sold twice: once for every *zone*, the set of such
purses that its factory pays from at a place. Zones only grow on the way down, and every purse more makes a class
dearer: of the classes that a label is sold as below a domain, the one of the domain's own zone has the highest caps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.planning.power.forest import Forest
from tokenfactory.planning.power.goods import Goods, IntArray, PowerClass, gather_goods
from tokenfactory.planning.power.market import Clearing
from tokenfactory.planning.power.purses import Purse

Zone = tuple[int, ...]
"""Which allotments hold, by their number."""


@dataclass(frozen=True, slots=True)
class Allotment:
    """What some factories may draw together: everywhere, or in one domain and below."""

    name: str
    factories: frozenset[str]
    """`<namespace>/<factory>`."""
    milliwatts: int
    domain: str | None = None


@dataclass(frozen=True)
class Sale:
    """What is sold as what, and where."""

    goods: Goods
    purses: tuple[Purse, ...]
    labels: tuple[str, ...]
    """What people and sheets call each class of the goods; by class number."""
    _zones: tuple[Zone, ...]
    """By position: the scoped allotments that hold there, whoever pays from them."""
    _scoped: Mapping[int, Allotment]
    _numbers: Mapping[tuple[str, Zone], int]
    _factory: Mapping[str, str]

    def sold_as(self, position: int, label: str) -> int:
        """The class that a label on sale is sold as at a place."""
        return self._numbers[label, _paid(self._zones[position], self._scoped, self._factory[label])]

    def number(self, position: int, label: str) -> int | None:
        """The same; None for what is not on sale at all."""
        return self.sold_as(position, label) if label in self._factory else None

    def name(self, position: int, label: str) -> str | None:
        """The same by its name among the goods."""
        number = self.number(position, label)
        return None if number is None else self.goods.classes[number].name

    def label(self, class_name: str) -> str:
        return self.labels[self.goods.index[class_name]]

    def sheet(self, clearing: Clearing, position: int, below: Iterable[int]) -> dict[str, int]:
        """Milliwatts by label: what this domain's sheet says of the classes that stand in it and below.

        Where a zone begins, the sheets above speak for classes that may have more than those in here: the domain's
        own sheet then says what its whole path allows.
        """
        parent = int(clearing.market.forest.parent[position])
        begins = bool(self._scoped) and parent >= 0 and self._zones[parent] != self._zones[position]
        caps: IntArray = clearing.path_sheet(position) if begins else clearing.sheet(position)
        found: dict[str, int] = {}
        for number in below:
            label = self.labels[number]
            found[label] = max(found.get(label, 0), int(caps[number]))
        return found


def put_on_sale(
    forest: Forest, classes: Mapping[str, PowerClass], allotments: Iterable[Allotment] = ()
) -> Sale:
    """The goods for these classes (by label) under these allotments. Those of unknown domains hold nowhere."""
    wanted = sorted(allotments, key=lambda each: each.name)
    scoped = {
        number: each
        for number, each in enumerate(wanted)
        if each.domain is not None and each.domain in forest.index
    }
    zones = _zones(forest, scoped)
    sold: list[tuple[str, Zone]] = sorted(
        {
            (label, _paid(zone, scoped, each.factory))
            for label, each in classes.items()
            for zone in {(), *zones}
        }
    )
    named = {_name(label, zone, scoped): (label, zone) for label, zone in sold}
    goods = gather_goods(tuple(replace(classes[label], name=name) for name, (label, _) in named.items()))
    numbers = {named[each.name]: number for number, each in enumerate(goods.classes)}
    purses = [
        Purse(each.name, members, each.milliwatts)
        for number, each in enumerate(wanted)
        if each.domain is None or number in scoped
        if (members := _members(goods, named, number, each)).any()
    ]
    labels = tuple(named[each.name][0] for each in goods.classes)
    factory = {label: each.factory for label, each in classes.items()}
    return Sale(goods, tuple(purses), labels, zones, scoped, numbers, factory)


def _zones(forest: Forest, scoped: Mapping[int, Allotment]) -> tuple[Zone, ...]:
    begins: dict[int, list[int]] = {}
    for number, each in scoped.items():
        begins.setdefault(forest.index[each.domain or ""], []).append(number)
    zones: list[Zone] = []
    for position in range(forest.count):
        parent = int(forest.parent[position])
        above = zones[parent] if parent >= 0 else ()
        zones.append((*above, *begins[position]) if position in begins else above)
    return tuple(zones)


def _paid(zone: Zone, scoped: Mapping[int, Allotment], factory: str) -> Zone:
    """Those of a zone's allotments that this factory pays from."""
    return tuple(sorted(number for number in zone if factory in scoped[number].factories)) if factory else ()


def _name(label: str, zone: Zone, scoped: Mapping[int, Allotment]) -> str:
    return " under ".join((label, *(scoped[number].name for number in zone)))


def _members(
    goods: Goods, named: Mapping[str, tuple[str, Zone]], number: int, allotment: Allotment
) -> np.typing.NDArray[np.bool_]:
    return np.array(
        [
            each.factory in allotment.factories
            and (allotment.domain is None or number in named[each.name][1])
            for each in goods.classes
        ],
        dtype=np.bool_,
    )
