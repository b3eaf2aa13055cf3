"""A sheet has room for so many classes: a new one waits before that, and nobody else notices."""

import msgspec
import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.plan import classes


def ready(world: SmallWorld, name: str) -> tuple[str, str]:
    status = world.objects[TokenFactory]["inference", name].status
    (condition,) = [each for each in status.conditions if each.type == "Ready"]
    return status.ready, condition.reason


def wants(world: SmallWorld, name: str, count: int) -> None:
    world.apply(factory(model(gpus=1, replicas=(count, count)), name=name))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> SmallWorld:
    """Room for idle GPUs and two models."""
    monkeypatch.setattr(classes, "MOST_CLASSES", 3)
    world = SmallWorld.of(2, hall("60kW"))
    world.settle()
    return world


def test_a_class_too_many_waits_and_is_told_and_those_that_draw_go_on(world: SmallWorld):
    wants(world, "a", 1)
    wants(world, "b", 1)
    world.settle()
    sheet = world.objects[CapSheet]["", "hall"]
    wants(world, "c", 1)
    world.settle()
    assert ready(world, "c") == ("0/1", "TooManyClasses")
    told = [note for reason, note in world.events if reason == "TooManyClasses"]
    assert "the cap sheet of hall speaks of 3 classes" in told[0]
    assert {cap.class_name for cap in world.objects[CapSheet]["", "hall"].spec.caps} == {
        cap.class_name for cap in sheet.spec.caps
    }
    wants(world, "a", 3)
    world.settle()
    assert ready(world, "a") == ("3/3", "AllReady"), "more of a known class is no new one"
    assert ready(world, "b") == ("1/1", "AllReady")
    world.delete_factory("inference", "b")
    world.settle()
    assert ready(world, "c") == ("1/1", "AllReady"), "a class that nobody draws under any more makes room"


def test_of_many_that_come_at_once_as_many_get_in_as_there_is_room(world: SmallWorld):
    for name in "abcd":
        wants(world, name, 1)
    world.settle()
    assert sorted(ready(world, name) for name in "abcd") == [
        ("0/1", "TooManyClasses"),
        ("0/1", "TooManyClasses"),
        ("1/1", "AllReady"),
        ("1/1", "AllReady"),
    ]
    assert len(world.objects[Deployment]) == 4


def test_long_names_fill_a_sheet_sooner(world: SmallWorld, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(classes, "MOST_CLASSES", 3_500)
    wants(world, "a", 1)
    world.settle()
    caps = world.objects[CapSheet]["", "hall"].spec.caps
    monkeypatch.setattr(classes, "MOST_BYTES", sum(classes.class_bytes(cap.class_name) for cap in caps))
    wants(world, "b", 1)
    world.settle()
    assert ready(world, "b") == ("0/1", "TooManyClasses")
    assert msgspec.to_builtins(world.objects[CapSheet]["", "hall"].spec.caps) == msgspec.to_builtins(caps)
