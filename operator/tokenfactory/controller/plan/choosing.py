"""Which node for which gated pod: the controller's facts as placement's inputs, and its answer as wishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenfactory.api import names
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.placing import Unplaced, Wish
from tokenfactory.controller.plan.world import GpuHost, Replica, World
from tokenfactory.planning.placement.inputs import (
    NodeCandidate,
    Offer,
    PodRequest,
    Snapshot,
    Taint,
    Toleration,
)
from tokenfactory.planning.placement.plan import plan_placement
from tokenfactory.planning.power.ledger import Ledger

FLOOR_SHARE = 0.5
"""The part of its range above the minimum that a serving GPU is to have, while no profile says what it needs."""
_EFFORT = 64
"""How long to look for something better than the greedy answer: a round must end soon, and another one comes."""
_FAILURE_LABELS = ("topology.kubernetes.io/zone", "topology.tokenfactory.dev/rack")


@dataclass(frozen=True)
class Choice:
    wishes: tuple[Wish, ...]
    unplaced: tuple[Unplaced, ...]


def choose(world: World, grid: Grid, ledger: Ledger) -> Choice:
    """Every gated replica that is not charged anywhere yet."""
    waiting = {
        f"{replica.pod.metadata.namespace}/{replica.name}": replica
        for replica in world.replicas
        if replica.gated and not replica.terminating and replica.uid not in world.granted_on
    }
    if not waiting:
        return Choice((), ())
    products = {host.product for host in world.hosts.values() if host.product}
    candidates = tuple(
        _candidate(world, grid, host) for host in world.hosts.values() if host.held and host.product
    )
    offers = {product: _offer(world, product) for product in products}
    pods = tuple(_request(name, replica, offers) for name, replica in sorted(waiting.items()))
    plan = plan_placement(Snapshot(candidates, pods, _headroom(grid, ledger)), effort=_EFFORT)
    wishes = tuple(Wish(waiting[placed.pod], placed.node, placed.message) for placed in plan.placed)
    unplaced = tuple(Unplaced(waiting[entry.pod], entry.reason, entry.message) for entry in plan.unplaced)
    return Choice(wishes, unplaced)


def _candidate(world: World, grid: Grid, host: GpuHost) -> NodeCandidate:
    labels = host.node.metadata.labels if host.node else {}
    taints = host.node.spec.taints if host.node else ()
    granted = sum(grant.gpus for grant in host.grants)
    foreign = sum(1 for gpu in host.held.status.gpus if gpu.pod_uid == "" and gpu.pod) if host.held else 0
    replicas: dict[str, int] = {}
    for grant in host.grants:
        model = grant.class_name.partition("@")[0]
        replicas[model] = replicas.get(model, 0) + 1
    return NodeCandidate(
        name=host.name,
        product=host.product,
        gpus=host.gpu_count,
        free_gpus=max(0, host.gpu_count - granted - foreign),
        path=grid.places[host.name].path if host.name in grid.places else (),
        labels=labels,
        taints=tuple(Taint(taint.key, taint.value, taint.effect) for taint in taints),
        failure_domains=tuple(labels[label] for label in _FAILURE_LABELS if label in labels),
        replicas=replicas,
        closed=_closed(world, grid, host),
    )


def _closed(world: World, grid: Grid, host: GpuHost) -> str:
    if host.name not in grid.places:
        return "in no power domain"
    if host.fenced:
        return "fenced"
    if host.held is not None and host.held.spec.quarantine is not None:
        return "quarantined"
    if host.silent_seconds is None or world.lost(host):
        return "silent"
    if host.node is None or not host.node_ready:
        return "not ready"
    if host.node.spec.unschedulable:
        return "cordoned"
    return ""


def _request(name: str, replica: Replica, offers: Mapping[str, Offer]) -> PodRequest:
    namespace, factory = replica.pod.metadata.namespace, replica.factory
    return PodRequest(
        name=name,
        model=f"{namespace}/{factory.metadata.name}/{replica.model.name}",
        gpus=replica.model.gpus_per_replica,
        offers=offers,
        band=replica.model.band,
        selector=factory.spec.node_selector,
        tolerations=(Toleration(names.GPU_RESOURCE, "Exists"), Toleration(names.MANAGED_TAINT, "Exists")),
    )


def _offer(world: World, product: str) -> Offer:
    """Alike for all products until profiles tell them apart."""
    gpu = next(
        gpu
        for host in world.hosts.values()
        if host.held
        for gpu in host.held.status.gpus
        if gpu.product == product
    )
    return Offer(round(FLOOR_SHARE * (gpu.max_milliwatts - gpu.min_milliwatts)), tokens_per_joule=1.0)


def _headroom(grid: Grid, ledger: Ledger) -> dict[str, int]:
    """What is left when every serving GPU has its floor: what is charged above that can be taken back."""
    left = {name: domain.usable_milliwatts for name, domain in grid.domains.items()}
    for line, nodes in ledger.lines.items():
        each = line.fixed
        for demand in line.demands:
            floor = demand.low
            if names.class_owner(demand.class_name):
                floor += round(FLOOR_SHARE * (demand.high - demand.low))
            each += demand.count * floor
        for domain in line.domains:
            if domain in left:
                left[domain] -= each * len(nodes)
    return left
