"""What should run: the Deployment and Service of every model, and nothing of models that are no longer asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from tokenfactory.api import names
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.actions import Action, ApplyWorkload, DeleteWorkload
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service, says
from tokenfactory.controller.owning import whose
from tokenfactory.controller.plan.naming import Model, Names, Workload, held_at, slots
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.rolling import ran_before
from tokenfactory.controller.plan.world import World
from tokenfactory.controller.workloads import (
    RESTART_FEATURE,
    Object,
    WorkloadOptions,
    deployment,
    is_as,
    leader_worker_set,
    restarts_through_gate,
    service,
    template_digest,
)
from tokenfactory.kube.resources import key_of


@dataclass(frozen=True)
class Served:
    actions: list[Action]
    templates: Mapping[Model, str]
    """Of which template each model's pods are to be."""


def serve(world: World, staffing: Staffing, options: WorkloadOptions, given: Names) -> Served:
    options = _for_these_nodes(world, options)
    actions: list[Action] = []
    templates: dict[Model, str] = {}
    for factory_key, factory in world.snapshot.factories.items():
        if factory.metadata.deletion_timestamp:
            continue
        for model in factory.spec.models:
            if lacks_groups(world, model):
                continue
            wanted = _wanted(world, factory, model, staffing.count(factory_key, model.name), options)
            templates[factory_key, model.name] = template_digest(wanted)
            actions += [
                action
                for action in _keep(world, factory, model, wanted)
                if given.holders.get((action.kind, action.key)) == (factory_key, model.name)
                and (action.kind, action.key) not in given.taken
            ]
    there: list[Workload] = [
        *world.snapshot.deployments.values(),
        *(world.snapshot.leader_worker_sets or {}).values(),
        *world.snapshot.services.values(),
    ]
    actions += (_drop(held) for held in there if not _stays(world, held, given))
    return Served(actions, templates)


def _drop(held: Workload) -> Action:
    model_name = held.metadata.labels.get(names.MODEL_LABEL, "")
    return DeleteWorkload(held, f"its factory no longer serves {model_name} in this way")


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


def _wanted(
    world: World, factory: TokenFactory, model: ModelSpec, count: int, options: WorkloadOptions
) -> Object:
    runs = slots(factory, model).runs
    held = held_at(world, runs)
    if runs[0] is LeaderWorkerSet:
        wanted = leader_worker_set(factory, model, count, options)
        ran = ran_before(world, held, factory, model, count, template_digest(wanted))
        return wanted if ran is None else leader_worker_set(factory, model, count, options, ran)
    options = _as_it_is(world, held, factory, model, options)
    wanted = deployment(factory, model, count, options)
    ran = ran_before(world, held, factory, model, count, template_digest(wanted))
    return wanted if ran is None else deployment(factory, model, count, options, ran)


def _keep(world: World, factory: TokenFactory, model: ModelSpec, wanted: Object) -> list[ApplyWorkload]:
    actions = []
    mine = slots(factory, model)
    (kind, key), (_, front_key) = mine.runs, mine.front
    held = held_at(world, mine.runs)
    if held is None or not is_as(held, wanted):
        reason = (
            f"{wanted['spec']['replicas']} replicas of {model.name}"
            if held is None
            else f"{model.name} is to be as its factory says"
        )
        actions.append(ApplyWorkload(kind, key, wanted, reason, held))
    front = service(factory, model)
    held_service = world.snapshot.services.get(front_key)
    if held_service is None or not is_as(held_service, front):
        reason = f"an address for {model.name}"
        actions.append(ApplyWorkload(Service, front_key, front, reason, held_service))
    return actions


def _as_it_is(
    world: World, held: Workload | None, factory: TokenFactory, model: ModelSpec, options: WorkloadOptions
) -> WorkloadOptions:
    """With or without the rule for restarts as it is, while nothing else of its pods changes.

    A node that joins, leaves or has another kubelet is no reason to start all models anew. Only where no kubelet at
    all can follow the rule it goes: such pods run nowhere.
    """
    if not isinstance(held, Deployment):
        return options
    ruled = restarts_through_gate(held)
    if ruled == options.restart_through_gate or (ruled and not _somewhere(world)):
        return options
    as_it_is = msgspec.structs.replace(options, restart_through_gate=ruled)
    kept = deployment(factory, model, 0, as_it_is)
    return as_it_is if says(held.spec.get("template"), kept["spec"]["template"]) else options


def _somewhere(world: World) -> bool:
    """Can any kubelet follow the rule?"""
    return any(
        RESTART_FEATURE in host.node.status.declared_features
        for host in world.hosts.values()
        if host.node is not None
    )


def _stays(world: World, held: Workload, given: Names) -> bool:
    """Not ours to delete, or still asked for. What a deleted factory had, the garbage collector takes or leaves."""
    name = held.metadata.labels.get(names.FACTORY_LABEL, "")
    factory = world.snapshot.factories.get((held.metadata.namespace or "", name))
    if factory is None or factory.metadata.deletion_timestamp or held.metadata.deletion_timestamp:
        return True
    if whose(held.metadata, name, factory.metadata.uid or "") == "Others":
        return True
    holder = given.holders.get((type(held), key_of(held)))
    return holder is not None and holder[0] == key_of(factory)
