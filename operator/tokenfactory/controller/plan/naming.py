"""Which model has which names, where two would call their objects alike or somebody else has the name already.

The objects of a model are called `<factory>-<model>`, so factory `a-b` with model `c` and factory `a` with model `b-c` want
the same. The one whose model runs under the name keeps it, else the older factory. The other makes nothing, gives up
what it has under that name, and says so: two that each put it right would never end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.owning import TakenName, in_words, whose
from tokenfactory.controller.plan.world import World
from tokenfactory.controller.workloads import group_name, workload_name
from tokenfactory.kube.resources import Key, key_of

Workload = Deployment | LeaderWorkerSet | Service
Slot = tuple[type[Workload], Key]
Model = tuple[Key, str]
"""(factory, model)."""


@dataclass(frozen=True)
class Slots:
    """Where a model's objects are: what runs it, the Service in front of it, and names that others derive of these."""

    runs: Slot
    front: Slot
    derived: tuple[Slot, ...] = ()

    def __iter__(self) -> Iterator[Slot]:
        return iter((self.runs, self.front, *self.derived))


@dataclass(frozen=True)
class Names:
    holders: Mapping[Slot, Model]
    """Who may write there."""
    lost: Mapping[Model, str]
    """Models that lack a name, and who has it."""
    taken: frozenset[Slot]
    """Where somebody else's object is: nothing is written there."""


def slots(factory: TokenFactory, model: ModelSpec) -> Slots:
    namespace = factory.metadata.namespace or ""
    key = (namespace, workload_name(factory, model))
    if model.nodes_per_replica <= 1:
        return Slots((Deployment, key), (Service, key))
    group = (namespace, group_name(factory, model))
    # The controller of LeaderWorkerSets makes a Service of that name.
    return Slots((LeaderWorkerSet, group), (Service, key), ((Service, group),))


def held_at(world: World, slot: Slot) -> Workload | None:
    kind, key = slot
    held: Mapping[Key, Workload] = world.snapshot.services
    if kind is Deployment:
        held = world.snapshot.deployments
    elif kind is LeaderWorkerSet:
        held = world.snapshot.leader_worker_sets or {}
    return held.get(key)


def give_names(world: World) -> Names:
    holders: dict[Slot, Model] = {}
    lost: dict[Model, str] = {}
    taken: set[Slot] = set()
    for factory, model in _by_right(world):
        name, mine = (key_of(factory), model.name), slots(factory, model)
        before = next((holders[slot] for slot in mine if slot in holders), None)
        if before is not None:
            (_, other), theirs = before
            lost[name] = (
                f"TokenFactory {other} has the name {mine.front[1][1]} for its model {theirs}: "
                f"give this model, or its factory, another name"
            )
            continue
        holders |= dict.fromkeys(mine, name)
        for slot in (mine.runs, mine.front):
            if why := _taken(world, slot, factory):
                lost.setdefault(name, why.words)
                if not why.again:
                    taken.add(slot)
    return Names(holders, lost, frozenset(taken))


def _by_right(world: World) -> list[tuple[TokenFactory, ModelSpec]]:
    """Who runs under a name comes first, then who is older."""

    def right(pair: tuple[TokenFactory, ModelSpec]) -> tuple[bool, str, Key]:
        factory, model = pair
        held = held_at(world, slots(factory, model).runs)
        runs = held is not None and _is_of(held, factory)
        return (not runs, factory.metadata.creation_timestamp or "~", key_of(factory))

    return sorted(
        (
            (factory, model)
            for factory in world.snapshot.factories.values()
            if not factory.metadata.deletion_timestamp
            for model in factory.spec.models
        ),
        key=right,
    )


def _is_of(held: Workload, factory: TokenFactory) -> bool:
    return whose(held.metadata, factory.metadata.name, factory.metadata.uid or "") != "Others"


def _taken(world: World, slot: Slot, factory: TokenFactory) -> TakenName | None:
    held = held_at(world, slot)
    if held is None:
        return world.snapshot.taken.get((slot[0].KIND, slot[1]))
    if _is_of(held, factory):
        return None
    return TakenName(in_words(slot[0].KIND, held.metadata, factory.metadata.name), again=False)
