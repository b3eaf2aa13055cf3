"""A clock that jumps hands out no watts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tokenfactory.planning.power.clock import BELIEVED_AFTER_MILLISECONDS, look

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize("hours", [3, -3])
def test_after_a_jump_the_time_without_it_counts_as_well_until_the_new_one_was_meant(hours: int) -> None:
    clock, other = look(None, NOON, 0)
    assert other == NOON
    jump = timedelta(hours=hours)
    for milliseconds in (1_000, 60_000, BELIEVED_AFTER_MILLISECONDS):
        passed = timedelta(milliseconds=milliseconds)
        clock, other = look(clock, NOON + passed + jump, milliseconds)
        assert other == NOON + passed
    later = 1_000 + BELIEVED_AFTER_MILLISECONDS
    meant = NOON + jump + timedelta(milliseconds=later)
    clock, other = look(clock, meant, later)
    assert other == meant
    assert clock.doubted_since is None


def test_a_second_jump_is_not_believed_for_the_first_ones_age() -> None:
    clock, _ = look(None, NOON, 0)
    clock, _ = look(clock, NOON + timedelta(seconds=21), 1_000)
    second = BELIEVED_AFTER_MILLISECONDS - 1_000
    clock, _ = look(clock, NOON + timedelta(hours=3, milliseconds=second), second)
    for milliseconds in (second + 5_000, second + BELIEVED_AFTER_MILLISECONDS - 1):
        passed = timedelta(milliseconds=milliseconds)
        clock, other = look(clock, NOON + timedelta(hours=3) + passed, milliseconds)
        assert other == NOON + passed
    milliseconds = second + BELIEVED_AFTER_MILLISECONDS
    meant = NOON + timedelta(hours=3, milliseconds=milliseconds)
    assert look(clock, meant, milliseconds)[1] == meant


def test_a_clock_that_is_corrected_while_it_runs_is_followed() -> None:
    clock, _ = look(None, NOON, 0)
    for second in range(1, 100):
        wall = NOON + timedelta(seconds=2 * second)
        clock, other = look(clock, wall, second * 1000)
        assert other == wall


def test_a_jump_that_is_taken_back_is_forgotten() -> None:
    clock, _ = look(None, NOON, 0)
    clock, _ = look(clock, NOON + timedelta(hours=1), 1_000)
    clock, other = look(clock, NOON + timedelta(seconds=2), 2_000)
    assert other == NOON + timedelta(seconds=2)
    assert clock.doubted_since is None
