"""Only a pod that waits for its cap is a model's replica, whatever its labels say (P3)."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.plan.waiting import repository
from tokenfactory.controller.plan.world import gpus_asked, see
from tokenfactory.kube.objects import Pod

Spec = dict[str, Any]


class Visited(SmallWorld):
    """A tenant has made a pod of its own; no controller but ours looks at it."""

    def deploy(self) -> None:
        """Everything is deployed."""


@pytest.fixture
def world() -> SmallWorld:
    world = SmallWorld.of(2, hall("60kW"), factory(model()))
    world.settle()
    world.__class__ = Visited
    return world


def visit(world: SmallWorld, change: Callable[[Spec], object]) -> Pod:
    (made,) = world.objects[Deployment].values()
    template = msgspec.json.decode(msgspec.json.encode(made.spec["template"]))
    change(template["spec"])
    meta = {"name": "mine", "namespace": "inference", "uid": "uid-mine", **template["metadata"]}
    return world.put(msgspec.convert({"metadata": meta, "spec": template["spec"]}, Pod))


def grants(world: SmallWorld) -> set[str]:
    return {grant.uid for node in world.objects[GPUNode].values() for grant in node.spec.pods}


def opened(world: SmallWorld) -> bool:
    return not world.objects[Pod]["inference", "mine"].spec.scheduling_gates


def wait_of(spec: Spec) -> Spec:
    return spec["initContainers"][0]


LIKE_OURS: dict[str, Callable[[Spec], object]] = {
    "as it is": lambda spec: None,
    "another release": lambda spec: wait_of(spec).update(image="tokenfactory:0.9"),
    "a pinned digest": lambda spec: wait_of(spec).update(image="tokenfactory:test@sha256:12"),
    "a webhook's variable": lambda spec: wait_of(spec)["env"].insert(
        0, {"name": "HTTPS_PROXY", "value": "x"}
    ),
    "an injected sidecar": lambda spec: spec["initContainers"].insert(
        0, {"name": "mesh", "image": "mesh:1", "restartPolicy": "Always"}
    ),
}
UNLIKE: dict[str, tuple[Callable[[Spec], object], str]] = {
    "no init container": (lambda spec: spec.pop("initContainers"), "has no init container wait-cap"),
    "another image": (
        lambda spec: wait_of(spec).update(image="example.com/tokenfactory:test"),
        "runs example.com/tokenfactory:test, and not tokenfactory:test",
    ),
    "another command": (lambda spec: wait_of(spec).update(command=["true"]), "runs 'true wait-cap"),
    "other arguments": (lambda spec: wait_of(spec)["args"].append("--help"), "--help', and not 'wait-cap"),
    "nobody waits for it": (
        lambda spec: wait_of(spec).update(restartPolicy="Always"),
        "nothing waits for it",
    ),
    "another node is asked": (
        lambda spec: wait_of(spec)["env"].insert(0, {"name": "NODE_IP", "value": "10.9.9.9"}),
        "has other NODE_IP and POD_UID than ours",
    ),
    "another pod is asked about": (
        lambda spec: wait_of(spec)["env"].pop(),
        "has other NODE_IP and POD_UID than ours",
    ),
    "another program": (
        lambda spec: wait_of(spec)["env"].append({"name": "PYTHONPATH", "value": "/x"}),
        "has PYTHONPATH set",
    ),
    "GPUs for an init container": (
        lambda spec: spec["initContainers"].append(
            {"name": "warm", "resources": {"limits": {names.GPU_RESOURCE: "4"}}}
        ),
        "its container warm asks for GPUs",
    ),
    "GPUs for a second container": (
        lambda spec: spec["containers"].append(
            {"name": "draft", "resources": {"limits": {names.GPU_RESOURCE: "4"}}}
        ),
        "its container draft asks for GPUs",
    ),
}


@pytest.mark.parametrize("how", LIKE_OURS)
def test_a_pod_that_waits_for_its_cap_is_a_replica(world: SmallWorld, how: str):
    pod = visit(world, LIKE_OURS[how])
    world.rounds(8)
    assert pod.metadata.uid in grants(world)
    assert opened(world)


@pytest.mark.parametrize("how", UNLIKE)
def test_a_pod_that_would_not_wait_gets_nothing_and_is_told_why(world: SmallWorld, how: str):
    change, why = UNLIKE[how]
    pod = visit(world, change)
    world.rounds(8)
    assert pod.metadata.uid not in grants(world)
    assert not opened(world)
    told = [note for reason, note in world.events if reason == "Unguarded"]
    assert len(told) == 1, "once"
    assert why in told[0]
    (factory,) = world.objects[TokenFactory].values()
    assert [(wait.what, wait.reason) for wait in factory.status.waiting] == [("mine", "Unguarded")]
    assert factory.status.ready == "1/1", "it takes no replica's place"


def test_a_pod_that_is_changed_while_it_is_charged_loses_its_charge_and_stays_gated(world: SmallWorld):
    """Images of init containers can be changed at any time."""
    visit(world, LIKE_OURS["as it is"])
    while "uid-mine" not in grants(world):
        world.operate()
        world.beat()
    assert not opened(world)
    visit(world, UNLIKE["another image"][0])
    world.rounds(8)
    assert not opened(world)
    assert "uid-mine" not in grants(world)


def test_what_runs_under_a_charge_stays_a_replica_when_the_operator_gets_another_image(world: SmallWorld):
    """Its Deployment's rollout replaces it; until then it draws, and no cap of it may be taken for nobody's."""
    (before,) = see(world.snapshot(), OPTIONS.workloads).replicas
    moved = msgspec.structs.replace(OPTIONS.workloads, image="mirror.example.com/tokenfactory:test")
    assert see(world.snapshot(), moved).replicas == (before,)


def test_what_is_bound_without_a_charge_and_would_not_wait_is_a_stranger(world: SmallWorld):
    def by_hand(spec: Spec) -> None:
        spec.pop("initContainers")
        spec.pop("schedulingGates")
        spec["nodeName"] = "n1"

    visit(world, by_hand)
    seen = see(world.snapshot(), OPTIONS.workloads)
    assert [pod.metadata.name for pod in seen.foreign["n1"]] == ["mine"]
    assert not seen.unguarded, "it holds GPUs already: there is nothing to wait for"


def test_a_strangers_init_container_takes_gpus_too(world: SmallWorld):
    assert gpus_asked(visit(world, UNLIKE["GPUs for an init container"][0])) == 4
    assert gpus_asked(visit(world, UNLIKE["GPUs for a second container"][0])) == 8


@pytest.mark.parametrize(
    ("image", "where"),
    {
        "tokenfactory": "tokenfactory",
        "registry:5000/team/tokenfactory": "registry:5000/team/tokenfactory",
        "registry:5000/team/tokenfactory:1.0": "registry:5000/team/tokenfactory",
        "registry:5000/team/tokenfactory:1.0@sha256:ab": "registry:5000/team/tokenfactory",
    }.items(),
)
def test_the_repository_of_an_image(image: str, where: str):
    assert repository(image) == where


def test_gates_open_only_for_what_waits(world: SmallWorld):
    """Whatever is granted by whom: the opening looks for itself."""
    visit(world, UNLIKE["no init container"][0])
    node = world.objects[GPUNode]["", "n0"]
    grant = (
        msgspec.structs.replace(node.spec.pods[0], uid="uid-mine", name="mine") if node.spec.pods else None
    )
    if grant is None:
        node = world.objects[GPUNode]["", "n1"]
        grant = msgspec.structs.replace(node.spec.pods[0], uid="uid-mine", name="mine")
    world.put(
        msgspec.structs.replace(node, spec=msgspec.structs.replace(node.spec, pods=(*node.spec.pods, grant))),
        new_generation=True,
    )
    world.rounds(8)
    assert not [
        each for each in world.writes if isinstance(each, act.OpenGate) and each.pod.metadata.name == "mine"
    ]
