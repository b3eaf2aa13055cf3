"""Whatever is published, the sheet remembers enough: it never understates what a node may still be obeying."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.planning.power.builders import a_domain, a_leadership, a_node, a_target

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.controller.plan.classes import MOST_BYTES, MOST_CLASSES
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import observe
from tokenfactory.planning.power.lines import NodeFacts
from tokenfactory.planning.power.publish import plan_sheets
from tokenfactory.planning.power.sheets import (
    MOST_EARLIER,
    History,
    caps_of,
    class_bytes,
    first_sheet,
    successor,
)

CLASSES = ("a@H100", "b@H100", "c@H100")
CAPS = st.dictionaries(st.sampled_from(CLASSES), st.integers(0, 5), max_size=3)
STEPS = st.lists(st.tuples(CAPS, st.sampled_from((1, 2)), st.integers(-1, 3)), min_size=1, max_size=60)
ACKED = st.lists(st.integers(0, 60), max_size=3)


def the_first(known_version: int = 0):
    return first_sheet("hall", "hall", term=1, hold_milliseconds=1, acked=(), known_version=known_version)


def publish(steps, behind):
    """The sheets one after the other, with the caps of every epoch, and what the slowest node has acknowledged by then.

    Nodes acknowledge up to `behind` epochs late, and never take an acknowledgement back; -1: nobody asks them.
    """
    spec, least, log = the_first(), 0, {}
    log[spec.epoch] = {}
    for caps, hold, late in steps:
        if late >= 0:
            least = max(least, spec.epoch - late - behind)
        wanted = {name: Allowance(cap) for name, cap in caps.items()}
        before = spec
        asked = least if late >= 0 and least >= max(1, spec.complete_from) else None
        spec = successor(spec, wanted, term=1, hold_milliseconds=hold, least_acked=asked)
        log[spec.epoch] = caps_of(spec)
        yield before, spec, log, least


@given(STEPS, st.integers(0, 70))
def test_no_cap_that_a_node_may_still_obey_is_understated(steps, behind) -> None:
    for _, spec, log, least in publish(steps, behind):
        history = History.of(spec)
        for acked in range(spec.epoch + 1):
            highest = history.highest(acked)
            if highest is None:
                # Whoever has acknowledged as much as everybody had when it was forgotten is never without a bound.
                assert acked < max(1, spec.complete_from)
                assert acked < max(1, least, 1)
                continue
            for epoch in range(max(1, acked), spec.epoch + 1):
                for name, cap in log[epoch].items():
                    assert highest.get(name, 0) >= cap


@given(STEPS, st.integers(0, 70))
def test_what_is_published_never_goes_back_and_never_grows_without_end(steps, behind) -> None:
    for before, after, _, _ in publish(steps, behind):
        changed = (after.caps, after.hold_milliseconds) != (before.caps, before.hold_milliseconds)
        assert after.epoch == before.epoch + changed
        assert before.complete_from <= after.complete_from <= after.epoch
        throughs = [entry.through for entry in after.earlier]
        assert throughs == sorted(set(throughs))
        assert len(throughs) <= MOST_EARLIER
        assert all(through < after.epoch for through in throughs)


@pytest.mark.parametrize("length", [70, 253])
def test_a_sheet_with_all_the_classes_it_may_have_stays_an_object_that_etcd_takes(length: int) -> None:
    """Every cut is lower than the one before, and nobody answers: as much as can be to remember."""
    count = min(MOST_CLASSES, MOST_BYTES // class_bytes("x" * length))
    labels = [f"{number:04}".ljust(length, "x") for number in range(count)]
    spec = the_first()
    for milliwatts in range(700_000, 696_000, -1_000):
        caps = {label: Allowance(milliwatts, 200_000) for label in labels}
        spec = successor(spec, caps, term=1, hold_milliseconds=1)
    assert len(msgspec.json.encode(spec)) < 1_100_000
    assert History.of(spec).highest(2) == dict.fromkeys(labels, 700_000), "what is merged still counts"


def test_a_staircase_of_more_than_32_steps_is_merged_upwards() -> None:
    """The least memory that this can happen with: every cut is lower than the one before, and nobody answers."""
    spec = the_first()
    for cap in range(100, 0, -1):
        spec = successor(spec, {"a@H100": Allowance(cap)}, term=1, hold_milliseconds=1)
    assert len(spec.earlier) == MOST_EARLIER
    history = History.of(spec)
    for acked in range(2, spec.epoch + 1):
        exact = 102 - acked
        highest = history.highest(acked)
        assert highest is not None
        assert exact <= highest["a@H100"] <= 100
    assert history.highest(spec.epoch) == {"a@H100": 1}


@given(st.integers(0, 10**9), st.lists(st.integers(0, 10**9), max_size=3))
def test_a_sheet_written_anew_is_above_every_epoch_that_its_domain_ever_had(version, acked) -> None:
    """An epoch is at most the version of the write that brought it, and the deletion is known."""
    spec = first_sheet("hall", "hall", term=1, hold_milliseconds=1, acked=acked, known_version=version)
    assert spec.epoch > max(version, *acked, 0)
    assert spec.complete_from == spec.epoch
    assert History.of(spec).highest(max(version, *acked, 0)) is None


@given(STEPS, ACKED, CAPS, st.integers(0, 4000))
def test_the_same_input_gives_the_same_plan_and_what_is_as_wanted_no_new_epoch(
    steps, acked, wanted, limit
) -> None:
    *_, (_, spec, _, _) = publish(steps, 70)
    nodes = [
        a_node(f"n{at}", path=["hall"], gpus=1)
        .grant(f"p{at}", CLASSES[at], 1)
        .acked(hall=min(epoch, spec.epoch))
        .obj()
        for at, epoch in enumerate(acked)
    ]
    sheet = CapSheet(metadata=ObjectMeta(name="hall", resource_version="1"), spec=spec)

    def look(sheet: CapSheet):
        domain = a_domain("hall", limit=limit)
        facts = {node.metadata.name: NodeFacts(guarded=True) for node in nodes}
        return observe({"hall": domain}, {"hall": sheet}, nodes, facts, a_leadership())

    targets = a_target({"hall": {name: cap * 100 for name, cap in wanted.items()}})
    plan = plan_sheets(look(sheet), targets)
    assert plan == plan_sheets(look(sheet), targets)
    for write in plan.writes:
        assert write.spec.epoch > spec.epoch
        after = CapSheet(metadata=ObjectMeta(name="hall", resource_version="2"), spec=write.spec)
        as_it_is = {"hall": {cap.class_name: Allowance(cap.cap, cap.fallback) for cap in write.spec.caps}}
        assert plan_sheets(look(after), as_it_is).writes == ()
