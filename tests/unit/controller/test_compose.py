"""A factory from first apply to tokens, followed in memory: what is written, in which order, and when it stops."""

import msgspec
import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.names import GPU_RESOURCE
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.cutting import cuts
from tokenfactory.controller.objects import Deployment
from tokenfactory.kube.objects import Pod

SITE = (hall("30kW"), factory(model(replicas=(3, 8))))


@pytest.fixture
def world() -> SmallWorld:
    return SmallWorld.of(4, *SITE)


def draw(world: SmallWorld) -> int:
    """What the hardware may draw: GPUs without a pod draw their minimum at most once capped."""
    total = 0
    for node in world.objects[GPUNode].values():
        total += node.spec.overhead_milliwatts
        agent = world.agents[node.metadata.name]
        for gpu in node.status.gpus:
            total += agent.enforced.get(gpu.uuid, 0)
    return total


def chat_of(world: SmallWorld) -> TokenFactory:
    return next(iter(world.objects[TokenFactory].values()))


def hall_of(world: SmallWorld) -> PowerDomain:
    return next(iter(world.objects[PowerDomain].values()))


def test_a_factory_comes_up_and_then_nothing_is_written(world: SmallWorld):
    world.settle()
    assert len(world.ready_pods()) == 3
    assert chat_of(world).status.ready == "3/3"
    assert {c.type: c.status for c in chat_of(world).status.conditions}["Ready"] == "True"
    before = len(world.writes)
    world.rounds(5)
    assert len(world.writes) == before


def test_a_gate_opens_only_after_the_charge_stands_and_is_obeyed(world: SmallWorld):
    for _ in range(40):
        world.others()
        seen = world.snapshot().gpu_nodes
        plan = world.plan().plan
        for action in plan.actions:
            if isinstance(action, act.OpenGate):
                node = seen["", action.node]
                assert action.pod.metadata.uid in {grant.uid for grant in node.spec.pods}
                assert node.status.observed_generation == node.metadata.generation
                assert node.status.capped
            world.take(action)
    assert len(world.ready_pods()) == 3


def test_the_watts_go_to_what_serves_and_fit_the_limit_in_every_round(world: SmallWorld):
    for _ in range(40):
        world.others()
        world.operate()
        assert draw(world) <= 30_000_000
    # 29.1 kW usable, 4 kW overhead, 32 GPUs at 200 W: the rest is shared by twelve that serve.
    serving = [
        gpu.enforced_milliwatts for n in world.objects[GPUNode].values() for gpu in n.status.gpus if gpu.pod
    ]
    assert len(serving) == 12
    assert min(serving) == 700_000


@pytest.mark.parametrize("writes", range(1, 12))
def test_an_operator_killed_after_any_write_ends_where_the_others_do(world: SmallWorld, writes: int):
    for _ in range(40):
        world.others()
        world.operate(most_writes=writes)
    world.settle()
    fresh = SmallWorld.of(4, *SITE)
    fresh.settle()
    assert chat_of(world).status.ready == chat_of(fresh).status.ready
    assert hall_of(world).status.charge == hall_of(fresh).status.charge


def test_a_lost_node_stays_charged_and_its_replica_starts_elsewhere(world: SmallWorld):
    world.settle()
    victim = world.ready_pods()[0].spec.node_name
    charged_before = world.plan().books.ledger.node_charge(victim)
    world.agents[victim].alive = False
    for _ in range(30):
        world.others()
        world.operate()
        assert draw(world) <= 30_000_000
    assert world.plan().books.ledger.node_charge(victim) >= charged_before
    assert hall_of(world).status.lost_nodes == 1
    running = [pod for pod in world.ready_pods() if not pod.metadata.deletion_timestamp]
    assert len(running) == 3
    assert victim not in {pod.spec.node_name for pod in running}
    assert {incident.node for incident in chat_of(world).status.incidents} == {victim}


def test_a_cut_lowers_at_once_and_a_raise_comes_back(world: SmallWorld):
    world.settle()
    world.apply(hall("14kW"))
    world.others()
    world.operate()
    world.others()
    assert draw(world) <= 14_000_000
    world.settle()
    assert draw(world) <= 14_000_000 * 97 // 100
    world.apply(hall("30kW"))
    world.settle()
    serving = [
        gpu.enforced_milliwatts for n in world.objects[GPUNode].values() for gpu in n.status.gpus if gpu.pod
    ]
    assert min(serving) == 700_000


def test_a_factory_whose_domain_is_missing_says_so(world: SmallWorld):
    world.apply(factory(model(replicas=(3, 8)), power={"domain": "attic"}))
    world.settle()
    ready = {c.type: c for c in chat_of(world).status.conditions}["Ready"]
    assert ready.status == "False"
    assert "attic does not exist" in ready.message


def test_the_cut_path_lowers_the_root_alone_and_looks_at_no_node(world: SmallWorld):
    world.settle()
    last = world.plan()
    world.apply(hall("14kW"))
    snapshot = world.snapshot()
    lower = cuts(last, snapshot.domains, snapshot.sheets, world.now)
    assert [action.spec.domain for action in lower] == ["hall"]
    assert lower[0].lowers
    before = {cap.class_name: cap.cap for cap in snapshot.sheets["", "hall"].spec.caps}
    assert all(cap.cap <= before[cap.class_name] for cap in lower[0].spec.caps)
    world.take(lower[0])
    world.others()
    assert draw(world) <= 14_000_000


def test_the_cut_path_is_silent_when_a_limit_rises_or_stays(world: SmallWorld):
    world.settle()
    last = world.plan()
    world.apply(hall("40kW"))
    snapshot = world.snapshot()
    assert cuts(last, snapshot.domains, snapshot.sheets, world.now) == []


def test_replicas_that_outlive_their_factory_are_charged_as_what_they_are(world: SmallWorld):
    """Until the garbage collector has taken them they run capped: nobody else is throttled for strangers."""
    world.settle()
    before = world.plan().books.ledger.charge("hall")
    world.delete_factory("inference", "chat")
    for _ in range(2):
        assert world.plan().books.ledger.charge("hall") <= before
        world.operate()
        world.beat()


def test_a_stranger_that_only_the_agent_sees_makes_its_node_charged_for_a_reboot(world: SmallWorld):
    """It may hold a GPU in a way that no pod's requests tell (DRA, MIG, an environment variable)."""
    world.settle()
    ledger = world.plan().books.ledger
    name = min(world.agents, key=ledger.node_charge)
    guarded = ledger.node_charge(name)
    node = world.objects[GPUNode]["", name]
    gpus = tuple(
        msgspec.structs.replace(gpu, pod="default/stranger") if not gpu.pod else gpu
        for gpu in node.status.gpus
    )
    world.put(msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, gpus=gpus)))
    charged = world.plan().books.ledger.node_charge(name)
    assert charged > guarded
    assert charged >= sum(gpu.default_milliwatts for gpu in gpus)


def test_beside_a_stranger_every_replica_that_fits_gets_its_watts():
    """On a node that is charged for a reboot caps buy nothing: what it owes must come off what the others may have."""
    world = SmallWorld()
    for number in range(4):
        world.add_node(f"n{number}", gpus=4)
    small = model(image="llama-3.1-8b", gpus=2, replicas=(1, 8))
    world.apply(hall("14kW", nodeOverhead="800W"), factory(small))
    world.settle()
    stranger = msgspec.convert(
        {
            "metadata": {"name": "stranger", "namespace": "default", "uid": "uid-stranger"},
            "spec": {
                "nodeName": "n3",
                "containers": [{"name": "x", "resources": {"limits": {GPU_RESOURCE: "1"}}}],
            },
        },
        Pod,
    )
    world.put(stranger)
    world.settle()
    world.apply(factory({**small, "replicas": {"min": 7, "max": 8}}))
    for _ in range(40):
        world.others()
        world.operate()
        assert draw(world) <= 14_000_000
    mine = [pod for pod in world.ready_pods() if pod.metadata.name != "stranger"]
    assert len(mine) == 7, chat_of(world).status.waiting


def test_factories_of_one_name_in_two_namespaces_have_nothing_in_common():
    world = SmallWorld.of(4, hall("30kW"))
    world.apply(*(factory(model(replicas=(2, 2)), namespace=name) for name in ("a", "b")))
    world.settle()
    for name in ("a", "b"):
        assert world.objects[TokenFactory][name, "chat"].status.ready == "2/2"
        (made,) = (key for key in world.objects[Deployment] if key[0] == name)
        assert made == (name, "chat-llama")
    assert len({each.metadata.uid for each in world.objects[TokenFactory].values()}) == 2
    classes = {grant.class_name for node in world.objects[GPUNode].values() for grant in node.spec.pods}
    assert {label.partition("/")[0] for label in classes} == {"a", "b"}
    world.delete_factory("a", "chat")
    world.settle()
    assert set(world.objects[Deployment]) == {("b", "chat-llama")}
    assert world.objects[TokenFactory]["b", "chat"].status.ready == "2/2"
    assert {pod.metadata.namespace for pod in world.ready_pods()} == {"b"}
