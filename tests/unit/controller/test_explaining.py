"""Why a GPU's limit is what it is: what is in force comes first, and what the market wants only where that is the reason."""

import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model, rack
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.compose import compose
from tokenfactory.controller.plan.explaining import GpuExplained, explain_gpu


def explained(world: SmallWorld, node: str, index: int = 0) -> GpuExplained:
    books = compose(world.snapshot(), OPTIONS, world.memory).books
    host = books.world.hosts[node]
    assert host.held is not None
    return explain_gpu(books, host, host.held.status.gpus[index])


def bound_by(world: SmallWorld) -> str:
    (found,) = world.objects[TokenFactory].values()
    return found.status.models[0].bound_by


def site(*manifests: Manifest) -> SmallWorld:
    world = SmallWorld()
    world.add_node("n0", gpus=4, rack="a")
    world.apply(hall("9kW", reserve="0%"), factory(model()))
    world.settle()
    world.apply(*manifests)
    world.settle()
    return world


@pytest.fixture(scope="module")
def settled() -> SmallWorld:
    """One node in a hall of 2.6 kW: four GPUs of a model, at less than they could use."""
    return site(hall("2.6kW", reserve="0%"))


def test_the_sheet_that_binds_and_the_price_are_named(settled: SmallWorld):
    found = explained(settled, "n0")
    assert (found.enforced_milliwatts, found.class_name) == (
        400_000,
        "inference/chat/llama@NVIDIA H100 80GB HBM3",
    )
    (sheet,) = found.sheets
    assert (sheet.domain, sheet.cap_milliwatts, sheet.binds) == ("hall", 400_000, True)
    assert sheet.epoch == sheet.acknowledged
    assert found.market is not None
    assert (found.market.bound, found.market.bound_by, found.market.band) == ("Domain", "hall", 100)
    assert found.message == found.market.message == bound_by(settled)


def test_of_two_domains_the_lower_sheet_binds():
    world = site(rack("a", "2.6kW", nodeOverhead="1kW", reserve="0%"))
    assert [(sheet.domain, sheet.binds) for sheet in explained(world, "n0").sheets] == [
        ("hall", False),
        ("rack-a", True),
    ]


def test_an_agent_that_is_behind_is_named_and_not_the_market(settled: SmallWorld):
    world = settled.fork()
    world.agents["n0"].reports = False
    world.apply(hall("2.2kW", reserve="0%"))
    world.rounds(3)
    found = explained(world, "n0")
    assert found.enforced_milliwatts == 400_000
    assert "the sheet of hall says 300W" in found.message
    assert f"acknowledged epoch {found.sheets[0].acknowledged}" in found.message
    assert found.sheets[0].acknowledged < found.sheets[0].epoch
    assert bound_by(world) == found.message


def test_a_raise_that_waits_says_so(settled: SmallWorld):
    world = settled.fork()
    world.apply(hall("3kW", reserve="0%"))
    world.rounds(1)
    assert "500W are meant for it" in explained(world, "n0").message


def test_a_silent_agent_is_named(settled: SmallWorld):
    world = settled.fork()
    world.agents["n0"].alive = False
    world.live(60)
    assert "the agent of n0 is silent: 400W" in explained(world, "n0").message


def test_a_class_that_the_sheet_does_not_name_has_its_minimum(settled: SmallWorld):
    world = settled.fork()
    for sheet in list(world.objects[CapSheet].values()):
        if sheet.spec.renewal is None:
            del world.objects[CapSheet][("", sheet.spec.domain)]
    assert "the sheet of hall does not name its class" in explained(world, "n0").message


def test_nothing_is_said_to_bind_a_model_of_which_nothing_runs():
    world = SmallWorld.of(1, hall("9kW"), factory(model()))
    world.rounds(1)
    assert not world.ready_pods()
    assert bound_by(world) == ""
    world.settle()
    assert "nothing holds it back" in bound_by(world)
