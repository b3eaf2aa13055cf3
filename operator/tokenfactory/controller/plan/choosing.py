"""Which node for which gated pod: the controller's facts as placement's inputs, and its answer as wishes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import msgspec

from tokenfactory.api.quantities import parse_decimal
from tokenfactory.controller.plan.admitting import refusals
from tokenfactory.controller.plan.at_hand import loads
from tokenfactory.controller.plan.beside import Rules, beside
from tokenfactory.controller.plan.candidates import DOMAIN, Site
from tokenfactory.controller.plan.classes import REASON as TOO_MANY
from tokenfactory.controller.plan.classes import Classes
from tokenfactory.controller.plan.demands import affinity_of, claims_of, tolerations_of
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.hulls import model_hull, worthwhile
from tokenfactory.controller.plan.leftovers import NOTHING_KNOWN, Known
from tokenfactory.controller.plan.placing import Unplaced, Wish
from tokenfactory.controller.plan.profiles import gpu_range
from tokenfactory.controller.plan.refusing import Refusals, Slot
from tokenfactory.controller.plan.rolling import successors
from tokenfactory.controller.plan.rooms import Lowest, Rooms, Wanted
from tokenfactory.controller.plan.status import watts
from tokenfactory.controller.plan.world import Replica, World
from tokenfactory.controller.workloads import RESTART_FEATURE, asks_for_rule
from tokenfactory.kube.resources import key_of
from tokenfactory.planning.placement.inputs import Offer, PodRequest, Snapshot
from tokenfactory.planning.placement.plan import plan_placement
from tokenfactory.planning.power.ledger import Ledger

_EFFORT = 64
"""How long to look for something better than the greedy answer: a round must end soon, and another one comes."""


@dataclass(frozen=True)
class Choice:
    wishes: tuple[Wish, ...]
    unplaced: tuple[Unplaced, ...]
    asked: Known = field(default_factory=dict)
    """What pods ask, for the next round."""
    again_after_seconds: float = math.inf
    """Until some of them ask for less."""


def choose(
    world: World, grid: Grid, ledger: Ledger, refused: Refusals, asked: Known = NOTHING_KNOWN
) -> Choice:
    """Every gated replica that is not charged anywhere yet."""
    waiting = {
        f"{replica.pod.metadata.namespace}/{replica.name}": replica
        for replica in world.replicas
        if replica.gated and not replica.terminating and replica.uid not in world.granted_on
    }
    gathering = _gathering(world)
    stopped = [
        Unplaced(replica, *why)
        for replica in waiting.values()
        if (why := _cannot_begin(world, replica, gathering))
    ]
    held_back = {each.replica.uid for each in stopped}
    waiting = {name: replica for name, replica in waiting.items() if replica.uid not in held_back}
    if not waiting:
        return Choice((), tuple(stopped), asked)
    ranges = gpu_range(world)
    # What a domain grants to some together is no limit on a node's path: it is kept beside placement's own books.
    following = successors(world)
    rooms = Rooms(world, grid, ledger, ranges, following.uids)
    site = Site(world, grid, tuple(waiting.values()), asked, refused.mute)
    between = beside(world, [replica.pod for replica in waiting.values()], site.standing)
    classes = Classes(world, grid, ledger)
    alike: dict[tuple[Slot, bytes, bool], PodRequest | str] = {}
    pods = []
    for name, replica in sorted(waiting.items()):
        slot = key_of(replica.factory), replica.model.name
        kind = slot, msgspec.json.encode(replica.pod.spec), replica.uid in following.uids
        if kind not in alike:
            like = _request(world, grid, site, refused, ranges, replica)
            if replica.uid in following.uids:
                like = _in_its_place(like, _headroom(grid, ledger, Lowest()))
            alike[kind] = classes.refuse(rooms.refuse(like, replica), replica)
        found = alike[kind]
        if isinstance(found, str):
            stopped.append(Unplaced(replica, TOO_MANY, found))
        else:
            pods.append(
                _with_rules(replace(found, name=name, gang=replica.group), between.rules.get(replica.uid))
            )
    snapshot = Snapshot(
        site.candidates(),
        tuple(pods),
        _headroom(grid, ledger, Wanted(world)),
        standing=between.standing,
        refusing=between.refusing,
    )
    plan = plan_placement(snapshot, effort=_EFFORT)
    known, crowded = classes.admit([Wish(waiting[each.pod], each.node, each.message) for each in plan.placed])
    wishes, spent = rooms.admit(known)
    unplaced = tuple(Unplaced(waiting[entry.pod], entry.reason, entry.message) for entry in plan.unplaced)
    waits = (*unplaced, *spent, *crowded, *stopped)
    return Choice(wishes, waits, site.known, following.more_in_seconds)


def _with_rules(pod: PodRequest, rules: Rules | None) -> PodRequest:
    if rules is None:
        return pod
    return replace(pod, marks=rules.marks, spread=rules.spread, near=rules.near, apart=rules.apart)


def _cannot_begin(world: World, replica: Replica, gathering: Mapping[str, str]) -> tuple[str, str] | None:
    """Why no node is looked for yet."""
    if replica.group in gathering:
        return "GroupIncomplete", gathering[replica.group]
    if missing := claims_of(world, replica.pod).missing:
        where = f"PersistentVolumeClaim {' and '.join(missing)} in namespace {replica.pod.metadata.namespace}"
        return "ClaimMissing", f"there is no {where}: create it, or correct the model's checkpoint.claim"
    return None


def unguarded(world: World) -> tuple[Unplaced, ...]:
    """Told like replicas that wait, and after them: a stranger's pod must not hide what a factory waits for."""
    return tuple(
        Unplaced(replica, "Unguarded", f"it gets no GPUs, since it would not wait for their caps: {why}")
        for replica, why in world.unguarded
        if not replica.terminating
    )


def _gathering(world: World) -> dict[str, str]:
    """Groups whose pods are not all there yet: half of one must take no place that a whole one could have."""
    members: dict[str, list[Replica]] = {}
    for replica in world.replicas:
        if replica.group and not replica.terminating and not replica.finished:
            members.setdefault(replica.group, []).append(replica)
    return {
        group: f"{len(pods)} of the {pods[0].model.nodes_per_replica} pods of its group are there"
        for group, pods in members.items()
        if len(pods) < pods[0].model.nodes_per_replica
    }


def _request(
    world: World,
    grid: Grid,
    site: Site,
    refused: Refusals,
    ranges: Mapping[str, tuple[int, int]],
    replica: Replica,
) -> PodRequest:
    """What pods of this kind ask for; their names, groups and labels are their own."""
    namespace, factory, model = replica.pod.metadata.namespace, replica.factory, replica.model
    offers = {}
    for product, (low, high) in ranges.items():
        hull = model_hull(world, namespace or "", model, product, low, high)
        knee_watts = hull.milliwatts[hull.knee] / 1000
        offers[product] = Offer(
            worthwhile(hull) - low, hull.tokens[hull.knee] / knee_watts if knee_watts else 0.0
        )
    return PodRequest(
        name="",
        model=f"{namespace}/{factory.metadata.name}/{model.name}",
        gpus=model.gpus_per_replica,
        offers=offers,
        band=model.band,
        value=float(parse_decimal(model.value_per_million_tokens)),
        loads=loads(replica),
        not_on=refused.nodes((key_of(factory), model.name)),
        volumes=claims_of(world, replica.pod).volumes,
        resources=site.known[replica.uid][1],
        selector={
            **factory.spec.node_selector,
            **replica.pod.spec.node_selector,
            DOMAIN + factory.spec.power.domain: "yes",
        },
        affinity=affinity_of(replica.pod),
        tolerations=tolerations_of(replica.pod),
        # Of the pod itself: its Deployment may have been made with or without the rule for restarts.
        features=frozenset({RESTART_FEATURE} if asks_for_rule(replica.pod) else ()),
        refused=refusals(world, grid.tree, factory, model),
    )


def _in_its_place(request: PodRequest, left: Mapping[str, int]) -> PodRequest:
    """The same of a pod that follows one that ran: the market shares out anew what there is. Only where not even the
    lowest caps fit there is nothing to share.
    """
    full = {
        name: f"{name} lacks {watts(-lacks)} even with every GPU at its lowest cap"
        for name, lacks in left.items()
        if lacks < 0
    }
    offers = {product: replace(offer, milliwatts_per_gpu=0) for product, offer in request.offers.items()}
    return replace(request, offers=offers, has_place=True, refused={**full, **request.refused})


def _headroom(grid: Grid, ledger: Ledger, wanted: Wanted | Lowest) -> dict[str, int]:
    """What is left when every serving GPU has what is wanted, such as what is worth serving at: what is charged above
    that can be had back.

    A silent node gives nothing back (P4): it counts with its whole charge.
    """
    left = {name: domain.usable_milliwatts for name, domain in grid.domains.items()}
    for entry in ledger.entries.values():
        line = entry.line
        total = line.fixed
        if not entry.facts.heard or entry.kind != "Charged":
            total = ledger.line_charge(line)
        else:
            total += sum(demand.count * wanted.each(demand, entry) for demand in line.expected())
        for domain in line.domains:
            if domain in left:
                left[domain] -= total
    return left
