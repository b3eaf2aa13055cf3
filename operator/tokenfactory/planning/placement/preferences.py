"""What makes one node better than another for a pod, as a chain of small scorers from 0 to 1.

These are preferences: who gets a place at all is decided before, by band and value, and no preference ever costs a place.
Two further ones depend on what else is placed and live in `room.py`: spreading a model's replicas over failure domains,
and not breaking into a node that could still take a whole-node replica.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from tokenfactory.planning.placement.fleet import Fleet, FloatArray
from tokenfactory.planning.placement.inputs import PodRequest

Scorer = Callable[[Fleet, PodRequest], FloatArray]


def efficient_product(fleet: Fleet, pod: PodRequest) -> FloatArray:
    """Tokens per joule of the node's product for this model, against the best product in the fleet."""
    score = np.zeros(fleet.count, dtype=np.float64)
    best = max((o.tokens_per_joule for p, o in pod.offers.items() if p in fleet.products), default=0.0)
    for product, offer in pod.offers.items():
        score[fleet.products.get(product, fleet.none)] = offer.tokens_per_joule / best if best > 0 else 1.0
    return score


def healthy(fleet: Fleet, _pod: PodRequest) -> FloatArray:
    return np.clip(fleet.health, 0.0, 1.0)


def at_hand(fleet: Fleet, pod: PodRequest) -> FloatArray:
    """The part of what it loads before it serves that is there already: its image, a checkpoint of its model."""
    there = np.zeros(fleet.count, dtype=np.float64)
    for what in sorted(pod.loads):
        there += fleet.caching(what)
    return there / len(pod.loads) if pod.loads else there + 1.0


def linked(fleet: Fleet, pod: PodRequest) -> FloatArray:
    """The pod's GPUs reach each other by NVLink, and it leaves multi-node NVLink domains to those that need them."""
    score = np.where((pod.gpus <= 1) | (fleet.linked_gpus >= pod.gpus), 1.0, 0.0)
    if not pod.gang:
        score *= np.where(fleet.in_shared_fabric, 0.5, 1.0)
    return score


# The product outweighs the rest: it sets the joules of every token, the others cost once or seldom.
WEIGHTED: Final[tuple[tuple[float, Scorer], ...]] = (
    (0.45, efficient_product),
    (0.20, healthy),
    (0.15, at_hand),
    (0.20, linked),
)
SPREAD_WEIGHT: Final = 0.25
WHOLE_NODE_WEIGHT: Final = 0.20


def scores(fleet: Fleet, pod: PodRequest) -> tuple[FloatArray, ...]:
    return tuple(scorer(fleet, pod) for _, scorer in WEIGHTED)


def preference(each: tuple[FloatArray, ...]) -> FloatArray:
    total = np.zeros_like(each[0])
    for (weight, _), score in zip(WEIGHTED, each, strict=True):
        total += weight * score
    return total
