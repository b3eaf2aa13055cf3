"""What must always hold of the power market, whatever the tree, the classes and the limits."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planning.power import oracle, worlds

from tokenfactory.planning.power.goods import TICKS

EXAMPLES = int(os.environ.get("MARKET_EXAMPLES", "60"))
seeds = st.integers(0, 10**9)
market_property = settings(max_examples=EXAMPLES, deadline=None)
BANDS = (1000, 100, 10)


def direct_levels(market, limits):
    """The level of every domain by bisection from the definition: the most at which its subtree fits."""
    order, fleet, forest = market.order, market.fleet, market.forest
    level = np.full(forest.count, float(order.cells))

    def drawn(domain, trial):
        levels = level.copy()
        levels[domain] = min(levels[domain], trial)
        total = market.base[domain]
        for d, c, gpus in zip(fleet.domain, fleet.class_index, fleet.gpus, strict=True):
            path = forest.path(int(d))
            if domain in path:
                lowest = min(levels[p] for p in path[: path.index(domain) + 1])
                cell = np.array([min(int(lowest), order.cells)])
                cap = order.caps_at(np.array([c]), cell, np.array([lowest - cell[0]]))[0]
                total += int(gpus * (cap - order.goods.minimum[c]))
        return total

    for domain in reversed(range(forest.count)):
        low, high = 0.0, float(order.cells)
        if drawn(domain, high) <= limits[domain]:
            continue
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if drawn(domain, middle) <= limits[domain] else (low, middle)
        level[domain] = low
    return level


@given(seeds)
@market_property
def test_no_domain_is_ever_over_its_limit(seed):
    market, limits = worlds.random_world(seed, bands=BANDS, round_prices=seed % 2 == 0)
    clearing = market.clear(limits)
    assert (clearing.drawn <= limits).all()
    assert not clearing.unfit.any()


def raise_one_limit(market, limits, domain, more):
    raised = limits.copy()
    raised[domain] += more
    return market.clear(limits), market.clear(raised)


@given(seeds, st.integers(0, 11), st.integers(1, 10**8))
@market_property
def test_more_limit_never_means_fewer_tokens(seed, domain, more):
    market, limits = worlds.random_world(seed, floors=False)
    before, after = raise_one_limit(market, limits, domain, more)
    # Caps are whole milliwatts, rounded down: the sum may lose one per GPU.
    best_value_per_milliwatt = market.order.goods.value_per_tick * TICKS
    rounding = float(market.fleet.gpus.sum()) * best_value_per_milliwatt
    assert after.value() >= before.value() * (1 - 1e-9) - rounding


@given(seeds, st.integers(0, 11), st.integers(1, 10**8))
@market_property
def test_more_limit_never_costs_an_slo_or_a_higher_band_anything(seed, domain, more):
    market, limits = worlds.random_world(seed, bands=BANDS)
    before, after = raise_one_limit(market, limits, domain, more)
    rounding = float(market.fleet.gpus.sum()) * 1e-3
    pairs = zip(
        oracle.reached_by_stage(market, before.caps), oracle.reached_by_stage(market, after.caps), strict=True
    )
    for old, new in pairs:
        assert new >= old * (1 - 1e-9) - rounding
        if new > old:
            return  # a stage gained: later ones may pay for it


@given(seeds)
@market_property
def test_a_higher_band_never_pays_before_a_lower_one(seed):
    market, limits = worlds.random_world(seed, bands=BANDS, floors=False)
    clearing = market.clear(limits)
    goods = market.order.goods
    for domain in range(market.forest.count):
        inside = [domain in market.forest.path(int(d)) for d in market.fleet.domain]
        bound = (clearing.path_levels[2] == domain)[market.fleet.domain] & np.array(inside, dtype=bool)
        for band in BANDS:
            of = np.array([goods.classes[c].band for c in market.fleet.class_index])
            short = bound & (of == band) & (clearing.caps < goods.maximum[market.fleet.class_index])
            if short.any():
                lower = bound & (of < band)
                assert (clearing.caps[lower] == goods.minimum[market.fleet.class_index[lower]]).all()


@given(seeds)
@settings(max_examples=max(EXAMPLES // 4, 10), deadline=None)
def test_the_lowest_sheet_on_the_path_is_the_direct_solution(seed):
    market, limits = worlds.random_world(seed, domains=6, classes=4, gpus=60, bands=BANDS)
    clearing = market.clear(limits)
    direct = direct_levels(market, limits)
    for pair, (domain, number) in enumerate(zip(market.fleet.domain, market.fleet.class_index, strict=True)):
        path = market.forest.path(int(domain))
        by_sheets = min(int(clearing.sheet(p)[number]) for p in path)
        assert by_sheets == clearing.caps[pair]
        lowest = min(direct[p] for p in path)
        cell = np.array([min(int(lowest), market.order.cells)])
        expected = market.order.caps_at(np.array([number]), cell, np.array([lowest - cell[0]]))[0]
        # The bisection knows whole milliwatts only: a level may differ by what rounding hides.
        assert abs(int(clearing.caps[pair]) - int(expected)) <= 60


@given(seeds, st.randoms(use_true_random=False))
@market_property
def test_the_order_of_the_input_changes_nothing(seed, random):
    market, limits = worlds.random_world(seed, round_prices=True)
    classes = list(market.order.goods.classes)
    random.shuffle(classes)
    goods = worlds.gather_goods(tuple(classes))
    again = worlds.Market(market.forest, worlds.put_in_order(goods), market.fleet, market.committed)
    first, second = market.clear(limits), again.clear(limits)
    for domain in range(market.forest.count):
        assert (first.sheet(domain) == second.sheet(domain)).all()


@given(seeds, st.lists(st.tuples(st.integers(0, 11), st.floats(0.0, 1.3)), min_size=1, max_size=6))
@market_property
def test_one_changed_limit_after_the_other_equals_clearing_anew(seed, changes):
    market, limits = worlds.random_world(seed, bands=BANDS, round_prices=seed % 2 == 0)
    clearing = market.clear(limits)
    for domain, share in changes:
        milliwatts = int(market.base[domain] + (limits[domain] - market.base[domain]) * share)
        limits = limits.copy()
        limits[domain] = milliwatts
        clearing = clearing.with_limit(domain, milliwatts)
        anew = market.clear(limits)
        assert (clearing.cell == anew.cell).all()
        assert np.allclose(clearing.fraction, anew.fraction, atol=1e-9)
        assert (np.abs(clearing.caps - anew.caps) <= 1).all()
        assert (clearing.drawn <= limits).all()


def check_optimum(seed):
    rng = np.random.default_rng(seed)
    market, limits = worlds.random_world(
        seed,
        bands=(100, 10) if seed % 2 else (100,),
        gpus=int(rng.integers(1, 10_000)),
        round_prices=seed % 3 == 0,
    )
    reached = oracle.reached_by_stage(market, market.clear(limits).caps)
    best = oracle.optimum_by_stage(market, limits)
    assert (reached <= best * (1 + 1e-6) + 0.01).all()
    # Whole milliwatts, rounded down, may cost one per GPU.
    assert (reached >= best * 0.9999 - float(market.fleet.gpus.sum()) * 1e-3).all()


@given(seeds)
@settings(max_examples=max(EXAMPLES // 2, 20), deadline=None)
def test_the_result_is_the_optimum_of_the_linear_programme(seed):
    check_optimum(seed)


@pytest.mark.slow
def test_the_result_is_the_optimum_on_many_random_sites():
    for seed in range(500):
        check_optimum(seed)


class TestDegenerateInput:
    def world(self, classes, gpus, limits, parents=(-1,)):
        goods = worlds.gather_goods(tuple(classes))
        forest = worlds.plant(np.array(parents, dtype=np.int64))
        domain = np.array([g[0] for g in gpus], dtype=np.int64)
        number = np.array([g[1] for g in gpus], dtype=np.int64)
        fleet = worlds.muster(forest, domain, number, len(classes))
        market = worlds.Market(
            forest, worlds.put_in_order(goods), fleet, np.zeros(len(parents), dtype=np.int64)
        )
        return market.clear(np.array(limits, dtype=np.int64))

    def test_no_nodes(self):
        clearing = self.world([worlds.PowerClass("a", 1, (100, 200), (0.0, 1.0))], [], [0])
        assert clearing.caps.size == 0
        assert clearing.sheet(0).tolist() == [200]

    def test_no_classes_and_no_domains(self):
        assert self.world([], [], [], parents=()).caps.size == 0

    def test_a_limit_of_zero_leaves_everyone_at_the_minimum_and_says_so(self):
        clearing = self.world([worlds.PowerClass("a", 1, (100, 200), (0.0, 1.0))], [(0, 0)] * 3, [0])
        assert clearing.caps.tolist() == [100]
        assert clearing.unfit.tolist() == [True]
        assert clearing.sheet(0).tolist() == [100]

    def test_a_class_with_one_point_gets_that_point(self):
        clearing = self.world([worlds.PowerClass("a", 1, (100,), (5.0,))], [(0, 0)] * 3, [10_000])
        assert clearing.caps.tolist() == [100]

    def test_equal_prices_everywhere_are_shared_evenly(self):
        classes = [worlds.PowerClass(f"c{i}", 1, (100_000, 300_000), (0.0, 10.0)) for i in range(4)]
        clearing = self.world(classes, [(0, i) for i in range(4)], [800_000])
        assert clearing.caps.tolist() == [200_000] * 4

    def test_exactly_enough_gives_everyone_all(self):
        clearing = self.world([worlds.PowerClass("a", 1, (100, 200), (0.0, 1.0))], [(0, 0)] * 3, [600])
        assert clearing.caps.tolist() == [200]

    def test_one_milliwatt_less_lowers_a_cap_and_never_rounds_up(self):
        clearing = self.world([worlds.PowerClass("a", 1, (100, 200), (0.0, 1.0))], [(0, 0)] * 3, [599])
        assert clearing.caps.tolist() == [199]
