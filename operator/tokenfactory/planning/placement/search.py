"""Finding places: putting units in and out of a room, and keeping what is better.

Who gets a place comes first: the worth placed is compared band by band, highest band first, and only equal worth is
decided by comfort (where they stand). All work is counted in evaluations (one pod against all nodes), never in time, and
nothing is random, so the same snapshot always gives the same plan.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Final

import numpy as np

from tokenfactory.planning.placement.filters import fits
from tokenfactory.planning.placement.fleet import BoolArray, FloatArray
from tokenfactory.planning.placement.room import Room
from tokenfactory.planning.placement.shape import Shape

NOWHERE: Final = -1
FABRICS_COMPARED: Final = 3
_EPSILON: Final = 1e-9


@dataclass(frozen=True, eq=False)
class Unit:
    """What is placed as one: a pod, or all pods of a replica that spans nodes."""

    name: str
    band: int
    worth: int
    """In whole units, so that sums of it are exact."""
    members: tuple[tuple[int, Shape], ...]
    """Index of the pod in the snapshot, and its shape."""
    gang: bool
    share: float
    """The part of the cluster's GPUs or watts that it takes, whichever is more."""

    @cached_property
    def kind(self) -> tuple[Shape, ...]:
        return tuple(shape for _, shape in self.members)

    @cached_property
    def gpus(self) -> int:
        return sum(shape.pod.gpus for _, shape in self.members)


class Keep(Enum):
    """Which result of an attempt stays."""

    BETTER = "more worth, or the same and more comfort"
    NO_LESS_WORTH = "at least the same worth, wherever"
    THRIFTIER = "at least the same worth, with no more watts if it is the same"


class Mode(Enum):
    """What picks the node among those that fit."""

    COMFORT = "preferences"
    TIGHT = "fewest GPUs left over"
    CHEAP = "fewest watts"
    ANY = "the next of a fixed sequence"


MODES: Final = tuple(Mode)
SYSTEMATIC: Final = (Mode.COMFORT, Mode.TIGHT, Mode.CHEAP)

Order = Callable[[Unit], tuple[object, ...]]
Score = tuple[tuple[int, ...], float]


def by_density(unit: Unit) -> tuple[object, ...]:
    return (-unit.band, -unit.worth / max(unit.share, 1e-12), unit.name)


def by_size(unit: Unit) -> tuple[object, ...]:
    return (-unit.band, -unit.gpus, -unit.worth, unit.name)


def by_worth(unit: Unit) -> tuple[object, ...]:
    return (-unit.band, -unit.worth, unit.share, unit.name)


def by_thrift(unit: Unit) -> tuple[object, ...]:
    return (-unit.band, unit.share, unit.name)


ORDERS: Final[tuple[Order, ...]] = (by_density, by_size, by_worth, by_thrift)


class Picks:
    """A fixed sequence that looks arbitrary (a linear congruence): the same for every plan, so plans repeat."""

    def __init__(self) -> None:
        self._state = 0x5DEECE66D

    def below(self, count: int) -> int:
        self._state = (self._state * 6364136223846793005 + 1442695040888963407) & ((1 << 64) - 1)
        return (self._state >> 33) % count


class Search:
    def __init__(self, room: Room, units: tuple[Unit, ...], effort: int) -> None:
        self.room = room
        self.units = units
        self.effort = effort
        self.evaluations = 0
        self.picks = Picks()
        self.where: dict[Unit, tuple[int, ...]] = {}
        self.bands = sorted({u.band for u in units}, reverse=True)
        self._band_index = {b: i for i, b in enumerate(self.bands)}
        self._worth = [0] * len(self.bands)
        self._spreading = tuple(dict.fromkeys(s for u in units for s in u.kind if s.pod.spread))

    @property
    def score(self) -> Score:
        return tuple(self._worth), self.room.comfort

    def unplaced(self) -> list[Unit]:
        return [u for u in self.units if u not in self.where]

    # One unit in or out.

    def put(self, unit: Unit, nodes: tuple[int, ...]) -> None:
        for (_, shape), node in zip(unit.members, nodes, strict=True):
            self.room.place(shape, node)
        self.where[unit] = nodes
        self._worth[self._band_index[unit.band]] += unit.worth

    def take(self, unit: Unit) -> tuple[int, ...]:
        nodes = self.where.pop(unit)
        for (_, shape), node in reversed(list(zip(unit.members, nodes, strict=True))):
            self.room.remove(shape, node)
        self._worth[self._band_index[unit.band]] -= unit.worth
        return nodes

    def insert(self, unit: Unit, *, mode: Mode = Mode.COMFORT) -> bool:
        if unit.gang:
            nodes = self._best_fabric(unit, mode=mode)
        else:
            node = self.best_node(unit.members[0][1], mode=mode)
            nodes = () if node == NOWHERE else (node,)
        if not nodes:
            return False
        self.put(unit, nodes)
        return True

    def best_node(self, shape: Shape, *, mode: Mode = Mode.COMFORT, within: BoolArray | None = None) -> int:
        self.evaluations += 1
        room = self.room
        fit = fits(room, shape)
        if within is not None:
            fit &= within
        if not np.count_nonzero(fit):
            return NOWHERE
        if mode is Mode.ANY:
            open_nodes = np.flatnonzero(fit)
            return int(open_nodes[self.picks.below(open_nodes.size)])
        if mode is not Mode.COMFORT:
            left = room.free_gpus - shape.pod.gpus
            watts = room.watts_needed(shape)
            first, then = (left, watts) if mode is Mode.TIGHT else (watts, left)
            key = first * (int(then[fit].max()) + 1) + then
            return int(np.argmin(np.where(fit, key, np.iinfo(np.int64).max)))
        gain = np.where(fit, room.gains(shape), -np.inf)
        best = float(gain.max())
        among = np.flatnonzero(gain >= best - _EPSILON * max(1.0, abs(best)))
        return int(among[0] if among.size == 1 else among[np.argmin(room.free_gpus[among])])

    def _best_fabric(self, unit: Unit, *, mode: Mode) -> tuple[int, ...]:
        """All members in one NVLink domain: the one in which they are most comfortable of the first that take them."""
        best: tuple[float, tuple[int, ...]] = (-np.inf, ())
        taken = 0
        for within in self._roomy_fabrics(unit):
            before = self.room.comfort
            nodes = self._fill(unit, within, mode=mode)
            gain = self.room.comfort - before
            self._unfill(unit, nodes)
            if len(nodes) < len(unit.members):
                continue
            if gain > best[0] + _EPSILON:
                best = (gain, nodes)
            taken += 1
            if taken >= FABRICS_COMPARED:
                break
        return best[1]

    def _roomy_fabrics(self, unit: Unit) -> Iterator[BoolArray]:
        """NVLink domains with GPUs for all members where a first one fits, most comfortable first."""
        fleet, room = self.room.fleet, self.room
        slots = self._slots(unit)
        gain = room.gains(unit.members[0][1])
        comfort = np.full(len(fleet.fabrics), -np.inf)
        np.maximum.at(comfort, fleet.fabric_of, gain)
        roomy = np.flatnonzero(slots >= len(unit.members))
        for number in roomy[np.argsort(-comfort[roomy], kind="stable")]:
            yield fleet.fabric_of == number

    def _slots(self, unit: Unit) -> FloatArray:
        """How many members each NVLink domain would take at the very most, judging each node by itself."""
        self.evaluations += 1
        fleet, room = self.room.fleet, self.room
        fit = np.zeros(fleet.count, dtype=np.bool_)
        for shape in dict.fromkeys(unit.kind):
            fit |= fits(room, shape)
        least = max(min(shape.pod.gpus for shape in unit.kind), 1)
        each = np.where(fit, room.free_gpus // least, 0).astype(np.float64)
        return np.bincount(fleet.fabric_of, weights=each, minlength=len(fleet.fabrics)).astype(np.float64)

    def _fill(self, unit: Unit, within: BoolArray, *, mode: Mode) -> tuple[int, ...]:
        nodes: list[int] = []
        for _, shape in unit.members:
            node = self.best_node(shape, mode=mode, within=within)
            if node == NOWHERE:
                break
            self.room.place(shape, node)
            nodes.append(node)
        return tuple(nodes)

    def fullest_fabric(self, unit: Unit) -> tuple[int, str]:
        """How many members the roomiest NVLink domain takes, for telling why the replica was not placed."""
        fleet = self.room.fleet
        slots = self._slots(unit)
        names = tuple(fleet.fabrics)
        best = (0, "")
        for number in np.argsort(-slots, kind="stable")[:FABRICS_COMPARED]:
            nodes = self._fill(unit, fleet.fabric_of == number, mode=Mode.TIGHT)
            self._unfill(unit, nodes)
            if len(nodes) > best[0]:
                best = (len(nodes), names[number])
        return best

    def _unfill(self, unit: Unit, nodes: tuple[int, ...]) -> None:
        for (_, shape), node in reversed(list(zip(unit.members, nodes, strict=False))):
            self.room.remove(shape, node)

    # Many units.

    def fill(self, units: list[Unit], *, mode: Mode = Mode.COMFORT) -> None:
        """Each in turn; when one of a kind finds no place, none of that kind does: room only shrinks here.

        Rules between pods are the exception: a later placement may raise the least crowded domain of a spread, or be
        what another must stand near.
        """
        hopeless: set[tuple[Shape, ...]] = set()
        again: list[Unit] = []
        for unit in units:
            if unit.kind in hopeless or not self.insert(unit, mode=mode):
                hopeless.add(unit.kind)
                if any(shape.pod.spread or shape.pod.near for shape in unit.kind):
                    again.append(unit)
        hopeless.clear()
        for unit in again:
            if unit.kind not in hopeless and not self.insert(unit, mode=mode):
                hopeless.add(unit.kind)

    def restart(self, order: Order, *, mode: Mode) -> None:
        for unit in list(self.where):
            self.take(unit)
        self.fill(sorted(self.units, key=order), mode=mode)

    def arrange(self, where: dict[Unit, tuple[int, ...]]) -> None:
        for unit in list(self.where):
            self.take(unit)
        for unit, nodes in where.items():
            self.put(unit, nodes)

    def attempt(
        self,
        out: tuple[Unit, ...],
        order: Order,
        *,
        first: Unit | None = None,
        mode: Mode = Mode.COMFORT,
        first_mode: Mode | None = None,
        keep: Keep = Keep.BETTER,
    ) -> bool:
        """Takes these units out and puts them and the unplaced back; goes back unless the result is worth keeping."""
        before, watts = self.score, self.room.watts_taken
        placed_before = set(self.where)
        broken = self._broken()
        old = [(unit, self.take(unit)) for unit in out]
        waiting = sorted(self.unplaced(), key=order)
        if first is not None:
            self.insert(first, mode=first_mode or mode)
            waiting = [u for u in waiting if u is not first]
        self.fill(waiting, mode=mode)
        if keep is Keep.BETTER:
            kept = better(self.score, before)
        elif keep is Keep.NO_LESS_WORTH or self.score[0] != before[0]:
            kept = self.score[0] >= before[0]
        else:
            kept = self.room.watts_taken <= watts
        if kept and self._broken() <= broken:
            return True
        for unit in [u for u in self.where if u not in placed_before or u in out]:
            self.take(unit)
        for unit, nodes in old:
            self.put(unit, nodes)
        return False

    def _broken(self) -> int:
        """What pods that were taken out leave broken behind: each pod keeps its rules itself when it is put in."""
        neighbours = self.room.neighbours
        return sum(neighbours.skew(shape) for shape in self._spreading) + neighbours.unsupported()


def better(score: Score, than: Score) -> bool:
    if score[0] != than[0]:
        return score[0] > than[0]
    return score[1] > than[1] + _EPSILON * max(1.0, abs(than[1]))
