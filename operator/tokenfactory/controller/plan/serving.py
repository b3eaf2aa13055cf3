"""What should run: the Deployment and Service of every model, and nothing of models that are no longer asked for."""

from __future__ import annotations

from tokenfactory.api import names
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.actions import Action, ApplyWorkload, DeleteWorkload
from tokenfactory.controller.objects import Deployment, Service
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.world import World
from tokenfactory.controller.workloads import WorkloadOptions, deployment, is_as, service, workload_name
from tokenfactory.kube.resources import Key


def serve(world: World, staffing: Staffing, options: WorkloadOptions) -> list[Action]:
    actions: list[Action] = []
    wanted: set[Key] = set()
    for factory_key, factory in world.snapshot.factories.items():
        if factory.metadata.deletion_timestamp:
            continue
        for model in factory.spec.models:
            key = (factory.metadata.namespace or "", workload_name(factory, model))
            wanted.add(key)
            actions += _keep(world, factory, model, staffing.count(factory_key, model.name), key, options)
    there: list[Deployment | Service] = [
        *world.snapshot.deployments.values(),
        *world.snapshot.services.values(),
    ]
    for held in there:
        key = (held.metadata.namespace or "", held.metadata.name)
        if key not in wanted and _orphaned(world, held) and not held.metadata.deletion_timestamp:
            model_name = held.metadata.labels.get(names.MODEL_LABEL, "")
            actions.append(DeleteWorkload(held, f"its factory no longer serves {model_name}"))
    return actions


def _keep(
    world: World, factory: TokenFactory, model: ModelSpec, count: int, key: Key, options: WorkloadOptions
) -> list[Action]:
    actions: list[Action] = []
    wanted = deployment(factory, model, count, options)
    held = world.snapshot.deployments.get(key)
    if held is None or not is_as(held, wanted):
        reason = (
            f"{count} replicas of {model.name}"
            if held is None
            else f"{model.name} is to be as its factory says"
        )
        actions.append(ApplyWorkload(Deployment, key, wanted, reason))
    front = service(factory, model)
    held_service = world.snapshot.services.get(key)
    if held_service is None or not is_as(held_service, front):
        actions.append(ApplyWorkload(Service, key, front, f"an address for {model.name}"))
    return actions


def _orphaned(world: World, held: Deployment | Service) -> bool:
    """Ours, and its factory is there without that model. (Of a deleted factory the garbage collector takes it.)"""
    factory = world.snapshot.factories.get(
        (held.metadata.namespace or "", held.metadata.labels.get(names.FACTORY_LABEL, ""))
    )
    if factory is None:
        return False
    owned = any(owner.uid == factory.metadata.uid for owner in held.metadata.owner_references)
    model = held.metadata.labels.get(names.MODEL_LABEL)
    return owned and all(spec.name != model for spec in factory.spec.models)
