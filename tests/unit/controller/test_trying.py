"""Caps are tried to learn a curve: the knee is found, nobody waits longer for it, and nothing else depends on it."""

from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest
from tests.unit.controller.manifests import LLAMA_70B, factory, hall, model
from tests.unit.controller.small_world import Agent, SmallWorld
from tests.unit.controller.test_learning import Serving, known, live

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.plan.trying import Tries
from tokenfactory.planning.power.tries import MOST_PER_HOUR

KNEE = 450_000
FLOOR_SHARE = 0.5
"""Of the tokens: with fewer, a token takes longer than half of the SLO (see `Serving`: 32 ms at full speed)."""
LLAMA = model(image=LLAMA_70B, replicas=(2, 2), slo={"interTokenLatency": "128ms", "timeToFirstToken": "1s"})


def exploring(learning: str = "Explore", limit: str = "9kW") -> SmallWorld:
    world = SmallWorld.of(1, hall(limit, reserve="0%"), factory(LLAMA, learning=learning))
    world.meters = Serving(world)
    return world


def label_cap(world: SmallWorld) -> int:
    (sheet,) = (each for each in world.objects[CapSheet].values() if each.spec.renewal is None)
    return next(cap.cap for cap in sheet.spec.caps if cap.class_name.startswith("inference/"))


def model_of(world: SmallWorld):
    (found,) = world.objects[TokenFactory].values()
    return found.status.models[0]


def tried(world: SmallWorld) -> int:
    return sum(reason == "CapTried" for reason, _ in world.events)


@pytest.fixture(scope="module")
def explored() -> SmallWorld:
    """Full replicas whose caps no limit ever moves, for half an hour."""
    world = exploring()
    hidden = Serving(world)
    for _ in range(28):
        live(world, 1)
        lowest = min(world.agents["n0"].limits().values())
        assert hidden.rate(lowest) >= FLOOR_SHARE * hidden.rate(700_000), "a latency came near its SLO"
        assert not world.new_breaches()
    return world


def test_the_knee_is_found_within_thirty_tries_and_no_floor_is_crossed(explored: SmallWorld):
    (lesson,) = explored.memory.lessons.known.values()
    hull = lesson.state.hull()
    assert hull.milliwatts[hull.knee] == pytest.approx(KNEE, rel=0.06)
    assert 5 <= tried(explored) <= 30
    assert float(known(explored).status.confidence) >= 0.5


def test_what_was_learned_moves_the_market_to_the_knee_and_there_it_rests(explored: SmallWorld):
    assert label_cap(explored) == pytest.approx(KNEE, rel=0.02)
    world = explored.fork()
    before, events = len(world.writes), tried(world)
    live(world, 8)
    assert tried(world) == events
    assert [each for each in world.writes[before:] if isinstance(each, act.PublishSheet)] == []


def test_tries_cost_at_most_two_epochs_each(explored: SmallWorld):
    sheets = [each for each in explored.writes if isinstance(each, act.PublishSheet)]
    still = exploring("Observe")
    live(still, 8)
    settled = [each for each in still.writes if isinstance(each, act.PublishSheet)]
    assert tried(still) == 0
    assert len(sheets) <= len(settled) + 2 * tried(explored) + 2


@pytest.fixture(scope="module")
def at_a_try() -> SmallWorld:
    world = exploring()
    for _ in range(200):
        live(world, 0.1)
        if world.memory.tries.running:
            world.rounds(2)
            return world
    raise AssertionError("nothing was tried")


def test_a_try_is_told_of(at_a_try: SmallWorld):
    (running,) = at_a_try.memory.tries.running.values()
    assert label_cap(at_a_try) == running.cap_milliwatts
    assert f"tried at {running.cap_milliwatts // 1000}W in hall" in model_of(at_a_try).bound_by
    assert any(reason == "CapTried" and "hall is tried at" in said for reason, said in at_a_try.events)


def test_a_try_ends_at_once_when_a_limit_falls_a_node_dies_or_people_turn_it_off(at_a_try: SmallWorld):
    cut = at_a_try.fork()
    cut.apply(hall("2.2kW", reserve="0%"))
    off = at_a_try.fork()
    off.apply(factory(LLAMA))
    dead = at_a_try.fork()
    dead.agents["n0"].alive = False
    dead.now += timedelta(seconds=60)
    for world in (cut, off, dead):
        world.rounds(3)
        assert not world.memory.tries.running


@pytest.mark.parametrize(
    "late",
    [{"time_to_first_token_ms": 560}, {"inter_token_latency_us": 90_000}],
    ids=["first token", "others"],
)
def test_nothing_is_tried_while_a_latency_comes_near_its_slo(at_a_try: SmallWorld, late: dict[str, int]):
    world = at_a_try.fork()

    class Slow(Serving):
        def __call__(self, agent: Agent, holding):
            found = super().__call__(agent, holding)
            return tuple(msgspec.structs.replace(each, **late) for each in found)

    slow = Slow(world)
    slow.tokens = dict(world.meters.tokens)
    world.meters = slow
    live(world, 5)
    assert not world.memory.tries.running
    before = tried(world)
    live(world, 10)
    assert tried(world) == before


def test_a_restarted_operator_ends_the_try_and_goes_on_from_what_is_written(
    explored: SmallWorld, at_a_try: SmallWorld
):
    world = at_a_try.fork()
    world.crash()
    world.rounds(8)
    assert label_cap(world) > next(iter(at_a_try.memory.tries.running.values())).cap_milliwatts
    again = explored.fork()
    count = tried(again)
    again.term += 1
    again.memory = Memory()
    live(again, 8)
    assert tried(again) <= count + 3


def test_no_more_is_tried_in_an_hour_than_is_allowed(at_a_try: SmallWorld):
    world = at_a_try.fork()
    (owner,) = world.memory.tries.running
    begun = (world.milliseconds - 57 * 60_000,) * MOST_PER_HOUR
    world.memory = replace(world.memory, tries=Tries({}, {owner: begun}))
    before = tried(world)
    live(world, 2)
    assert tried(world) == before
    live(world, 4)
    assert tried(world) > before


def test_nothing_is_tried_where_a_latency_takes_more_than_half_of_its_slo():
    """32 ms of 60 at full speed: within the SLO, and too near it to be tried with less."""
    near = model(
        image=LLAMA_70B, replicas=(2, 2), slo={"interTokenLatency": "60ms", "timeToFirstToken": "1s"}
    )
    world = SmallWorld.of(1, hall("9kW", reserve="0%"), factory(near, learning="Explore"))
    world.meters = Serving(world)
    live(world, 6)
    assert model_of(world).ready == 2
    assert not world.memory.tries.running
    assert tried(world) == 0
