"""What nobody has seen yet hands out no watts: a node whose taint is new, and a clock that was set."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import msgspec
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power.sheets import caps_of


def hall_with_a_window(start: str) -> Manifest:
    window = {"name": "noon", "start": start, "end": "14:00", "limit": "50%"}
    return hall("12kW", timetable=[window])


def a_world() -> SmallWorld:
    world = SmallWorld.of(1, hall_with_a_window("12:00"))
    world.apply(factory(model(image="llama-70b", band=100, replicas=(2, 2))))
    world.settle()
    return world


def test_a_taint_is_worth_nothing_before_the_agent_has_capped_the_node_once() -> None:
    """A stranger that was being bound when the taint landed would start at the default limit."""
    world = a_world()
    node = world.objects[GPUNode]["", "n0"]
    gpus = tuple(
        msgspec.structs.replace(gpu, pod="", pod_uid="", enforced_milliwatts=700_000)
        for gpu in node.status.gpus
    )

    def charge(**status) -> int:
        spec = msgspec.structs.replace(node.spec, pods=())
        told = msgspec.structs.replace(node.status, gpus=gpus, **status)
        world.put(msgspec.structs.replace(node, spec=spec, status=told))
        return world.plan().books.ledger.node_charge("n0")

    assert charge(capped=False, applied=()) == 1_000_000 + 8 * 700_000
    # After a reboot nothing starts before caps are read back, so what stood before still bounds it.
    assert charge(capped=False, boot_id="boot-2") < 1_000_000 + 8 * 700_000


def test_a_clock_that_is_set_ends_no_window_of_a_timetable() -> None:
    world = a_world()
    assert world.plan().books.grid.limit("hall") == 6_000_000
    before = caps_of(world.objects[CapSheet]["", "hall"].spec)
    for _ in range(10):
        snapshot = world.snapshot()
        composed = world.plan_of(replace(snapshot, wall=snapshot.wall + timedelta(hours=3)))
        world.memory = composed.memory
        for action in composed.plan.actions:
            world.take(action)
        world.others()
        assert composed.books.grid.limit("hall") == 6_000_000
    after = caps_of(world.objects[CapSheet]["", "hall"].spec)
    assert all(after[name] <= cap for name, cap in before.items())
    later = world.snapshot()
    meant = replace(
        later,
        wall=later.wall + timedelta(hours=3, minutes=10),
        milliseconds=later.milliseconds + 600_000,
    )
    assert world.plan_of(meant).books.grid.limit("hall") == 12_000_000


def test_a_window_that_begins_by_the_doubted_time_is_looked_at_when_it_does() -> None:
    world = a_world()
    world.apply(hall_with_a_window("13:00"))
    world.now = world.now.replace(hour=12, minute=59)
    world.others()
    world.memory = world.plan().memory
    world.now = world.now.replace(minute=59, second=52)
    jumped = replace(world.snapshot(), wall=world.now + timedelta(hours=6))
    composed = world.plan_of(jumped)
    assert composed.books.grid.limit("hall") == 12_000_000
    assert composed.plan.again_after_seconds <= 8
