"""What a node is charged besides its GPUs: a person's word, a measurement, or the worst that is known."""

import pytest
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power import catalogue

SAID, WORST = 1_000_000, catalogue.overhead(H100, 8).milliwatts
HALL = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerDomain
metadata: {name: hall}
spec: {limit: 60kW%s, nodeSelector: {matchLabels: {nvidia.com/gpu.present: "true"}}}
"""


def charged(world: SmallWorld) -> int:
    return world.objects[GPUNode]["", "a0"].spec.overhead_milliwatts


def measure(world: SmallWorld, milliwatts: int, *, proven: bool = True) -> None:
    """The node's agent reports it from now on."""
    world.agents["a0"].overhead_milliwatts = milliwatts
    world.agents["a0"].overhead_proven = proven
    world.settle()


def site(said: str = "") -> SmallWorld:
    world = SmallWorld()
    world.add_node("a0")
    world.apply(HALL % said)
    world.settle()
    return world


@pytest.mark.parametrize(
    ("measured", "charge"),
    [
        (0, WORST),
        (100_000, WORST // 2),
        (WORST // 2 + 25_000, WORST // 2 + 25_000),
        (WORST + 500_000, WORST + 500_000),
    ],
)
def test_a_measurement_saves_at_most_half_of_the_worst_case_and_costs_all_that_it_says(measured, charge):
    world = site()
    assert charged(world) == WORST
    measure(world, measured)
    assert charged(world) == charge


@pytest.mark.parametrize(("measured", "charge"), [(0, SAID), (400_000, SAID), (1_400_000, 1_400_000)])
def test_a_persons_word_stands_until_more_is_measured(measured, charge):
    world = site(", nodeOverhead: 1kW")
    assert charged(world) == SAID
    measure(world, measured)
    assert charged(world) == charge


def test_what_was_told_early_saves_nothing_once_no_person_says_anything_any_more():
    world = site(", nodeOverhead: 1kW")
    measure(world, 1_400_000, proven=False)
    assert charged(world) == 1_400_000
    world.apply(HALL % "")
    world.settle()
    assert charged(world) == WORST
    measure(world, 1_400_000)
    assert charged(world) == max(1_400_000, WORST // 2)


def test_a_node_that_turns_out_to_draw_more_pushes_the_caps_down_and_no_limit_is_passed():
    world = site(", nodeOverhead: 1kW")
    hall = HALL.replace("60kW", "6kW") % ", nodeOverhead: 1kW"
    world.apply(hall)
    world.settle()
    before = world.objects[GPUNode]["", "a0"].status.gpus[0].enforced_milliwatts
    measure(world, 3_000_000)
    node = world.objects[GPUNode]["", "a0"]
    total = node.spec.overhead_milliwatts + sum(gpu.enforced_milliwatts for gpu in node.status.gpus)
    assert total <= 6_000_000
    assert node.status.gpus[0].enforced_milliwatts <= before
    assert not world.new_breaches()
