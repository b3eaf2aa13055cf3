"""From what agents report to how many replicas there are, and to the watts that they get meanwhile."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode, PodMeter
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.plan.replicating import (
    READING_MILLISECONDS,
    WAKE_SECONDS,
    at_the_door,
    read_meters,
    startup_milliseconds,
)
from tokenfactory.controller.plan.world import see
from tokenfactory.kube.objects import KubeCondition, Pod


def site(least: int, limit: str = "60kW") -> SmallWorld:
    slo = {"timeToFirstToken": "1s", "interTokenLatency": "500ms"}
    llama = model(image="llama-3.1-70b-instruct", replicas=(least, 3), slo=slo)
    return SmallWorld.of(2, hall(limit), factory(llama))


def the_model(world: SmallWorld) -> tuple[TokenFactory, Any]:
    factory = world.objects[TokenFactory]["inference", "chat"]
    return factory, factory.spec.models[0]


def meter_all(world: SmallWorld, **figures: int) -> None:
    """What agents count of every pod that serves."""
    for node in list(world.objects[GPUNode].values()):
        here = [pod for pod in world.ready_pods() if pod.spec.node_name == node.metadata.name]
        meters = tuple(
            msgspec.structs.replace(
                PodMeter(pod=pod.metadata.name, uid=pod.metadata.uid or "", since="a"), **figures
            )
            for pod in here
        )
        world.put(msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, meters=meters)))


def annotate(world: SmallWorld, said: str) -> None:
    factory, model = the_model(world)
    meta = msgspec.structs.replace(factory.metadata, annotations={names.WAKE_PREFIX + model.name: said})
    world.put(msgspec.structs.replace(factory, metadata=meta))


# --- to zero and back


def test_a_model_that_sleeps_wakes_when_somebody_at_the_door_says_so():
    world = site(0)
    world.settle()
    assert not world.ready_pods()
    annotate(world, world.stamp())
    world.settle()
    assert len(world.ready_pods()) == 1


@pytest.mark.parametrize(
    ("seconds_ago", "woken"), [(0, 1), (WAKE_SECONDS - 1, 1), (WAKE_SECONDS + 1, 0), (-5, 1), (-3600, 0)]
)
def test_a_call_is_heard_for_a_while(seconds_ago: int, woken: int):
    world = site(0)
    said = (world.now - timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
    annotate(world, said)
    assert at_the_door(*the_model(world), world.now) == woken


@pytest.mark.parametrize("said", ["", "yes", "2026-11-21", "2026-11-21T12:00:00", "12:00"])
def test_what_is_no_time_wakes_nobody(said: str):
    world = site(0)
    annotate(world, said)
    assert at_the_door(*the_model(world), world.now) == 0


# --- watts for a latency in danger


def highest(world: SmallWorld) -> int:
    return max(limit for agent in world.agents.values() for limit in agent.enforced.values())


def test_a_latency_in_danger_lifts_caps_above_what_brings_tokens_and_is_dropped_again():
    world = site(2)
    world.settle()
    well = highest(world)
    for _ in range(40):
        world.others()
        meter_all(world, running=8, time_to_first_token_ms=900, tokens_per_kilosecond=10**6)
        world.operate()
    assert well < highest(world) == 630_000
    for _ in range(200):
        world.others()
        meter_all(world, running=8, time_to_first_token_ms=100, tokens_per_kilosecond=10**6)
        world.operate()
    assert highest(world) == well


def test_what_is_lifted_takes_nothing_from_a_limit_that_is_reached():
    world = site(2, limit="8kW")
    for _ in range(60):
        world.others()
        meter_all(world, running=8, time_to_first_token_ms=900, tokens_per_kilosecond=10**6)
        world.operate()
        assert not world.new_breaches()


# --- figures


def test_prompts_are_counted_over_a_while_and_a_pod_that_began_anew_begins_at_zero():
    world = site(1)
    world.settle()
    readings: dict[str, Any] = {}
    for second in range(0, 200, 10):
        meter_all(world, prompt_tokens=second * 700)
        seen = replace(world.snapshot(), milliseconds=second * 1000)
        readings = read_meters(see(seen, OPTIONS.workloads), readings)
    (reading,) = readings.values()
    assert reading.prompt_tokens_per_second == 700
    meter_all(world, prompt_tokens=5)
    later = replace(world.snapshot(), milliseconds=200_000 + READING_MILLISECONDS)
    (reading,) = read_meters(see(later, OPTIONS.workloads), readings).values()
    assert reading.prompt_tokens_per_second == 0


def test_a_start_takes_what_the_last_ones_took():
    world = site(3)
    world.settle()
    replicas = see(world.snapshot(), OPTIONS.workloads).replicas_of(the_model(world)[0])
    assert startup_milliseconds([]) == startup_milliseconds(replicas) == 180_000, "nothing is known yet"

    def took(pod: Pod, seconds: int) -> Pod:
        begin, end = world.now, world.now + timedelta(seconds=seconds)
        conditions = tuple(
            KubeCondition(type=kind, status="True", last_transition_time=at.strftime("%Y-%m-%dT%H:%M:%SZ"))
            for kind, at in (("PodScheduled", begin), ("Ready", end))
        )
        return msgspec.structs.replace(pod, status=msgspec.structs.replace(pod.status, conditions=conditions))

    known = [
        replace(each, pod=took(each.pod, seconds))
        for each, seconds in zip(replicas, (40, 45, 900), strict=True)
    ]
    assert startup_milliseconds(known) == 45_000
