"""Parking: near the best mixed-integer split of run and parked replicas, and never above it."""

import numpy as np
import pytest
from tests.unit.planning.power import oracle, worlds

from tokenfactory.planning.power.budgets import Purse, settle
from tokenfactory.planning.power.goods import PowerClass
from tokenfactory.planning.power.parking import park
from tokenfactory.planning.power.profile import hull_of_curve
from tokenfactory.planning.power.whole import parts


def cliff_classes(rng, count):
    """Models that make nothing below their knee and are concave above it."""
    found = []
    for number in range(count):
        low = int(rng.integers(80, 250)) * 1000
        knee = low + int(rng.integers(50, 300)) * 1000
        caps = knee + np.cumsum(rng.integers(20_000, 150_000, size=int(rng.integers(1, 4))))
        first = rng.uniform(1.0, 10.0)
        slopes = np.sort(rng.uniform(0.05, first, size=caps.size))[::-1]
        milliwatts = (low, knee, *(int(c) for c in caps))
        gains = np.concatenate(([first], slopes)) * np.diff(milliwatts) / 1000
        tokens = (0.0, *(float(t) for t in np.cumsum(gains)))
        chords = (True, *[False] * caps.size)
        size = int(rng.choice([1, 2, 4, 8]))
        found.append(
            PowerClass(f"c{number:02d}", 1, milliwatts, tokens, chords=chords, gpus_per_replica=size)
        )
    return tuple(found)


def world(seed, replicas):
    rng = np.random.default_rng(seed)
    classes = cliff_classes(rng, 5)
    goods = worlds.gather_goods(classes)
    forest = worlds.plant(worlds.random_parents(rng, 7))
    pairs = [(d, c) for d in range(7) for c in range(5) if rng.random() < 0.7] or [(0, 0)]
    counts = [max(int(replicas * rng.uniform(0.3, 1)), 1) * classes[c].gpus_per_replica for _, c in pairs]
    domain, number = np.array(pairs).T
    fleet = worlds.muster(forest, domain, number, 5, np.array(counts))
    market = worlds.Market(forest, worlds.put_in_order(goods), fleet, np.zeros(7, dtype=np.int64))
    spread = np.zeros(7, dtype=np.int64)
    np.add.at(spread, fleet.domain, fleet.gpus * (goods.maximum - goods.minimum)[fleet.class_index])
    limits = market.base + (forest.subtree_sums(spread) * rng.uniform(0.2, 1.1, 7)).astype(np.int64)
    return market, limits


def best_with_parking(market, limits, purses=()):
    """Per domain and class a whole number of replicas runs, at or above the knee; the rest is parked."""
    value, upper, integer, owner, watts = [], [], [], [], []
    links = []
    for pair, number in enumerate(market.fleet.class_index):
        each = market.order.goods.classes[number]
        size, count = each.gpus_per_replica, int(market.fleet.gpus[pair]) // each.gpus_per_replica
        run = len(value)
        value.append(size * each.tokens[1])
        upper.append(count)
        integer.append(True)
        owner.append(pair)
        watts.append(size * (each.milliwatts[1] - each.milliwatts[0]) / 1000)
        for segment in range(1, len(each.milliwatts) - 1):
            width = (each.milliwatts[segment + 1] - each.milliwatts[segment]) / 1000
            links.append(([len(value), run], [1.0, -width * size]))
            value.append((each.tokens[segment + 1] - each.tokens[segment]) / width)
            upper.append(width * size * count)
            integer.append(False)
            owner.append(pair)
            watts.append(1.0)
    rows, bounds = list(links), [0.0] * len(links)
    for position in range(market.forest.count):
        columns = [
            i for i, p in enumerate(owner) if position in market.forest.path(int(market.fleet.domain[p]))
        ]
        rows.append((columns, [watts[i] for i in columns]))
        bounds.append(int(limits[position] - market.base[position]) / 1000)
    for purse in purses:
        mine = purse.members[market.fleet.class_index]
        columns = [i for i, p in enumerate(owner) if mine[p]]
        rows.append((columns, [watts[i] for i in columns]))
        minimum = market.order.goods.minimum[market.fleet.class_index]
        bounds.append((purse.milliwatts - int((market.fleet.gpus * minimum)[mine].sum())) / 1000)
    return oracle.solve_lp(value, upper, rows, bounds, integer)


def really_made(clearing):
    """Tokens by the curves as they are: nothing at all below the knee."""
    fleet, classes = clearing.market.fleet, clearing.market.order.goods.classes
    return sum(
        int(gpus) * classes[c].tokens_at(int(cap))
        for gpus, c, cap in zip(fleet.gpus, fleet.class_index, clearing.caps, strict=True)
    )


def compare(seed, replicas):
    market, limits = world(seed, replicas)
    plan = park(market.clear(limits))
    assert (plan.clearing.drawn <= limits).all()
    made = really_made(plan.clearing)
    found, bound, _ = best_with_parking(market, limits)
    assert made <= bound * (1 + 1e-6)
    return made / max(found, 1e-9)


SIZES = (1, 2, 3, 5, 10, 20, 60, 200)
"""Replicas of a class in a domain, at most."""


@pytest.mark.parametrize("size", SIZES)
def test_parking_is_within_half_a_percent_of_the_best_and_never_above(size):
    assert min(compare(seed, size) for seed in range(3)) >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_parking_on_many_random_sites(size):
    for seed in range(1000, 1063):
        assert compare(seed, size) >= 0.995, seed


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES[:-1])
def test_parking_under_a_budget_on_many_random_sites(size):
    for seed in range(1020, 1044):
        assert compare_with_a_budget(seed, size) >= 0.995, seed


def test_what_binds_apart_is_searched_apart():
    """Thirty halls, each with its own limit: more pairs than are searched together, in as many parts as halls."""
    rng = np.random.default_rng(5)
    classes = cliff_classes(rng, 6)
    forest = worlds.plant(np.array([-1] + [0] * 30, dtype=np.int64))
    domain, number = np.repeat(np.arange(1, 31), 6), np.tile(np.arange(6), 30)
    counts = np.array([3 * classes[c].gpus_per_replica for c in number])
    goods = worlds.gather_goods(classes)
    fleet = worlds.muster(forest, domain, number, 6, counts)
    market = worlds.Market(forest, worlds.put_in_order(goods), fleet, np.zeros(31, dtype=np.int64))
    spread = np.zeros(31, dtype=np.int64)
    np.add.at(spread, fleet.domain, fleet.gpus * (goods.maximum - goods.minimum)[fleet.class_index])
    limits = market.base + (spread * rng.uniform(0.2, 0.8, 31)).astype(np.int64)
    limits[0] = 10**12
    clearing = market.clear(limits)
    found = parts(clearing)
    assert [len(pairs) for _, pairs in found] == [6] * 30
    plan = park(clearing)
    assert (plan.clearing.drawn <= limits).all()
    best, bound, _ = best_with_parking(market, limits)
    assert 0.995 * best <= really_made(plan.clearing) <= bound * (1 + 1e-6)


def two_knees(seed):
    """One class with a cliff below each of two knees, in one domain, whose limit lies anywhere below the upper one."""
    rng = np.random.default_rng(seed)
    lower = int(rng.integers(300, 420)) * 1000
    upper = lower + int(rng.integers(80, 250)) * 1000
    low_tokens = rng.uniform(100, 500)
    high_tokens = low_tokens * rng.uniform(1.1, 1.6)
    curve = [
        (200_000, 0.0),
        (lower - 1000, 0.05 * low_tokens),
        (lower, low_tokens),
        (upper - 1000, 1.02 * low_tokens),
        (upper, high_tokens),
        (1_000_000, 1.001 * high_tokens),
    ]
    count = int(rng.choice([3, 10, 50, 200]))
    limit = int(8 * count * (200_000 + (upper - 200_000) * rng.uniform(0.2, 1.05)))
    return curve, count, limit


@pytest.mark.parametrize("seed", range(60))
def test_between_two_knees_fewer_replicas_run_at_the_upper_one(seed):
    """Against every number of running replicas, each with all the watts that are left to it."""
    curve, count, limit = two_knees(seed)
    each = hull_of_curve(curve, None).to_class("m", band=1, gpus_per_replica=8)
    goods, forest = worlds.gather_goods((each,)), worlds.plant(np.array([-1], dtype=np.int64))
    zero = np.zeros(1, dtype=np.int64)
    fleet = worlds.muster(forest, zero, zero, 1, np.array([8 * count]))
    market = worlds.Market(forest, worlds.put_in_order(goods), fleet, zero)
    plan = park(market.clear(np.array([limit], dtype=np.int64)))
    assert (plan.clearing.drawn <= limit).all()

    def makes(running):
        cap = (limit - 8 * (count - running) * 200_000) // (8 * running)
        return 8 * running * max((tokens for watts, tokens in curve if watts <= cap), default=0.0)

    best = max(makes(running) for running in range(1, count + 1))
    assert really_made(plan.clearing) >= 0.995 * best


def small(min_replicas=0, floor=0, tokens=(0.0, 10.0), curve=()):
    each = PowerClass(
        "m",
        1,
        (100_000, 300_000),
        tokens,
        floor=floor,
        chords=(True,),
        gpus_per_replica=2,
        min_replicas=min_replicas,
        curve=curve,
    )
    goods = worlds.gather_goods((each,))
    forest = worlds.plant(np.array([-1], dtype=np.int64), ("hall",))
    zero = np.zeros(1, dtype=np.int64)
    fleet = worlds.muster(forest, zero, zero, 1, np.array([20]))
    market = worlds.Market(forest, worlds.put_in_order(goods), fleet, zero)
    return park(market.clear(np.array([20 * 100_000 + 20 * 100_000], dtype=np.int64)))


def test_half_the_watts_run_half_the_replicas_at_the_knee():
    plan = small()
    assert plan.parked == {("hall", "m"): 5}
    assert plan.clearing.caps.tolist() == [300_000]


def test_below_the_slo_floor_replicas_are_drained_even_if_all_could_limp():
    plan = small(floor=1, tokens=(9.0, 10.0))
    assert plan.parked == {("hall", "m"): 5}


def test_the_fewest_replicas_asked_for_are_never_drained():
    plan = small(floor=1, min_replicas=8)
    assert plan.parked == {("hall", "m"): 2}
    # 20 GPUs with 4 kW: 4 parked at 100 W, 16 at 225 W, below their floor: that is the next step.
    assert plan.clearing.caps.tolist() == [225_000]


def test_where_the_curve_is_good_enough_nobody_is_parked():
    plan = small(tokens=(5.0, 10.0), curve=((100_000, 5.0), (150_000, 6.0), (300_000, 10.0)))
    assert plan.parked == {}


def compare_with_a_budget(seed, replicas):
    """Every other class pays from one budget, of half of what they would draw beyond their minimum."""
    market, limits = world(seed, replicas)
    goods, fleet = market.order.goods, market.fleet
    members = np.array([i % 2 == 0 for i in range(len(goods.classes))])
    mine = members[fleet.class_index]
    least = int((fleet.gpus * goods.minimum[fleet.class_index])[mine].sum())
    freely = int((fleet.gpus * market.clear(limits).caps)[mine].sum())
    purse = Purse("even", members, (least + freely) // 2)

    def settled(running):
        parked = fleet.gpus - running.fleet.gpus
        owed = int((parked * goods.minimum[fleet.class_index])[mine].sum())
        left = Purse(purse.name, purse.members, purse.milliwatts - owed)
        settled = settle(
            running.forest,
            goods,
            running.fleet,
            running.committed,
            limits,
            (left,),
            firsts=running.order.firsts,
        )
        return settled.clearing

    plan = park(settled(market), settled, (purse,))
    running = plan.clearing.market.fleet.gpus
    spent = running * plan.clearing.caps + (fleet.gpus - running) * goods.minimum[fleet.class_index]
    assert int(spent[mine].sum()) <= purse.milliwatts
    assert (plan.clearing.drawn <= limits).all()
    made = really_made(plan.clearing)
    found, bound, _ = best_with_parking(market, limits, (purse,))
    assert made <= bound * (1 + 1e-6)
    return made / max(found, 1e-9)


@pytest.mark.parametrize(("seed", "size"), [(1036, 1), (1, 2), (1010, 3), (1009, 5), (4, 100)])
def test_parking_keeps_within_a_budget_across_the_tree(seed, size):
    assert compare_with_a_budget(seed, size) >= 0.995
