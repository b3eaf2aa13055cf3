"""The governor obeys the lowest sheet of its path, and goes down whenever it cannot be sure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.planning.power.builders import PRODUCT, W, a_node

from tokenfactory.planning.power.governor import (
    PATIENCE_MILLISECONDS,
    Allowance,
    GpuView,
    Memory,
    Sheet,
    View,
    govern,
    read_back,
)

CHAT = "inference/chat/llama@H100"
HOLD = 60_000


def sheet(domain: str, cap: int | None, *, epoch: int = 1, fallback: int = 250) -> Sheet:
    caps = {} if cap is None else {CHAT: Allowance(cap * W, fallback * W)}
    return Sheet(domain, epoch, HOLD, caps)


def gpu(enforced: int | None = 700, pod: str = "p", uuid: str = "a-0") -> GpuView:
    return GpuView(uuid, PRODUCT, 200 * W, 700 * W, None if enforced is None else enforced * W, pod)


def a_view(*sheets: Sheet, gpus: tuple[GpuView, ...] = (gpu(),), renewal: int = 1, **changes) -> View:
    node = a_node("a", path=["hall", "rack"], gpus=0, boot="b1").grant("p", CHAT, 1).obj()
    view = View(
        boot_id="b1",
        spec=node.spec,
        generation=3,
        status=node.status,
        sheets={each.domain: each for each in sheets},
        renewals={"hall": renewal},
        gpus=gpus,
    )
    return replace(view, **changes)


def settled(view: View, now: int = 0) -> Memory:
    """As after a renewal that came while this process was looking."""
    memory, _ = govern(Memory(), replace(view, renewals={"hall": 0}), now)
    memory, decision = govern(memory, view, now)
    assert decision.mode == "Obeying"
    return memory


def cap_of(decision, uuid: str = "a-0") -> int | None:
    cap = decision.caps[uuid].cap_milliwatts
    return None if cap is None else cap // W


BOTH = (sheet("hall", 600), sheet("rack", 400))


@pytest.mark.parametrize(
    ("sheets", "want", "why"),
    [
        ((sheet("hall", 600), sheet("rack", 400)), 400, "Sheet CHAT in rack"),
        ((sheet("hall", 300), sheet("rack", 400)), 300, "Sheet CHAT in hall"),
        ((sheet("hall", 900), sheet("rack", 900)), 700, "Sheet CHAT in hall"),
        ((sheet("hall", 50), sheet("rack", 400)), 200, "Sheet CHAT in hall"),
        ((sheet("hall", 600), sheet("rack", None)), 200, "NoClass CHAT in rack"),
        ((sheet("hall", 600),), 200, "NoSheet CHAT in rack"),
    ],
)
def test_a_gpu_gets_the_lowest_cap_of_its_path_and_says_which_sheet_bound_it(sheets, want, why) -> None:
    memory = settled(a_view(*BOTH))
    _, decision = govern(memory, a_view(*sheets), 1)
    assert cap_of(decision) == want
    assert str(decision.caps["a-0"].reason) == why.replace("CHAT", CHAT)


def test_a_former_path_is_obeyed_while_it_is_listed() -> None:
    view = a_view(*BOTH, sheet("old", 350))
    spec = (
        a_node("a", path=["hall", "rack"], gpus=0).grant("p", CHAT, 1).spec(former_paths=(("hall", "old"),))
    )
    memory = settled(replace(view, spec=spec.obj().spec))
    _, decision = govern(memory, replace(view, spec=spec.obj().spec), 1)
    assert cap_of(decision) == 350


def test_a_gpu_that_nobody_known_holds_is_left_alone() -> None:
    view = a_view(*BOTH, gpus=(gpu(pod="stranger"),))
    assert cap_of(govern(settled(view), view, 1)[1]) is None


def test_a_pod_that_holds_more_gpus_than_were_granted_is_a_stranger() -> None:
    view = a_view(*BOTH, gpus=(gpu(), gpu(uuid="a-1")))
    _, decision = govern(settled(view), view, 1)
    assert cap_of(decision) is None
    assert decision.startable == {}


def test_a_sheet_older_than_one_obeyed_before_counts_as_absent() -> None:
    new = a_view(sheet("hall", 600), sheet("rack", 300, epoch=5))
    _, decision = govern(settled(new), a_view(sheet("hall", 600), sheet("rack", 700, epoch=4)), 1)
    assert cap_of(decision) == 200


def test_a_restarted_agent_refuses_what_its_own_status_says_is_stale() -> None:
    status = a_node("a", path=[], gpus=0).acked(hall=1, rack=5).obj().status
    view = a_view(sheet("hall", 600), sheet("rack", 700, epoch=4), status=status)
    assert cap_of(govern(Memory(), view, 0)[1]) == 200


def test_after_hold_the_fallback_rules_and_a_renewal_ends_that() -> None:
    view = a_view(*BOTH)
    memory = settled(view, now=1000)
    memory, decision = govern(memory, view, 1000 + HOLD - 1)
    assert (decision.mode, cap_of(decision), decision.next_deadline_ms) == ("Obeying", 400, 1000 + HOLD)
    memory, decision = govern(memory, view, 1000 + HOLD)
    assert (decision.mode, cap_of(decision)) == ("Fallback", 250)
    _, decision = govern(memory, replace(view, renewals={"hall": 2}), 1000 + HOLD + 1)
    assert (decision.mode, cap_of(decision)) == ("Obeying", 400)


def test_falling_back_never_raises() -> None:
    view = a_view(sheet("hall", 300, fallback=600), sheet("rack", 300, fallback=600))
    _, decision = govern(settled(view), view, HOLD)
    assert cap_of(decision) == 300


def test_the_first_renewal_seen_may_be_of_any_age_so_it_proves_nothing() -> None:
    memory, decision = govern(Memory(), a_view(*BOTH, gpus=(gpu(300),)), 0)
    assert (decision.mode, cap_of(decision)) == ("Starting", 300)
    memory, decision = govern(memory, a_view(*BOTH, gpus=(gpu(300),)), 10)
    assert decision.mode == "Starting"
    _, decision = govern(memory, a_view(*BOTH, gpus=(gpu(300),), renewal=2), 20)
    assert (decision.mode, cap_of(decision)) == ("Obeying", 400)


def test_a_starting_agent_lowers_what_is_above_the_sheets() -> None:
    assert cap_of(govern(Memory(), a_view(*BOTH, gpus=(gpu(700),)), 0)[1]) == 400


def test_in_a_boot_that_nobody_capped_a_starting_agent_goes_to_the_fallback() -> None:
    assert cap_of(govern(Memory(), a_view(*BOTH, boot_id="b2"), 0)[1]) == 250


def test_before_the_sheets_are_listed_caps_stay_and_prove_nothing() -> None:
    memory, decision = govern(Memory(), a_view(sheets=None), 0)
    assert cap_of(decision) is None
    memory, reading = read_back(memory, decision, {"a-0": 700 * W})
    assert (reading.observed_generation, reading.may_start) == (None, frozenset())
    assert cap_of(govern(memory, a_view(sheets=None), PATIENCE_MILLISECONDS)[1]) == 200


def test_what_was_read_back_may_be_reported_and_opens_the_gate() -> None:
    view = a_view(*BOTH)
    memory, decision = govern(settled(view), view, 1)
    memory, reading = read_back(memory, decision, {"a-0": 400 * W})
    assert reading.capped
    assert reading.applied == {"hall": 1, "rack": 1}
    assert reading.observed_generation == 3
    assert reading.may_start == {"p"}


@pytest.mark.parametrize("enforced", [401 * W, None])
def test_a_limit_that_is_not_in_place_acknowledges_nothing(enforced) -> None:
    view = a_view(*BOTH, status=a_node("a", path=[], gpus=0).uncapped().obj().status)
    memory, decision = govern(settled(view), view, 1)
    _, reading = read_back(memory, decision, {"a-0": enforced})
    assert not reading.capped
    assert reading.applied == {}
    assert reading.observed_generation is None
    assert reading.may_start == frozenset()


def test_a_reboot_closes_the_gate_until_caps_were_read_back_and_the_api_server_knows_the_boot() -> None:
    view = a_view(*BOTH)
    memory, decision = govern(settled(view), view, 1)
    memory, _ = read_back(memory, decision, {"a-0": 400 * W})
    memory, decision = govern(memory, replace(view, boot_id="b2"), 2)
    memory, reading = read_back(memory, decision, {"a-0": 700 * W})
    assert not reading.capped
    memory, reading = read_back(memory, decision, {"a-0": 400 * W})
    assert reading.capped
    assert reading.may_start == frozenset()
    known = a_node("a", path=[], gpus=0, boot="b2").obj().status
    memory, decision = govern(memory, replace(view, boot_id="b2", status=known), 3)
    assert read_back(memory, decision, {"a-0": 400 * W})[1].may_start == {"p"}


def test_a_fenced_node_goes_to_the_minimum_and_starts_nothing() -> None:
    fenced = a_node("a", path=["hall", "rack"], gpus=0).grant("p", CHAT, 1).fenced("b0").obj().spec
    view = a_view(*BOTH)
    memory, decision = govern(settled(view), replace(view, spec=fenced), 1)
    assert cap_of(decision) == 200
    assert read_back(memory, decision, {"a-0": 200 * W})[1].may_start == frozenset()


def test_a_released_pod_keeps_its_class_but_may_not_start() -> None:
    spec = a_node("a", path=["hall", "rack"], gpus=0).grant("p", CHAT, 1, released=True).obj().spec
    view = a_view(*BOTH, spec=spec)
    memory, decision = govern(settled(view), view, 1)
    assert cap_of(decision) == 400
    assert read_back(memory, decision, {"a-0": 400 * W})[1].may_start == frozenset()


def test_an_unreadable_gpu_makes_the_node_degraded() -> None:
    view = a_view(*BOTH, gpus=(gpu(None),))
    assert govern(settled(a_view(*BOTH)), view, 1)[1].mode == "Degraded"
