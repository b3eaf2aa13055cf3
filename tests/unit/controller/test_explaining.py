"""Why a GPU's limit is what it is: what is in force comes first, and what the market wants only where that is the reason."""

import json
import re

import pytest
from msgspec.structs import replace
from tests.unit.controller.manifests import Manifest, factory, hall, model, rack
from tests.unit.controller.small_world import H100, OPTIONS, SmallWorld

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.cli.explain import Output, UnknownError, told
from tokenfactory.controller.compose import compose
from tokenfactory.controller.plan.books import Books
from tokenfactory.controller.plan.explaining import GpuExplained, explain_gpu
from tokenfactory.kube.objects import Node


def books(world: SmallWorld) -> Books:
    return compose(world.snapshot(), OPTIONS, world.memory).books


def explained(world: SmallWorld, node: str, index: int = 0) -> GpuExplained:
    made = books(world)
    host = made.world.hosts[node]
    assert host.held is not None
    return explain_gpu(made, host, host.held.status.gpus[index])


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


def test_an_idle_gpu_and_a_strangers_are_named(settled: SmallWorld):
    world = settled.fork()
    world.add_node("n1", gpus=2)
    world.rounds(6)
    assert "does not name its class yet" in explained(world, "n1").message
    assert "hall has no watts left" in explained(world, "n1").message
    world.apply(hall("9kW"))
    world.settle()
    assert "nothing runs on it" in explained(world, "n1").message
    made = books(world)
    host = made.world.hosts["n1"]
    assert host.held is not None
    strangers = replace(host.held.status.gpus[0], class_name=names.unmanaged_class(H100))
    assert "a pod that is not charged here" in explain_gpu(made, host, strangers).message


def test_nothing_is_said_to_bind_a_model_of_which_nothing_runs():
    world = SmallWorld.of(1, hall("9kW"), factory(model()))
    world.rounds(1)
    assert not world.ready_pods()
    assert bound_by(world) == ""
    world.settle()
    assert "nothing holds it back" in bound_by(world)


def test_the_command_tells_sheet_band_price_and_reason(settled: SmallWorld):
    text = told(books(settled), "n0", "0")
    assert "enforced  400W" in text
    assert "hall: 400W" in text
    assert "<- binds" in text
    assert "bound: Domain by hall, band 100, price" in text
    assert f"why       {explained(settled, 'n0').message}" in text
    assert text.count("GPU ") == 1
    assert told(books(settled), "n0").count("GPU ") == 4


def test_the_command_tells_programs_the_same(settled: SmallWorld):
    said = json.loads(told(books(settled), "n0", "n0-gpu-2", Output.json))
    (gpu,) = said["gpus"]
    assert (said["node"], said["path"], gpu["index"]) == ("n0", ["hall"], 2)
    assert gpu["enforcedMilliwatts"] == gpu["sheets"][0]["capMilliwatts"] == 400_000
    assert (gpu["sheets"][0]["binds"], gpu["market"]["boundBy"]) == (True, "hall")


@pytest.mark.parametrize(
    ("node", "gpu", "said"),
    [
        ("no", "", "there is no GPU node no; did you mean n0?"),
        ("n0", "9", "n0 has no GPU 9; it has 0 (n0-gpu-0), 1"),
        ("away", "", "no power domain's nodeSelector matches its labels"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(settled: SmallWorld, node: str, gpu: str, said: str):
    world = settled.fork()
    held = world.objects[Node][("", "n0")]
    world.put(
        replace(held, metadata=replace(held.metadata, name="away", labels={"nvidia.com/gpu.present": "true"}))
    )
    with pytest.raises(UnknownError, match=re.escape(said)):
        told(books(world), node, gpu)
