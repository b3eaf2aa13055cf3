"""Budgets that hold in a part of the tree: no split is better, none is overdrawn, and the sheets alone say it."""

import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit.planning.power import oracle, worlds

from tokenfactory.planning.power.budgets import settle
from tokenfactory.planning.power.explain import explain
from tokenfactory.planning.power.zones import Allotment, put_on_sale

EXAMPLES = int(os.environ.get("MARKET_EXAMPLES", "60"))


def below(forest, position):
    return np.array([position in forest.path(p) for p in range(forest.count)], dtype=bool)


def spent_on(fleet, caps, mask):
    return int((fleet.gpus * caps)[mask].sum())


class Site:
    """A random site with grants in some of its domains, and what settling it says."""

    def __init__(self, seed, *, domains=8, gpus=400, bands=(100,), round_prices=False, overlapping=False):
        self.rng = np.random.default_rng(seed)
        self.plain, self.limits = worlds.random_world(
            seed,
            domains=domains,
            classes=6,
            gpus=gpus,
            bands=bands,
            factories=("a", "b", "c", ""),
            round_prices=round_prices,
        )
        self.forest, goods = self.plain.forest, self.plain.order.goods
        self.labels = [each.name for each in goods.classes]
        fleet = self.plain.fleet
        freely = self.plain.clear(self.limits).caps
        self.allotments, self.masks = [], []
        for number in range(int(self.rng.integers(1, 4))):
            position = int(self.rng.integers(0, domains))
            paying = frozenset(f for f in ("a", "b", "c") if self.rng.random() < 0.6) or frozenset("a")
            mine = np.array([goods.classes[c].factory in paying for c in fleet.class_index], dtype=bool)
            mask = mine & below(self.forest, position)[fleet.domain]
            least = spent_on(fleet, goods.minimum[fleet.class_index], mask)
            budget = int(least + (spent_on(fleet, freely, mask) - least) * self.rng.uniform(0.2, 1.1))
            name = f"{number} in {self.forest.names[position]}"
            self.allotments.append(Allotment(name, paying, budget, self.forest.names[position]))
            self.masks.append(mask)
        for factory in ("a", "b", "c") if overlapping else ():
            mask = np.array([goods.classes[c].factory == factory for c in fleet.class_index], dtype=bool)
            least = spent_on(fleet, goods.minimum[fleet.class_index], mask)
            budget = int(least + (spent_on(fleet, freely, mask) - least) * self.rng.uniform(0.2, 1.1))
            self.allotments.append(Allotment(factory, frozenset((factory,)), budget))
            self.masks.append(mask)
        self.sale = put_on_sale(self.forest, {each.name: each for each in goods.classes}, self.allotments)
        sold_as = [
            self.sale.sold_as(int(domain), self.labels[number])
            for domain, number in zip(fleet.domain, fleet.class_index, strict=True)
        ]
        caller = np.argsort(self.forest.position)
        self.fleet = worlds.muster(
            self.forest,
            caller[fleet.domain],
            np.array(sold_as, dtype=np.int64),
            len(self.sale.goods.classes),
            fleet.gpus,
        )
        self.settled = settle(
            self.forest, self.sale.goods, self.fleet, self.plain.committed, self.limits, self.sale.purses
        )
        caps = {
            (int(d), self.sale.labels[int(c)]): int(cap)
            for d, c, cap in zip(
                self.fleet.domain, self.fleet.class_index, self.settled.clearing.caps, strict=True
            )
        }
        self.caps = np.array(
            [caps[int(d), self.labels[int(c)]] for d, c in zip(fleet.domain, fleet.class_index, strict=True)],
            dtype=np.int64,
        )

    def sheets(self):
        """By position and label, as the controller publishes them."""
        named = [set() for _ in range(self.forest.count)]
        for domain, number in zip(self.fleet.domain, self.fleet.class_index, strict=True):
            for position in self.forest.path(int(domain)):
                named[position].add(int(number))
        return [
            self.sale.sheet(self.settled.clearing, position, sorted(numbers))
            for position, numbers in enumerate(named)
        ]


def reached_of_best(seed, bands, **kwargs):
    """By stage, all up to and including each; never more than the best, and no budget overdrawn."""
    site = Site(seed, gpus=int(np.random.default_rng(seed).integers(1, 3000)), bands=bands, **kwargs)
    fleet = site.plain.fleet
    for allotment, mask in zip(site.allotments, site.masks, strict=True):
        assert spent_on(fleet, site.caps, mask) <= allotment.milliwatts
    assert (site.settled.clearing.drawn <= site.limits).all()
    shared = [(mask, each.milliwatts) for mask, each in zip(site.masks, site.allotments, strict=True)]
    best = np.cumsum(oracle.optimum_by_stage(site.plain, site.limits, shared=shared))
    reached = np.cumsum(oracle.reached_by_stage(site.plain, site.caps))
    assert reached[0] <= best[0] * 1.001 + 0.1
    return (reached + 0.1) / np.maximum(best, 0.1)


def assert_best(seed, bands, **kwargs):
    ratio = reached_of_best(seed, bands, **kwargs)
    assert (ratio >= 0.999).all(), (seed, ratio)


@pytest.mark.parametrize("seed", range(16))
def test_the_best_split_within_what_domains_grant(seed):
    assert_best(seed, (100,) if seed % 2 else (100, 10))


@pytest.mark.parametrize("seed", range(6000, 6012))
def test_the_best_split_where_gpus_pay_from_several_budgets(seed):
    assert_best(seed, (100,) if seed % 2 else (100, 10), overlapping=True, round_prices=seed % 3 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 500, 50))
def test_the_best_split_on_many_random_sites(start):
    """Factories' budgets and domains' grants, three to six to a site: some GPUs pay from two or three of them."""
    for seed in range(start, start + 50):
        bands = (100,) if seed % 2 else (100, 10)
        assert_best(10_000 + seed, bands, overlapping=True, round_prices=seed % 3 == 0)


@given(st.integers(0, 10**9))
@example(1382652)
@settings(max_examples=max(EXAMPLES // 3, 10), deadline=None)
def test_the_lowest_sheet_on_a_path_is_the_cap_also_where_a_grant_ends(seed):
    site = Site(seed, gpus=120, bands=(100, 10), round_prices=seed % 2 == 0)
    sheets = site.sheets()
    fleet = site.plain.fleet
    for domain, number, cap in zip(fleet.domain, fleet.class_index, site.caps, strict=True):
        label = site.labels[int(number)]
        assert min(sheets[p][label] for p in site.forest.path(int(domain))) == cap


def two_halls(budget):
    """One factory in two halls of 10 GPUs each; only the first grants no more than `budget`."""
    forest = worlds.plant(np.array([-1, 0, 0], dtype=np.int64), ("site", "granting", "open"))
    chat = worlds.PowerClass("chat", 1, (100_000, 300_000), (0.0, 10.0), factory="ns/chat")
    grant = Allotment("granting's spec.admits[0]", frozenset(("ns/chat",)), budget, "granting")
    sale = put_on_sale(forest, {"chat": chat}, (grant,))
    sold = np.array([sale.sold_as(forest.index[hall], "chat") for hall in ("granting", "open")])
    fleet = worlds.muster(forest, np.array([1, 2]), sold, len(sale.goods.classes), np.array([10, 10]))
    limits = np.full(3, 10**9, dtype=np.int64)
    return sale, settle(forest, sale.goods, fleet, np.zeros(3, dtype=np.int64), limits, sale.purses)


def test_a_grant_binds_in_its_domain_and_nowhere_else():
    sale, settled = two_halls(2_000_000)
    forest = settled.clearing.market.forest
    at = {name: sale.number(forest.index[name], "chat") for name in forest.names}
    assert at["granting"] != at["open"] == at["site"]
    assert sale.sheet(settled.clearing, forest.index["site"], [at["granting"], at["open"]]) == {
        "chat": 300_000
    }
    assert sale.sheet(settled.clearing, forest.index["granting"], [at["granting"]])["chat"] == pytest.approx(
        200_000, abs=2
    )
    assert sale.sheet(settled.clearing, forest.index["open"], [at["open"]]) == {"chat": 300_000}
    said = explain(settled.clearing, "granting", sale.name(forest.index["granting"], "chat"), settled.adders)
    assert said.bound == "Budget"
    assert said.bound_by == "granting's spec.admits[0]"
    # 10 tokens of 200 W is what the last watt is worth.
    assert said.price == pytest.approx(10 / 200, rel=1e-6)


def test_a_grant_that_is_large_enough_changes_nothing():
    _, settled = two_halls(10**9)
    assert settled.adders == {}
    assert set(settled.clearing.caps.tolist()) == {300_000}


def test_a_grant_in_an_unknown_domain_holds_nowhere_and_one_without_a_domain_everywhere():
    forest = worlds.plant(np.array([-1], dtype=np.int64), ("site",))
    chat = worlds.PowerClass("chat", 1, (100, 300), (0.0, 10.0), factory="ns/chat")
    gone = Allotment("gone", frozenset(("ns/chat",)), 1, "elsewhere")
    sale = put_on_sale(forest, {"chat": chat}, (gone, replace(gone, name="everywhere", domain=None)))
    assert [purse.name for purse in sale.purses] == ["everywhere"]
    assert sale.name(0, "chat") == "chat"
    assert sale.number(0, "unheard of") is None
