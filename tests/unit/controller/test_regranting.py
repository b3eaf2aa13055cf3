"""Replicas that run without a grant: their GPUNode was deleted under them, or their factory went and came back."""

from dataclasses import replace

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.kube.objects import Pod


def chat(replicas: int = 3, **spec: object) -> Manifest:
    return factory(model(replicas=(replicas, replicas)), **spec)


def site(limit: str = "30kW", **spec: object) -> tuple[SmallWorld, str]:
    """A settled world, and a node with a replica on it."""
    world = SmallWorld.of(4, hall(limit), chat(**spec))
    world.settle()
    return world, world.ready_pods()[0].spec.node_name


def forget(world: SmallWorld, name: str) -> None:
    """Somebody deletes the GPUNode."""
    del world.objects[GPUNode]["", name]


def loose(world: SmallWorld) -> set[str]:
    granted = {
        grant.uid
        for node in world.objects[GPUNode].values()
        for grant in node.spec.pods
        if not grant.released
    }
    return {pod.metadata.uid or "" for pod in world.ready_pods()} - granted


def status(world: SmallWorld) -> tuple[str, dict[str, str]]:
    held = world.objects[TokenFactory]["inference", "chat"].status
    return held.charge, {each.type: each.reason for each in held.conditions}


def test_what_runs_on_a_node_whose_gpunode_was_deleted_is_charged_there_again():
    world, name = site()
    before, charge = {pod.metadata.uid for pod in world.ready_pods()}, status(world)[0]
    forget(world, name)
    world.settle(each_round=_no_breach)
    assert {pod.metadata.uid for pod in world.ready_pods()} == before, "nothing was restarted"
    assert not loose(world)
    assert status(world) == (charge, status(world)[1])
    assert status(world)[1]["Ready"] == "AllReady"


def _no_breach(world: SmallWorld) -> None:
    assert not world.new_breaches()


def test_a_cut_reaches_it_even_where_the_limit_falls_before_it_is_charged_again():
    world, name = site()
    forget(world, name)
    world.operate()
    world.apply(hall("14kW"))
    world.look()
    world.settle(each_round=_no_breach)
    assert not loose(world)
    node = world.objects[GPUNode]["", name]
    held = [world.agents[name].enforced[gpu.uuid] for gpu in node.status.gpus if gpu.pod_uid]
    assert held
    assert max(held) < 700_000
    assert world.drawing()["hall"] <= 14_000_000


def test_while_it_has_no_charge_of_its_own_its_factory_counts_and_says_so():
    world, name = site(power={"domain": "hall", "budget": "8.5kW"})
    charge = status(world)[0]
    world.agents[name].reports = False
    forget(world, name)
    world.rounds(4)
    there = len([pod for pod in world.ready_pods() if pod.spec.node_name == name])
    held = world.objects[TokenFactory]["inference", "chat"].status
    assert [each.reason for each in held.waiting] == ["Uncharged"] * there
    assert all(name in each.message for each in held.waiting)
    assert sum(reason == "Uncharged" for reason, _ in world.events) == there
    assert watts(held.charge) >= watts(charge), "what may be drawn did not become less"
    assert status(world)[1]["WithinBudget"] == "OverBudget", (
        "nobody caps it, so it counts at what a GPU may draw"
    )
    world.apply(chat(4, power={"domain": "hall", "budget": "8.5kW"}))
    world.rounds(4)
    assert len(world.ready_pods()) == 3, "it gets nothing more meanwhile"
    world.agents[name].reports = True
    world.settle()
    assert len(world.ready_pods()) == 4
    assert status(world)[1]["WithinBudget"] == "WithinBudget"
    assert not loose(world)


def watts(text: str) -> float:
    return float(text[:-2]) * 1000 if text.endswith("kW") else float(text[:-1])


def test_a_replica_that_cannot_be_charged_for_a_minute_starts_again_elsewhere():
    world, name = site()
    world.agents[name].reports = False
    here = {pod.metadata.uid for pod in world.ready_pods() if pod.spec.node_name == name}
    forget(world, name)
    world.rounds(20)
    assert not [each for each in world.writes if isinstance(each, act.DeletePod)]
    world.rounds(60)
    assert not here & {pod.metadata.uid for pod in world.ready_pods()}
    assert len(world.ready_pods()) == 3
    assert not loose(world)
    replaced = [each for each in world.writes if isinstance(each, act.DeletePod)]
    assert all("without a charge of its own" in each.reason for each in replaced)


@pytest.mark.parametrize(
    ("now", "lacks"),
    [
        (hall("5kW"), "lacks"),
        (hall("60kW", admits=[{"namespaceSelector": {}, "maxBand": 0}]), "up to band 0"),
    ],
    ids=["its hall is full", "its hall does not admit it"],
)
def test_what_does_not_serve_yet_needs_all_that_a_gated_pod_needs(now: Manifest, lacks: str):
    """A person took its gate away: it would draw more, and nothing says that it may."""
    world = SmallWorld.of(2, hall("60kW"), chat(1))
    world.settle()
    world.apply(now)
    world.rounds(20)
    world.apply(chat(2))
    world.rounds(10)
    gated = [pod for pod in world.objects[Pod].values() if pod.spec.scheduling_gates]
    assert gated
    free = next(name for name in world.agents if name not in {p.spec.node_name for p in world.ready_pods()})
    world.run_pods = lambda: None  # it waits in its init container
    world.schedule(gated[0], free)
    world.rounds(5)
    (told,) = world.objects[TokenFactory]["inference", "chat"].status.waiting
    assert told.reason == "Uncharged"
    assert lacks in told.message
    assert not any(grant.uid == gated[0].metadata.uid for grant in world.objects[GPUNode]["", free].spec.pods)


def test_a_factory_that_went_and_came_back_has_its_pods_charged_as_living_ones():
    world, _ = site()
    before = {pod.metadata.uid for pod in world.ready_pods()}
    for held in list(world.objects[Deployment].values()):
        world.put(
            msgspec.structs.replace(
                held, metadata=msgspec.structs.replace(held.metadata, owner_references=())
            )
        )
    world.delete_factory("inference", "chat")
    world.settle()
    assert loose(world) == before, "released: nothing of them may start any more"
    world.apply(chat())
    world.settle()
    assert not loose(world)
    assert {pod.metadata.uid for pod in world.ready_pods()} == before


@pytest.mark.parametrize("agent", ["dies", "lives"])
def test_a_gpunode_that_is_deleted_with_a_dead_agent_is_a_lost_node_like_any_other(agent: str):
    world, name = site()
    world.agents[name].alive = agent == "lives"
    forget(world, name)
    world.rounds(60)
    serving = [pod for pod in world.ready_pods() if not pod.metadata.deletion_timestamp]
    assert len(serving) == 3
    assert (name in {pod.spec.node_name for pod in serving}) == (agent == "lives")
    if agent == "dies":
        charge = world.plan().books.ledger.node_charge(name)
        assert charge >= 8 * 700_000, "nobody knows what it draws"


def test_nothing_that_serves_is_deleted_because_its_gpunode_cannot_be_read():
    """After a start the caches hold nothing of an object that does not fit our types: of an agent of another release."""
    world, _ = site()
    serving = {pod.metadata.uid for pod in world.ready_pods()}
    hidden = {pod.spec.node_name for pod in world.ready_pods()}
    whole = world.snapshot

    def half() -> Snapshot:
        seen = whole()
        nodes = {key: node for key, node in seen.gpu_nodes.items() if key[1] not in hidden}
        return replace(
            seen, gpu_nodes=nodes, undecodable={("GPUNode", ("", name)): "no such mode" for name in hidden}
        )

    world.snapshot = half
    world.crash()
    world.live(200)
    assert {pod.metadata.uid for pod in world.ready_pods()} == serving


def test_replacements_of_a_silent_node_do_not_wait_for_what_is_loose_on_it():
    """Its GPUNode was deleted as well: what is left there is neither charged anew nor deleted before its turn."""
    few = {"maxConcurrent": 1}
    world = SmallWorld.of(4, hall("60kW"), factory(model(gpus=1, replicas=(16, 16)), recovery=few))
    world.settle()
    dead = world.ready_pods()[0].spec.node_name
    assert sum(pod.spec.node_name == dead for pod in world.ready_pods()) >= 3
    world.agents[dead].alive = False
    forget(world, dead)
    world.live(300)
    assert sum(pod.spec.node_name != dead for pod in world.ready_pods()) == 16


def test_the_patience_with_a_gpunode_begins_when_it_is_there():
    """Thousands of them are made anew one after the other, and that may take longer than an agent to report."""
    world, name = site()
    serving = {pod.metadata.uid for pod in world.ready_pods()}
    forget(world, name)
    take = world.take
    world.take = lambda action: None if isinstance(action, act.ChargeNode) else take(action)
    world.live(100)
    world.take = take
    world.live(60)
    assert {pod.metadata.uid for pod in world.ready_pods()} == serving
    assert not loose(world)
