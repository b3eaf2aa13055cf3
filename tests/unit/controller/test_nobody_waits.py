"""Whatever becomes of a node, in whichever round: no replica waits there for ever, and none without a word."""

import os
import random
from collections.abc import Callable

import msgspec
import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.gpu_node import Fence, GPUNode
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.kube.objects import Node, Pod

WALKS = int(os.environ.get("WALKS", "6"))
"""By seed."""
ROUNDS = 14
"""A factory is up in fewer."""


def die(world: SmallWorld, name: str) -> None:
    world.agents[name].alive = False


def mute(world: SmallWorld, name: str) -> None:
    """It is heard and acknowledges nothing."""
    world.agents[name].reports = False


def unplug(world: SmallWorld, name: str) -> None:
    die(world, name)
    world.objects[Node].pop(("", name), None)


def fence(world: SmallWorld, name: str) -> None:
    die(world, name)
    held = world.objects[GPUNode].get(("", name))
    if held is not None and held.status.boot_id:
        off = Fence(method="Person", by="ann", at=world.stamp(), boot_id=held.status.boot_id)
        world.put(
            msgspec.structs.replace(held, spec=msgspec.structs.replace(held.spec, fence=off)),
            new_generation=True,
        )


def forget(world: SmallWorld, name: str) -> None:
    world.objects[GPUNode].pop(("", name), None)


def refuse(world: SmallWorld, name: str) -> None:
    world.refusing[name] = "Insufficient cpu"


def quarrel(world: SmallWorld, name: str) -> None:
    """The operator dies as well, in the middle of a round."""
    mute(world, name)
    world.operate(most_writes=1)
    world.crash()


HAPPENS: tuple[Callable[[SmallWorld, str], None], ...] = (die, mute, unplug, fence, forget, refuse, quarrel)


@pytest.mark.parametrize("seed", range(WALKS))
def test_every_replica_comes_to_serve_where_a_node_is_left_that_can(seed: int):
    world, broken = history(seed, nodes=5)
    world.rounds(90)
    living = [pod for pod in world.objects[Pod].values() if not pod.metadata.deletion_timestamp]
    assert len(living) == 3
    assert {pod.metadata.uid for pod in living} <= {pod.metadata.uid for pod in world.ready_pods()}, broken
    granted = {
        grant.uid
        for node in world.objects[GPUNode].values()
        for grant in node.spec.pods
        if not grant.released
    }
    assert {pod.metadata.uid for pod in living} <= granted, "under caps"


@pytest.mark.parametrize("seed", range(WALKS))
def test_whoever_does_not_serve_is_told_why(seed: int):
    """Where hardly a node is left that can."""
    world, broken = history(seed, nodes=2)
    world.rounds(90)
    serving = {pod.metadata.name for pod in world.ready_pods() if not pod.metadata.deletion_timestamp}
    idle = {
        pod.metadata.name for pod in world.objects[Pod].values() if not pod.metadata.deletion_timestamp
    } - serving
    told = {each.what: each for each in world.objects[TokenFactory]["inference", "chat"].status.waiting}
    unbound = {pod.metadata.name for pod in world.objects[Pod].values() if not pod.spec.scheduling_gates}
    assert idle - unbound <= told.keys(), broken
    assert all(each.message for each in told.values())


def history(seed: int, nodes: int) -> tuple[SmallWorld, list[str]]:
    """A factory comes up while two nodes meet with something, mostly between a pod's charge and its gate."""
    chance = random.Random(seed)
    world = SmallWorld.of(nodes, hall("60kW"), factory(model(replicas=(3, 3))))
    said: dict[str, str] = {}
    for number in range(ROUNDS):
        world.rounds(1)
        whole = sorted(world.agents.keys() - said.keys())
        charged = [name for name in whole if name in with_gated(world)]
        if len(said) < 2 and chance.random() < (0.7 if charged else 0.1):
            happens, name = chance.choice(HAPPENS), chance.choice(charged or whole)
            happens(world, name)
            said[name] = f"{happens.__name__} {name} in round {number}"
    return world, list(said.values())


def with_gated(world: SmallWorld) -> set[str]:
    """Nodes on which a pod is charged whose gate is not open yet."""
    gated = {pod.metadata.uid for pod in world.objects[Pod].values() if pod.spec.scheduling_gates}
    return {
        name
        for (_, name), node in world.objects[GPUNode].items()
        if any(grant.uid in gated and not grant.released for grant in node.spec.pods)
    }
