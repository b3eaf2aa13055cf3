"""What a node is charged besides its GPUs: a person's word, a measurement, or the worst that is known."""

import pytest
from tests.unit.controller.manifests import hall
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power import catalogue

SAID, WORST = 1_000_000, catalogue.overhead(H100, 8).milliwatts


def charged(world: SmallWorld) -> int:
    return world.objects[GPUNode]["", "n0"].spec.overhead_milliwatts


def measure(world: SmallWorld, milliwatts: int, *, proven: bool = True) -> None:
    """The node's agent reports it from now on."""
    world.agents["n0"].overhead_milliwatts = milliwatts
    world.agents["n0"].overhead_proven = proven
    world.settle()


def site(said: str | None = None) -> SmallWorld:
    """What a person says of the overhead; None: nothing."""
    world = SmallWorld.of(1, hall("60kW", nodeOverhead=said))
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
    world = site("1kW")
    assert charged(world) == SAID
    measure(world, measured)
    assert charged(world) == charge


def test_what_was_told_early_saves_nothing_once_no_person_says_anything_any_more():
    world = site("1kW")
    measure(world, 1_400_000, proven=False)
    assert charged(world) == 1_400_000
    world.apply(hall("60kW", nodeOverhead=None))
    world.settle()
    assert charged(world) == WORST
    measure(world, 1_400_000)
    assert charged(world) == max(1_400_000, WORST // 2)


def test_a_node_that_turns_out_to_draw_more_pushes_the_caps_down_and_no_limit_is_passed():
    world = site("1kW")
    world.apply(hall("6kW"))
    world.settle()
    before = world.objects[GPUNode]["", "n0"].status.gpus[0].enforced_milliwatts
    measure(world, 3_000_000)
    node = world.objects[GPUNode]["", "n0"]
    total = node.spec.overhead_milliwatts + sum(gpu.enforced_milliwatts for gpu in node.status.gpus)
    assert total <= 6_000_000
    assert node.status.gpus[0].enforced_milliwatts <= before
    assert not world.new_breaches()
