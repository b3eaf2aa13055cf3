"""How many replicas: the fewest that keep the SLO, without flapping, and never from silence."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenfactory.planning.efficiency.operating_point import Goals, latency_of
from tokenfactory.planning.efficiency.replicas import (
    FILL_DOWN,
    FILL_UP,
    Decision,
    Memory,
    Tuning,
    decide_replicas,
)
from tokenfactory.planning.efficiency.traffic import ReplicaMeter, Traffic
from tokenfactory.planning.power.profile import Point

SECOND = 1_000
# 100 requests at once give 1,000 tokens/s and 40 ms; beyond that the SLO of 50 ms (45 with its margin) is missed.
POINTS = (
    Point(400_000, 100.0, 8, 10.0),
    Point(400_000, 500.0, 50, 20.0),
    Point(400_000, 1_000.0, 100, 40.0),
    Point(700_000, 1_020.0, 100, 40.0),
    Point(700_000, 1_300.0, 200, 90.0),
)
GOALS = Goals(1, 20, None, 50.0)
TUNING = Tuning()


def serving(
    tokens_per_second: float,
    replicas: int,
    *,
    latency: float | None = None,
    first: float | None = None,
    waiting: int = 0,
) -> Traffic:
    """A load shared evenly by replicas that keep up with it."""
    each = tokens_per_second / replicas
    if latency is None:
        latency = latency_of(POINTS, each / 10)
    meter = ReplicaMeter(int(each / 10), waiting, 300, first, latency, each)
    return Traffic(meters=(meter,) * replicas, ready=replicas)


def run(loads: list[float], goals: Goals = GOALS, start: int = 1, every: int = 15) -> list[Decision]:
    """One decision per interval; replicas are there as soon as they are asked for."""
    memory, ready, told = Memory(), start, []
    for step, load in enumerate(loads):
        traffic = serving(load, ready) if ready else Traffic(at_the_door=int(load > 0))
        decision = decide_replicas(goals, POINTS, traffic, memory, step * every * SECOND, TUNING)
        memory, ready = decision.memory, decision.replicas
        told.append(decision)
    return told


def test_as_few_as_carry_the_load_and_no_fewer() -> None:
    """Ten replicas at 2,500 tokens/s: three are filled too far for a removal, four are the fewest that stay."""
    told = run([2_500.0] * 200, start=10)
    assert told[-1].replicas == 4
    assert 2_500 / 4_000 < FILL_DOWN < 2_500 / 3_000


def test_a_rise_is_met_at_once_and_a_fall_only_after_the_window() -> None:
    told = run([1_000.0] * 40 + [3_600.0] * 40 + [1_000.0] * 60, start=2)
    sizes = [d.replicas for d in told]
    assert sizes[39] == 2
    assert max(sizes[40:44]) >= 4
    assert min(sizes[80 : 80 + TUNING.window_milliseconds // (15 * SECOND)]) >= 4
    assert sizes[-1] == 2


def test_taken_away_a_few_at_a_time() -> None:
    sizes = [d.replicas for d in run([500.0] * 300, start=20)]
    assert all(a - b <= max(1, a // 5) for a, b in pairwise(sizes))
    assert sizes[-1] == 1


@settings(max_examples=15, deadline=None)
@given(
    load=st.floats(200, 15_000),
    noise=st.lists(st.floats(0.92, 1.08), min_size=120, max_size=120),
    start=st.integers(1, 20),
)
def test_noise_never_makes_it_flap(load: float, noise: list[float], start: int) -> None:
    """Under noise that is smaller than the gap between the two fill marks nothing that was taken away comes back."""
    told = run([load * n for n in noise * 3], start=start)
    sizes = [d.replicas for d in told]
    rises_after_a_fall = 0
    fell = False
    for before, after in pairwise(sizes):
        rises_after_a_fall += fell and after > before
        fell = fell or after < before
    assert rises_after_a_fall == 0
    assert len(set(sizes[-60:])) == 1


NOISES = {
    "a quarter either way": lambda rng: rng.uniform(0.75, 1.25),
    "long-tailed": lambda rng: rng.lognormvariate(0, 0.3),
    "spikes": lambda rng: 3.0 if rng.random() < 0.02 else 1.0,
    "on and off": lambda rng: rng.choice((0.6, 1.4)),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("load", [900.0, 7_000.0])
def test_heavier_noise_than_the_marks_allow_for_makes_it_patient(noise: str, load: float) -> None:
    """White noise, anew each 15 s: after an hour's learning at most a dozen changes an hour, whatever it is like.

    Without patience it is 26 to 49.
    """
    rng = Random(7)
    told = run([load * NOISES[noise](rng) for _ in range(480)], start=10)
    sizes = [d.replicas for d in told[240:]]
    assert sum(a != b for a, b in pairwise(sizes)) <= 12


def test_patience_is_forgotten_when_it_is_calm() -> None:
    rng = Random(7)
    noisy = [2_500 * rng.choice((0.6, 1.4)) for _ in range(240)]
    told = run([*noisy, *[2_500.0] * (240 * 5)], start=10)
    assert told[239].memory.patience == 16
    assert told[-1].memory.patience == 1
    assert told[-1].replicas == 4


@settings(max_examples=40, deadline=None)
@given(
    loads=st.lists(st.floats(0, 40_000), min_size=1, max_size=60),
    least=st.integers(0, 5),
    more=st.integers(0, 10),
    start=st.integers(0, 20),
)
@example(loads=[1.0, 0.0, 0.0, 0.0, 3139.0, 5e-324], least=0, more=0, start=0)
def test_always_within_what_the_user_allows(loads: list[float], least: int, more: int, start: int) -> None:
    goals = Goals(least, max(least + more, 1), None, 50.0)
    for decision in run(loads, goals, start):
        assert goals.min_replicas <= decision.replicas <= goals.max_replicas
        assert decision.reason
        assert decision.message


def test_never_taken_away_while_starting_ones_are_pending() -> None:
    memory = Memory()
    for step in range(30):
        traffic = replace(serving(100.0, 3), pending=2)
        decision = decide_replicas(GOALS, POINTS, traffic, memory, step * 15 * SECOND, TUNING)
        memory = decision.memory
        assert decision.replicas == 5


def test_replicas_that_never_start_are_not_asked_for_for_ever() -> None:
    """No watts for the other two: what runs is enough, so the wish is given up; when it is not, it stays."""

    def after(tokens_per_second: float) -> int | None:
        memory = Memory()
        for step in range(60):
            traffic = replace(serving(tokens_per_second, 3), pending=2)
            memory = decide_replicas(GOALS, POINTS, traffic, memory, step * 15 * SECOND, TUNING).memory
        return memory.desired

    assert (after(100.0) or 0) <= 3
    assert after(3_500.0) == 5


def test_a_backlog_while_more_are_starting_asks_for_no_more() -> None:
    busy = serving(1_000.0, 1, waiting=400)
    first = decide_replicas(GOALS, POINTS, busy, Memory(), 0, TUNING)
    assert first.replicas >= 5
    starting = replace(busy, pending=first.replicas - 1)
    again = decide_replicas(GOALS, POINTS, starting, first.memory, 15 * SECOND, TUNING)
    assert again.replicas == first.replicas


def test_silent_agents_change_nothing() -> None:
    told = run([2_500.0] * 40, start=4)
    dark = Traffic(meters=(), ready=4)
    for step in range(40, 120):
        decision = decide_replicas(GOALS, POINTS, dark, told[-1].memory, step * 15 * SECOND, TUNING)
        assert (decision.replicas, decision.reason) == (4, "TrafficUnknown")


def test_replicas_nobody_reports_of_are_taken_for_like_the_others() -> None:
    half = Traffic(meters=(ReplicaMeter(80, 0, 300, None, 30.0, 800.0),) * 2, ready=4)
    decision = decide_replicas(GOALS, POINTS, half, Memory(), 0, TUNING)
    assert half.tokens_per_second == 3_200
    assert decision.replicas == 4


def test_a_latency_beyond_its_slo_adds_replicas_whatever_the_profile_says() -> None:
    goals = replace(GOALS, first_token_milliseconds=500.0)
    memory, decision = Memory(desired=4, ready=4, at_milliseconds=0, load=1_000.0, since=0), None
    for step in range(1, 8):
        late = serving(1_000.0, 4, first=650.0)
        decision = decide_replicas(goals, POINTS, late, memory, step * 15 * SECOND, TUNING)
        memory = decision.memory
    assert decision is not None
    assert decision.replicas > 4


def test_nothing_is_taken_away_while_a_latency_is_near_its_slo() -> None:
    goals = replace(GOALS, first_token_milliseconds=500.0)
    memory = Memory()
    for step in range(100):
        near = serving(400.0, 4, first=330.0)
        decision = decide_replicas(goals, POINTS, near, memory, step * 15 * SECOND, TUNING)
        memory = decision.memory
    assert memory.desired == 4


def test_tokens_that_take_longer_than_the_profile_says_need_more_replicas() -> None:
    def settled(latency: float | None) -> int:
        memory = Memory()
        for step in range(60):
            traffic = serving(3_000.0, 5, latency=latency)
            memory = decide_replicas(GOALS, POINTS, traffic, memory, step * 15 * SECOND, TUNING).memory
        return memory.desired or 0

    assert settled(None) < settled(40.0)


def test_prompts_that_grow_are_met_ahead_though_answers_shrink() -> None:
    """Latency is still well within the SLO, but it will not be by the time a new replica serves."""
    goals = replace(GOALS, first_token_milliseconds=500.0)

    def after(rising: float) -> int:
        memory = Memory()
        for step in range(30):
            meter = ReplicaMeter(40, 0, 300, 320.0, 20.0, 300.0 - step, 1_000.0 * (1 + rising * step))
            traffic = Traffic(meters=(meter,) * 4, ready=4)
            memory = decide_replicas(goals, POINTS, traffic, memory, step * 15 * SECOND, TUNING).memory
        return memory.desired or 0

    assert after(0.0) == 4
    assert after(0.03) > 4


def test_a_full_cache_needs_more_replicas() -> None:
    meter = ReplicaMeter(90, 0, 990, None, 30.0, 900.0)
    full = Traffic(meters=(meter,) * 4, ready=4)
    room = Traffic(meters=(replace(meter, cache_permille=500),) * 4, ready=4)
    assert decide_replicas(GOALS, POINTS, full, Memory(), 0, TUNING).replicas > 4
    assert decide_replicas(GOALS, POINTS, room, Memory(), 0, TUNING).replicas == 4


ZERO = Goals(0, 4, None, 50.0)


def test_sleeps_without_traffic_and_wakes_for_the_first_request() -> None:
    memory = Memory()
    quiet = Traffic(meters=(ReplicaMeter(),), ready=1)
    slept_at = None
    for step in range(100):
        now = step * 15 * SECOND
        decision = decide_replicas(ZERO, POINTS, quiet, memory, now, TUNING)
        memory = decision.memory
        if decision.replicas == 0:
            slept_at = now
            break
    assert slept_at == TUNING.idle_milliseconds
    asleep = decide_replicas(ZERO, POINTS, Traffic(), memory, slept_at + SECOND, TUNING)
    assert (asleep.replicas, asleep.reason) == (0, "NoTraffic")
    woken = decide_replicas(
        ZERO, POINTS, Traffic(at_the_door=1), asleep.memory, slept_at + 2 * SECOND, TUNING
    )
    assert (woken.replicas, woken.reason) == (1, "Woken")
    starting = decide_replicas(ZERO, POINTS, Traffic(pending=1, at_the_door=3), woken.memory, 10**6, TUNING)
    assert (starting.replicas, starting.reason) == (1, "Starting")


def test_min_one_never_sleeps() -> None:
    memory = Memory()
    for step in range(200):
        quiet = Traffic(meters=(ReplicaMeter(),), ready=1)
        decision = decide_replicas(GOALS, POINTS, quiet, memory, step * 15 * SECOND, TUNING)
        memory = decision.memory
        assert decision.replicas == 1


def test_a_lost_memory_takes_nothing_away_before_a_window_was_seen() -> None:
    told = run([100.0] * (TUNING.window_milliseconds // (15 * SECOND)), start=8)
    assert {d.replicas for d in told} == {8}


def test_more_than_allowed_is_told() -> None:
    told = run([30_000.0] * 3, start=20)[-1]
    assert (told.replicas, told.reason) == (20, "AtMaximum")
    assert "the most allowed is 20" in told.message


@pytest.mark.parametrize("tokens", [0.0, 50.0, 5_000.0])
def test_without_a_profile_it_still_decides(tokens: float) -> None:
    memory = Memory()
    for step in range(60):
        decision = decide_replicas(GOALS, (), serving(tokens, 4), memory, step * 15 * SECOND, TUNING)
        memory = decision.memory
        assert 1 <= decision.replicas <= 20
        assert decision.point is None


def test_fill_marks_leave_a_gap() -> None:
    assert FILL_DOWN * 1.08 / 0.92 < FILL_UP


def test_what_a_token_takes_in_an_empty_replica_too_holds_none() -> None:
    """Two replicas at 14 ms each, of which 10 ms are there at any load: one at 20 ms is well within 50 ms."""
    assert run([500.0] * 60, start=2)[-1].replicas == 1


def test_it_says_whether_latency_holds_its_replicas() -> None:
    goals = replace(GOALS, first_token_milliseconds=500.0)

    def settled(first: float) -> Decision:
        memory = Memory()
        for step in range(30):
            traffic = serving(400.0, 4, first=first)
            decision = decide_replicas(goals, POINTS, traffic, memory, step * 15 * SECOND, TUNING)
            memory = replace(decision.memory, desired=4)
        return decision

    assert settled(290.0).held_by_latency
    assert not settled(50.0).held_by_latency
