"""Who is charged where: the spec of each GPUNode, from the node's place in the tree and the pods that it may run.

A GPUNode's spec is a charge that agents act upon, so it shrinks in two steps (see planning/power/grants.py): what
goes is first marked as released, or kept as a former path, and is taken off only when the agent has reported that it
obeys the spec without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tokenfactory.api import names
from tokenfactory.api.gpu_node import Fence, GPUNode, GPUNodeSpec, PodGrant
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.controller.actions import Action, ChargeNode, TaintNode, Tell
from tokenfactory.controller.plan.profiles import actuators_of
from tokenfactory.controller.plan.quarantining import repeat_offenders
from tokenfactory.controller.plan.world import GpuHost, Replica, World, has_finished
from tokenfactory.kube.objects import Node
from tokenfactory.kube.times import rfc3339
from tokenfactory.planning.power import grants
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import NodeFacts, enter
from tokenfactory.planning.power.spending import Spending, lacking

Path = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a node belongs and what it draws besides its GPUs."""

    path: Path
    overhead_milliwatts: int


def with_arrivals(
    world: World, ledger: Ledger, places: Mapping[str, Place], facts: Mapping[str, NodeFacts]
) -> Ledger:
    """With every node charged where it is to be charged from this round on, as well as where it was.

    A machine that appears or moves draws there already: nothing may be granted or raised against its watts meanwhile.
    """
    found = []
    for host in world.hosts.values():
        place = places.get(host.name)
        if place is None or (host.held is not None and host.held.spec.path == place.path):
            continue
        term = ledger.leadership.term
        spec = GPUNodeSpec(path=place.path, overhead_milliwatts=place.overhead_milliwatts, term=term)
        found.append((_covering(host.held, host.name, spec), facts[host.name]))
    return ledger.with_nodes(found)


def with_charges(ledger: Ledger, actions: Sequence[Action], facts: Mapping[str, NodeFacts]) -> Ledger:
    """With all that these writes charge, and still with all that they let go: they may fail, each by itself."""
    return ledger.with_nodes(
        (_covering(action.held, action.name, action.spec), facts[action.name])
        for action in actions
        if isinstance(action, ChargeNode) and (action.held is None or _charges(action.held.spec, action.spec))
    )


def _charges(before: GPUNodeSpec, after: GPUNodeSpec) -> bool:
    """Is there more in it than a term or an address?"""
    return (
        before.path != after.path
        or before.overhead_milliwatts != after.overhead_milliwatts
        or before.fence != after.fence
        or {pod.uid for pod in before.pods} != {pod.uid for pod in after.pods}
    )


def _covering(held: GPUNode | None, name: str, spec: GPUNodeSpec) -> GPUNode:
    if held is None:
        return GPUNode(metadata=ObjectMeta(name=name), spec=spec)
    before = held.spec
    listed = {pod.uid for pod in spec.pods}
    former = dict.fromkeys((*before.former_paths, before.path, *spec.former_paths))
    both = msgspec.structs.replace(
        spec,
        term=before.term,  # not claimed before it is written
        former_paths=tuple(path for path in former if path and path != spec.path),
        pods=(*spec.pods, *(pod for pod in before.pods if pod.uid not in listed)),
        overhead_milliwatts=max(spec.overhead_milliwatts, before.overhead_milliwatts),
        fence=spec.fence if before.fence is not None else None,
    )
    return msgspec.structs.replace(held, spec=both)


def leaves_a_path(actions: Sequence[Action]) -> bool:
    """Is a former path dropped? That may raise what the node draws, so no sheet may rise in the same round."""
    return any(
        isinstance(action, ChargeNode)
        and action.held is not None
        and not set(action.held.spec.former_paths) <= {*action.spec.former_paths, action.spec.path}
        for action in actions
    )


def charge_nodes(
    world: World,
    ledger: Ledger,
    places: Mapping[str, Place],
    facts: Mapping[str, NodeFacts],
    granted: Mapping[str, list[Replica]],
    spent: Spending,
    *,
    taint: bool,
) -> list[Action]:
    """One write for each node whose charge is not what it should be. `granted` are new, admitted pods by node."""
    actions: list[Action] = []
    offenders = repeat_offenders(world)
    claims = {name for kind, name in _unclaimed(ledger) if kind == "GPUNode"}
    term = world.snapshot.leadership.term
    for host in world.hosts.values():
        place = places.get(host.name)
        if host.held is None:
            if place is not None:
                spec = GPUNodeSpec(path=place.path, overhead_milliwatts=place.overhead_milliwatts, term=term)
                actions.append(ChargeNode(None, host.name, spec, f"under {'/'.join(place.path)}"))
            continue
        held = host.held
        new = granted.get(host.name, [])
        # A path is left only in a round in which nothing is granted, and a sheet rises only in one without both.
        spec = _spec(world, ledger, host, held, place, facts[host.name], new, spent, may_leave=not granted)
        if host.name in offenders and spec.quarantine is None:
            spec = msgspec.structs.replace(spec, quarantine=offenders[host.name])
            actions.append(Tell(held, "Quarantined", offenders[host.name].reason, "Warning"))
        if held.spec.former_paths and spec.former_paths != held.spec.former_paths:
            # What one node may draw more from now on is not there for the next.
            left = msgspec.structs.replace(held, spec=spec)
            spent, _ = _spend(spent, ledger, left, facts[host.name])
            ledger = ledger.with_node(left)
        if spec == held.spec and host.name not in claims:
            if taint and place is not None:
                actions += _taint(host.node)
            continue
        reason = "claimed in a new term" if spec == held.spec else _difference(held.spec, spec)
        spec = msgspec.structs.replace(spec, term=max(term, held.spec.term))
        actions.append(ChargeNode(held, host.name, spec, reason))
    return actions


def _unclaimed(ledger: Ledger) -> list[tuple[str, str]]:
    trees = sorted({ledger.tree(domain) for domain in ledger.domains})
    return [entry for tree in trees for entry in ledger.unclaimed(tree)]


def _spec(
    world: World,
    ledger: Ledger,
    host: GpuHost,
    held: GPUNode,
    place: Place | None,
    facts: NodeFacts,
    new: list[Replica],
    spent: Spending,
    *,
    may_leave: bool,
) -> GPUNodeSpec:
    """Each step sees the node as the one before leaves it."""
    node = held

    def so(spec: GPUNodeSpec) -> GPUNode:
        return msgspec.structs.replace(node, spec=spec)

    node = so(grants.collected(node, facts))
    if node.spec.former_paths and may_leave:
        settled = so(grants.settled_path(node))
        if settled.spec != node.spec and ledger.admit_spec(settled):
            _, short = _spend(spent, ledger, settled, facts)
            node = node if short else settled
    path = place.path if place else ()
    moved = grants.moved(node, path) if path else None
    if moved is not None:
        node = so(moved)
    for old in node.spec.pods:
        node = so(_renewed(world, host, node, old))
    for replica in new:
        actuators = actuators_of(world, replica.model, host.product)
        grant = msgspec.structs.replace(new_grant(replica, host), actuators=actuators)
        node = so(grants.granted(node, grant))
    node = so(_fence(world, ledger, host, node, facts))
    overhead = place.overhead_milliwatts if place else node.spec.overhead_milliwatts
    return msgspec.structs.replace(node.spec, overhead_milliwatts=overhead)


def _spend(
    spent: Spending, ledger: Ledger, node: GPUNode, facts: NodeFacts
) -> tuple[Spending, tuple[str, ...]]:
    """What this spec adds to the budgets, and which of them do not bear it."""
    before = ledger.entries[node.metadata.name].line
    return lacking(spent, ledger, before, enter(node, facts, ledger.domains).line)


def _fence(world: World, ledger: Ledger, host: GpuHost, node: GPUNode, facts: NodeFacts) -> GPUNodeSpec:
    """Fences what its domain takes for off once its Node object is gone; lifts a fence that a later boot ends."""
    spec, fence = node.spec, node.spec.fence
    if fence is None:
        if host.node is not None or facts.heard or not _deleted_means_off(world, spec.path):
            return spec
        at = rfc3339(world.snapshot.wall)
        off = Fence(method="NodeDeleted", by="tokenfactory operator", at=at, boot_id=node.status.boot_id)
        return msgspec.structs.replace(spec, fence=off)
    later = node.status.boot_id not in {"", fence.boot_id}
    back = later or (fence.method == "NodeDeleted" and host.node is not None)
    if facts.heard and back and ledger.admit_return(node.metadata.name):
        return msgspec.structs.replace(spec, fence=None)
    return spec


def _deleted_means_off(world: World, path: Path) -> bool:
    """The deepest domain that the node is in decides: the machines of a rack are alike."""
    domain = world.snapshot.domains.get(("", path[-1])) if path else None
    return domain is not None and domain.spec.node_deleted_means_off


def _renewed(world: World, host: GpuHost, node: GPUNode, grant: PodGrant) -> GPUNodeSpec:
    """With this grant as it should be now: its address and its actuators known, or on its way out."""
    replica = world.by_uid.get(grant.uid)
    pod = replica.pod if replica is not None else world.kept.get(grant.uid)
    if pod is None or has_finished(pod) or pod.spec.node_name not in {"", node.metadata.name}:
        return grants.released(node, grant.uid)
    address = pod.status.pod_ip
    metrics = f"http://{address}:{names.NIM_PORT}/v1/metrics" if address else grant.metrics
    known = grant.actuators
    if replica is not None and host.product:
        known = actuators_of(world, replica.model, host.product)
    if grant.released or (grant.metrics, grant.actuators) == (metrics, known):
        return node.spec
    fresh = msgspec.structs.replace(grant, metrics=metrics, actuators=known)
    pods = tuple(fresh if pod.uid == grant.uid else pod for pod in node.spec.pods)
    return msgspec.structs.replace(node.spec, pods=pods)


def new_grant(replica: Replica, host: GpuHost) -> PodGrant:
    return PodGrant(
        namespace=replica.pod.metadata.namespace or "",
        name=replica.name,
        uid=replica.uid,
        class_name=replica.class_on(host.product),
        gpus=replica.model.gpus_per_replica,
    )


def _taint(node: Node | None) -> list[Action]:
    """Foreign pods on a managed node would be charged in full: keep them off unless they say that they know."""
    if node is None or any(taint.key == names.MANAGED_TAINT for taint in node.spec.taints):
        return []
    kept = [{"key": taint.key, "value": taint.value, "effect": taint.effect} for taint in node.spec.taints]
    ours = {"key": names.MANAGED_TAINT, "value": "true", "effect": "NoSchedule"}
    version = node.metadata.resource_version or ""
    return [TaintNode(node.metadata.name, version, (*kept, ours), "it belongs to a power domain")]


def _difference(held: GPUNodeSpec, spec: GPUNodeSpec) -> str:
    before = {grant.uid: grant for grant in held.pods}
    after = {grant.uid: grant for grant in spec.pods}
    parts = [
        f"charged for {grant.namespace}/{grant.name}" for uid, grant in after.items() if uid not in before
    ]
    parts += [
        f"{grant.namespace}/{grant.name} released"
        for uid, grant in after.items()
        if grant.released and uid in before and not before[uid].released
    ]
    parts += [
        f"{grant.namespace}/{grant.name} off the books" for uid, grant in before.items() if uid not in after
    ]
    if held.fence is None and spec.fence is not None:
        parts.append("fenced: its Node object was deleted, and its domain takes that for switched off")
    if held.fence is not None and spec.fence is None:
        parts.append("its fence is lifted: its agent reports from a later boot")
    if held.quarantine is None and spec.quarantine is not None:
        parts.append(f"quarantined: {spec.quarantine.reason}")
    if held.path != spec.path:
        parts.append(f"now under {'/'.join(spec.path) or 'no domain'}")
    if held.former_paths and not spec.former_paths:
        parts.append("its former path is no longer obeyed")
    return ", ".join(parts) or "facts renewed"
