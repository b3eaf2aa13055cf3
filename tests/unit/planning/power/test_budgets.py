"""Budgets across the tree: never overdrawn, and within 0.1 % of the best that any split could do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planning.power import oracle, worlds

from tokenfactory.planning.power import pricing
from tokenfactory.planning.power.budgets import Purse, cut_at_root, settle
from tokenfactory.planning.power.forest import Fleet, plant
from tokenfactory.planning.power.goods import PowerClass, gather_goods


def random_purses(market, limits, rng):
    """One purse per factory, most of them smaller than what it would spend."""
    goods, fleet = market.order.goods, market.fleet
    caps = market.clear(limits).caps
    purses = []
    for factory in goods.factories:
        members = np.array([c.factory == factory for c in goods.classes])
        least = oracle.factory_base(market, factory)
        freely = int((fleet.gpus * caps)[members[fleet.class_index]].sum())
        purses.append(Purse(factory, members, int(least + (freely - least) * rng.uniform(0.2, 1.1))))
    return tuple(purses)


def check_instance(seed, bands):
    rng = np.random.default_rng(seed)
    factories = ("a", "b", "c", "") if seed % 3 else ("a", "b")
    market, limits = worlds.random_world(
        seed,
        bands=bands,
        gpus=int(rng.integers(1, 10_000)),
        classes=8,
        factories=factories,
        round_prices=seed % 5 == 0,
    )
    purses = random_purses(market, limits, rng)
    settled = settle(market.forest, market.order.goods, market.fleet, market.committed, limits, purses)
    assert settled.overdrawn == ()
    assert all(settled.spent[p.name] <= p.milliwatts for p in purses)
    assert (settled.clearing.drawn <= limits).all()
    best = oracle.optimum_by_stage(market, limits, {p.name: p.milliwatts for p in purses})
    reached = oracle.reached_by_stage(market, settled.clearing.caps)
    # A later stage may gain what an earlier one left over: what counts is all up to and including each stage.
    assert reached[0] <= best[0] * (1 + 1e-6) + 0.01
    assert reached.sum() <= best.sum() * 1.001 + 0.01
    assert (np.cumsum(reached) >= np.cumsum(best) * 0.999 - 0.1).all(), reached / np.maximum(best, 1e-9)
    return reached.sum() / max(best.sum(), 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_the_best_split_within_every_budget(seed):
    check_instance(seed, (100,))


@pytest.mark.parametrize("seed", range(100, 106))
def test_bands_come_before_value_under_budgets_too(seed):
    check_instance(seed, (100, 10))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 500, 50))
def test_the_best_split_on_many_random_sites(start):
    for seed in range(start, start + 50):
        check_instance(1000 + seed, (100,) if seed % 2 else (100, 10))


def test_a_budget_that_is_not_reached_costs_nothing():
    market, limits = worlds.random_world(3, factories=("a", "b"))
    goods = market.order.goods
    rich = Purse("a", np.array([c.factory == "a" for c in goods.classes]), 10**12)
    settled = settle(market.forest, goods, market.fleet, market.committed, limits, (rich,))
    assert settled.adders == {}
    assert (settled.clearing.caps == market.clear(limits).caps).all()


def test_a_budget_below_the_minimum_is_reported_and_leaves_the_minimum():
    market, limits = worlds.random_world(3, factories=("a",))
    goods = market.order.goods
    poor = Purse("a", np.ones(len(goods.classes), dtype=bool), 1)
    settled = settle(market.forest, goods, market.fleet, market.committed, limits, (poor,))
    assert settled.overdrawn == ("a",)
    assert (settled.clearing.caps == goods.minimum[market.fleet.class_index]).all()


def test_a_factory_that_pays_more_in_a_crowded_hall_moves_its_watts_to_the_empty_one():
    """Prices add: one budget, two halls, the same model in both, a rival only in the first."""
    classes = (
        worlds.PowerClass("chat", 1, (100_000, 300_000), (0.0, 10.0), factory="chat"),
        worlds.PowerClass("rival", 1, (100_000, 300_000), (0.0, 9.0), factory="rival"),
    )
    goods = worlds.gather_goods(classes)
    forest = worlds.plant(np.array([-1, 0, 0], dtype=np.int64), ("site", "crowded", "empty"))
    domain = np.array([1] * 20 + [2] * 10)
    number = np.array([0] * 10 + [1] * 10 + [0] * 10)
    fleet = worlds.muster(forest, domain, number, 2)
    limits = np.array([10**9, 4_000_000, 10**9], dtype=np.int64)
    purse = Purse("chat", np.array([True, False]), 4_000_000)
    settled = settle(forest, goods, fleet, np.zeros(3, dtype=np.int64), limits, (purse,))
    # 20 GPUs with 4 kW: the empty hall's 10 at 300 W, the crowded hall's at 100 W and the rival at 300 W.
    assert settled.clearing.caps.tolist() == pytest.approx([100_000, 300_000, 300_000], abs=200)


@given(st.integers(0, 10**9), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_a_lowered_budget_lands_with_one_write_to_the_roots_sheet(seed, share):
    market, limits = worlds.random_world(seed, factories=("a", "b"), bands=(100, 10))
    goods, fleet = market.order.goods, market.fleet
    members = np.array([c.factory == "a" for c in goods.classes], dtype=bool)
    clearing = market.clear(limits)
    mine = members[fleet.class_index]
    least = int((fleet.gpus * goods.minimum[fleet.class_index])[mine].sum())
    freely = int((fleet.gpus * clearing.caps)[mine].sum())
    budget = least + int((freely - least) * share)
    cut = cut_at_root(clearing, Purse("a", members, budget))
    assert set(cut) <= set(np.flatnonzero(members).tolist())
    ceiling = np.array([cut.get(int(c), 10**9) for c in fleet.class_index], dtype=np.int64)
    after = np.minimum(clearing.caps, ceiling)
    assert int((fleet.gpus * after)[mine].sum()) <= budget
    assert (after[~mine] == clearing.caps[~mine]).all()
    # No deeper than it has to be: what rounding leaves is less than a milliwatt per GPU and cell.
    assert int((fleet.gpus * after)[mine].sum()) >= budget - 2 * int(fleet.gpus[mine].sum()) - 1


def many_budgets(count, domains):
    """Each over GPUs of one class in several of the domains; all domains bind, and so does their root."""
    rng = np.random.default_rng(1)
    forest = plant(np.array([-1] + [0] * domains), tuple(f"d{number:02}" for number in range(domains + 1)))
    classes = []
    for number in range(count):
        worth = 1 + 0.3 * rng.random()
        tokens = (0.0, worth * 600, worth * 900, worth * 1000)
        caps = (200_000, 350_000, 500_000, 700_000)
        classes.append(PowerClass(f"c{number:03}", 1, caps, tokens, factory=f"ns/f{number:03}"))
    goods = gather_goods(tuple(classes))
    pairs = [(1 + int(at), number) for number in range(count) for at in rng.choice(domains, 4, replace=False)]
    where, which = np.array(sorted(pairs)).T
    gpus = 8 * rng.integers(1, 11, where.size)
    limits = forest.subtree_sums(np.bincount(where, gpus * 450_000, domains + 1).astype(np.int64))
    limits[0] = limits[0] * 9 // 10
    each = np.bincount(which, gpus, count)
    room = 200_000 + 500_000 * (0.4 + 0.4 * rng.random(count))
    purses = tuple(
        Purse(f"p{number}", np.arange(count) == number, int(each[number] * room[number]))
        for number in range(count)
    )
    return forest, goods, Fleet(where, which, gpus), np.zeros(domains + 1, dtype=np.int64), limits, purses


def test_a_search_that_is_cut_short_sells_nearly_as_much_within_every_budget(monkeypatch):
    site = many_budgets(40, 10)
    whole = settle(*site)
    for most in (30, 5):
        monkeypatch.setattr(pricing, "MOST_CLEARINGS", most)
        found = settle(*site)
        assert found.clearings < most + 100
        assert all(found.spent[each.name] <= each.milliwatts for each in site[-1])
        assert (found.clearing.drawn <= site[-2]).all()
        assert found.clearing.tokens() > 0.99 * whole.clearing.tokens()
