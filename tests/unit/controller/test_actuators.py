"""A profile's actuators reach the GPUs of its model through the grant, follow the profile, and go with it."""

import pytest
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api import actuators as api
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_profile import PowerProfile

SITE = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerDomain
metadata: {name: hall}
spec: {limit: 20kW, nodeOverhead: 1kW, nodeSelector: {matchLabels: {nvidia.com/gpu.present: "true"}}}
---
apiVersion: tokenfactory.dev/v1alpha1
kind: TokenFactory
metadata: {name: chat, namespace: inference}
spec:
  power: {domain: hall}
  models:
  - {name: llama, nim: {image: "nvcr.io/nim/meta/llama-3.3-70b-instruct:1.8.0"}, gpusPerReplica: 4, replicas: {min: 1, max: 1}}
"""
PROFILE = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerProfile
metadata: {name: llama}
spec:
  model: llama-3.3-70b-instruct
  gpuProduct: %s
  actuators: {lockedClocks: {maxMHz: %d}, workloadPowerProfile: MaxQ}
  points: [{concurrency: 8, watts: 400W, tokensPerSecond: "100"}]
"""


def asked(world: SmallWorld) -> list[api.Actuators | None]:
    return [pod.actuators for node in world.objects[GPUNode].values() for pod in node.spec.pods]


def wish(megahertz: int) -> api.Actuators:
    return api.Actuators(locked_clocks=api.ClockRange(max_mhz=megahertz), workload_power_profile="MaxQ")


@pytest.fixture
def world() -> SmallWorld:
    world = SmallWorld()
    world.add_node("a0")
    world.apply(SITE)
    return world


def test_a_grant_carries_what_the_models_profile_asks(world):
    world.apply(PROFILE % (H100, 1410))
    world.settle()
    assert asked(world) == [wish(1410)]


def test_a_running_models_grant_follows_its_profile(world):
    world.settle()
    assert asked(world) == [None]
    world.apply(PROFILE % (H100, 1410))
    world.settle()
    assert asked(world) == [wish(1410)]
    world.apply(PROFILE % (H100, 1200))
    world.settle()
    assert asked(world) == [wish(1200)]
    world.objects[PowerProfile].clear()
    world.settle()
    assert asked(world) == [None]


def test_a_profile_of_another_product_asks_nothing(world):
    world.apply(PROFILE % ("NVIDIA H200", 1410))
    world.settle()
    assert asked(world) == [None]
