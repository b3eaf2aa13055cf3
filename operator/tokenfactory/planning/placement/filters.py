"""The chain of filters: each says which nodes a pod may still use, and what to tell of those that it may not.

Steady filters look at what no placement changes and are asked once per shape; the others are asked each time. A node is
counted under the first filter that stops it, and an unplaced pod's reason is the last filter that stopped any node:
the one nearest to letting it through.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from tokenfactory.api.quantities import Milliwatts, format_power
from tokenfactory.planning.placement.amounts import format_amount
from tokenfactory.planning.placement.fleet import BoolArray, Fleet
from tokenfactory.planning.placement.inputs import PodRequest
from tokenfactory.planning.placement.room import Room
from tokenfactory.planning.placement.shape import Shape

Texts = list[tuple[int, str]]

LIMITS_TOLD: Final = 4


@dataclass(frozen=True)
class SteadyFilter:
    reason: str
    passes: Callable[[Fleet, PodRequest], BoolArray]
    explain: Callable[[Fleet, PodRequest, BoolArray], Texts]


@dataclass(frozen=True)
class RoomFilter:
    reason: str
    concerns: Callable[[Room, Shape], bool]
    """Whether what it looks at can ever stop such a pod: most do not spread. Asked once per shape."""
    passes: Callable[[Room, Shape], BoolArray]
    explain: Callable[[Room, Shape, BoolArray], Texts]


def _counted(words: list[str]) -> Texts:
    return [(count, text) for text, count in sorted(Counter(words).items(), key=lambda c: (-c[1], c[0]))]


def _nodes(mask: BoolArray) -> list[int]:
    return [int(i) for i in np.flatnonzero(mask)]


def _open(fleet: Fleet, _pod: PodRequest) -> BoolArray:
    return fleet.open


def _why_closed(fleet: Fleet, _pod: PodRequest, blocked: BoolArray) -> Texts:
    return _counted([fleet.nodes[i].closed for i in _nodes(blocked)])


def _not_refused(fleet: Fleet, pod: PodRequest) -> BoolArray:
    mask = np.ones(fleet.count, dtype=np.bool_)
    mask[[fleet.index[n] for n in pod.not_on if n in fleet.index]] = False
    return mask


def _why_refused(fleet: Fleet, pod: PodRequest, blocked: BoolArray) -> Texts:
    said = [pod.not_on[fleet.nodes[i].name] for i in _nodes(blocked)]
    return _counted(["refused before by kube-scheduler" + (f" ({why})" if why else "") for why in said])


def _able(fleet: Fleet, pod: PodRequest) -> BoolArray:
    if not pod.features:
        return np.ones(fleet.count, dtype=np.bool_)
    return np.array([pod.features <= node.features for node in fleet.nodes], dtype=np.bool_)


def _why_not_able(fleet: Fleet, pod: PodRequest, blocked: BoolArray) -> Texts:
    lacking = [", ".join(sorted(pod.features - fleet.nodes[i].features)) for i in _nodes(blocked)]
    return _counted([f"whose kubelet does not declare {names}" for names in lacking])


def _selected(fleet: Fleet, pod: PodRequest) -> BoolArray:
    return fleet.selected(pod)


def _why_not_selected(_fleet: Fleet, _pod: PodRequest, blocked: BoolArray) -> Texts:
    return [(int(blocked.sum()), "not matched by its node selector or affinity")]


def _reached(fleet: Fleet, pod: PodRequest) -> BoolArray:
    mask = np.ones(fleet.count, dtype=np.bool_)
    for volume in pod.volumes:
        mask &= fleet.meets_one(volume.reach)
    return mask


def _why_not_reached(fleet: Fleet, pod: PodRequest, blocked: BoolArray) -> Texts:
    words: list[str] = []
    for volume in pod.volumes:
        here = blocked & ~fleet.meets_one(volume.reach)
        words += [f"that the volume of claim {volume.claim} cannot be reached from"] * int(here.sum())
        blocked = blocked & ~here
    return _counted(words)


def _tolerated(fleet: Fleet, pod: PodRequest) -> BoolArray:
    mask = np.ones(fleet.count, dtype=np.bool_)
    for node, members in fleet.taint_groups:
        mask[members] = all(
            t.effect == "PreferNoSchedule" or any(each.tolerates(t) for each in pod.tolerations)
            for t in node.taints
        )
    return mask


def _why_not_tolerated(fleet: Fleet, pod: PodRequest, blocked: BoolArray) -> Texts:
    words = []
    for i in _nodes(blocked):
        taint = next(
            t
            for t in fleet.nodes[i].taints
            if t.effect != "PreferNoSchedule" and not any(each.tolerates(t) for each in pod.tolerations)
        )
        words.append(
            f"with taint {taint.key}{'=' if taint.value else ''}{taint.value} that it does not tolerate"
        )
    return _counted(words)


def _admitted(fleet: Fleet, pod: PodRequest) -> BoolArray:
    if not pod.refused:
        return np.ones(fleet.count, dtype=np.bool_)
    return np.array([not any(d in pod.refused for d in n.path) for n in fleet.nodes], dtype=np.bool_)


def _why_not_admitted(fleet: Fleet, pod: PodRequest, blocked: BoolArray) -> Texts:
    domains = [next(d for d in fleet.nodes[i].path if d in pod.refused) for i in _nodes(blocked)]
    return _counted([f"in {d}, which does not admit it: {pod.refused[d]}" for d in domains])


def _served(fleet: Fleet, pod: PodRequest) -> BoolArray:
    mask = np.zeros(fleet.count, dtype=np.bool_)
    for product in pod.offers:
        mask[fleet.products.get(product, fleet.none)] = True
    return mask


def _why_not_served(fleet: Fleet, pod: PodRequest, blocked: BoolArray) -> Texts:
    return _counted(
        [f"with {fleet.nodes[i].product}, which cannot serve {pod.model}" for i in _nodes(blocked)]
    )


def _free_gpus(room: Room, shape: Shape) -> BoolArray:
    return room.free_gpus >= shape.pod.gpus


def _why_no_gpus(_room: Room, shape: Shape, blocked: BoolArray) -> Texts:
    plural = "" if shape.pod.gpus == 1 else "s"
    return [(int(blocked.sum()), f"without {shape.pod.gpus} free GPU{plural}")]


def _free_resources(room: Room, shape: Shape) -> BoolArray:
    masks = [room.free(name) >= amount for name, amount in shape.pod.resources.items()]
    mask = masks[0] if masks else np.ones(room.fleet.count, dtype=np.bool_)
    for other in masks[1:]:
        mask &= other
    return mask


def _why_no_resources(room: Room, shape: Shape, blocked: BoolArray) -> Texts:
    """By the first resource that is short, with the node that has most of it."""
    texts = Texts()
    for name, amount in sorted(shape.pod.resources.items()):
        free = room.free(name)
        here = blocked & (free < amount)
        if here.any():
            most = int(np.argmax(np.where(here, free, np.iinfo(np.int64).min)))
            has = f"{room.fleet.nodes[most].name} has {format_amount(name, max(int(free[most]), 0))}"
            texts.append((int(here.sum()), f"without {format_amount(name, amount)} {name} free ({has})"))
            blocked = blocked & ~here
    return texts


def _spread(room: Room, shape: Shape) -> BoolArray:
    return room.neighbours.spread_allows(shape)


def _why_not_spread(_room: Room, shape: Shape, blocked: BoolArray) -> Texts:
    keys = " and ".join(each.rule.topology_key for each in shape.pod.spread)
    return [(int(blocked.sum()), f"would break its spread over {keys}")]


def _near(room: Room, shape: Shape) -> BoolArray:
    return room.neighbours.near_allows(shape)


def _why_not_near(room: Room, shape: Shape, blocked: BoolArray) -> Texts:
    return _told(room.neighbours.why_not_near(shape), blocked)


def _apart(room: Room, shape: Shape) -> BoolArray:
    return room.neighbours.apart_allows(shape)


def _why_not_apart(room: Room, shape: Shape, blocked: BoolArray) -> Texts:
    return _told(room.neighbours.why_not_apart(shape), blocked)


def _told(reasons: Iterable[tuple[BoolArray, str]], blocked: BoolArray) -> Texts:
    """Each node under the first of the reasons that holds there."""
    texts = Texts()
    for where, text in reasons:
        here = blocked & where
        if here.any():
            texts.append((int(here.sum()), text))
            blocked = blocked & ~here
    return texts


def _power(room: Room, shape: Shape) -> BoolArray:
    return room.shortfall(shape) <= 0


def _why_no_power(room: Room, shape: Shape, blocked: BoolArray) -> Texts:
    """By the limit that is shortest of watts; the figure is the least that would open one of its nodes."""
    least: dict[str, int] = {}
    count: Counter[str] = Counter()
    for i in _nodes(blocked):
        where, missing = room.shortest_limit(shape, i)
        count[where] += 1
        least[where] = min(missing, least.get(where, missing))
    ranked = sorted(count, key=lambda w: (-count[w], w))
    texts = [
        (count[where], f"in {where} need {_rounded_up(least[where])} more") for where in ranked[:LIMITS_TOLD]
    ]
    if others := ranked[LIMITS_TOLD:]:
        short = _rounded_up(min(least[w] for w in others))
        texts.append((sum(count[w] for w in others), f"in {len(others)} other limits need {short} or more"))
    return texts


def _rounded_up(milliwatts: int) -> str:
    """Readable, and never less than what is missing."""
    step = 100_000 if milliwatts >= 1_000_000 else 1_000
    return format_power(Milliwatts(-(-milliwatts // step) * step))


STEADY: tuple[SteadyFilter, ...] = (
    SteadyFilter("NodesClosed", _open, _why_closed),
    SteadyFilter("NodesRefused", _not_refused, _why_refused),
    SteadyFilter("KubeletTooOld", _able, _why_not_able),
    SteadyFilter("NoMatchingNode", _selected, _why_not_selected),
    SteadyFilter("VolumeOutOfReach", _reached, _why_not_reached),
    SteadyFilter("UntoleratedTaint", _tolerated, _why_not_tolerated),
    SteadyFilter("NotAdmitted", _admitted, _why_not_admitted),
    SteadyFilter("ProductCannotServe", _served, _why_not_served),
)
ROOM: tuple[RoomFilter, ...] = (
    RoomFilter("InsufficientGPUs", lambda *_: True, _free_gpus, _why_no_gpus),
    RoomFilter(
        "InsufficientResources",
        lambda _, shape: bool(shape.pod.resources),
        _free_resources,
        _why_no_resources,
    ),
    RoomFilter("SpreadNotPossible", lambda _, shape: bool(shape.pod.spread), _spread, _why_not_spread),
    RoomFilter("PodAffinity", lambda _, shape: bool(shape.pod.near), _near, _why_not_near),
    RoomFilter(
        "PodAntiAffinity",
        lambda room, shape: room.neighbours.may_refuse(shape),
        _apart,
        _why_not_apart,
    ),
    RoomFilter("InsufficientPower", lambda _, shape: not shape.pod.has_place, _power, _why_no_power),
)


def allowed(fleet: Fleet, pod: PodRequest) -> BoolArray:
    mask = np.ones(fleet.count, dtype=np.bool_)
    for each in STEADY:
        mask &= each.passes(fleet, pod)
    return mask


def fits(room: Room, shape: Shape) -> BoolArray:
    if shape not in room.concerning:
        room.concerning[shape] = tuple(each.passes for each in ROOM if each.concerns(room, shape))
    mask = shape.allowed.copy()
    for passes in room.concerning[shape]:
        mask &= passes(room, shape)
    return mask


def explain(room: Room, shape: Shape) -> tuple[str, str]:
    """Why no node takes a pod of this shape: (reason, message), each node counted once."""
    fleet = room.fleet
    left = np.ones(fleet.count, dtype=np.bool_)
    reason, texts = "NoNodes", Texts()
    for each in STEADY:
        blocked = left & ~each.passes(fleet, shape.pod)
        if blocked.any():
            reason, texts = each.reason, texts + each.explain(fleet, shape.pod, blocked)
            left &= ~blocked
    for one in ROOM:
        blocked = left & ~one.passes(room, shape)
        if blocked.any():
            reason, texts = one.reason, texts + one.explain(room, shape, blocked)
            left &= ~blocked
    detail = ", ".join(f"{count} {text}" for count, text in texts) or "there are no GPU nodes"
    return reason, f"{int(left.sum())}/{fleet.count} nodes: {detail}"
