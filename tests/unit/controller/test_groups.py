"""Models that span nodes: a LeaderWorkerSet where there is one to have, else words that say what to install."""

from datetime import timedelta
from typing import Any

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.compose import _ledger
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.plan.choosing import choose
from tokenfactory.controller.plan.domains import lay_out
from tokenfactory.controller.plan.placing import grant
from tokenfactory.controller.plan.purses import spending
from tokenfactory.controller.plan.refusing import Refusals
from tokenfactory.controller.plan.world import see
from tokenfactory.kube.objects import Pod, SchedulingGate

KEY = ("inference", "chat-huge")
GROUP = ("inference", "chat-huge-group")


def huge(**changed: Any) -> Manifest:
    wanted = {"image": "llama-3.1-405b-instruct", "gpus": 8, "nodesPerReplica": 2, "replicas": (1, 2)}
    return model("huge", **{**wanted, **changed})


@pytest.fixture
def world() -> SmallWorld:
    return SmallWorld.of(3, hall("40kW"), factory(huge()))


def status(world: SmallWorld):
    return next(iter(world.objects[TokenFactory].values())).status


def group(world: SmallWorld, only: int | None = None, number: int = 0) -> None:
    """What the LeaderWorkerSet controller makes of one replica: all of it, or so many pods of it so far."""
    template = world.objects[LeaderWorkerSet][GROUP].spec["leaderWorkerTemplate"]
    for worker in range(template["size"] if only is None else only):
        part = template["workerTemplate" if worker else "leaderTemplate"]
        labels = part["metadata"]["labels"] | {
            names.LWS_GROUP_LABEL: str(number),
            names.LWS_WORKER_LABEL: str(worker),
        }
        name = f"chat-huge-group-{number}-{worker}" if worker else f"chat-huge-group-{number}"
        meta = {"name": name, "namespace": "inference", "uid": f"uid-{name}", "labels": labels}
        pod = msgspec.convert({"metadata": meta, "spec": part["spec"]}, Pod)
        gates = (SchedulingGate(name=names.GATE),)
        assert pod.spec.scheduling_gates == gates
        world.put(pod)


def live(world: SmallWorld, rounds: int = 12) -> None:
    for _ in range(rounds):
        world.run_pods()
        world.beat()
        world.operate()


def test_without_their_crd_nothing_runs_by_halves_and_the_condition_says_what_to_install(world: SmallWorld):
    world.settle()
    assert not world.objects[Deployment]
    assert not world.objects[LeaderWorkerSet]
    ready = {c.type: c for c in status(world).conditions}["Ready"]
    assert (ready.status, ready.reason) == ("False", "LeaderWorkerSetMissing")
    assert "huge spans 2 nodes" in ready.message


def test_a_group_is_charged_pod_by_pod_and_serves_as_one_replica(world: SmallWorld):
    world.has_groups = True
    live(world, 3)
    spec = world.objects[LeaderWorkerSet][GROUP].spec
    assert (spec["replicas"], spec["leaderWorkerTemplate"]["size"]) == (1, 2)
    assert world.objects[Service][KEY].spec["selector"][names.LWS_WORKER_LABEL] == "0"
    group(world)
    live(world)
    nodes = {pod.spec.node_name for pod in world.ready_pods()}
    assert len(nodes) == 2
    granted = {grant.name for node in world.objects[GPUNode].values() for grant in node.spec.pods}
    assert granted == {"chat-huge-group-0", "chat-huge-group-0-1"}
    assert status(world).ready == "1/1"


def charged(world: SmallWorld) -> set[str]:
    return {grant.name for node in world.objects[GPUNode].values() for grant in node.spec.pods}


def test_a_leader_takes_no_place_before_its_workers_are_there(world: SmallWorld):
    world.has_groups = True
    live(world, 3)
    group(world, only=1)
    live(world)
    assert charged(world) == set()
    assert [(each.what, each.reason) for each in status(world).waiting] == [
        ("chat-huge-group-0", "GroupIncomplete")
    ]
    group(world)
    live(world)
    assert len(charged(world)) == 2


def test_where_watts_are_there_for_half_a_group_none_of_it_is_charged(world: SmallWorld):
    world.add_node("n3")
    world.has_groups = True
    live(world, 3)
    group(world)
    live(world)
    world.apply(factory(huge(replicas=(2, 2))))
    group(world, number=1)
    seen, books, ledger = books_of(world)
    wishes = list(choose(seen, books, ledger, Refusals()).wishes)
    assert len(wishes) == 2
    for more_pods, granted in ((1.5, 0), (2.5, 2)):
        limit = ledger.charge("hall") / 0.97 + more_pods * 8 * (688_000 - 200_000)
        world.apply(hall(f"{limit / 1000:.0f}W"))
        seen, books, ledger = books_of(world)
        answer = grant(seen, ledger, spending(seen, books, ledger), wishes)
        assert sum(map(len, answer.granted.values())) == granted
        assert len(answer.waiting) == 2 - granted


def books_of(world: SmallWorld):
    seen = see(world.snapshot(), OPTIONS.workloads)
    grid = lay_out(seen)
    return seen, grid, _ledger(seen, grid)


def test_half_a_group_is_no_replica(world: SmallWorld):
    world.has_groups = True
    live(world, 3)
    group(world)
    live(world)
    assert status(world).ready == "1/1"
    lost = world.objects[Pod]["inference", "chat-huge-group-0-1"]
    world.put(msgspec.structs.replace(lost, status=msgspec.structs.replace(lost.status, conditions=())))
    world.now += timedelta(seconds=20)
    for agent in world.agents.values():
        agent.heard_at = world.now
    world.operate()
    assert status(world).ready == "0/1"


def test_a_model_that_no_longer_spans_nodes_leaves_no_group_behind(world: SmallWorld):
    world.has_groups = True
    live(world, 3)
    world.apply(factory(huge(nodesPerReplica=None)))
    live(world, 2)
    assert not world.objects[LeaderWorkerSet]
    assert KEY in world.objects[Deployment]
