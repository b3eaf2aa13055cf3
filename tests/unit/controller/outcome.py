"""What matters of a world that has come to rest: everything but names, times and epochs."""

from collections import Counter
from typing import Any

import msgspec
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.objects import Deployment, Service
from tokenfactory.kube.objects import Node


def outcome(world: SmallWorld) -> dict[str, Any]:
    return {
        "factories": {key: _factory(each) for key, each in world.objects[TokenFactory].items()},
        "domains": {name: _domain(each) for (_, name), each in world.objects[PowerDomain].items()},
        "workloads": {
            (kind.KIND, *key): _owned(world, each)
            for kind in (Deployment, Service)
            for key, each in world.objects[kind].items()
        },
        "nodes": {name: _node(world, each) for (_, name), each in world.objects[GPUNode].items()},
        "replicas": dict(Counter(_classes(world))),
        "caps": caps(world),
    }


def caps(world: SmallWorld) -> dict[tuple[str, str, int], int]:
    """How many GPUs of which class have which cap, by the domain that they are in."""
    found: Counter[tuple[str, str, int]] = Counter()
    for node in world.objects[GPUNode].values():
        agent = world.agents[node.metadata.name]
        for gpu in node.status.gpus:
            where = node.spec.path[-1] if node.spec.path else ""
            found[where, gpu.pod.rsplit("-", 1)[0], agent.enforced.get(gpu.uuid, 0)] += 1
    return dict(found)


def _factory(factory: TokenFactory) -> Any:
    status = factory.status
    return {
        "spec": msgspec.to_builtins(factory.spec),
        "ready": status.ready,
        "charge": status.charge,
        "budget": status.budget,
        "conditions": {(each.type, each.status, each.reason) for each in status.conditions},
        "models": [(each.name, each.ready, each.desired, each.cap) for each in status.models],
        "incidents": sorted((each.node, each.phase) for each in status.incidents),
        "waiting": Counter(each.reason for each in status.waiting),
    }


def _domain(domain: PowerDomain) -> Any:
    status = domain.status
    return {
        "limit": status.limit,
        "charge": status.charge,
        "nodes": status.nodes,
        "lost": status.lost_nodes,
        "conditions": {(each.type, each.status, each.reason) for each in status.conditions},
        "waiting": len(status.waiting),
    }


def _owned(world: SmallWorld, each: Deployment | Service) -> Any:
    there = {factory.metadata.uid for factory in world.objects[TokenFactory].values()}
    owners = [(owner.name, owner.uid in there) for owner in each.metadata.owner_references]
    return (each.spec, each.metadata.labels, owners)


def _node(world: SmallWorld, node: GPUNode) -> Any:
    held = world.objects[Node].get(("", node.metadata.name))
    taints = held.spec.taints if held else ()
    return {
        "path": node.spec.path,
        "former": node.spec.former_paths,
        "overhead": node.spec.overhead_milliwatts,
        "released": [grant.name for grant in node.spec.pods if grant.released],
        "taints": [taint.key for taint in taints],
        "mode": node.status.mode,
    }


def _classes(world: SmallWorld) -> list[tuple[str, bool]]:
    live = [pod for pod in world.ready_pods() if not pod.metadata.deletion_timestamp]
    return [(pod.metadata.labels[names.MODEL_LABEL], bool(pod.spec.node_name)) for pod in live]
