"""Oversubscription goes as far as measurements and the breaker allow, and not at all when in doubt."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tokenfactory.planning.power.oversubscription import Breaker, Sample, brakes, ceiling

BREAKER = Breaker(1_000_000, ((125, 30_000), (150, 10_000)), 20_000)
HALF = [Sample(500, 1000)] * 990 + [Sample(800, 1000)] * 10


def allowed(samples=HALF, percentile="99.9", breaker=BREAKER, silent=0, braking=False) -> int:
    return ceiling(breaker, samples, Decimal(percentile), silent_milliwatts=silent, braking=braking)


def test_the_percentile_says_how_much_of_the_charge_is_drawn() -> None:
    assert allowed(percentile="99.9") == 1_250_000
    assert allowed(percentile="99") == 1_250_000  # 2 MW by the measurements, but the breaker bears 125 %
    assert allowed([Sample(900, 1000)] * 1000) == 1_111_111


def test_a_silent_node_counts_in_full() -> None:
    assert allowed([Sample(900, 1000)] * 1000, silent=550_000) == 550_000 + 500_000


@pytest.mark.parametrize(
    "case",
    [
        {"samples": HALF[:999]},
        {"braking": True},
        {"breaker": Breaker(1_000_000, ((125, 30_000),), 25_000)},
        {"breaker": Breaker(1_000_000, (), 0)},
        {"samples": [Sample(1200, 1000)] * 1000},
    ],
)
def test_in_doubt_charges_fit_the_limit(case) -> None:
    assert allowed(**case) == 1_000_000


@pytest.mark.parametrize(
    ("draw", "silent", "braking", "want"),
    [
        (969_999, 0, False, False),
        (970_000, 0, False, True),
        (470_000, 500_000, False, True),
        (900_000, 0, True, True),
        (899_999, 0, True, False),
    ],
)
def test_the_brake_comes_on_near_the_limit_and_goes_off_well_below(draw, silent, braking, want) -> None:
    assert brakes(BREAKER, draw_milliwatts=draw, silent_milliwatts=silent, braking=braking) is want
