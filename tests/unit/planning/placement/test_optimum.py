"""Against the true optimum: every limit holds, and the plan is worth at least 98 % of the best one."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planning.placement.clusters import random_cluster
from tests.unit.planning.placement.oracle import Verdict, judge, violations

from tokenfactory.planning.placement.inputs import Snapshot
from tokenfactory.planning.placement.plan import plan_placement

LEAST = 0.98


def cluster(seed: int) -> Snapshot:
    return random_cluster(seed, nodes=6 + seed % 7, pods=10 + seed % 13, scarce=0.4 + 0.1 * (seed % 4))


def verdict(seed: int) -> Verdict:
    snapshot = cluster(seed)
    plan = plan_placement(snapshot)
    assert violations(snapshot, plan) == [], f"seed {seed}"
    return judge(snapshot, plan)


@pytest.mark.parametrize("seed", range(4))
def test_near_the_optimum(seed: int) -> None:
    assert verdict(seed).share >= LEAST


@pytest.mark.slow
def test_near_the_optimum_on_200_clusters() -> None:
    verdicts = {seed: verdict(seed) for seed in range(200)}
    below = {seed: round(v.share, 4) for seed, v in verdicts.items() if v.share < LEAST}
    assert below == {}
    # Harder: no band for itself, however small, goes short of what the best plan gives it, but for a few in a hundred.
    short = {seed: round(v.worst_band, 4) for seed, v in verdicts.items() if v.worst_band < LEAST}
    assert len(short) <= 5, short


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    nodes=st.integers(1, 9),
    pods=st.integers(0, 14),
    scarce=st.floats(0.05, 2.0),
)
def test_no_limit_is_ever_broken(seed: int, nodes: int, pods: int, scarce: float) -> None:
    snapshot = random_cluster(seed, nodes=nodes, pods=pods, scarce=scarce)
    assert violations(snapshot, plan_placement(snapshot, effort=200)) == []


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_input_decides_nothing(seed: int) -> None:
    snapshot = random_cluster(seed, nodes=6, pods=8)
    mirrored = replace(
        snapshot,
        nodes=snapshot.nodes[::-1],
        pods=snapshot.pods[::-1],
        headroom_milliwatts=dict(reversed(snapshot.headroom_milliwatts.items())),
        standing=dict(reversed(snapshot.standing.items())),
    )
    assert plan_placement(snapshot, effort=200) == plan_placement(mirrored, effort=200)


def test_a_large_plan_takes_few_evaluations() -> None:
    """1,000 nodes and 500 pods: each pod is weighed against all nodes about once, not once per node or pair."""
    snapshot = random_cluster(1, nodes=1_000, pods=500, models=12, gangs=False, scarce=1.5)
    plan = plan_placement(snapshot)
    assert violations(snapshot, plan) == []
    assert len(plan.placed) + len(plan.unplaced) == 500
    assert plan.evaluations <= 500 + 300
