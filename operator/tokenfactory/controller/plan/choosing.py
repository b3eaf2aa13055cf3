"""Which node for which gated pod: the controller's facts as placement's inputs, and its answer as wishes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tokenfactory.api import names
from tokenfactory.api.quantities import parse_decimal
from tokenfactory.controller.plan.admitting import refusals
from tokenfactory.controller.plan.classes import REASON as TOO_MANY
from tokenfactory.controller.plan.classes import Classes
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.hulls import model_hull, worthwhile
from tokenfactory.controller.plan.placing import Unplaced, Wish
from tokenfactory.controller.plan.profiles import gpu_range
from tokenfactory.controller.plan.quarantining import health_of
from tokenfactory.controller.plan.refusing import Refusals, Slot
from tokenfactory.controller.plan.rooms import Rooms, Wanted
from tokenfactory.controller.plan.world import GpuHost, Replica, World, gpus_asked
from tokenfactory.controller.workloads import RESTART_FEATURE, asks_for_rule
from tokenfactory.kube.resources import key_of
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

_EFFORT = 64
"""How long to look for something better than the greedy answer: a round must end soon, and another one comes."""
_DOMAIN = "power domain "
"""Before a domain's name: a label that only placement sees, so that a factory's domain is one more selector."""
_FAILURE_LABELS = ("topology.kubernetes.io/zone", "topology.tokenfactory.dev/rack")


@dataclass(frozen=True)
class Choice:
    wishes: tuple[Wish, ...]
    unplaced: tuple[Unplaced, ...]


def choose(world: World, grid: Grid, ledger: Ledger, refused: Refusals) -> Choice:
    """Every gated replica that is not charged anywhere yet."""
    waiting = {
        f"{replica.pod.metadata.namespace}/{replica.name}": replica
        for replica in world.replicas
        if replica.gated and not replica.terminating and replica.uid not in world.granted_on
    }
    gathering = _gathering(world)
    incomplete = [
        Unplaced(replica, "GroupIncomplete", gathering[replica.group])
        for replica in waiting.values()
        if replica.group in gathering
    ]
    waiting = {name: replica for name, replica in waiting.items() if replica.group not in gathering}
    if not waiting:
        return Choice((), tuple(incomplete))
    ranges = gpu_range(world)
    # What a domain grants to some together is no limit on a node's path: it is kept beside placement's own books.
    rooms = Rooms(world, grid, ledger, ranges)
    grouped = any(replica.group for replica in waiting.values())
    health = health_of(world)
    local = _on_disk(world)
    candidates = tuple(
        _candidate(
            world,
            grid,
            host,
            grouped=grouped,
            health=health.get(host.name, 1.0),
            cached=local.get(host.name, frozenset()),
            mute=host.name in refused.mute,
        )
        for host in world.hosts.values()
        if host.held and host.product
    )
    classes = Classes(world, grid, ledger)
    alike: dict[tuple[Slot, frozenset[str]], PodRequest | str] = {}
    pods = []
    for name, replica in sorted(waiting.items()):
        slot, features = (key_of(replica.factory), replica.model.name), _features(replica)
        if (slot, features) not in alike:
            asked = rooms.refuse(_request(world, grid, name, replica, ranges), replica)
            asked = replace(asked, not_on=refused.nodes(slot), features=features)
            alike[slot, features] = classes.refuse(asked, replica)
        like = alike[slot, features]
        if isinstance(like, str):
            incomplete.append(Unplaced(replica, TOO_MANY, like))
        else:
            pods.append(replace(like, name=name, gang=replica.group))
    plan = plan_placement(Snapshot(candidates, tuple(pods), _headroom(world, grid, ledger)), effort=_EFFORT)
    known, crowded = classes.admit([Wish(waiting[each.pod], each.node, each.message) for each in plan.placed])
    wishes, spent = rooms.admit(known)
    unplaced = tuple(Unplaced(waiting[entry.pod], entry.reason, entry.message) for entry in plan.unplaced)
    return Choice(wishes, (*unplaced, *spent, *crowded, *incomplete))


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


def _fabric(host: GpuHost, labels: Mapping[str, str], *, grouped: bool) -> str:
    """The NVLink domain that its GPUs report. Where NVLink ends at the node, a group shares the network of a zone."""
    reported = {gpu.fabric for gpu in host.held.status.gpus if gpu.fabric} if host.held else set()
    if len(reported) == 1:
        return reported.pop()
    return f"network of zone {labels.get(_FAILURE_LABELS[0], 'unnamed')}" if grouped and not reported else ""


def _candidate(
    world: World,
    grid: Grid,
    host: GpuHost,
    *,
    grouped: bool,
    health: float,
    cached: frozenset[str],
    mute: bool,
) -> NodeCandidate:
    labels = host.node.metadata.labels if host.node else {}
    path = grid.places[host.name].path if host.name in grid.places else ()
    taints = host.node.spec.taints if host.node else ()
    replicas: dict[str, int] = {}
    for grant in host.grants:
        model = grant.class_name.partition("@")[0]
        replicas[model] = replicas.get(model, 0) + 1
    return NodeCandidate(
        name=host.name,
        product=host.product,
        gpus=host.gpu_count,
        free_gpus=free_gpus(world, host),
        path=path,
        labels={**labels, **{_DOMAIN + domain: "yes" for domain in path}},
        taints=tuple(Taint(taint.key, taint.value, taint.effect) for taint in taints),
        fabric=_fabric(host, labels, grouped=grouped),
        failure_domains=tuple(labels[label] for label in _FAILURE_LABELS if label in labels),
        health=health,
        cached=cached,
        replicas=replicas,
        features=frozenset(host.node.status.declared_features if host.node else ()),
        closed=_closed(world, grid, host) or ("whose agent does not answer" if mute else ""),
    )


def free_gpus(world: World, host: GpuHost) -> int:
    """That a new pod could get: sound ones, as many as kube-scheduler may hand out, less everybody's claims.

    A stranger's claim counts from when it is bound, and still when its pod is gone and its GPU is not.
    """
    gpus = host.held.status.gpus if host.held else ()
    sound = host.gpu_count - sum(not gpu.healthy for gpu in gpus)
    offered = host.node.status.allocatable.get(names.GPU_RESOURCE, "") if host.node else ""
    usable = min(sound, int(offered)) if offered.isdigit() else sound
    held = sum(1 for gpu in gpus if gpu.pod and not gpu.pod_uid)
    bound = sum(gpus_asked(pod) for pod in world.foreign.get(host.name, ()))
    return max(0, usable - sum(grant.gpus for grant in host.grants) - max(held, bound))


def _features(replica: Replica) -> frozenset[str]:
    """Of the pod itself: its Deployment may have been made with or without the rule for restarts."""
    return frozenset({RESTART_FEATURE} if asks_for_rule(replica.pod) else ())


def _on_disk(world: World) -> dict[str, frozenset[str]]:
    """Models by node whose checkpoint lies on that node's own disk."""
    found: dict[str, set[str]] = {}
    for checkpoint in world.snapshot.checkpoints.values():
        spec = checkpoint.spec
        if spec.location.node and checkpoint.status.phase not in {"Corrupt", "Failed"}:
            name = f"{checkpoint.metadata.namespace}/{spec.factory}/{spec.model}"
            found.setdefault(spec.location.node, set()).add(name)
    return {node: frozenset(models) for node, models in found.items()}


def _closed(world: World, grid: Grid, host: GpuHost) -> str:
    if host.name not in grid.places:
        return "in no power domain"
    if host.held is not None and (
        host.held.spec.former_paths or host.held.spec.path != grid.places[host.name].path
    ):
        return "moving to another power domain"
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


def _request(
    world: World, grid: Grid, name: str, replica: Replica, ranges: Mapping[str, tuple[int, int]]
) -> PodRequest:
    namespace, factory, model = replica.pod.metadata.namespace, replica.factory, replica.model
    offers = {}
    for product, (low, high) in ranges.items():
        hull = model_hull(world, model, product, low, high)
        watts = hull.milliwatts[hull.knee] / 1000
        offers[product] = Offer(worthwhile(hull) - low, hull.tokens[hull.knee] / watts if watts else 0.0)
    return PodRequest(
        name=name,
        model=f"{namespace}/{factory.metadata.name}/{model.name}",
        gpus=model.gpus_per_replica,
        offers=offers,
        band=model.band,
        value=float(parse_decimal(model.value_per_million_tokens)),
        selector={**factory.spec.node_selector, _DOMAIN + factory.spec.power.domain: "yes"},
        tolerations=(Toleration(names.GPU_RESOURCE, "Exists"), Toleration(names.MANAGED_TAINT, "Exists")),
        weights=f"{namespace}/{factory.metadata.name}/{model.name}",
        refused=refusals(world, grid.tree, factory, model),
    )


def _headroom(world: World, grid: Grid, ledger: Ledger) -> dict[str, int]:
    """What is left when every serving GPU has what is worth serving at: what is charged above that can be had back.

    A silent node gives nothing back (P4): it counts with its whole charge.
    """
    left = {name: domain.usable_milliwatts for name, domain in grid.domains.items()}
    wanted = Wanted(world)
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
