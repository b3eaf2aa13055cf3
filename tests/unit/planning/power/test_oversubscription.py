"""Oversubscription goes as far as measurements and the breaker allow, and not at all when in doubt."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.planning.power.oversubscription import (
    SAMPLE_MILLISECONDS,
    WINDOW_SAMPLES,
    Breaker,
    Load,
    Margin,
    Watch,
    draw_share,
    watch,
)

MINUTE = 60_000
BREAKER = Breaker(1_000_000, ((125, MINUTE), (150, 10_000)), 14_000)
HALF = {500: 990, 800: 10}


def ceiling(
    counts=HALF, percentile="99.9", breaker=BREAKER, draw=0, charge=0, silent=0, braking=False
) -> int:
    share = draw_share(Watch(counts=counts), Decimal(percentile))
    return Margin(breaker, Load(draw, charge, silent), share, braking).ceiling_milliwatts


def test_the_percentile_says_how_much_of_the_charge_is_drawn() -> None:
    assert draw_share(Watch(counts=HALF), Decimal("99.9")) == 800
    assert draw_share(Watch(counts=HALF), Decimal(99)) == 500
    assert draw_share(Watch(counts={500: 900}, before={800: 100}), Decimal("99.9")) == 800
    assert ceiling(percentile="99") == 1_250_000  # 2 MW by the measurements, but the breaker bears 125 %
    assert ceiling({900: 1000}) == 1_033_333  # 93 % of the limit: the rest is the margin to the brake


def test_a_silent_node_counts_in_full() -> None:
    assert ceiling({900: 1000}, silent=200_000) == 200_000 + 811_111


@pytest.mark.parametrize(
    "case",
    [
        {"counts": {500: 999}},
        {"braking": True},
        {"breaker": Breaker(1_000_000, ((125, MINUTE),), 15_000)},
        {"breaker": Breaker(1_000_000, (), 0)},
        {"counts": {1200: 1000}},
    ],
)
def test_in_doubt_charges_fit_the_limit(case) -> None:
    assert ceiling(**case) == 1_000_000


def test_with_few_measurements_what_is_charged_stays_as_far_as_the_breaker_bears_it() -> None:
    assert ceiling({}, charge=1_100_000, silent=50_000) == 1_150_000
    assert ceiling({}, charge=1_400_000) == 1_250_000


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
    before = Watch(braking=braking, brakes=int(braking))
    after, margin = watch(before, BREAKER, Decimal(99), Load(draw, 2 * draw, silent), 0)
    assert after.braking is margin.braking is want
    assert after.brakes == int(braking or want)


def test_a_busy_second_counts_no_more_than_a_quiet_one_and_a_day_later_nothing() -> None:
    watched, now = Watch(), 0
    for _ in range(10):
        watched, _ = watch(watched, BREAKER, Decimal(99), Load(900, 1000), now)
    assert watched.counts == {900: 1}
    for _ in range(2 * WINDOW_SAMPLES + 1):
        now += SAMPLE_MILLISECONDS
        watched, _ = watch(watched, BREAKER, Decimal(99), Load(500, 1000), now)
    assert {**watched.counts, **watched.before}.keys() == {500}


@given(st.data())
def test_whatever_is_drawn_and_whoever_is_silent_the_breaker_bears_every_gpu_at_its_cap(data) -> None:
    """P1 of this mode: the true draw may pass the limit only as far and as long as the breaker bears it."""
    breaker = Breaker(
        data.draw(st.integers(1, 10**9)),
        tuple(data.draw(st.lists(st.tuples(st.integers(101, 300), st.integers(1, 600_000)), max_size=4))),
        data.draw(st.integers(1_000, 300_000)),
    )
    watched, now = Watch(counts=data.draw(st.dictionaries(st.integers(0, 1500), st.integers(1, 2000)))), 0
    for _ in range(data.draw(st.integers(1, 6))):
        charge, silent = data.draw(st.integers(0, 2 * 10**9)), data.draw(st.integers(0, 10**9))
        load = Load(data.draw(st.integers(0, charge)), charge, silent)
        now += data.draw(st.integers(0, 60_000))
        watched, margin = watch(watched, breaker, Decimal("99.9"), load, now)
        most = margin.ceiling_milliwatts
        bears = [p for p, ms in breaker.overload if ms > breaker.hold_milliseconds + 45_000]
        assert breaker.usable_milliwatts <= most <= breaker.usable_milliwatts * max(bears, default=100) // 100
        if load.draw_milliwatts + silent >= breaker.usable_milliwatts:
            assert most == breaker.usable_milliwatts
        more = Load(load.draw_milliwatts, charge, silent + 1_000)
        _, careful = watch(watched, breaker, Decimal("99.9"), more, now)
        # One more silent watt never lets the others have more.
        if margin.share_permille is not None:
            assert (
                careful.ceiling_milliwatts - min(silent + 1_000, breaker.usable_milliwatts)
                <= (most - min(silent, breaker.usable_milliwatts))
                or most == breaker.usable_milliwatts
            )


@pytest.mark.parametrize(("mean", "gain"), [(0.55, 1.25), (0.67, 1.0)])
def test_a_day_of_serving_with_thirty_percent_more_servers_brings_no_brake(mean: float, gain: float) -> None:
    """One server differs from the next by 13 % of its limit, more by day than by night, and now and then all surge by
    11.8 %, to 66 % or 79 % of what their full caps allow. The first leaves room for nearly full caps; the second (103 % of the
    limit, if nothing capped it) for none beyond the limit, and so much is cut off its peaks.
    """
    rng = np.random.default_rng(7)
    servers, each = 130, 6_600
    breaker = Breaker(100 * each, ((130, 120_000),), 8_000)
    watched, surge, cap = Watch(), 0, 1 / 1.3
    draws, wants = [], []
    for second in range(0, 86_400, 10):
        surge = 4 if rng.random() < 0.002 else max(0, surge - 1)
        tide = (1.03 if second // 3600 in range(9, 18) else 0.97) * (1.118 if surge else 1.0)
        wanted = np.clip(rng.normal(mean, 0.134, servers) * tide, 0.2, 1.0)
        wants.append(int(wanted.sum() * each))
        draws.append(int(np.minimum(wanted, cap).sum() * each))
        load = Load(draws[-1], int(cap * servers * each))
        watched, margin = watch(watched, breaker, Decimal("99.9"), load, second * 1000)
        cap = min(1.0, margin.ceiling_milliwatts / (servers * each))
    assert watched.brakes == 0
    assert max(draws) < breaker.usable_milliwatts
    assert cap * servers * each >= 0.99 * gain * breaker.usable_milliwatts
    assert sum(draws) > 0.97 * sum(wants)
