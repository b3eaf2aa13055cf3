"""More is tried with watts that nobody was sold: a knee above what people thought is found, and nobody else notices."""

from datetime import timedelta
from itertools import pairwise
from types import SimpleNamespace

import pytest
from tests.unit.controller.manifests import LLAMA_70B, factory, hall, model, profile, rack
from tests.unit.controller.small_agent import Agent
from tests.unit.controller.small_world import H100, SmallWorld
from tests.unit.controller.test_learning import Serving, live
from tests.unit.controller.test_trying import label_cap, tried
from tests.unit.planning.power.test_ledger import CHAT
from tests.unit.planning.power.test_tries import UNEVEN, Plant

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.controller.plan.trying import Try, _with_tries
from tokenfactory.planning.power.tries import MOST_PER_HOUR

THOUGHT = 450_000
"""Where the profile says that more watts bring nothing."""
TRULY = 560_000
POINTS = [(256, "200W", "20"), (256, "380W", "300"), (256, "450W", "400"), (256, "700W", "400")]
LOW_KNEE = profile("low", H100, *POINTS, gpusPerReplica=4)


class TwoKnees(Serving):
    """A quarter more tokens between the knee that is thought of and the second one."""

    def rate(self, cap: int) -> float:
        return super().rate(cap) * (0.8 + 0.2 * min(max((cap - THOUGHT) / (TRULY - THOUGHT), 0), 1))


def llama(replicas: int = 2):
    return model(
        image=LLAMA_70B,
        replicas=(replicas, replicas),
        powerProfile="low",
        slo={"interTokenLatency": "400ms", "timeToFirstToken": "1s"},
    )


def one_hall(limit: str = "9kW", meters: type[Serving] = TwoKnees, **spec) -> SmallWorld:
    admits = spec.pop("admits", None)
    exploring = factory(llama(), **{"learning": "Explore", **spec})
    world = SmallWorld.of(1, LOW_KNEE, hall(limit, reserve="0%", admits=admits), exploring)
    world.meters = meters(world)
    return world


def two_racks(limit: str) -> SmallWorld:
    world = SmallWorld()
    world.add_node("n0", rack="a")
    world.add_node("n1", rack="b")
    exploring = factory(llama(4), learning="Explore")
    world.apply(LOW_KNEE, hall(limit, reserve="0%"), rack("a", "9kW"), rack("b", "9kW"), exploring)
    world.meters = TwoKnees(world)
    return world


def upwards(world: SmallWorld) -> Try | None:
    return next((each for each in world.memory.tries.running.values() if each.upwards), None)


def until_up(world: SmallWorld) -> SmallWorld:
    for _ in range(400):
        live(world, 0.1)
        if upwards(world):
            return world
    raise AssertionError("nothing was tried upwards")


@pytest.fixture(scope="module")
def at_more() -> SmallWorld:
    world = until_up(one_hall())
    live(world, 0.5)
    assert upwards(world)
    return world


@pytest.fixture(scope="module")
def racks() -> list[tuple[SmallWorld, Try | None]]:
    """Two racks with watts to spare, at every look until the market has moved."""
    world, seen = two_racks("15kW"), []
    for _ in range(230):
        live(world, 0.1)
        assert not world.new_breaches()
        seen.append((world.fork(), upwards(world)))
    return seen


def test_a_knee_above_what_the_profile_says_is_found_and_used(racks):
    last = racks[-1][0]
    assert min(held.value for held in last.memory.caps.values()) > THOUGHT + 0.7 * (TRULY - THOUGHT)
    assert tried(last) <= MOST_PER_HOUR


def test_only_the_domain_that_is_tried_has_more_than_the_market_gives(racks):
    rose = 0
    for (before, ending), (world, running) in pairwise(racks):
        for letter, node in (("a", "n0"), ("b", "n1")):
            most = max(world.agents[node].limits().values())
            tries = [each.cap_milliwatts for each in (ending, running) if each and each.domain[-1] == letter]
            market = [held.value for held in (*before.memory.caps.values(), *world.memory.caps.values())]
            assert most <= max(*tries, *market, 0), "somebody else got more"
            rose += running is not None and most == running.cap_milliwatts > max(market)
    assert rose > 20


def test_a_try_upwards_is_told_of_and_explained(at_more: SmallWorld):
    running = upwards(at_more)
    assert label_cap(at_more) == running.cap_milliwatts > THOUGHT
    said = f"tried at {running.cap_milliwatts // 1000}W instead of {THOUGHT // 1000}W"
    assert any(reason == "CapTried" and said in words for reason, words in at_more.events)


def most_allowed(world: SmallWorld) -> int:
    sheets = [each.spec for each in world.objects[CapSheet].values() if each.spec.renewal is None]
    caps = [cap.cap for spec in sheets for cap in spec.caps if cap.class_name.startswith("inference/")]
    return max(caps, default=0)


def test_it_ends_at_once_when_a_limit_falls_a_node_dies_or_people_turn_it_off(at_more: SmallWorld):
    cut, off, broke, dead = (at_more.fork() for _ in range(4))
    cut.apply(hall("4.7kW", reserve="0%"))
    off.apply(factory(llama()))
    broke.apply(factory(llama(), learning="Explore", power={"domain": "hall", "budget": "3.6kW"}))
    dead.agents["n0"].alive = False
    dead.now += timedelta(seconds=60)
    for world in (cut, off, broke, dead):
        world.operate()
        assert not upwards(world)
        assert most_allowed(world) <= THOUGHT


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"power": {"domain": "hall", "budget": "3.7kW"}},
        {"admits": [{"namespaceSelector": {}, "budget": "3.7kW"}]},
        {"efficiency": {"tokensPerJoule": "0.1", "scope": "GPU"}},
    ],
    ids=["no watts", "its own budget is spent", "a grant is spent", "an efficiency target"],
)
def test_nothing_is_tried_upwards_where_its_watts_are_not_to_be_had(spec):
    world = one_hall(**spec)
    live(world, 1)
    if not spec:
        world.apply(hall("4.7kW", reserve="0%"))
    for _ in range(14):
        live(world, 1)
        assert not upwards(world)
    assert tried(world) >= 2, "but lower caps are"


def test_sheets_above_rise_only_once_those_beside_the_path_have_read_back_that_they_are_held():
    caps = {**UNEVEN, "rack-c": 300, "rack-d": 300}
    plant = Plant(caps, {})
    more = Try("rack-a", CHAT, 520_000, 0, upwards=True)

    def with_it():
        return _with_tries(SimpleNamespace(ledger=plant.ledger()), plant.targets, [more], at_once=False)

    for _ in range(2):
        said = {name: of[CHAT].cap // 1000 for name, of in with_it().items()}
        assert said == {**caps, "rack-b": 400}
        plant.publish(with_it())
    plant.acknowledge()
    said = {name: of[CHAT].cap // 1000 for name, of in with_it().items()}
    assert said == {**caps, "hall": 520, "row-1": 520, "rack-b": 400}


def test_where_the_profile_is_right_two_looks_are_enough():
    world = one_hall(meters=Serving)
    tries = set()
    for _ in range(24):
        live(world, 1)
        tries |= {upwards(world)}
    assert len(tries - {None}) <= 2
    assert label_cap(world) == pytest.approx(THOUGHT, rel=0.02)


def test_a_try_that_teaches_nothing_ends_with_its_time(at_more: SmallWorld):
    world = at_more.fork()
    world.meters = TwoKnees(world, queued=0)
    began = upwards(world)
    live(world, 5.5)
    assert upwards(world) is None
    assert most_allowed(world) == THOUGHT
    (lesson,) = world.memory.lessons.known.values()
    assert not lesson.state.knows(began.cap_milliwatts)


def test_a_cap_that_its_gpus_never_obey_is_not_tried_again_for_an_hour(
    at_more: SmallWorld, monkeypatch: pytest.MonkeyPatch
):
    """Somebody has limited them beside us: each further try would be two epochs for every agent, and teach nothing."""
    limits = Agent.limits
    monkeypatch.setattr(Agent, "limits", lambda self: {u: min(w, THOUGHT) for u, w in limits(self).items()})
    world = at_more.fork()
    began = upwards(world)
    live(world, 6)
    assert upwards(world) is None
    for _ in range(20):
        live(world, 1)
        assert upwards(world) is None or upwards(world).cap_milliwatts < began.cap_milliwatts
