"""What goes leaves nothing behind, and gives its watts back no sooner than it has stopped drawing."""

import msgspec
import pytest
from tests.unit.controller.manifests import LLAMA_70B, domain, factory, model, rack
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import Fence, GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller import actions as act
from tokenfactory.kube.objects import Node, Pod


def site(*, means_off: bool = False) -> SmallWorld:
    world = SmallWorld()
    for name in ("a0", "a1", "b0"):
        world.add_node(name, rack=name[0])
    world.apply(
        domain("hall", "30kW", nodeOverhead="1kW"),
        rack("a", "20kW", nodeDeletedMeansOff=means_off),
        rack("b", "20kW", nodeDeletedMeansOff=False),
        factory(model(image=LLAMA_70B, replicas=(3, 3))),
    )
    world.settle()
    assert len(world.ready_pods()) == 3
    return world


@pytest.fixture
def world() -> SmallWorld:
    return site()


def drain(world: SmallWorld) -> list[Pod]:
    """The factory goes; its pods take their time to end."""
    pods = world.ready_pods()
    world.lingering = {pod.metadata.uid for pod in pods}
    for pod in pods:
        meta = msgspec.structs.replace(pod.metadata, deletion_timestamp=world.stamp())
        world.put(msgspec.structs.replace(pod, metadata=meta))
    world.delete_factory("inference", "chat")
    return pods


def caps_of(world: SmallWorld, pods: list[Pod]) -> set[int]:
    uids = {pod.metadata.uid for pod in pods}
    return {
        gpu.enforced_milliwatts
        for node in world.objects[GPUNode].values()
        for gpu in node.status.gpus
        if gpu.pod_uid in uids
    }


def test_a_deleted_factory_drains_at_its_caps_and_then_gives_its_watts_back(world: SmallWorld):
    before = caps_of(world, world.ready_pods())
    charge = world.plan().books.ledger.charge("hall")
    pods = drain(world)
    world.live(30)
    assert min(caps_of(world, pods)) >= min(before)
    assert world.plan().books.ledger.charge("hall") >= charge
    granted = {grant.uid for node in world.objects[GPUNode].values() for grant in node.spec.pods}
    assert granted == {pod.metadata.uid for pod in pods}, "charged as long as they may draw"
    for pod in pods:
        world.objects[Pod].pop((pod.metadata.namespace or "", pod.metadata.name))
    world.settle()
    assert not any(node.spec.pods for node in world.objects[GPUNode].values())
    assert world.plan().books.ledger.charge("hall") == 3 * (1_000_000 + 8 * 200_000)


def test_pods_that_drain_are_no_strangers_that_are_charged_in_full(world: SmallWorld):
    drain(world)
    world.others()
    facts = world.plan().books.grid.facts
    assert all(fact.guarded for fact in facts.values())


def test_a_deleted_domain_takes_its_sheet_along_once_no_node_obeys_it(world: SmallWorld):
    world.label_node("b0", rack="a")
    world.settle()
    assert ("", "rack-b") in world.objects[CapSheet]
    del world.objects[PowerDomain]["", "rack-b"]
    world.live(10)
    assert ("", "rack-b") not in world.objects[CapSheet]
    assert ("", "rack-a") in world.objects[CapSheet]
    world.settle()


def test_the_sheet_of_a_domain_that_a_silent_node_may_obey_stays(world: SmallWorld):
    world.agents["b0"].alive = False
    world.live(30)
    del world.objects[PowerDomain]["", "rack-b"]
    world.live(120)
    assert ("", "rack-b") in world.objects[CapSheet]


def test_a_deleted_node_stays_charged_where_nobody_said_that_it_means_off(world: SmallWorld):
    charge = world.plan().books.ledger.node_charge("a0")
    world.agents["a0"].alive = False
    del world.objects[Node]["", "a0"]
    world.live(200)
    assert world.objects[GPUNode]["", "a0"].spec.fence is None
    assert world.plan().books.ledger.node_charge("a0") >= charge


def test_where_deletion_means_off_the_node_is_fenced_freed_and_forgotten():
    world = site(means_off=True)
    world.agents["a0"].alive = False
    del world.objects[Node]["", "a0"]
    for pod in list(world.ready_pods()):
        if pod.spec.node_name == "a0":
            world.objects[Pod].pop((pod.metadata.namespace or "", pod.metadata.name))
    for _ in range(8):
        world.others()
        world.operate()
        if world.plan().books.ledger.entries["a0"].facts.heard:
            assert world.objects[GPUNode]["", "a0"].spec.fence is None, "never while its agent is heard"
    written: list[act.ChargeNode] = []
    for _ in range(20):
        world.others()
        written += [a for a in world.plan().plan.actions if isinstance(a, act.ChargeNode) and a.name == "a0"]
        world.operate()
    fences = [
        a.spec.fence for a in (*world.writes, *written) if isinstance(a, act.ChargeNode) and a.name == "a0"
    ]
    assert {fence.method for fence in fences if fence} == {"NodeDeleted"}
    assert ("", "a0") not in world.objects[GPUNode]
    world.settle()


def test_a_person_s_fence_is_lifted_when_a_later_boot_reports(world: SmallWorld):
    world.agents["a0"].alive = False
    world.live(20)
    held = world.objects[GPUNode]["", "a0"]
    fence = Fence(method="Person", by="sre", at=world.stamp(), boot_id=held.status.boot_id)
    world.put(
        msgspec.structs.replace(held, spec=msgspec.structs.replace(held.spec, fence=fence)),
        new_generation=True,
    )
    world.live(10)
    assert world.plan().books.ledger.node_charge("a0") == 0
    held = world.objects[GPUNode]["", "a0"]
    assert held.spec.fence is not None
    world.agents["a0"].alive = True
    world.agents["a0"].boot_id = "boot-2"
    world.live(20)
    assert world.objects[GPUNode]["", "a0"].spec.fence is None
    assert world.plan().books.ledger.node_charge("a0") > 0
