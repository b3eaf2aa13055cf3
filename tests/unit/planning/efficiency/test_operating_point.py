"""Where a replica runs: dense, at the knee, within the SLO."""

import pytest

from tokenfactory.planning.efficiency.operating_point import Goals, choose_operating_point, latency_of
from tokenfactory.planning.power.profile import Point

# A cap costs nothing down to 400 W and half the tokens at 300 W.
CURVE = tuple(
    Point(cap * 1_000, tokens * speed, batch, latency / speed, 100.0 / speed)
    for batch, tokens, latency in (
        (8, 100.0, 10.0),
        (64, 600.0, 20.0),
        (128, 900.0, 40.0),
        (256, 1_100.0, 80.0),
    )
    for cap, speed in ((300, 0.5), (400, 1.0), (700, 1.0))
)


def test_dense_and_at_the_knee() -> None:
    point = choose_operating_point(CURVE, Goals())
    assert point is not None
    assert (point.concurrency, point.cap_milliwatts, point.meets_slo) == (256, 400_000, True)
    assert point.tokens_per_joule == pytest.approx(1_100 / 400)


def test_as_dense_as_the_slo_allows_with_a_margin() -> None:
    point = choose_operating_point(CURVE, Goals(inter_token_milliseconds=50.0))
    assert point is not None
    assert 128 <= point.concurrency < 160
    assert point.cap_milliwatts == 400_000


def test_slower_here_than_in_the_profile_means_less_dense() -> None:
    fast = choose_operating_point(CURVE, Goals(inter_token_milliseconds=50.0))
    slow = choose_operating_point(CURVE, Goals(inter_token_milliseconds=50.0), slowdown=1.5)
    assert fast is not None
    assert slow is not None
    assert slow.concurrency < fast.concurrency
    assert slow.tokens_per_second < fast.tokens_per_second


def test_a_first_token_that_a_low_cap_delays_raises_the_cap() -> None:
    steep = (Point(300_000, 900.0, 64, 20.0, 480.0), Point(500_000, 1_000.0, 64, 18.0, 200.0))
    free = choose_operating_point(steep, Goals())
    bound = choose_operating_point(steep, Goals(first_token_milliseconds=500.0))
    assert free is not None
    assert bound is not None
    assert (free.cap_milliwatts, bound.cap_milliwatts) == (300_000, 500_000)


def test_what_a_replica_costs_besides_its_gpus_pays_for_higher_caps() -> None:
    points = (Point(300_000, 900.0, 64, 20.0), Point(500_000, 1_200.0, 64, 18.0))
    bare = choose_operating_point(points, Goals())
    housed = choose_operating_point(points, Goals(), overhead_milliwatts=2_000_000)
    assert bare is not None
    assert housed is not None
    assert (bare.cap_milliwatts, housed.cap_milliwatts) == (300_000, 500_000)


def test_an_slo_that_no_point_keeps_gets_the_nearest_and_says_so() -> None:
    point = choose_operating_point(CURVE, Goals(inter_token_milliseconds=5.0))
    assert point is not None
    assert (point.concurrency, point.meets_slo) == (8, False)


def test_nothing_known() -> None:
    assert choose_operating_point((), Goals()) is None
    assert latency_of((), 10) is None


def test_latency_is_read_between_and_beyond_the_points() -> None:
    assert latency_of(CURVE, 1) == 10.0
    assert latency_of(CURVE, 96) == pytest.approx(30.0)
    assert latency_of(CURVE, 512) == pytest.approx(160.0)
