"""Where a replica does not go: what kube-scheduler refuses, sick GPUs, others' claims, nodes that keep failing."""

from collections.abc import Callable

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import Fence, GPUNode, GPUNodeSpec, GPUNodeStatus, GPUStatus
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.token_factory import Incident, TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.plan.candidates import free_gpus
from tokenfactory.controller.plan.quarantining import health_of
from tokenfactory.controller.plan.world import GpuHost, World, see
from tokenfactory.kube.objects import Container, Node, NodeStatus, Pod, PodSpec, ResourceRequirements
from tokenfactory.planning.recovery.incidents import failures


def chat(**recovery: object) -> Manifest:
    return factory(model(replicas=(2, 2)), recovery=recovery)


def site(nodes: int = 3) -> SmallWorld:
    return SmallWorld.of(nodes, hall("60kW"), chat(quarantineAfter=2))


def where(world: SmallWorld) -> set[str]:
    return {pod.spec.node_name for pod in world.ready_pods()}


# --- kube-scheduler refuses the node


def test_a_pod_that_kube_scheduler_does_not_bind_is_placed_elsewhere():
    world = site()
    world.refusing = dict.fromkeys(("n0", "n1"), "0/3 nodes are available: 1 node(s) had no free host ports")
    world.settle()
    assert len(world.ready_pods()) == 2
    assert where(world) == {"n2"}
    replaced = [each for each in world.writes if isinstance(each, act.DeletePod)]
    assert replaced
    assert all("kube-scheduler does not bind it" in each.reason for each in replaced)
    assert all("host ports" in each.reason for each in replaced)
    booked = {key[1]: node.spec.pods for key, node in world.objects[GPUNode].items()}
    assert not booked["n0"], "its watts are given back"
    assert not booked["n1"], "its watts are given back"


def test_a_short_refusal_is_waited_for():
    """The pod that was there before may still hold its GPUs for kube-scheduler."""
    world = site()
    world.refusing = dict.fromkeys(("n0", "n1", "n2"), "Insufficient nvidia.com/gpu")
    world.rounds(4)
    unbound = [pod for pod in world.objects[Pod].values() if not pod.spec.scheduling_gates]
    assert unbound
    world.refusing = {}
    for pod in unbound:
        world.others()
        world.schedule(
            world.objects[Pod]["inference", pod.metadata.name],
            world.plan().books.world.granted_on[pod.metadata.uid],
        )
    world.settle()
    assert not [each for each in world.writes if isinstance(each, act.DeletePod)]


def test_when_every_node_is_refused_people_are_told_and_later_it_is_tried_again():
    world = site(1)
    world.refusing = {
        "n0": "0/9 nodes are available: 1 node(s) had no free host ports, 8 node(s) didn't match Pod's node "
        "affinity/selector. preemption: 0/9 nodes are available: 9 Preemption is not helpful for scheduling."
    }
    world.rounds(40)
    ready = {c.type: c for c in world.objects[TokenFactory]["inference", "chat"].status.conditions}["Ready"]
    assert (ready.status, ready.reason) == ("False", "NodesRefused")
    assert ready.message.endswith("1 refused before by kube-scheduler (1 node(s) had no free host ports)")
    world.refusing = {}
    world.rounds(400)
    assert len(world.ready_pods()) == 2


def test_what_no_node_can_give_is_tried_ever_more_seldom():
    """Each try is a pod, charges and new sheets for everybody."""
    world = site(20)
    world.refusing = dict.fromkeys(world.agents, "persistentvolumeclaim model-cache not found")
    world.rounds(250)
    replaced = sum(isinstance(each, act.DeletePod) for each in world.writes)
    assert 4 <= replaced <= 12, "in eight minutes, of two replicas"


# --- the node's agent never lets the gate open


def charged(nodes: int = 4) -> tuple[SmallWorld, str, str]:
    """A world whose one replica has just been charged, with its node and its pod, which is still gated."""
    world = SmallWorld.of(nodes, hall("60kW"), factory(model()))
    while True:
        world.rounds(1)
        for (_, name), node in world.objects[GPUNode].items():
            if node.spec.pods:
                (pod,) = world.objects[Pod].values()
                assert pod.spec.scheduling_gates
                return world, name, pod.metadata.name


def fence(world: SmallWorld, name: str) -> None:
    world.agents[name].alive = False
    node = world.objects[GPUNode]["", name]
    off = Fence(method="Person", by="ann", at=world.stamp(), boot_id=node.status.boot_id)
    world.put(
        msgspec.structs.replace(node, spec=msgspec.structs.replace(node.spec, fence=off)), new_generation=True
    )


def unplug(world: SmallWorld, name: str) -> None:
    world.agents[name].alive = False
    del world.objects[Node]["", name]


BROKEN: dict[str, tuple[Callable[[SmallWorld, str], object], str]] = {
    "its agent dies": (
        lambda world, name: setattr(world.agents[name], "alive", False),
        "its agent fell silent",
    ),
    "its agent lives and never acknowledges": (
        lambda world, name: setattr(world.agents[name], "reports", False),
        "has not acknowledged that",
    ),
    "it is fenced": (fence, "it is fenced"),
    "its Node is deleted": (unplug, "its Node object is gone"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_pod_whose_gate_cannot_open_on_its_node_starts_elsewhere_and_is_told_why(how: str):
    world, bad, pod = charged()
    breaks, why = BROKEN[how]
    breaks(world, bad)
    world.rounds(30)
    assert len(world.ready_pods()) == 1
    assert bad not in where(world)
    (gone,) = [each for each in world.writes if isinstance(each, act.DeletePod)]
    assert gone.pod.metadata.name == pod
    assert gone.as_seen, "one that was opened meanwhile may run"
    assert why in gone.reason
    assert bad in gone.reason
    fenced = how == "it is fenced"
    left = [grant.name for grant in world.objects[GPUNode]["", bad].spec.pods]
    assert left == ([] if fenced else [pod]), "silence earns no credit (P4)"
    assert all(grant.released for grant in world.objects[GPUNode]["", bad].spec.pods)


def test_a_wait_for_an_agents_answer_is_told_and_ends_when_it_comes():
    world, slow, pod = charged(1)
    world.agents[slow].reports = False
    world.rounds(8)
    (told,) = world.objects[TokenFactory]["inference", "chat"].status.waiting
    assert (told.what, told.reason) == (pod, "AgentNotAnswering")
    assert slow in told.message
    world.agents[slow].reports = True
    world.settle()
    assert [each.metadata.name for each in world.ready_pods()] == [pod]
    assert not world.objects[TokenFactory]["inference", "chat"].status.waiting
    assert not [each for each in world.writes if isinstance(each, act.DeletePod)]


def test_a_node_whose_agent_does_not_answer_gets_no_pods_until_it_does():
    world, mute, _ = charged(1)
    world.agents[mute].reports = False
    world.rounds(30)
    (told,) = world.objects[TokenFactory]["inference", "chat"].status.waiting
    assert told.reason == "NodesClosed"
    assert "whose agent does not answer" in told.message
    replaced = sum(isinstance(each, act.DeletePod) for each in world.writes)
    world.rounds(100)
    assert sum(isinstance(each, act.DeletePod) for each in world.writes) == replaced == 1
    world.agents[mute].reports = True
    world.settle()
    assert len(world.ready_pods()) == 1


def test_an_agent_that_is_slow_and_gets_on_is_waited_for():
    world, slow, pod = charged(1)
    agent = world.agents[slow]
    for number in range(40):
        agent.reports = False
        world.rounds(1)
        status = world.objects[GPUNode]["", slow].status
        later = msgspec.structs.replace(status, observed_generation=0, boot_id=f"boot-{number // 15}")
        world.put(msgspec.structs.replace(world.objects[GPUNode]["", slow], status=later))
    assert [each.metadata.name for each in world.objects[Pod].values()] == [pod]


def test_in_a_storm_a_charged_pod_stays_where_it_is_and_says_so():
    """Rather is it the operator that hears nothing: elsewhere nobody would answer either."""
    world, bad, pod = charged(4)
    for agent in world.agents.values():
        agent.alive = False
    world.rounds(30)
    assert [each.metadata.name for each in world.objects[Pod].values()] == [pod]
    (told,) = world.objects[TokenFactory]["inference", "chat"].status.waiting
    assert told.reason == "AgentNotAnswering"
    assert "like too many others" in told.message
    calm = world.fork()
    for agent in calm.agents.values():
        agent.alive = True
    calm.settle()
    assert where(calm) == {bad}
    fence(world, bad)
    world.rounds(2)
    assert pod not in {each.metadata.name for each in world.objects[Pod].values()}, "a fence is proof"


# --- what a node has to give


def host_with(gpus: list[GPUStatus], offered: str = "8", strangers: int = 0) -> tuple[World, GpuHost]:
    node = Node(metadata=ObjectMeta(name="n"), status=NodeStatus(allocatable={names.GPU_RESOURCE: offered}))
    limits = ResourceRequirements(limits={names.GPU_RESOURCE: str(strangers)})
    stranger = Pod(spec=PodSpec(node_name="n", containers=(Container(resources=limits),)))
    held = GPUNode(metadata=ObjectMeta(name="n"), spec=GPUNodeSpec(), status=GPUNodeStatus(gpus=tuple(gpus)))
    host = GpuHost("n", node, held, 0.0)
    empty = see(SmallWorld().snapshot(), OPTIONS.workloads)
    return World(empty.snapshot, (), {"n": host}, {"n": (stranger,)} if strangers else {}), host


def gpu(index: int, **more: object) -> GPUStatus:
    return msgspec.structs.replace(GPUStatus(index=index, uuid=f"g{index}", product="H100"), **more)


@pytest.mark.parametrize(
    ("gpus", "offered", "strangers", "free"),
    [
        ([gpu(i) for i in range(8)], "8", 0, 8),
        ([gpu(i, healthy=i > 1) for i in range(8)], "8", 0, 6),
        ([gpu(i) for i in range(8)], "7", 0, 7),
        ([gpu(i, healthy=i > 0) for i in range(8)], "7", 0, 7),
        ([gpu(i) for i in range(8)], "", 0, 8),
        ([gpu(i) for i in range(8)], "8", 4, 4),
        ([gpu(i, pod="train/x" if i < 4 else "") for i in range(8)], "8", 4, 4),
        ([gpu(i, pod="train/x" if i < 4 else "") for i in range(8)], "8", 0, 4),
        ([gpu(i) for i in range(8)], "0", 4, 0),
    ],
    ids=["all", "two are sick", "one is not offered", "the sick one is not offered", "nothing is known of offers",
         "a stranger is bound", "a stranger runs", "a stranger's GPU is not free yet", "nothing is left"],
)  # fmt: skip
def test_free_gpus_are_those_that_a_pod_could_get(
    gpus: list[GPUStatus], offered: str, strangers: int, free: int
):
    assert free_gpus(*host_with(gpus, offered, strangers)) == free


# --- nodes that keep failing


def lose(world: SmallWorld, name: str) -> None:
    """Its agent dies for long enough that its pods restart elsewhere, and comes back."""
    world.agents[name].alive = False
    world.rounds(20)
    world.agents[name].alive = True
    world.settle()


def test_a_node_that_keeps_failing_gets_no_new_work_until_a_person_clears_it():
    world = site(8)
    world.settle()
    bad = min(where(world))
    lose(world, bad)
    assert world.objects[GPUNode]["", bad].spec.quarantine is None
    assert health_of(see(world.snapshot(), OPTIONS.workloads))[bad] == 0.5
    others = [name for name in world.agents if name != bad]
    for name in others:
        world.cordon(name)
    world.delete_pod(world.ready_pods()[0])
    world.settle()
    for name in others:
        world.cordon(name, on=False)
    assert bad in where(world)
    lose(world, bad)
    quarantine = world.objects[GPUNode]["", bad].spec.quarantine
    assert quarantine is not None
    assert "lost 2 times" in quarantine.reason
    assert ("Quarantined", quarantine.reason) in world.events
    assert bad not in where(world)
    cleared = world.objects[GPUNode]["", bad]
    world.put(
        msgspec.structs.replace(cleared, spec=msgspec.structs.replace(cleared.spec, quarantine=None)),
        new_generation=True,
    )
    world.settle()
    assert world.objects[GPUNode]["", bad].spec.quarantine is None, "what it did before was looked at"


def test_a_hasty_factory_takes_no_node_from_others_by_a_late_heartbeat():
    world = site(2)
    world.apply(chat(detectAfter="1s", quarantineAfter=1))
    world.rounds(20)
    assert world.objects[TokenFactory]["inference", "chat"].status.incidents, "it looked lost to this factory"
    assert not [node for node in world.objects[GPUNode].values() if node.spec.quarantine]


def test_a_node_that_stays_silent_fails_for_a_hasty_factory_too():
    world = site(8)
    world.apply(chat(detectAfter="5s", quarantineAfter=1))
    world.settle()
    bad = min(where(world))
    lose(world, bad)
    assert world.objects[GPUNode]["", bad].spec.quarantine is not None


def test_replicas_lost_together_are_one_failure_and_a_silence_that_ended_is_none():
    def lost(at: str, cause: str = "silent") -> Incident:
        return Incident(id=at, node="n", model="m", phase="Closed", detected_at=at, cause=cause)

    assert failures([lost("2026-11-21T12:00:01Z"), lost("2026-11-21T12:00:09Z")]) == 1
    assert failures([lost("2026-11-21T12:00:01Z"), lost("2026-11-21T13:00:01Z")]) == 2
    assert failures([lost("2026-11-21T12:00:01Z", "silent; it came back by itself")]) == 0
