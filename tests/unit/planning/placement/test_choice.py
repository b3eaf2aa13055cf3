"""Which node a pod gets, case by case."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planning.placement.builders import ANY, WATT, node, pod, snapshot, spread

from tokenfactory.planning.placement.inputs import Offer, Requirement, Taint, Toleration, Volume
from tokenfactory.planning.placement.plan import plan_placement


def where(plan) -> dict[str, str]:
    return {p.pod: p.node for p in plan.placed}


PREFERS = {
    "the product with more tokens per joule": (
        [node("a"), node("b", product="B200")],
        pod(offers=ANY),
        "b",
    ),
    "the product that is best for this very model": (
        [node("a"), node("b", product="B200")],
        pod(offers={"H100": Offer(500 * WATT, 2.0), "B200": Offer(800 * WATT, 1.0)}),
        "a",
    ),
    "the node that fails less": ([node("a", health=0.4), node("b")], pod(), "b"),
    "the node that has its image": (
        [node("a"), node("b", cached=frozenset({"nim:1.8"}))],
        pod(loads=frozenset({"nim:1.8"})),
        "b",
    ),
    "the node that can restore its cache as well": (
        [node("a", cached=frozenset({"nim:1.8"})), node("b", cached=frozenset({"nim:1.8", "weights"}))],
        pod(loads=frozenset({"nim:1.8", "weights"})),
        "b",
    ),
    "the node whose free GPUs are linked": ([node("a", linked_gpus=2), node("b", linked_gpus=4)], pod(), "b"),
    "a node outside of a multi-node NVLink domain": (
        [node("a", fabric="nvl-0"), node("a2", fabric="nvl-0"), node("b")],
        pod(),
        "b",
    ),
    "the rack without a replica": (
        [
            node("a1", failure_domains=("z", "r1")),
            node("a2", failure_domains=("z", "r1"), replicas={"team/chat/llama": 1}),
            node("b", failure_domains=("z", "r2")),
        ],
        pod(),
        "b",
    ),
    "a node that is broken into already": ([node("a"), node("b", free_gpus=4)], pod(), "b"),
    "the tightest fit among equals": ([node("a", free_gpus=6), node("b", free_gpus=5)], pod(gpus=2), "b"),
    "health over what is at hand when a node fails often": (
        [node("a", health=0.0, cached=frozenset({"w"})), node("b")],
        pod(loads=frozenset({"w"})),
        "b",
    ),
}


@pytest.mark.parametrize("case", PREFERS)
def test_prefers(case: str) -> None:
    nodes, asked, wanted = PREFERS[case]
    for order in (nodes, nodes[::-1]):
        assert where(plan_placement(snapshot(order, [asked], site=10_000))) == {"team/a": wanted}


MUST = {
    "a matching label": ([node("a"), node("b", labels={"pool": "x"})], pod(selector={"pool": "x"}), "b"),
    "one of the affinity's terms": (
        [node("a", labels={"gen": "3"}), node("b", labels={"gen": "5"})],
        pod(
            affinity=(
                (Requirement("gen", "Gt", ("4",)), Requirement("gen", "Exists")),
                (Requirement("gen", "In", ("9",)),),
            )
        ),
        "b",
    ),
    "an absent label for NotIn and DoesNotExist": (
        [node("a", labels={"spot": "yes"}), node("b")],
        pod(affinity=((Requirement("spot", "NotIn", ("yes",)), Requirement("spot", "DoesNotExist")),)),
        "b",
    ),
    "a tolerated taint": ([node("a", taints=(Taint("x"),)), node("b")], pod(), "b"),
    "a node whose kubelet can run it": (
        [node("a"), node("b", features=frozenset({"x"}))],
        pod(features=frozenset({"x"})),
        "b",
    ),
    "a node that kube-scheduler did not refuse": (
        [node("a"), node("b")],
        pod(not_on={"a": "no free ports"}),
        "b",
    ),
    "a node that is open": ([node("a", closed="quarantined: XID 79"), node("b")], pod(), "b"),
    "free CPU beside others' claims": (
        [node("a", free={"cpu": 3_000}), node("b", free={"cpu": 8_000})],
        pod(resources={"cpu": 4_000}),
        "b",
    ),
    "a product that serves the model": ([node("a", product="L4"), node("b")], pod(), "b"),
    "watts at every domain of the path": (
        [node("a", path=("site", "hall", "rack-a")), node("b", path=("site", "hall", "rack-b"))],
        pod(),
        "b",
    ),
    "a domain that admits it": (
        [node("a", path=("site", "hall")), node("b")],
        pod(refused={"hall": "no grant for namespace team"}),
        "b",
    ),
    "a node that reaches its volume": (
        [node("a", labels={"name": "a"}), node("b", labels={"name": "b"}, health=0.0)],
        pod(volumes=(Volume("cache", ((Requirement("name", "In", ("b",)),),)),)),
        "b",
    ),
}


@pytest.mark.parametrize("case", MUST)
def test_must_have(case: str) -> None:
    nodes, asked, wanted = MUST[case]
    plan = plan_placement(snapshot(nodes, [asked], site=10_000, hall=5_000, rack_a=1_999, rack_b=2_000))
    assert where(plan) == {"team/a": wanted}
    alone = [n for n in nodes if n.name != wanted]
    nowhere = plan_placement(snapshot(alone, [asked], site=10_000, hall=5_000, rack_a=1_999, rack_b=2_000))
    if case != "the spread that it asks for":
        assert not nowhere.placed


def test_an_empty_affinity_term_matches_nothing() -> None:
    assert not where(plan_placement(snapshot([node("a")], [pod(affinity=((),))])))


def test_toleration_opens_the_node() -> None:
    tainted = [node("a", taints=(Taint("gpu", "batch"), Taint("soft", effect="PreferNoSchedule")))]
    for toleration in (
        Toleration("gpu", "Equal", "batch"),
        Toleration(operator="Exists"),
        Toleration("gpu", "Exists"),
    ):
        assert where(plan_placement(snapshot(tainted, [pod(tolerations=(toleration,))])))
    for toleration in (Toleration("gpu", "Equal", "other"), Toleration("gpu", "Exists", effect="NoExecute")):
        assert not where(plan_placement(snapshot(tainted, [pod(tolerations=(toleration,))])))


def test_the_higher_band_gets_the_watts_whatever_it_is_worth() -> None:
    pods = [pod("team/low", band=100, value=1000.0), pod("team/high", band=200, value=0.001)]
    plan = plan_placement(snapshot([node("a")], pods, site=3_000))
    assert where(plan) == {"team/high": "a"}


def test_a_low_band_never_pushes_a_high_one_out_but_may_make_it_move() -> None:
    """The 4-GPU pod fits only on b, so the high pod stands on a, though it likes b better."""
    nodes = [node("a", free_gpus=1, health=0.0), node("b", free_gpus=4)]
    pods = [pod("team/high", gpus=1, band=200), pod("team/low", gpus=4, band=100, model="team/chat/other")]
    assert where(plan_placement(snapshot(nodes, pods, site=10_000))) == {"team/high": "a", "team/low": "b"}


def test_small_replicas_leave_room_for_a_whole_node_one() -> None:
    nodes = [node("a"), node("b"), node("c", free_gpus=7)]
    pods = [pod(f"team/s{i}", gpus=2) for i in range(3)]
    plan = plan_placement(snapshot(nodes, pods))
    assert set(where(plan).values()) == {"c"}


def test_a_budget_is_charged_besides_the_path() -> None:
    pods = [pod("team/a", accounts=("budget",)), pod("team/b", accounts=("budget",)), pod("team/c")]
    plan = plan_placement(snapshot([node("a"), node("b")], pods, site=10_000, budget=3_000))
    assert sorted(where(plan)) == ["team/a", "team/c"]
    assert plan.unplaced[0].message == "0/2 nodes: 1 without 4 free GPUs, 1 in budget need 1kW more"


def test_waking_a_node_is_charged_once_and_only_on_its_path() -> None:
    asleep = [node("a", wake_milliwatts=700 * WATT)]
    pods = [pod("team/a", accounts=("budget",)), pod("team/b", accounts=("budget",))]
    plan = plan_placement(snapshot(asleep, pods, site=4_700, budget=4_000))
    assert [(p.milliwatts, p.wake_milliwatts) for p in plan.placed] == [(2_000_000, 700_000), (2_000_000, 0)]
    assert len(plan_placement(snapshot(asleep, pods, site=4_699, budget=4_000)).placed) == 1


@settings(max_examples=20, deadline=None)
@given(
    free=st.lists(st.integers(0, 8), min_size=3, max_size=9), pods=st.integers(0, 14), skew=st.integers(1, 3)
)
def test_a_hard_spread_holds_and_is_used_to_the_full(free: list[int], pods: int, skew: int) -> None:
    nodes = [node(f"n{i}", free_gpus=gpus, labels={"zone": str(i % 3)}) for i, gpus in enumerate(free)]
    asked = [pod(f"team/p{i:02d}", gpus=1, **spread("zone", skew)) for i in range(pods)]
    plan = plan_placement(snapshot(nodes, asked), effort=100)
    room = [sum(free[z::3]) for z in range(3)]
    counts = [sum(int(p.node[1:]) % 3 == z for p in plan.placed) for z in range(3)]
    assert max(counts) - min(counts) <= skew
    assert len(plan.placed) == min(pods, sum(min(r, min(room) + skew) for r in room))


def test_a_replica_that_spans_nodes_stands_in_one_nvlink_domain_or_nowhere() -> None:
    nodes = [node(f"{f}{i}", fabric=f"nvl-{f}") for f in "ab" for i in range(2)]
    gang = [pod(f"team/g{i}", gpus=8, gang="g") for i in range(2)]
    plan = plan_placement(snapshot([*nodes[:1], *nodes[2:]], gang))
    assert set(where(plan).values()) == {"b0", "b1"}
    split = plan_placement(snapshot([nodes[0], nodes[2]], gang))
    assert not split.placed
    assert {u.reason for u in split.unplaced} == {"NVLinkDomainTooSmall"}
    assert "1 of 2" in split.unplaced[0].message


def test_an_overdrawn_domain_takes_nothing() -> None:
    plan = plan_placement(snapshot([node("a", path=("site", "hall"))], [pod()], site=90_000, hall=-500))
    assert plan.unplaced[0].message == "0/1 nodes: 1 in hall need 2.5kW more"


def test_nothing_to_do() -> None:
    assert plan_placement(snapshot([], [])).placed == ()
    told = plan_placement(snapshot([], [pod()])).unplaced[0]
    assert (told.reason, told.message) == ("NoNodes", "0/0 nodes: there are no GPU nodes")
