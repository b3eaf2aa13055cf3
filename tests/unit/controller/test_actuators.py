"""A profile's actuators reach the GPUs of its model through the grant, follow the profile, and go with it."""

import pytest
from tests.unit.controller.manifests import LLAMA_70B, Manifest, factory, hall, model, profile
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api import actuators as api
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_profile import PowerProfile


def tuned(gpu_product: str, megahertz: int) -> Manifest:
    actuators = {"lockedClocks": {"maxMHz": megahertz}, "workloadPowerProfile": "MaxQ"}
    return profile("llama", gpu_product, (8, "400W", "100"), actuators=actuators)


def asked(world: SmallWorld) -> list[api.Actuators | None]:
    return [pod.actuators for node in world.objects[GPUNode].values() for pod in node.spec.pods]


def wish(megahertz: int) -> api.Actuators:
    return api.Actuators(locked_clocks=api.ClockRange(max_mhz=megahertz), workload_power_profile="MaxQ")


@pytest.fixture
def world() -> SmallWorld:
    return SmallWorld.of(1, hall("20kW"), factory(model(image=LLAMA_70B)))


def test_a_grant_carries_what_the_models_profile_asks(world):
    world.apply(tuned(H100, 1410))
    world.settle()
    assert asked(world) == [wish(1410)]


def test_a_running_models_grant_follows_its_profile(world):
    world.settle()
    assert asked(world) == [None]
    world.apply(tuned(H100, 1410))
    world.settle()
    assert asked(world) == [wish(1410)]
    world.apply(tuned(H100, 1200))
    world.settle()
    assert asked(world) == [wish(1200)]
    world.objects[PowerProfile].clear()
    world.settle()
    assert asked(world) == [None]


def test_a_profile_of_another_product_asks_nothing(world):
    world.apply(tuned("NVIDIA H200", 1410))
    world.settle()
    assert asked(world) == [None]
