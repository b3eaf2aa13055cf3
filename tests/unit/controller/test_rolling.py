"""Rollouts while watts are short: whoever served before serves again, and what was not there does not hold them up."""

from collections import Counter

import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api import names
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.objects import Deployment
from tokenfactory.kube.objects import Pod

AMPLE, SHORT = "12kW", "6kW"
"""Two nodes of eight GPUs: their minimum and 2 kW beside; what is left of the shorter one is far below four knees."""


def wanted(tag: str, replicas: int = 4) -> Manifest:
    return factory(model("m", tag=tag, gpus=2, replicas=(replicas, replicas)))


def serving(world: SmallWorld) -> Counter[str]:
    """Ready pods by their image's tag."""
    return Counter(pod.spec.containers[0].image.rsplit(":")[-1] for pod in world.ready_pods())


def condition(world: SmallWorld, kind: str) -> str:
    status = world.objects[TokenFactory]["inference", "chat"].status
    return next(each.status for each in status.conditions if each.type == kind)


def deployment(world: SmallWorld) -> Deployment:
    (found,) = world.objects[Deployment].values()
    return found


def squeezed(replicas: int = 4) -> SmallWorld:
    """Four replicas run, and then there are only watts to begin one or two."""
    world = SmallWorld.of(2, hall(AMPLE), wanted("1.8.0"))
    world.settle()
    assert serving(world) == {"1.8.0": 4}
    world.apply(hall(SHORT))
    world.settle()
    world.apply(wanted("1.8.0", replicas))
    world.settle()
    assert serving(world) == {"1.8.0": 4}
    return world


def test_a_new_replica_would_not_begin_with_so_few_watts():
    """Else there is nothing to be shown here."""
    world = SmallWorld.of(2, hall(SHORT), wanted("1.8.0"))
    world.settle()
    assert serving(world)["1.8.0"] < 4


@pytest.mark.parametrize("replicas", [4, 8], ids=["all run", "others wait"])
@pytest.mark.parametrize("crashing", [False, True], ids=["in peace", "operators die"])
def test_a_rollout_in_a_shortage_ends_with_as_many_as_ran_before(replicas: int, crashing: bool):
    world = squeezed(replicas)
    world.apply(wanted("1.9.0", replicas))
    for number in range(60):
        world.rounds(1)
        assert sum(serving(world).values()) >= 3, "a quarter at a time"
        if crashing and not number % 4:
            world.crash()
    world.settle()
    assert serving(world) == {"1.9.0": 4}
    assert condition(world, "Updated") == "True" or replicas > 4
    assert names.RAN_LABEL not in deployment(world).metadata.labels
    assert deployment(world).spec["strategy"]["rollingUpdate"]["maxUnavailable"] == "25%"


def test_what_begins_a_rollout_says_how_many_ran_in_the_same_write():
    world = squeezed(8)
    world.apply(wanted("1.9.0", 8))
    writes = [each for each in world.plan().plan.actions if isinstance(each, act.ApplyWorkload)]
    assert [each.manifest["metadata"]["labels"][names.RAN_LABEL] for each in writes] == ["4"]
    strategy = writes[0].manifest["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 5}


def test_only_successors_keep_a_place():
    """What nobody replaces finds what is worth beginning with, or waits: also while something else is rolled out."""
    world = squeezed(8)
    gated = [pod for pod in world.objects[Pod].values() if pod.spec.scheduling_gates]
    assert len(gated) == 4
    world.apply(wanted("1.9.0", 8))
    world.settle()
    assert sum(serving(world).values()) == 4
