"""More is tried only with watts that are left everywhere, in one domain alone, and nobody notices."""

from __future__ import annotations

import os

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.planning.power.builders import W, a_domain, a_node, a_sheet, a_target
from tests.unit.planning.power.test_ledger import CHAT, OTHER, look

from tokenfactory.api.gpu_node import AppliedEpoch
from tokenfactory.planning.power.publish import plan_sheets
from tokenfactory.planning.power.spending import Budgets
from tokenfactory.planning.power.tries import (
    Spare,
    are_held,
    gpus_of,
    held_beside,
    held_for,
    left_over,
    raised_in,
)
from tokenfactory.planning.power.tries import given as gets
from tokenfactory.planning.power.zones import Allotment

NO_BUDGETS = Budgets()
LEAVES = ("rack-a", "rack-b", "rack-c", "rack-d")
PARENTS = {
    "rack-a": "row-1",
    "rack-b": "row-1",
    "rack-c": "row-2",
    "rack-d": "hall",
    "row-1": "hall",
    "row-2": "hall",
}
"""And the hall itself."""


def path(leaf: str) -> list[str]:
    return [*path(PARENTS[leaf]), leaf] if leaf in PARENTS else [leaf]


UNEVEN = {
    "hall": 400,
    "row-1": 500,
    "row-2": 400,
    "rack-a": 600,
    "rack-b": 450,
    "rack-c": 600,
    "rack-d": 500,
}
"""Caps by sheet, in watts: some leaves would rise by their own sheets if those above did."""


class Plant:
    """Sheets, and one node in each rack that has acknowledged what it has seen of them."""

    def __init__(self, caps: dict[str, int], limits: dict[str, int]) -> None:
        self.targets = a_target({name: {CHAT: cap} for name, cap in caps.items()})
        self.domains = tuple(
            a_domain(name, parent=PARENTS.get(name), limit=limits.get(name, 10_000)) for name in caps
        )
        self.sheets = {name: a_sheet(name, tree="hall").caps({CHAT: cap}).obj() for name, cap in caps.items()}
        self.nodes = {
            leaf: a_node(leaf, path=path(leaf), gpus=2).grant(leaf, CHAT, 2).holds(leaf, 0, 1).obj()
            for leaf in LEAVES
        }
        self.acknowledge()

    def acknowledge(self, *leaves: str) -> None:
        for leaf in leaves or LEAVES:
            node = self.nodes[leaf]
            seen = [self.sheets[name].spec for name in path(leaf)]
            cap = min(spec.caps[0].cap for spec in seen)
            gpus = tuple(msgspec.structs.replace(gpu, enforced_milliwatts=cap) for gpu in node.status.gpus)
            applied = tuple(AppliedEpoch(domain=spec.domain, epoch=spec.epoch) for spec in seen)
            status = msgspec.structs.replace(node.status, gpus=gpus, applied=applied)
            self.nodes[leaf] = msgspec.structs.replace(node, status=status)

    def ledger(self):
        return look(list(self.nodes.values()), domains=self.domains, sheets=self.sheets.values())

    def highest(self) -> dict[str, int]:
        """What each rack's node may be obeying or come to obey."""
        ledger = self.ledger()
        return {leaf: ledger.highest(ledger.entries[leaf].line, CHAT) for leaf in LEAVES}

    def publish(self, targets) -> None:
        for write in plan_sheets(self.ledger(), targets).writes:
            held = self.sheets[write.spec.domain]
            self.sheets[write.spec.domain] = msgspec.structs.replace(held, spec=write.spec)


CAPS = st.integers(20, 60).map(lambda tens: tens * 10)


@given(
    caps=st.fixed_dictionaries(dict.fromkeys(("hall", "row-1", "row-2", *LEAVES), CAPS)),
    room=st.fixed_dictionaries(dict.fromkeys(("hall", "row-1", "row-2", *LEAVES), st.integers(0, 300))),
    leaf=st.sampled_from(LEAVES),
    order=st.permutations(LEAVES),
)
@settings(deadline=None, max_examples=int(os.environ.get("MARKET_EXAMPLES", "60")))
def test_one_domain_gets_what_is_left_and_nobody_else_may_ever_draw_more(caps, room, leaf, order):
    drawn = {
        name: sum(300 + 2 * min(caps[at] for at in path(rack)) for rack in LEAVES if name in path(rack))
        for name in caps
    }
    plant = Plant(caps, {name: drawn[name] + room[name] for name in caps})
    ledger, before = plant.ledger(), plant.highest()
    spare = left_over(ledger, NO_BUDGETS, [plant.targets])
    assert spare.left == {name: room[name] * W for name in caps}
    more = spare.each(ledger.path(leaf), gpus_of(ledger)[leaf, CHAT])
    cap = before[leaf] + more
    for _ in range(4):
        ledger = plant.ledger()
        ready = are_held(ledger, plant.targets, leaf, CHAT)
        plant.publish(
            raised_in(ledger, plant.targets, leaf, CHAT, cap)
            if ready
            else held_for(ledger, plant.targets, leaf, CHAT)
        )
        for rack in order:
            assert {r: most for r, most in plant.highest().items() if r != leaf} == {
                r: most for r, most in before.items() if r != leaf
            }
            assert all(plant.ledger().headroom(name) >= 0 for name in caps)
            plant.acknowledge(rack)
    assert plant.highest()[leaf] == cap or more < 10 * W
    for _ in range(4):
        plant.publish(plant.targets)
        plant.acknowledge()
    assert plant.highest() == before


def test_the_ledger_has_the_last_word():
    plant = Plant({"hall": 500, "row-1": 500, "row-2": 500, **dict.fromkeys(LEAVES, 500)}, {"row-1": 2700})
    for _ in range(3):
        plant.publish(raised_in(plant.ledger(), plant.targets, "rack-a", CHAT, 600 * W))
        assert plant.ledger().headroom("row-1") >= 0
        plant.acknowledge()
    assert plant.highest()["rack-a"] == 550 * W


def test_what_is_still_drawn_and_what_is_meant_for_others_is_not_left():
    plant = Plant({"hall": 500, "row-1": 500, "row-2": 500, **dict.fromkeys(LEAVES, 500)}, {"rack-a": 2000})
    lower = a_target({"hall": {CHAT: 400}})
    higher = a_target(
        {"hall": {CHAT: 500}, "row-1": {CHAT: 500}, "rack-a": {CHAT: 600}, "rack-b": {OTHER: 1}}
    )
    nobody = (2000 - 300) * W
    assert left_over(plant.ledger(), NO_BUDGETS, [lower]).left["rack-a"] == nobody - 2 * 500 * W
    assert left_over(plant.ledger(), NO_BUDGETS, [lower, higher]).left["rack-a"] == nobody - 2 * 500 * W
    risen = a_target({name: {CHAT: 600} for name in ("hall", "row-1", "rack-a")})
    assert left_over(plant.ledger(), NO_BUDGETS, [lower, risen]).left["rack-a"] == nobody - 2 * 600 * W
    plant.publish(lower)
    assert left_over(plant.ledger(), NO_BUDGETS, [lower]).left["rack-a"] == nobody - 2 * 500 * W
    plant.acknowledge("rack-a")
    assert left_over(plant.ledger(), NO_BUDGETS, [lower]).left["rack-a"] == nobody - 2 * 400 * W
    plant.publish(plant.targets)
    assert left_over(plant.ledger(), NO_BUDGETS, [lower]).left["rack-a"] == nobody - 2 * 500 * W, (
        "it may rise yet"
    )


def test_a_budget_is_spent_by_whoever_pays_from_it_and_only_where_it_holds():
    plant = Plant({"hall": 500, "row-1": 500, "row-2": 500, **dict.fromkeys(LEAVES, 500)}, {})
    mine, theirs = frozenset({"inference/chat"}), frozenset({"inference/other"})
    budgets = {
        "its own": Allotment("inference/chat", mine, 4100 * W),
        "row-1's": Allotment("row-1's spec.admits[0]", mine, 2050 * W, "row-1"),
        "theirs": Allotment("inference/other", theirs, 70 * W),
    }
    left = left_over(plant.ledger(), Budgets(budgets), [plant.targets]).left
    assert {name: left[name] for name in budgets} == {
        "its own": (4100 - 8 * 500) * W,
        "row-1's": (2050 - 4 * 500) * W,
        "theirs": 70 * W,
    }


def test_the_tightest_place_says_how_much_more_there_is():
    spare = Spare({"hall": 900, "rack": 500, "purse": -80})
    assert spare.each(("hall", "rack"), 8) == 62
    spare.take(("hall", "rack"), 8, 50)
    assert (spare.left["hall"], spare.each(("hall", "rack"), 8)) == (500, 12)
    assert spare.each(("hall", "purse"), 8) == -10


def test_only_those_are_held_whose_own_sheets_would_let_them_rise():
    plant = Plant(UNEVEN, {})
    ledger = plant.ledger()
    assert held_beside(ledger, plant.targets, "rack-a", CHAT) == {"rack-b": 400 * W, "rack-d": 400 * W}
    raised = raised_in(ledger, plant.targets, "rack-a", CHAT, 520 * W)
    assert {leaf: gets(raised, path(leaf), CHAT) // W for leaf in LEAVES} == {
        "rack-a": 520,
        "rack-b": 400,
        "rack-c": 400,
        "rack-d": 400,
    }
    assert raised["rack-a"][CHAT].cap == 600 * W
    assert raised["hall"][CHAT].fallback == plant.targets["hall"][CHAT].fallback
