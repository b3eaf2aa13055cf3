"""The oracle of the cluster tests: it lets people's own acts pass, and nothing that follows from none of them."""

from datetime import UTC, datetime

import msgspec
import pytest

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.twin.invariants import BudgetWatch, NodeTruth, breaches

OLD = 1000
NOON = datetime(2026, 11, 19, 12, 0, tzinfo=UTC)
"""A Thursday."""


def hall(limit: int) -> list[PowerDomain]:
    spec = {"limit": f"{limit}W", "nodeSelector": {"matchLabels": {"room": "hall"}}}
    return [msgspec.convert({"metadata": {"name": "hall"}, "spec": spec}, PowerDomain)]


def node(watts: int, name: str = "a", overhead: int = 0) -> NodeTruth:
    return NodeTruth(name, {"room": "hall"}, watts * 1000, overhead * 1000)


def told(*looks: tuple[int, list[NodeTruth]]) -> list[bool]:
    """For each look, at (limit, nodes): was the domain said to be in breach?"""
    watch = BudgetWatch()
    return [bool(watch.look(hall(limit), nodes, NOON)) for limit, nodes in looks]


@pytest.mark.parametrize(
    ("draws", "breached"),
    [
        pytest.param([900, 900, 800, 600, 500], [], id="it only falls until the limit holds"),
        pytest.param([900, 900, 800, 801], [3], id="it rises while it is over"),
        pytest.param([900, 900, 600, 500, 601], [4], id="it is over once more after it had held"),
        pytest.param([900, OLD + 1], [1], id="it was over the old limit as well"),
        pytest.param([900, 600, 601], [2], id="over the new limit, which had held at once"),
    ],
)
def test_after_a_limit_was_lowered(draws: list[int], breached: list[int]):
    looks = [(600 if index else OLD, [node(draw)]) for index, draw in enumerate(draws)]
    assert [index for index, found in enumerate(told(*looks)) if found] == breached


def test_over_a_limit_that_nobody_lowered():
    assert told((OLD, [node(OLD)]), (OLD, [node(OLD + 1)]), (OLD, [node(OLD + 1)])) == [False, True, True]


def test_what_was_allowed_before_the_cut_may_still_arrive_until_the_limits_are_read_again():
    watch = BudgetWatch()
    looks = [(OLD, 700, True), (600, 700, True), (600, OLD, False), (600, OLD, True), (600, OLD + 1, False)]
    found = [bool(watch.look(hall(limit), [node(draw)], NOON, read_anew=anew)) for limit, draw, anew in looks]
    assert found == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("beside", "newcomer", "breached"),
    [
        pytest.param([900, 900, 700], [0, 200, 200], [], id="the others make room"),
        pytest.param([900, 901, 700], [0, 200, 200], [1], id="another rises with it"),
        pytest.param([900, 900, 900], [0, 200, 201], [2], id="the new one rises before there is room"),
    ],
)
def test_a_node_that_is_racked_draws_at_once(beside: list[int], newcomer: list[int], breached: list[int]):
    looks = [
        (OLD, [node(draw), *([node(more, "b")] if more else [])])
        for draw, more in zip(beside, newcomer, strict=True)
    ]
    assert [index for index, found in enumerate(told(*looks)) if found] == breached


def test_its_other_draw_is_known_a_little_later():
    known_late = [node(100, "b"), node(100, "b", overhead=50)]
    assert told((OLD, [node(900)]), *((OLD, [node(900), late]) for late in known_late)) == [False] * 3


def site(**specs: dict) -> list[PowerDomain]:
    return [
        msgspec.convert({"metadata": {"name": name}, "spec": spec}, PowerDomain)
        for name, spec in specs.items()
    ]


ROOM = {"nodeSelector": {"matchLabels": {"room": "hall"}}}


@pytest.mark.parametrize(
    ("start", "end", "days", "held"),
    [
        ("11:00", "13:00", [], True),
        ("12:00", "13:00", ["Thu"], True),
        ("11:00", "12:00", [], False),
        ("11:00", "13:00", ["Wed"], False),
        ("22:00", "13:00", ["Wed"], True),
        ("22:00", "13:00", ["Thu"], False),
        ("12:00", "01:00", ["Thu"], True),
    ],
)
def test_a_window_of_a_timetable_is_a_limit_while_it_is_open(start, end, days, held):
    window = {"name": "w", "start": start, "end": end, "limit": "60%", "days": days}
    domains = site(hall={"limit": "1000W", "timetable": [window], **ROOM})
    assert bool(breaches(domains, [node(700)], NOON)) == held


def test_a_share_of_the_parent_shrinks_with_the_parents_window_and_loads_below_count():
    window = {"name": "w", "start": "11:00", "end": "13:00", "limit": "50%"}
    domains = site(
        hall={"limit": "1000W", "timetable": [window]},
        rack={"limit": "80%", "parent": "hall", "fixedLoad": "150W", **ROOM},
    )
    assert [each.domain for each in breaches(domains, [node(250)], NOON)] == []
    assert [each.domain for each in breaches(domains, [node(251)], NOON)] == ["rack"]
    assert [each.domain for each in breaches(domains, [node(351)], NOON)] == ["hall", "rack"]


def test_a_cycle_of_parents_ends():
    domains = site(a={"limit": "1W", "parent": "b", **ROOM}, b={"limit": "1kW", "parent": "a"})
    assert [each.domain for each in breaches(domains, [node(2)], NOON)] == ["a", "b"]
