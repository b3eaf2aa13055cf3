"""Pods that are alike in all that placement looks at share one shape: what never changes is weighed once per shape."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokenfactory.planning.placement.fleet import UNLIMITED, BoolArray, Fleet, FloatArray, IntArray
from tokenfactory.planning.placement.inputs import PodRequest


@dataclass(frozen=True, eq=False)
class Shape:
    pod: PodRequest
    """One of the pods of this shape."""
    allowed: BoolArray
    """Nodes that pass every filter which no placement can change."""
    need: IntArray
    """Milliwatts that its GPUs take on each node."""
    scores: tuple[FloatArray, ...]
    """What each scorer says of each node, for telling why."""
    preference: FloatArray
    """How good each node is for it, 0 to 1, apart from what other placements change."""
    accounts: IntArray

    @cached_property
    def needs(self) -> list[int]:
        """`need` as plain numbers."""
        found: list[int] = self.need.tolist()
        return found


def shape_key(pod: PodRequest) -> tuple[object, ...]:
    return (
        pod.model,
        pod.gpus,
        pod.band,
        pod.value,
        pod.loads,
        tuple(sorted((p, o.milliwatts_per_gpu, o.tokens_per_joule) for p, o in pod.offers.items())),
        tuple(sorted(pod.selector.items())),
        pod.affinity,
        pod.volumes,
        pod.tolerations,
        pod.marks,
        pod.spread,
        pod.near,
        pod.apart,
        tuple(sorted(pod.not_on.items())),
        pod.features,
        tuple(sorted(pod.resources.items())),
        pod.accounts,
        tuple(sorted(pod.refused.items())),
        pod.has_place,
        bool(pod.gang),
    )


def power_need(fleet: Fleet, pod: PodRequest) -> IntArray:
    """Where the product cannot serve the model no headroom is enough."""
    need = np.full(fleet.count, UNLIMITED, dtype=np.int64)
    for product, offer in pod.offers.items():
        need[fleet.products.get(product, fleet.none)] = pod.gpus * offer.milliwatts_per_gpu
    return need


def account_indices(fleet: Fleet, pod: PodRequest) -> IntArray:
    known = [fleet.limit_index[a] for a in pod.accounts if a in fleet.limit_index]
    return np.array(sorted(set(known)), dtype=np.int64)
