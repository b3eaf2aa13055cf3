"""What should run: the Deployment and Service of every model, and nothing of models that are no longer asked for."""

from __future__ import annotations

import msgspec

from tokenfactory.api import names
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.actions import Action, ApplyWorkload, DeleteWorkload
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service, says
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.world import World
from tokenfactory.controller.workloads import (
    RESTART_FEATURE,
    Object,
    WorkloadOptions,
    deployment,
    group_name,
    is_as,
    leader_worker_set,
    restarts_through_gate,
    service,
    workload_name,
)
from tokenfactory.kube.resources import Key

Workload = Deployment | LeaderWorkerSet | Service
Slot = tuple[type[Workload], Key]


def serve(world: World, staffing: Staffing, options: WorkloadOptions) -> list[Action]:
    options = _for_these_nodes(world, options)
    actions: list[Action] = []
    wanted: set[Slot] = set()
    for factory_key, factory in world.snapshot.factories.items():
        if factory.metadata.deletion_timestamp:
            continue
        for model in factory.spec.models:
            runs, front = _slots(factory, model)
            wanted |= {runs, front}
            actions += _keep(world, factory, model, staffing.count(factory_key, model.name), options)
    there: list[Workload] = [
        *world.snapshot.deployments.values(),
        *(world.snapshot.leader_worker_sets or {}).values(),
        *world.snapshot.services.values(),
    ]
    for held in there:
        slot = (type(held), (held.metadata.namespace or "", held.metadata.name))
        if slot not in wanted and _owned_here(world, held) and not held.metadata.deletion_timestamp:
            model_name = held.metadata.labels.get(names.MODEL_LABEL, "")
            actions.append(DeleteWorkload(held, f"its factory no longer serves {model_name} in this way"))
    return actions


def _for_these_nodes(world: World, options: WorkloadOptions) -> WorkloadOptions:
    """A kubelet may be older than the API server: no pod that needs what it cannot do would be bound to its node."""
    able = all(
        RESTART_FEATURE in host.node.status.declared_features
        for host in world.hosts.values()
        if host.node is not None
    )
    if able or not options.restart_through_gate:
        return options
    return msgspec.structs.replace(options, restart_through_gate=False)


def lacks_groups(world: World, model: ModelSpec) -> bool:
    """It spans nodes, and nothing here can run groups of pods."""
    return model.nodes_per_replica > 1 and world.snapshot.leader_worker_sets is None


def _slots(factory: TokenFactory, model: ModelSpec) -> tuple[Slot, Slot]:
    """Where what runs the model is, and its Service."""
    namespace = factory.metadata.namespace or ""
    key = (namespace, workload_name(factory, model))
    if model.nodes_per_replica > 1:
        return (LeaderWorkerSet, (namespace, group_name(factory, model))), (Service, key)
    return (Deployment, key), (Service, key)


def _keep(
    world: World, factory: TokenFactory, model: ModelSpec, count: int, options: WorkloadOptions
) -> list[Action]:
    if lacks_groups(world, model):
        return []
    actions: list[Action] = []
    (kind, key), (_, front_key) = _slots(factory, model)
    held: Workload | None = world.snapshot.deployments.get(key)
    if kind is LeaderWorkerSet:
        held = (world.snapshot.leader_worker_sets or {}).get(key)
        wanted = leader_worker_set(factory, model, count, options)
    else:
        wanted = _deployment(world, held, factory, model, count, options)
    if held is None or not is_as(held, wanted):
        reason = (
            f"{count} replicas of {model.name}"
            if held is None
            else f"{model.name} is to be as its factory says"
        )
        actions.append(ApplyWorkload(kind, key, wanted, reason))
    front = service(factory, model)
    held_service = world.snapshot.services.get(front_key)
    if held_service is None or not is_as(held_service, front):
        actions.append(ApplyWorkload(Service, front_key, front, f"an address for {model.name}"))
    return actions


def _deployment(
    world: World,
    held: Workload | None,
    factory: TokenFactory,
    model: ModelSpec,
    count: int,
    options: WorkloadOptions,
) -> Object:
    """With or without the rule for restarts as it is, while nothing else of its pods changes.

    A node that joins, leaves or has another kubelet is no reason to start all models anew. Only where no kubelet at
    all can follow the rule it goes: such pods run nowhere.
    """
    wanted = deployment(factory, model, count, options)
    if not isinstance(held, Deployment):
        return wanted
    ruled = restarts_through_gate(held)
    if ruled == options.restart_through_gate or (ruled and not _somewhere(world)):
        return wanted
    as_it_is = msgspec.structs.replace(options, restart_through_gate=ruled)
    kept = deployment(factory, model, count, as_it_is)
    return kept if says(held.spec.get("template"), kept["spec"]["template"]) else wanted


def _somewhere(world: World) -> bool:
    """Can any kubelet follow the rule?"""
    return any(
        RESTART_FEATURE in host.node.status.declared_features
        for host in world.hosts.values()
        if host.node is not None
    )


def _owned_here(world: World, held: Workload) -> bool:
    """Ours, and its factory is still there. (What a deleted factory had, the garbage collector takes.)"""
    factory = world.snapshot.factories.get(
        (held.metadata.namespace or "", held.metadata.labels.get(names.FACTORY_LABEL, ""))
    )
    return factory is not None and any(
        owner.uid == factory.metadata.uid for owner in held.metadata.owner_references
    )
