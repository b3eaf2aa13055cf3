"""Caps at the knee, and above it while a latency is in danger."""

import itertools

from tests.unit.planning.efficiency.test_operating_point import CURVE

from tokenfactory.planning.efficiency.caps import DROP_AT, LIFT_AT, choose_cap, is_lifted
from tokenfactory.planning.efficiency.operating_point import Goals
from tokenfactory.planning.efficiency.replicas import Memory, decide_replicas
from tokenfactory.planning.efficiency.traffic import ReplicaMeter, Traffic

GOALS = Goals(1, 4, 1_000.0, 50.0)


def test_the_knee_while_all_is_well_and_nearly_everything_when_not() -> None:
    assert choose_cap(CURVE, GOALS, lifted=False) == 400_000
    assert choose_cap(CURVE, GOALS, lifted=True) == 630_000
    assert choose_cap((), GOALS, lifted=True) == 0
    assert choose_cap((), GOALS, lifted=False) == 0


def test_lifted_and_dropped_at_different_marks() -> None:
    between = (LIFT_AT + DROP_AT) / 2
    assert not is_lifted(between, lifted=False)
    assert is_lifted(between, lifted=True)
    assert is_lifted(LIFT_AT + 0.01, lifted=False)
    assert not is_lifted(DROP_AT - 0.01, lifted=True)


def test_a_late_first_token_lifts_the_caps_until_it_is_well_again() -> None:
    memory, caps = Memory(), []
    for step, first in enumerate([300.0] * 10 + [950.0] * 10 + [300.0] * 20):
        meter = ReplicaMeter(32, 0, 300, first, 20.0, 300.0)
        traffic = Traffic(meters=(meter,) * 2, ready=2)
        decision = decide_replicas(GOALS, CURVE, traffic, memory, step * 15_000)
        memory = decision.memory
        caps.append(decision.cap_milliwatts)
    assert set(caps[:10]) == {400_000}
    assert set(caps[14:20]) == {630_000}
    assert caps[-1] == 400_000
    assert sum(a != b for a, b in itertools.pairwise(caps)) == 2
