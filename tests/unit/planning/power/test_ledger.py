"""The ledger charges the most that a node may draw by anything that its agent may be obeying."""

from __future__ import annotations

import msgspec
import pytest
from tests.unit.planning.power.builders import W, a_domain, a_leadership, a_node, a_sheet, a_target

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger, observe
from tokenfactory.planning.power.lines import NodeFacts
from tokenfactory.planning.power.publish import plan_claims, plan_cuts, plan_sheets

CHAT = "inference/chat/llama@H100"
OTHER = "inference/chat/qwen@H100"


def look(nodes, *, limit=10_000, sheets=(), facts=None, leadership=None, domains=None) -> Ledger:
    guarded = {node.metadata.name: NodeFacts(guarded=True) for node in nodes}
    return observe(
        {d.name: d for d in domains or (a_domain("hall", limit=limit),)},
        {sheet.metadata.name: sheet for sheet in sheets},
        nodes,
        {**guarded, **(facts or {})},
        leadership or a_leadership(),
    )


def hall(**caps):
    return a_sheet("hall").caps({CHAT: caps.pop("chat", 500)}).obj()


def test_an_idle_guarded_node_is_charged_overhead_and_minimum() -> None:
    ledger = look([a_node("a", path=["hall"], gpus=4).obj()], sheets=[hall()])
    assert ledger.node_charge("a") == (300 + 4 * 200) * W


def test_a_granted_pod_is_charged_its_cap_before_any_gpu_is_known_to_be_its_own() -> None:
    node = a_node("a", path=["hall"], gpus=4).grant("p", CHAT, 2).acked(hall=1).obj()
    assert look([node], sheets=[hall()]).node_charge("a") == (300 + 2 * 500 + 2 * 200) * W


def test_a_lower_sheet_lowers_the_charge_only_when_it_is_acknowledged() -> None:
    sheet = a_sheet("hall", epoch=2).caps({CHAT: 300}).earlier(1, {CHAT: 500}).obj()
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).holds("p", 0).acked(hall=1)
    assert look([node.obj()], sheets=[sheet]).node_charge("a") == 800 * W
    assert look([node.acked(hall=2).obj()], sheets=[sheet]).node_charge("a") == 600 * W


def test_a_domain_that_the_agent_never_acknowledged_bounds_nothing() -> None:
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).obj()
    assert look([node], sheets=[hall()]).node_charge("a") == (300 + 700) * W


def test_an_acknowledgement_from_before_the_sheet_remembers_bounds_nothing() -> None:
    sheet = a_sheet("hall", epoch=9, complete_from=7).caps({CHAT: 300}).obj()
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).holds("p", 0).acked(hall=5).obj()
    assert look([node], sheets=[sheet]).node_charge("a") == 1000 * W


def test_a_limit_read_back_above_every_sheet_counts_as_it_is() -> None:
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).holds("p", 0).acked(hall=1)
    assert look([node.enforced(0, 650).obj()], sheets=[hall()]).node_charge("a") == 950 * W


def test_where_foreign_pods_may_land_every_gpu_is_charged_its_default_limit() -> None:
    node = a_node("a", path=["hall"], gpus=2).acked(hall=1).obj()
    assert look([node], sheets=[hall()], facts={"a": NodeFacts()}).node_charge("a") == (300 + 1400) * W


def test_a_gpu_that_a_foreign_pod_holds_is_charged_its_default_limit() -> None:
    node = a_node("a", path=["hall"], gpus=2).holds("stranger", 0).acked(hall=1).obj()
    assert look([node], sheets=[hall()]).node_charge("a") == (300 + 700 + 200) * W


def test_a_node_without_an_agent_is_charged_its_nameplate() -> None:
    node = a_node("a", path=["hall"], gpus=0).obj()
    facts = {"a": NodeFacts(guarded=True, nameplate_milliwatts=6000 * W)}
    assert look([node], facts=facts).node_charge("a") == 6000 * W


def test_a_reboot_leaves_no_more_charge_than_the_sheets_on_a_guarded_node() -> None:
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).holds("p", 0).acked(hall=1)
    node = node.enforced(0, 700).uncapped().obj()
    assert look([node], sheets=[hall()]).node_charge("a") == 800 * W


@pytest.mark.parametrize(
    ("heard", "boot", "charge"), [(False, "b1", 0), (True, "b1", 500), (False, "b2", 500)]
)
def test_a_fence_holds_for_the_boot_that_it_ended_and_while_nothing_is_heard(heard, boot, charge) -> None:
    node = a_node("a", path=["hall"], gpus=1, boot=boot).fenced("b1").obj()
    ledger = look([node], sheets=[hall()], facts={"a": NodeFacts(guarded=True, heard=heard)})
    assert ledger.node_charge("a") == charge * W


def test_admission_asks_every_domain_of_the_path() -> None:
    domains = (a_domain("hall", limit=10_000), a_domain("rack", parent="hall", limit=1000))
    sheets = [hall(), a_sheet("rack", tree="hall").caps({CHAT: 500}).obj()]
    node = a_node("a", path=["hall", "rack"], gpus=2).acked(hall=1, rack=1).obj()
    ledger = look([node], sheets=sheets, domains=domains)
    assert ledger.admit("a", CHAT, 1)
    assert ledger.admit("a", CHAT, 2).why == ("domain rack lacks 300 W",)


def test_nothing_is_admitted_while_a_former_leader_may_still_write() -> None:
    node = a_node("a", path=["hall"], gpus=1).acked(hall=1).obj()
    ledger = look([node], sheets=[hall()], leadership=a_leadership(term=2, claim_from=2))
    assert not ledger.admit("a", CHAT, 1)
    assert [claim.spec.term for claim in plan_claims(ledger)] == [2]


def test_a_cut_is_published_without_a_look_at_any_node() -> None:
    ledger = look([], sheets=[hall()])
    (write,) = plan_cuts(ledger, {"hall": {CHAT: Allowance(300 * W)}})
    assert write.spec.epoch == 2
    assert [cap.cap for cap in write.spec.caps] == [300 * W]
    assert [cap.cap for entry in write.spec.earlier for cap in entry.caps] == [500 * W]


def test_a_cut_by_itself_raises_no_fallback() -> None:
    """It looks at the limits of the moment; what was in the sheet fitted every window of a timetable."""
    sheet = a_sheet("hall").caps({CHAT: 600, OTHER: 200}).obj()
    caps = tuple(msgspec.structs.replace(cap, fallback=min(cap.cap, 250 * W)) for cap in sheet.spec.caps)
    sheet = msgspec.structs.replace(sheet, spec=msgspec.structs.replace(sheet.spec, caps=caps))
    target = {CHAT: Allowance(550 * W, 450 * W), OTHER: Allowance(200 * W, 100 * W)}
    (write,) = plan_cuts(look([], sheets=[sheet]), {"hall": target})
    assert {cap.class_name: (cap.cap, cap.fallback) for cap in write.spec.caps} == {
        CHAT: (550 * W, 250 * W),
        OTHER: (200 * W, 100 * W),
    }


def two_nodes(*, acked: int):
    """Node a just lost 200 W by epoch 2 of its rack's sheet; node b's rack wants them."""
    domains = (
        a_domain("hall", limit=1400),
        a_domain("rack-a", parent="hall"),
        a_domain("rack-b", parent="hall"),
    )
    sheets = [
        a_sheet("hall").caps({CHAT: 700}).obj(),
        a_sheet("rack-a", tree="hall", epoch=2).caps({CHAT: 300}).earlier(1, {CHAT: 500}).obj(),
        a_sheet("rack-b", tree="hall").caps({CHAT: 300}).obj(),
    ]
    nodes = [
        a_node("a", path=["hall", "rack-a"], gpus=1)
        .grant("p", CHAT, 1)
        .acked(hall=1, **{"rack-a": acked})
        .obj(),
        a_node("b", path=["hall", "rack-b"], gpus=1).grant("q", CHAT, 1).acked(hall=1, **{"rack-b": 1}).obj(),
    ]
    targets = a_target({"hall": {CHAT: 700}, "rack-a": {CHAT: 300}, "rack-b": {CHAT: 500}})
    return look(nodes, sheets=sheets, domains=domains), targets


def test_a_raise_waits_for_the_acknowledgement_that_frees_its_watts() -> None:
    plan = plan_sheets(*two_nodes(acked=1))
    assert plan.writes == ()
    (wait,) = plan.waits
    assert (wait.domain, wait.reason, wait.blocked_by) == ("rack-b", "Acknowledgement", "hall")
    assert wait.nodes == (("a", "rack-a", 2),)


def test_a_raise_is_published_once_the_watts_were_read_back_as_gone() -> None:
    plan = plan_sheets(*two_nodes(acked=2))
    (write,) = plan.writes
    assert (write.spec.domain, write.spec.epoch, write.why) == ("rack-b", 2, "Raise")
    assert plan.waits == ()


def test_a_raise_goes_part_of_the_way_where_that_is_worth_an_epoch() -> None:
    domains = (a_domain("hall", limit=900),)
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).acked(hall=1).obj()
    ledger = look([node], sheets=[hall(chat=300)], domains=domains)
    (write,) = plan_sheets(ledger, a_target({"hall": {CHAT: 700}})).writes
    assert [cap.cap for cap in write.spec.caps] == [600 * W]


def test_in_a_domain_over_its_limit_nothing_rises() -> None:
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).acked(hall=1).obj()
    ledger = look([node], sheets=[hall(chat=500)], limit=700)
    plan = plan_sheets(ledger, a_target({"hall": {CHAT: 600}}))
    assert plan.writes == ()


def test_what_is_as_wanted_is_not_written_again() -> None:
    node = a_node("a", path=["hall"], gpus=1).grant("p", CHAT, 1).acked(hall=1).obj()
    ledger = look([node], sheets=[hall(chat=500)])
    assert plan_sheets(ledger, a_target({"hall": {CHAT: 500}})).writes == ()


def a_rack_that_moved(*, current: bool, heard: bool = True) -> Ledger:
    """Under hall b now, with a sheet that is still found under hall a."""
    domains = (a_domain("a"), a_domain("b"), a_domain("rack", parent="b"))
    sheets = [
        a_sheet("a").caps({CHAT: 500}).obj(),
        a_sheet("b").caps({CHAT: 500}).obj(),
        a_sheet("rack", tree="a").caps({CHAT: 300}).obj(),
    ]
    node = a_node("n", path=["b", "rack"], gpus=1).spec(former_paths=(("a", "rack"),)).acked(a=1, rack=1)
    node = node.observed(node.obj().metadata.generation - (not current))
    return look(
        [node.obj()], sheets=sheets, domains=domains, facts={"n": NodeFacts(guarded=True, heard=heard)}
    )


def test_a_sheet_moves_to_another_tree_once_its_agents_follow_both() -> None:
    targets = a_target({"a": {CHAT: 500}, "b": {CHAT: 500}, "rack": {CHAT: 300}})
    assert plan_sheets(a_rack_that_moved(current=False), targets).writes == ()
    (write,) = plan_sheets(a_rack_that_moved(current=True), targets).writes
    assert (write.spec.domain, write.spec.tree, write.spec.epoch) == ("rack", "b", 2)
    assert [cap.cap for cap in write.spec.caps] == [300 * W]
    (write,) = plan_sheets(a_rack_that_moved(current=False, heard=False), targets).writes
    assert write.spec.tree == "b"
