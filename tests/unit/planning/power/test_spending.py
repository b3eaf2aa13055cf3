"""What a budget across the tree pays for is charged to it like watts to a domain, and raises wait for it just so."""

from __future__ import annotations

from tests.unit.planning.power.builders import W, a_domain, a_leadership, a_node, a_sheet, a_target

from tokenfactory.planning.power.ledger import Ledger, observe
from tokenfactory.planning.power.lines import NodeFacts
from tokenfactory.planning.power.publish import plan_sheets
from tokenfactory.planning.power.spending import Budgets, Spending, lacking
from tokenfactory.planning.power.zones import Allotment

CHAT = "inference/chat/llama@H100"
QWEN = "inference/chat/qwen@H100"
SEARCH = "inference/search/llama@H100"
OWN = "inference/chat's spec.power.budget"
GRANT = "rack-b's spec.admits[0]"


def budgets(own: int | None = None, grant: int | None = None) -> Budgets:
    found = {}
    if own is not None:
        found[OWN] = Allotment("inference/chat", frozenset({"inference/chat"}), own * W)
    if grant is not None:
        found[GRANT] = Allotment(
            GRANT, frozenset({"inference/chat", "inference/search"}), grant * W, "rack-b"
        )
    return Budgets(found)


def look(sheets, nodes, *, guarded: bool = True) -> Ledger:
    domains = (
        a_domain("hall"),
        a_domain("rack-a", parent="hall"),
        a_domain("rack-b", parent="hall"),
    )
    empty = {each.name: a_sheet(each.name, tree="hall").obj() for each in domains}
    return observe(
        {each.name: each for each in domains},
        {**empty, **{sheet.metadata.name: sheet for sheet in sheets}},
        nodes,
        {node.metadata.name: NodeFacts(guarded=guarded) for node in nodes},
        a_leadership(),
    )


def node(name: str, rack: str, class_name: str, *, hall: int = 1, acked: int = 1):
    """Of one GPU, which a pod of this class has been granted."""
    made = a_node(name, path=["hall", rack], gpus=1).grant(f"of-{name}", class_name, 1).holds(f"of-{name}", 0)
    return made.acked(hall=hall, **{rack: acked})


def cut_and_raised(acked: int):
    """CHAT was cut from 700 to 300 W in rack-a; QWEN is to have 500 W instead of 300 in rack-b."""
    sheets = [
        a_sheet("hall").caps({CHAT: 700, QWEN: 700, SEARCH: 700}).obj(),
        a_sheet("rack-a", tree="hall", epoch=2).caps({CHAT: 300}).earlier(1, {CHAT: 700}).obj(),
        a_sheet("rack-b", tree="hall").caps({QWEN: 300, SEARCH: 300}).obj(),
    ]
    nodes = [
        node("a", "rack-a", CHAT, acked=acked).enforced(0, 700 if acked == 1 else 300).obj(),
        node("b", "rack-b", QWEN).obj(),
        node("c", "rack-b", SEARCH).obj(),
    ]
    caps = {CHAT: 700, QWEN: 700, SEARCH: 700}
    targets = a_target({"hall": caps, "rack-a": {CHAT: 300}, "rack-b": {QWEN: 500, SEARCH: 500}})
    return look(sheets, nodes), targets


def caps_of(plan, domain: str) -> dict[str, int]:
    found = [write.spec for write in plan.writes if write.spec.domain == domain]
    return {cap.class_name: cap.cap // W for spec in found for cap in spec.caps}


def test_a_raise_waits_until_the_budget_that_pays_for_it_has_been_given_the_watts():
    ledger, targets = cut_and_raised(acked=1)
    plan = plan_sheets(ledger, targets, budgets(own=1000))
    assert caps_of(plan, "rack-b") == {QWEN: 300, SEARCH: 500}, "who pays from nothing does not wait"
    (wait,) = plan.waits
    assert (wait.class_name, wait.reason, wait.blocked_by) == (QWEN, "Acknowledgement", OWN)
    assert wait.nodes == (("a", "rack-a", 2),), "not those who do not pay from it"
    assert f"{OWN} has no watts left until 1 nodes have acknowledged: a (rack-a epoch 2)" in str(wait)


def test_the_raise_goes_out_once_the_watts_were_read_back_as_gone():
    ledger, targets = cut_and_raised(acked=2)
    plan = plan_sheets(ledger, targets, budgets(own=1000))
    assert caps_of(plan, "rack-b") == {QWEN: 500, SEARCH: 500}
    assert plan.waits == ()


def test_a_raise_goes_as_far_as_the_budget_bears():
    ledger, targets = cut_and_raised(acked=1)
    assert caps_of(plan_sheets(ledger, targets, budgets(own=1100)), "rack-b")[QWEN] == 400


def test_two_raises_of_a_round_do_not_spend_a_budget_twice():
    sheets = [
        a_sheet("hall").caps({CHAT: 700}).obj(),
        a_sheet("rack-a", tree="hall").caps({CHAT: 300}).obj(),
        a_sheet("rack-b", tree="hall").caps({CHAT: 300}).obj(),
    ]
    ledger = look(sheets, [node("a", "rack-a", CHAT).obj(), node("b", "rack-b", CHAT).obj()])
    targets = a_target({"hall": {CHAT: 700}, "rack-a": {CHAT: 500}, "rack-b": {CHAT: 500}})
    plan = plan_sheets(ledger, targets, budgets(own=800))
    assert caps_of(plan, "rack-a") == {CHAT: 500}
    assert caps_of(plan, "rack-b") == {}


def test_a_domains_grant_is_held_also_where_another_sheet_of_the_path_rises():
    """The rack's own sheet allows 700 W, and the hall's is what has held CHAT down."""
    sheets = [
        a_sheet("hall").caps({CHAT: 300, SEARCH: 700}).obj(),
        a_sheet("rack-b", tree="hall", epoch=2)
        .caps({CHAT: 700, SEARCH: 200})
        .earlier(1, {SEARCH: 700})
        .obj(),
    ]
    nodes = [node("a", "rack-b", CHAT, acked=2), node("b", "rack-b", SEARCH, acked=1)]
    ledger = look(sheets, [each.obj() for each in nodes])
    targets = a_target({"hall": {CHAT: 700, SEARCH: 700}, "rack-b": {CHAT: 700, SEARCH: 200}})
    plan = plan_sheets(ledger, targets, budgets(grant=1000))
    assert "hall" not in {write.spec.domain for write in plan.writes}
    acked = look(sheets, [nodes[0].obj(), nodes[1].acked(hall=1, **{"rack-b": 2}).obj()])
    assert caps_of(plan_sheets(acked, targets, budgets(grant=1000)), "hall")[CHAT] == 700


def test_a_grant_does_not_pay_outside_its_domain():
    ledger, targets = cut_and_raised(acked=1)
    assert caps_of(plan_sheets(ledger, targets, budgets(grant=1000)), "rack-b") == {QWEN: 500, SEARCH: 500}


def test_at_the_cost_of_an_overdrawn_budget_nothing_rises_not_even_what_costs_nothing():
    """Where a stranger's pod may land its GPUs are charged their default limit already; its own are capped all the same."""
    sheets = [
        a_sheet("hall").caps({CHAT: 700}).obj(),
        a_sheet("rack-a", tree="hall").caps({CHAT: 300}).obj(),
    ]
    ledger = look(sheets, [node("a", "rack-a", CHAT).obj()], guarded=False)
    targets = a_target({"hall": {CHAT: 700, QWEN: 200}, "rack-a": {CHAT: 500, QWEN: 200}})
    assert caps_of(plan_sheets(ledger, targets, budgets(own=700)), "rack-a") == {CHAT: 500, QWEN: 200}
    assert caps_of(plan_sheets(ledger, targets, budgets(own=600)), "rack-a") == {CHAT: 300, QWEN: 200}, (
        "a class that its sheets do not name could never start"
    )


def test_a_pod_that_takes_a_gpu_of_the_same_charge_is_paid_for_all_the_same():
    """The domain is charged no more by it: the GPU stood at its default limit. Its budget is."""
    sheets = [
        a_sheet("hall").caps({CHAT: 700}).obj(),
        a_sheet("rack-a", tree="hall").caps({CHAT: 300}).obj(),
    ]
    waiting = a_node("a", path=["hall", "rack-a"], gpus=1).grant("p", CHAT, 1).acked(hall=1, **{"rack-a": 1})
    ledger = look(sheets, [waiting.obj()], guarded=False)
    assert budgets(own=300).charged(ledger) == {OWN: 300 * W}
    targets = a_target({"hall": {CHAT: 700}, "rack-a": {CHAT: 500}})
    assert plan_sheets(ledger, targets, budgets(own=300)).writes == ()


def test_a_grant_of_watts_that_a_budget_lacks_is_told_in_watts():
    ledger, _ = cut_and_raised(acked=1)
    entry = ledger.entries["b"]
    more = node("b", "rack-b", QWEN).grant("next", QWEN, 1).obj()
    after = ledger.with_node(more)
    held = budgets(own=1200)
    spent = Spending(held, held.charged(ledger))
    assert spent.charged == {OWN: 1000 * W}
    spent, why = lacking(spent, after, entry.line, after.entries["b"].line)
    assert why == (f"{OWN} lacks 100 W",)
    assert spent.over("inference/chat") == [f"{OWN} is overdrawn by 100 W"]
    assert spent.over("inference/search") == []
