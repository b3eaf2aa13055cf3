"""A shortage beyond what caps should bear: who is drained, who is evicted, and how it comes back."""

from datetime import timedelta

import pytest
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act

DOMAIN = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerDomain
metadata: {name: hall}
spec: {limit: 30kW, nodeOverhead: 1kW, nodeSelector: {matchLabels: {nvidia.com/gpu.present: "true"}}}
"""
FACTORY = """
apiVersion: tokenfactory.dev/v1alpha1
kind: TokenFactory
metadata: {name: chat, namespace: inference}
spec:
  power: {domain: hall}
  models:
  - {name: gold, band: 100, nim: {image: "nvcr.io/nim/meta/llama-3.3-70b-instruct:1.8.0"}, gpusPerReplica: 4, slo: {interTokenLatency: 50ms}, replicas: {min: 2, max: 2}}
  - {name: tin, band: 10, nim: {image: "nvcr.io/nim/meta/llama-3.3-70b-instruct:1.8.0"}, gpusPerReplica: 4, slo: {interTokenLatency: 50ms}, replicas: {min: 1, max: 5}}
"""


@pytest.fixture
def world() -> SmallWorld:
    """Seven replicas at work: five of tin are there because traffic once asked for them."""
    world = SmallWorld()
    for number in range(4):
        world.add_node(f"n{number}")
    world.apply(DOMAIN)
    world.apply(FACTORY.replace("min: 1, max: 5", "min: 5, max: 5"))
    world.settle()
    world.apply(FACTORY)
    world.settle()
    assert serving(world) == {"gold": 2, "tin": 5}
    return world


def serving(world: SmallWorld) -> dict[str, int]:
    found: dict[str, int] = {}
    for pod in world.ready_pods():
        model = pod.metadata.labels["tokenfactory.dev/model"]
        found[model] = found.get(model, 0) + 1
    return found


def status(world: SmallWorld):
    return next(iter(world.objects[TokenFactory].values())).status


def live(world: SmallWorld, seconds: int) -> None:
    until = world.now + timedelta(seconds=seconds)
    while world.now < until:
        world.others()
        world.operate()


def test_a_lasting_shortage_drains_the_lowest_band_and_says_so(world: SmallWorld):
    world.apply(DOMAIN.replace("30kW", "15kW"))
    live(world, 20)
    assert serving(world) == {"gold": 2, "tin": 5}, "caps bear it at first"
    live(world, 60)
    left = serving(world)
    assert left["gold"] == 2
    assert 1 <= left["tin"] < 5
    parked = [entry for entry in status(world).waiting if entry.reason == "Parked"]
    assert [entry.what for entry in parked] == ["tin"]
    assert "hall" in parked[0].message
    assert {model.name: model.desired for model in status(world).models}["tin"] == left["tin"]


def test_a_drain_does_not_end_its_own_reason(world: SmallWorld):
    world.apply(DOMAIN.replace("30kW", "15kW"))
    live(world, 90)
    left = serving(world)
    before = len([write for write in world.writes if isinstance(write, act.ApplyWorkload)])
    live(world, 900)
    assert serving(world) == left
    assert len([write for write in world.writes if isinstance(write, act.ApplyWorkload)]) == before


def test_what_was_drained_comes_back_late_and_completely(world: SmallWorld):
    world.apply(DOMAIN.replace("30kW", "15kW"))
    live(world, 90)
    left = serving(world)
    world.apply(DOMAIN)
    live(world, 200)
    assert serving(world) == left, "not before the shortage has been over for long"
    live(world, 200)
    assert serving(world) == {"gold": 2, "tin": 5}
    world.settle()
    assert status(world).waiting == ()


def test_a_short_dip_drains_nobody(world: SmallWorld):
    for _ in range(10):
        world.apply(DOMAIN.replace("30kW", "15kW"))
        live(world, 16)
        world.apply(DOMAIN)
        live(world, 16)
    assert serving(world) == {"gold": 2, "tin": 5}


def test_the_pods_that_go_are_marked_before_there_are_to_be_fewer(world: SmallWorld):
    world.apply(DOMAIN.replace("30kW", "15kW"))
    seen: list[act.Action] = []
    for _ in range(45):
        world.others()
        planned = world.plan().plan.actions
        seen += [action for action in planned if isinstance(action, act.MarkPod | act.ApplyWorkload)]
        world.operate()
    assert isinstance(seen[0], act.MarkPod)
    assert any(isinstance(action, act.ApplyWorkload) for action in seen)


def test_where_not_even_the_minimum_fits_the_lowest_band_is_evicted_first(world: SmallWorld):
    # 4 kW of overhead and 32 GPUs at 200 W are 10.4 kW: nothing that caps can do.
    world.apply(DOMAIN.replace("30kW", "8.8kW"))
    live(world, 20)
    assert not [write for write in world.writes if isinstance(write, act.DeletePod)]
    live(world, 60)
    gone = [write for write in world.writes if isinstance(write, act.DeletePod)]
    assert gone
    assert all("evicted from hall" in write.reason for write in gone)
    assert gone[0].pod.metadata.labels["tokenfactory.dev/model"] == "tin"
    assert serving(world).get("gold", 0) >= 1
    domain = next(iter(world.objects[PowerDomain].values()))
    compliant = {c.type: c for c in domain.status.conditions}["Compliant"]
    assert compliant.status == "False"
    count = len(gone)
    live(world, 120)
    assert len([write for write in world.writes if isinstance(write, act.DeletePod)]) == count
