"""Rules between pods: who must stand with whom, who must not, and what is said when no place is left."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planning.placement.builders import LLAMAS as LIKE
from tests.unit.planning.placement.builders import apart, beside, near, node, of, pod, spread
from tests.unit.planning.placement.oracle import violations

from tokenfactory.planning.placement.inputs import NodeCandidate, PodRule
from tokenfactory.planning.placement.plan import plan_placement

FRONT = "pods of web with app=front"
CACHE = "pods with claim team/cache"
HERE = PodRule("zone", FRONT)


def zones(*names: str, gpus: int = 8) -> list[NodeCandidate]:
    """A node in each of these zones; the first is the one that everybody likes best."""
    return [
        node(
            f"n{i}",
            labels={"zone": name} if name else {},
            gpus=gpus,
            free_gpus=gpus,
            health=max(0.0, 1 - i / 10),
        )
        for i, name in enumerate(names)
    ]


GOES = {
    "to the zone of the pods that it must be near": (
        [pod(**near("zone", FRONT))], {"standing": {HERE: {"b": 1}}}, ["n1"]),
    "nowhere where such pods are in no zone of ours": (
        [pod(**near("zone", FRONT))], {"standing": {HERE: {"elsewhere": 1}}}, []),
    "nowhere where there are no such pods": ([pod(**near("zone", FRONT))], {}, []),
    "anywhere when it is the first of its kind": ([pod(**near("zone", CACHE), **of(CACHE))], {}, ["n0"]),
    "to where the first of its kind stands": (
        [pod(**near("zone", CACHE), **of(CACHE))], {"standing": {PodRule("zone", CACHE): {"b": 1}}}, ["n1"]),
    "where its first finds no room, with the others": (
        [pod(f"team/{i}", gpus=3, **near("zone", CACHE), **of(CACHE)) for i in range(3)], {}, ["n0", "n0"]),
    "away from the pods that it stands apart from": (
        [pod(**apart("zone", FRONT))], {"standing": {HERE: {"a": 2}}}, ["n1"]),
    "to a node without the label, which is apart from everything": (
        [pod(**apart("zone", FRONT))], {"standing": {HERE: {"a": 2, "b": 1}}}, ["n2"]),
    "away from pods that stand apart from it": (
        [pod(**of(LIKE))], {"refusing": {PodRule("zone", LIKE): {"a": 1}}}, ["n1"]),
    "where such pods are, when they mean others": (
        [pod()], {"refusing": {PodRule("zone", LIKE): {"a": 1}}}, ["n0"]),
    "one to each zone, when they stand apart from each other": (
        [pod(f"team/{i}", **apart("zone", LIKE), **of(LIKE)) for i in range(2)], {}, ["n0", "n1"]),
    "to the zone that has fewest": (
        [pod(**spread("zone"))], {"standing": {PodRule("zone", LIKE): {"a": 1}}}, ["n1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", GOES)
def test_goes(case: str) -> None:
    asked, there, wanted = GOES[case]
    snapshot = beside(zones("a", "b", ""), asked, **there)
    plan = plan_placement(snapshot)
    assert violations(snapshot, plan) == []
    assert sorted(placed.node for placed in plan.placed) == wanted


@pytest.mark.parametrize(
    ("pods", "nodes", "effort"), [(2, 2, None), (250, 100, 0)], ids=["searched", "only filled"]
)
def test_what_must_be_near_waits_for_no_second_round(pods: int, nodes: int, effort: int | None) -> None:
    """The pod that others lean on may come after them."""
    leaning = [pod(f"team/a{i}", gpus=1, value=9.0, **near("zone", FRONT)) for i in range(pods)]
    front = pod("team/z", gpus=4, **of(FRONT))
    plan = plan_placement(beside(zones(*"ab" * (nodes // 2)), [*leaning, front], watts=900_000), effort)
    assert len(plan.placed) == pods + 1 if nodes == 2 else len(plan.placed) > 100
    assert len({int(placed.node[1:]) % 2 for placed in plan.placed}) == 1, "all in one zone"


def test_what_is_placed_now_keeps_away_what_is_placed_with_it() -> None:
    """Whichever of the two comes first, and although the second says nothing itself."""
    shy, front = pod("team/shy", gpus=1, **apart("zone", FRONT)), pod("team/front", gpus=1, **of(FRONT))
    for pods in ([replace(shy, value=9.0), front], [shy, replace(front, value=9.0)]):
        plan = plan_placement(beside(zones("a", "a", "b"), pods))
        assert len({"b" if placed.node == "n2" else "a" for placed in plan.placed}) == 2
        assert [each.reason for each in plan_placement(beside(zones("a", "a"), pods)).unplaced] == [
            "PodAntiAffinity"
        ]


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_rules_hold_whatever_is_taken_out_and_put_back(data: st.DataObject) -> None:
    """Few watts and many wishes, so that the search moves what others lean on."""
    nodes = [
        node(
            f"n{i}", labels={"zone": data.draw(st.sampled_from("ab"))}, free_gpus=data.draw(st.integers(1, 6))
        )
        for i in range(4)
    ]
    kinds = [of(FRONT), near("zone", FRONT), near("zone", CACHE) | of(CACHE), apart("zone", CACHE), {}]
    asked = [
        pod(
            f"team/{i}",
            gpus=data.draw(st.integers(1, 4)),
            value=data.draw(st.sampled_from((1.0, 2.0, 5.0))),
            **data.draw(st.sampled_from(kinds)),
        )
        for i in range(7)
    ]
    snapshot = beside(nodes, asked, watts=data.draw(st.sampled_from((2_000, 4_000, 9_000))))
    assert violations(snapshot, plan_placement(snapshot, effort=400)) == []


TOLD = {
    "near": (
        pod(**near("zone", FRONT)),
        {"standing": {HERE: {"c": 1}}},
        ("PodAffinity", "0/2 nodes: 2 not with pods of web with app=front (same zone)"),
    ),
    "apart": (
        pod(**apart("zone", FRONT), **of(LIKE)),
        {"standing": {HERE: {"a": 1}}, "refusing": {PodRule("zone", LIKE): {"a": 1, "b": 1}}},
        (
            "PodAntiAffinity",
            f"0/2 nodes: 1 with {FRONT} (not the same zone), 1 with pods that stand apart from {LIKE} (not the same zone)",
        ),
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_told(case: str) -> None:
    asked, there, told = TOLD[case]
    plan = plan_placement(beside(zones("a", "b"), [asked], **there))
    assert [(each.reason, each.message) for each in plan.unplaced] == [told]


def test_a_full_zone_breaks_the_spread_of_the_other() -> None:
    nodes = [node("a", labels={"zone": "1"}), node("b", free_gpus=0, labels={"zone": "2"})]
    plan = plan_placement(beside(nodes, [pod(**spread("zone"))], standing={PodRule("zone", LIKE): {"1": 1}}))
    assert [(each.reason, each.message) for each in plan.unplaced] == [
        ("SpreadNotPossible", "0/2 nodes: 1 without 4 free GPUs, 1 would break its spread over zone")
    ]
