"""The seeded slice of the fault search, and every deliberate bug that it must find."""

from __future__ import annotations

import pytest
from tests.fault import surges
from tests.fault.bugs import BUGS
from tests.fault.parts import Kit, Violation
from tests.fault.rest import Score
from tests.fault.search import episode, search

pytestmark = pytest.mark.slow

SEEDS = {
    "skip read-back": 5_000_000,
    "drop fencing": 5_000_000,
    "ignore hold": 5_000_000,
    "credit an expired hold": 5_000_000,
    "raise before lower": 5_000_000,
    "trust a cap across a reboot": 5_000_060,
    "skip the claim": 5_000_000,
    "forget the former path": 5_000_120,
    "collect a pod before the agent said so": 5_000_590,
    "believe who acknowledged nothing": 5_000_020,
}
"""Where to begin so that a test takes seconds; from 5,000,000 on, all are found within 600 episodes."""


def test_p1_to_p6_hold_after_every_step_and_every_history_comes_to_rest() -> None:
    score = search(seed=4, steps=30_000)
    assert score.steps >= 30_000
    for what in ("new_leader", "reboots", "agent_dies", "duplicate", "lose", "watch_breaks", "driver_fails"):
        assert score.moves[what] > 0, f"the search never came to {what}"


@pytest.mark.parametrize("bug", SEEDS)
def test_the_search_finds_a_deliberate_bug(bug: str) -> None:
    with pytest.raises(Violation):
        _forty_episodes(bug)


def _forty_episodes(bug: str) -> None:
    for number in range(40):
        episode(SEEDS[bug] + number, BUGS[bug], Score(), to_rest=False)


def test_the_same_histories_are_fine_without_the_bugs() -> None:
    for first in SEEDS.values():
        for number in range(3):
            episode(first + number, Kit(), Score())


SURGES = {
    "ignore the brake": 729,
    "count the silent by their last draw": 702,
    "oversubscribe whatever hold is": 715,
}
"""A history of a statistical domain that brings each bug to light. Since reports tell a minute's peak, believing old ones
and looking at the moment alone need rarer histories: these are written out below."""


def test_the_draw_of_a_statistical_domain_passes_its_limit_only_as_its_breaker_bears() -> None:
    score = Score()
    for seed in range(5):
        surges.episode(seed, Kit(), score)
    for what in (*surges.MOVES, *surges.FAULTS):
        assert score.moves[what.__name__] > 0, f"the search never came to {what.__name__}"


@pytest.mark.parametrize("bug", SURGES)
def test_the_search_finds_a_bug_in_oversubscription(bug: str) -> None:
    with pytest.raises(Violation, match="P1: r1 draws"):
        surges.episode(SURGES[bug], BUGS[bug], Score())
    surges.episode(SURGES[bug], Kit(), Score())


def test_a_surge_of_which_no_report_tells_ends_before_the_breaker_trips() -> None:
    """Whenever the operator looks next."""
    for second in range(5):
        surges.a_surge_that_nobody_tells(Kit(), second)
    with pytest.raises(Violation, match="P1: r1 draws"):
        surges.a_surge_that_nobody_tells(BUGS["believe an old report"], 0)


def test_a_load_that_is_low_whenever_a_report_is_due_is_seen_all_the_same() -> None:
    surges.a_load_that_hides_from_reports(Kit())
    with pytest.raises(Violation, match="P1: r1 draws"):
        surges.a_load_that_hides_from_reports(BUGS["believe the moment of a report alone"])
