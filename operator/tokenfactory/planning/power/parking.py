"""Which replicas to drain and park, where the watts do not carry all of them.

Below an SLO floor, and on the bridge over a cliff, it is better that some replicas run well and the others are
parked at NVML's minimum than that all run badly. The caps alone already fit the limits; parking makes more
of the same watts. Per class and binding domain, as many replicas stay as the group's watts carry to the end
of the stretch; what is left over goes back to the market.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.planning.power.forest import Fleet
from tokenfactory.planning.power.goods import BoolArray, IntArray, PowerClass
from tokenfactory.planning.power.market import Clearing, Market

# Watts left over by one round of parking can ask for another; by then they are less than a replica's.
ROUNDS = 8


@dataclass(frozen=True)
class Parking:
    """What runs where after parking."""

    clearing: Clearing
    """Of the GPUs that keep running; the parked ones are part of `committed`."""
    parked: Mapping[tuple[str, str], int]
    """Replicas by (domain, class)."""

    def value(self) -> float:
        return self.clearing.value()


def park(clearing: Clearing, clear: Callable[[Market], Clearing] | None = None) -> Parking:
    """Parks replicas until no class that should not be is caught on a stretch that a GPU cannot use.

    `clear` clears the market of what keeps running; with purses it must be one that settles them anew
    (`budgets.settle`), since fewer GPUs may spend more each. Default: the same order, the same limits.
    """
    market = clearing.market
    limits = clearing.limits
    clear_again = clear or (lambda running: running.clear(limits))
    classes, fleet = market.order.goods.classes, market.fleet
    parked = np.zeros(fleet.gpus.size, dtype=np.int64)
    may_park = _may_park(classes, fleet)
    for _ in range(ROUNDS):
        more = _one_round(clearing, parked, may_park)
        if not more.any():
            break
        parked += more
        clearing = clear_again(_running(market, parked))
    names = market.forest.names
    replicas = {
        (names[int(fleet.domain[pair])], classes[int(fleet.class_index[pair])].name): int(
            parked[pair] // classes[int(fleet.class_index[pair])].gpus_per_replica
        )
        for pair in np.flatnonzero(parked)
    }
    return Parking(clearing, replicas)


def _running(market: Market, parked: IntArray) -> Market:
    """The market without the parked GPUs, which go on drawing their minimum."""
    fleet = market.fleet
    committed = market.committed.copy()
    np.add.at(committed, fleet.domain, parked * market.order.goods.minimum[fleet.class_index])
    return Market(market.forest, market.order, replace(fleet, gpus=fleet.gpus - parked), committed)


def _may_park(classes: tuple[PowerClass, ...], fleet: Fleet) -> IntArray:
    """Replicas of each class that may be drained: all but the fewest that its factory asks for."""
    per_replica = np.array([c.gpus_per_replica for c in classes], dtype=np.int64)
    least = np.array([c.min_replicas for c in classes], dtype=np.int64)
    replicas = np.zeros(per_replica.size, dtype=np.int64)
    np.add.at(replicas, fleet.class_index, fleet.gpus // per_replica[fleet.class_index])
    spare: IntArray = np.maximum(replicas - least, 0)
    return spare


def _one_round(clearing: Clearing, parked: IntArray, may_park: IntArray) -> IntArray:
    """GPUs to park in addition, by pair."""
    market, caps = clearing.market, clearing.caps
    classes, fleet = market.order.goods.classes, market.fleet
    binding = clearing.path_levels[2][fleet.domain]
    more = np.zeros(caps.size, dtype=np.int64)
    groups: dict[tuple[int, int], list[int]] = {}
    for pair in np.flatnonzero(_caught(clearing) & (fleet.gpus > 0)):
        groups.setdefault((int(fleet.class_index[pair]), int(binding[pair])), []).append(int(pair))
    left = may_park.copy()
    np.subtract.at(left, fleet.class_index, parked // _per_replica(classes)[fleet.class_index])
    for (number, _), pairs in sorted(groups.items()):
        each, members = classes[number], np.array(pairs)
        replicas = fleet.gpus[members] // each.gpus_per_replica
        low, high = each.milliwatts[0], each.milliwatts[1]
        watts = int((fleet.gpus[members] * (caps[members] - low)).sum())
        carried = min(watts // (each.gpus_per_replica * (high - low)), int(replicas.sum()))
        to_park = min(int(replicas.sum()) - carried, int(left[number]))
        if to_park > 0:
            left[number] -= to_park
            more[members] = _share_out(to_park, replicas) * each.gpus_per_replica
    return more


def _per_replica(classes: tuple[PowerClass, ...]) -> IntArray:
    return np.array([c.gpus_per_replica for c in classes], dtype=np.int64)


def _caught(clearing: Clearing) -> BoolArray:
    """Pairs whose cap is on a first stretch that is better parked than run."""
    market = clearing.market
    classes, fleet, caps = market.order.goods.classes, market.fleet, clearing.caps
    first_end = np.array([c.milliwatts[1] if len(c.milliwatts) > 1 else 0 for c in classes], dtype=np.int64)
    caught = np.array([len(c.milliwatts) > 1 and c.is_chord(0) for c in classes], dtype=np.bool_)
    suspects = np.flatnonzero(caught[fleet.class_index] & (caps < first_end[fleet.class_index]))
    found = np.zeros(caps.size, dtype=np.bool_)
    for pair in suspects:
        each = classes[int(fleet.class_index[pair])]
        found[pair] = parks_better(each, int(caps[pair]))
    return found


def parks_better(each: PowerClass, cap: int) -> bool:
    """Whether a share of the replicas at the end of the first stretch beats all of them at this cap."""
    if each.floor > 0:
        return True  # below the SLO floor nobody is served as promised
    low, high = each.milliwatts[0], each.milliwatts[1]
    share = (cap - low) / (high - low)
    return share * each.tokens[1] > each.tokens_at(cap)


def _share_out(count: int, replicas: IntArray) -> IntArray:
    """Splits a count over domains in proportion; the largest remainders get one more, the first ones on a tie."""
    exact = count * replicas / max(int(replicas.sum()), 1)
    given = np.floor(exact).astype(np.int64)
    missing = count - int(given.sum())
    given[np.argsort(-(exact - given), kind="stable")[:missing]] += 1
    return np.minimum(given, replicas)
