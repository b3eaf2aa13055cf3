"""Measured points become what a class can sell: hull, knee, SLO floor."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.planning.power.profile import Point, Requirement, hull_of, parked, unknown

ANY = Requirement()


def points(*pairs, concurrency=1):
    return [Point(w * 1000, t, concurrency) for w, t in pairs]


def hull(measured, requirement=ANY, low=200, high=700, gpus=1):
    return hull_of(
        measured,
        requirement,
        minimum_milliwatts=low * 1000,
        maximum_milliwatts=high * 1000,
        gpus_per_replica=gpus,
    )


def watts(found):
    return [w / 1000 for w in found.milliwatts]


def test_flat_then_cliff_has_its_knee_at_the_edge_of_the_cliff():
    # FACTS: B200 decode, flat from 688 W down to 430 W, 36 % fewer tokens at 350 W.
    found = hull(points((350, 640), (430, 1000), (688, 1000)), low=200, high=1000)
    assert watts(found)[found.knee] == 430
    assert watts(found) == [200, 430]
    assert found.chords == (True,)


def test_a_gpu_that_names_no_lowest_limit_has_a_hull_too():
    found = hull(points((350, 640), (430, 1000)), low=0)
    assert watts(found) == [0, 430]
    assert watts(found)[found.knee] == 430


def test_on_a_bridge_the_measured_curve_counts():
    found = hull(points((350, 640), (430, 1000), (688, 1000)), low=200, high=1000).to_class("m", band=1)
    assert found.tokens_at(200_000) == 0
    assert found.tokens_at(360_000) == 640
    assert found.tokens_at(430_000) == 1000
    assert found.tokens_at(999_000) == 1000


def test_what_lies_on_a_concave_curve_is_no_chord():
    found = hull(points((200, 100), (300, 180), (400, 220), (700, 240)))
    assert watts(found) == [200, 300, 400, 700]
    assert found.chords == (False, False, False)


def test_two_knees_are_bridged_only_where_the_curve_sags():
    found = hull(points((200, 100), (300, 110), (400, 300), (500, 310), (600, 450), (700, 460)))
    assert watts(found) == [200, 400, 600, 700]
    assert found.chords == (True, True, False)


def test_the_slo_floor_is_the_lowest_cap_that_keeps_the_latency():
    measured = [
        Point(200_000, 50, 8, inter_token_milliseconds=160),
        Point(300_000, 90, 8, inter_token_milliseconds=60),
        Point(400_000, 160, 8, inter_token_milliseconds=49),
        Point(700_000, 180, 8, inter_token_milliseconds=45),
    ]
    found = hull(measured, Requirement(inter_token_milliseconds=50))
    assert watts(found) == [200, 400, 700]
    assert found.floor == 1
    assert found.tokens == (50, 160, 180)
    assert found.meets_slo


def test_the_floor_is_that_of_the_load_and_not_of_a_replica_that_serves_one_request():
    measured = [
        Point(200_000, 40, 1, 20.0),
        Point(200_000, 800, 64, 80.0),
        Point(400_000, 45, 1, 18.0),
        Point(400_000, 1600, 64, 40.0),
        Point(700_000, 1700, 64, 38.0),
    ]

    def floor(load: int | None) -> int:
        found = hull(measured, Requirement(inter_token_milliseconds=50, concurrency=load))
        return found.milliwatts[found.floor] // 1000

    assert floor(64) == 400
    assert floor(1) == 200
    # Half way between one request and 64, and a little more: 50 ms at 200 W fall between them.
    assert (floor(32), floor(33)) == (200, 400)


def test_a_time_to_first_token_has_a_floor_as_well():
    measured = [
        Point(300_000, 800, 64, 40.0, 2000.0),
        Point(500_000, 900, 64, 35.0, 400.0),
        Point(700_000, 950, 64, 33.0, 300.0),
    ]
    found = hull(measured, Requirement(first_token_milliseconds=500, concurrency=64))
    assert found.milliwatts[found.floor] == 500_000


def test_an_unknown_latency_follows_from_tokens_and_concurrency():
    measured = points((300, 100), (500, 250), concurrency=10)
    assert watts(hull(measured, Requirement(inter_token_milliseconds=50), low=300)) == [300, 500]
    assert hull(measured, Requirement(inter_token_milliseconds=50), low=300).floor == 1
    assert not hull(measured, Requirement(inter_token_milliseconds=39)).meets_slo


def test_a_latency_that_no_watts_can_keep_is_told_and_nothing_is_thrown_away():
    found = hull(points((300, 100), (500, 250), concurrency=10), Requirement(inter_token_milliseconds=1))
    assert not found.meets_slo
    assert found.floor == 0
    assert max(found.tokens) == 250


def test_a_replica_never_serves_more_at_once_than_it_is_sent():
    measured = points((300, 100), concurrency=4) + points((300, 900), (600, 1600), concurrency=64)
    # Between 4 and 64 requests at 300 W; at 600 W no fewer than 64 were measured, and 8 make an eighth of that.
    assert hull(measured, Requirement(concurrency=8)).tokens[1:] == pytest.approx(
        (100 + 800 * 4 / 60, 1600 / 8)
    )
    assert max(hull(measured, Requirement(concurrency=64)).tokens) == 1600


@pytest.mark.parametrize("measured", [[], points((0, 5))])
def test_nothing_measured_is_taken_as_proportional(measured):
    found = hull(measured)
    assert found == unknown(200_000, 700_000)
    assert found.chords == (False,)


def test_a_gpu_that_cannot_be_capped_is_one_point():
    assert hull(points((300, 100)), low=400, high=400) == parked(400_000)


@given(
    st.lists(st.tuples(st.integers(1, 1200), st.floats(0, 1e4), st.sampled_from([1, 8, 64])), max_size=12),
    st.integers(50, 500),
    st.integers(0, 800),
    st.none() | st.floats(1, 200),
)
def test_every_hull_is_rising_and_concave_above_its_floor(rows, low, width, latency):
    measured = [Point(w * 1000, t, c) for w, t, c in rows]
    found = hull(measured, Requirement(inter_token_milliseconds=latency), low, low + width)
    assert found.milliwatts[0] == low * 1000
    assert found.milliwatts[-1] <= (low + width) * 1000
    assert all(a < b for a, b in pairwise(found.milliwatts))
    assert all(a <= b for a, b in pairwise(found.tokens))
    assert len(found.chords) == len(found.milliwatts) - 1
    slopes = [
        (t1 - t0) / (w1 - w0)
        for (w0, t0), (w1, t1) in pairwise(
            list(zip(found.milliwatts, found.tokens, strict=True))[found.floor :]
        )
    ]
    assert all(a >= b - 1e-12 for a, b in pairwise(slopes))
