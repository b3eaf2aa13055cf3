"""Power is given up in order, given back in reverse and late, and nothing flaps."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.planning.power import worlds

from tokenfactory.planning.power import efficiency, explain, steps
from tokenfactory.planning.power.budgets import Purse, settle
from tokenfactory.planning.power.goods import PowerClass
from tokenfactory.planning.power.parking import park
from tokenfactory.planning.power.steps import Held, Patience, Step

PATIENCE = Patience()
W = 1000


def hall(limit_watts, *, min_replicas=0, idle=50):
    """10 GPUs of a high and 10 of a low band: minimum 100 W, SLO floor 200 W, useful up to 400 W."""
    classes = tuple(
        PowerClass(
            name,
            band,
            (100 * W, 200 * W, 400 * W),
            (1.0, 10.0, 20.0),
            floor=1,
            chords=(True, False),
            min_replicas=min_replicas,
            idle_milliwatts=idle * W,
            factory=name,
        )
        for name, band in (("high", 1000), ("low", 10))
    )
    forest = worlds.plant(np.array([-1, 0], dtype=np.int64), ("site", "hall"))
    fleet = worlds.muster(forest, np.ones(2, dtype=np.int64), np.arange(2), 2, np.array([10, 10]))
    market = worlds.Market(
        forest, worlds.put_in_order(worlds.gather_goods(classes)), fleet, np.zeros(2, dtype=np.int64)
    )
    return market.clear(np.array([10**12, limit_watts * W], dtype=np.int64))


@pytest.mark.parametrize(
    ("limit_watts", "min_replicas", "step", "caps", "parked"),
    [
        (8000, 0, Step.FREE, [400, 400], 0),
        (7000, 0, Step.THROTTLE, [400, 300], 0),
        (6000, 0, Step.THROTTLE, [400, 200], 0),
        (5000, 0, Step.THROTTLE, [300, 200], 0),
        (4000, 0, Step.THROTTLE, [200, 200], 0),
        (3500, 0, Step.DRAIN, [200, 150], 5),
        (3500, 10, Step.BELOW_FLOORS, [200, 150], 0),
        (2000, 10, Step.MINIMUM, [100, 100], 0),
        (1900, 0, Step.EVICT, [100, 100], 0),
    ],
)
def test_each_step_comes_only_when_the_one_before_is_not_enough(
    limit_watts, min_replicas, step, caps, parked
):
    clearing = hall(limit_watts, min_replicas=min_replicas)
    assert [c // W for c in clearing.caps.tolist()] == caps
    parking = park(clearing)
    assert steps.needed(clearing, parking)["hall"] == step
    assert steps.needed(clearing, parking)["site"] == Step.FREE
    if step < Step.EVICT:
        assert sum(parking.parked.values()) == parked


def test_evictions_begin_with_the_lowest_band_and_stop_when_it_fits():
    found = steps.evictions(hall(1900))
    assert found.evictions == (steps.Eviction("hall", "low", 2),)
    assert found.still_missing == {}


def test_what_evictions_cannot_free_is_told():
    found = steps.evictions(hall(900))
    assert [(e.class_name, e.gpus) for e in found.evictions] == [("low", 10), ("high", 10)]
    assert found.still_missing == {"hall": 100 * W}


class TestHysteresis:
    def test_a_step_up_is_taken_at_once_and_back_only_one_at_a_time(self):
        memory = steps.advance({}, {"d": Step.FREE}, 0, PATIENCE)
        memory = steps.advance(memory, {"d": Step.BELOW_FLOORS}, 1, PATIENCE)
        assert memory["d"].value == Step.BELOW_FLOORS
        trail = []
        for now in range(2, 1300):
            memory = steps.advance(memory, {"d": Step.FREE}, now, PATIENCE)
            trail.append(memory["d"].value)
        assert trail[:299] == [Step.BELOW_FLOORS] * 299
        assert sorted(set(trail), reverse=True) == [3, 2, 1, 0]

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=200))
    def test_steps_never_fall_twice_within_the_patience(self, wanted):
        memory: dict[str, Held] = {}
        falls = []
        for turn, step in enumerate(wanted):
            before = memory.get("d")
            memory = steps.advance(memory, {"d": Step(step)}, turn * 60.0, PATIENCE)
            assert memory["d"].value >= step
            if before and memory["d"].value < before.value:
                falls.append(turn * 60.0)
                assert before.value - memory["d"].value == 1
        assert all(b - a >= PATIENCE.give_back_after_seconds for a, b in pairwise(falls))

    def test_a_lower_cap_is_taken_at_once_and_a_higher_one_when_it_lasts(self):
        memory = steps.settle_caps({}, {"c": 500 * W}, {}, 0, PATIENCE)
        memory = steps.settle_caps(memory, {"c": 300 * W}, {}, 1, PATIENCE)
        assert memory["c"].value == 300 * W
        for now, cap in ((2, 500), (5, 450), (9, 600)):
            memory = steps.settle_caps(memory, {"c": cap * W}, {"c": 700 * W}, now, PATIENCE)
            assert memory["c"].value == 300 * W
        memory = steps.settle_caps(memory, {"c": 600 * W}, {"c": 700 * W}, 11, PATIENCE)
        assert memory["c"].value == 450 * W  # no more than was wanted all the time

    def test_a_raise_that_is_too_small_is_not_worth_a_write_but_the_last_one_to_the_top_is(self):
        memory = {"c": Held(698 * W, 0, 698 * W)}
        held = memory
        for now in range(1, 100):
            held = steps.settle_caps(held, {"c": 700 * W}, {"c": 1000 * W}, now, PATIENCE)
        assert held["c"].value == 698 * W
        for now in range(1, 100):
            memory = steps.settle_caps(memory, {"c": 700 * W}, {"c": 700 * W}, now, PATIENCE)
        assert memory["c"].value == 700 * W

    @given(st.lists(st.integers(100, 700), min_size=2, max_size=100))
    def test_caps_are_never_above_what_is_wanted_and_rise_no_oftener_than_patience_allows(self, wanted):
        memory: dict[str, Held] = {}
        rises = []
        for turn, cap in enumerate(wanted):
            before = memory.get("c")
            memory = steps.settle_caps(memory, {"c": cap * W}, {}, float(turn), PATIENCE)
            assert memory["c"].value <= cap * W
            if before and memory["c"].value > before.value:
                rises.append(turn)
        assert all(b - a >= PATIENCE.raise_after_seconds for a, b in pairwise(rises))

    def test_a_short_shortage_drains_nothing_and_a_lasting_one_does(self):
        memory: dict[str, Held] = {}
        for now in (0.0, 10.0, 20.0):
            memory = steps.settle_parked(memory, {"m": 3}, now, PATIENCE)
            assert memory["m"].value == 0
        memory = steps.settle_parked(memory, {}, 25.0, PATIENCE)
        assert memory == {}
        for now in (30.0, 45.0, 61.0):
            memory = steps.settle_parked(memory, {"m": 3 if now < 60 else 4}, now, PATIENCE)
        assert memory["m"].value == 3

    def test_parked_replicas_come_back_late_and_no_more_than_the_tightest_moment_allows(self):
        memory = {"m": Held(5, 0, 5)}
        for now in range(1, 301):
            memory = steps.settle_parked(memory, {"m": 2 if now == 100 else 0}, float(now), PATIENCE)
            assert memory["m"].value == 5
        memory = steps.settle_parked(memory, {}, 302.0, PATIENCE)
        assert memory["m"].value == 2

    @given(st.lists(st.integers(0, 4), min_size=1, max_size=150))
    def test_parking_never_turns_round_within_its_patience(self, wanted):
        memory: dict[str, Held] = {}
        changes = []
        for turn, count in enumerate(wanted):
            now = turn * 20.0
            before = memory["m"].value if "m" in memory else 0
            memory = steps.settle_parked(memory, {"m": count} if count else {}, now, PATIENCE)
            after = memory["m"].value if "m" in memory else 0
            if after != before:
                changes.append((now, after > before))
        for (first, _), (second, up) in pairwise(changes):
            limit = PATIENCE.drain_after_seconds if up else PATIENCE.give_back_after_seconds
            assert second - first >= limit


class TestExplain:
    def test_the_domain_the_band_and_the_price_are_named(self):
        found = explain.explain(hall(7000), "hall", "low")
        assert (found.bound, found.bound_by, found.band) == ("Domain", "hall", 10)
        assert found.price == pytest.approx(10 / 200)
        assert found.cap_milliwatts == 300 * W

    def test_nothing_binds_a_class_that_has_all_it_can_use(self):
        assert explain.explain(hall(7000), "hall", "high").bound == "Nothing"

    def test_an_efficiency_target_and_a_budget_are_named_when_they_bind(self):
        clearing = hall(8000)
        market = clearing.market
        goods = market.order.goods
        order = worlds.put_in_order(goods, price_floors={goods.factories.index("low"): 1.0})
        frugal = worlds.Market(market.forest, order, market.fleet, market.committed).clear(clearing.limits)
        found = explain.explain(frugal, "hall", "low")
        assert (found.bound, found.bound_by, found.cap_milliwatts) == ("Efficiency", "low", 200 * W)
        members = np.array([c.name == "low" for c in goods.classes])
        purse = Purse("low's budget", members, 3000 * W)
        settled = settle(market.forest, goods, market.fleet, market.committed, clearing.limits, (purse,))
        found = explain.explain(settled.clearing, "hall", "low", settled.adders)
        assert (found.bound, found.bound_by) == ("Budget", "low's budget")
        assert found.cap_milliwatts == pytest.approx(300 * W, abs=10)

    def test_a_domain_below_its_minimum_says_how_much_is_missing(self):
        found = explain.explain(hall(1900), "hall", "high")
        assert found.bound == "Minimum"
        assert "100 W" in found.message

    def test_a_class_that_can_use_no_more_than_its_minimum_is_held_at_it_all_the_same(self):
        idle = PowerClass("idle", 0, (100 * W,), (0.0,))
        goods = worlds.gather_goods((idle,))
        forest = worlds.plant(np.array([-1], dtype=np.int64), ("hall",))
        zero = np.zeros(1, dtype=np.int64)
        market = worlds.Market(
            forest, worlds.put_in_order(goods), worlds.muster(forest, zero, zero, 1, np.array([10])), zero
        )
        found = explain.explain(market.clear(np.array([900 * W])), "hall", "idle")
        assert (found.bound, found.bound_by) == ("Minimum", "hall")
        assert explain.explain(market.clear(np.array([1000 * W])), "hall", "idle").bound == "Nothing"

    @pytest.mark.parametrize(
        ("limit_watts", "reason"), [(3900, "FloorsDoNotFit"), (1999, "MinimumDoesNotFit")]
    )
    def test_floors_that_do_not_fit_are_problems(self, limit_watts, reason):
        (found,) = explain.floors_that_do_not_fit(hall(limit_watts))
        assert (found.subject, found.reason) == ("hall", reason)
        assert "raise its limit" in found.message

    def test_floors_that_fit_are_none(self):
        assert explain.floors_that_do_not_fit(hall(4000)) == ()


class TestEfficiency:
    """One class: 1 token/J from 100 W to 200 W, 0.5 to 300 W, 0.1 to 400 W; 100 W of overhead per GPU."""

    each = PowerClass("m", 1, (100 * W, 200 * W, 300 * W, 400 * W), (100.0, 200.0, 250.0, 260.0), factory="f")

    def draw_at(self, floor):
        goods = worlds.gather_goods((self.each,))
        order = worlds.put_in_order(goods, price_floors={0: floor})
        forest = worlds.plant(np.array([-1], dtype=np.int64))
        zero = np.zeros(1, dtype=np.int64)
        market = worlds.Market(forest, order, worlds.muster(forest, zero, zero, 1, np.array([10])), zero)
        clearing = market.clear(np.array([10**9], dtype=np.int64))
        return efficiency.draw_of(clearing, "f", overhead_watts=1000)

    def find(self, target):
        goods = worlds.gather_goods((self.each,))
        return efficiency.find_price_floor(target, efficiency.thresholds(goods, "f"), self.draw_at)

    @pytest.mark.parametrize(
        ("target", "met", "watts"),
        [
            (0.5, True, 5000),  # everything: 2600 / 5000 = 0.52
            (0.6, True, 4000),  # without the last piece: 2500 / 4000 = 0.625
            (0.65, True, 3000),  # 2000 / 3000 = 0.667
            (0.9, False, 3000),  # the best there is
        ],
    )
    def test_the_lowest_floor_that_meets_the_target_keeps_the_most_tokens(self, target, met, watts):
        found = self.find(target)
        assert found.met is met
        assert found.reached.watts == pytest.approx(watts)

    def test_a_factory_that_sells_nothing_has_no_thresholds(self):
        assert efficiency.thresholds(worlds.gather_goods((self.each,)), "other").size == 0
