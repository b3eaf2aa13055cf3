"""A charge whose answer was lost counts as doubtful until the object is seen in a newer version."""

import pytest

from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.controller import actions as act
from tokenfactory.controller.unsettled import Unsettled, touched
from tokenfactory.kube.errors import ApiError, UnreachableError, error_of

SPEC = CapSheetSpec(domain="hall", tree="hall", term=1, epoch=2)
SHEET = CapSheet(metadata=ObjectMeta(name="hall", resource_version="7"), spec=SPEC)
PUBLISH = act.PublishSheet(SHEET, SPEC, "raise")


def lost(*, sent: bool) -> UnreachableError:
    return UnreachableError("PUT", TimeoutError(), sent=sent)


def answered(code: int) -> ApiError:
    return error_of("PUT", code, b"{}", None)


@pytest.mark.parametrize(
    ("error", "doubtful"),
    [(lost(sent=True), True), (lost(sent=False), False), (answered(503), True), (answered(422), False)],
)
def test_only_what_may_have_been_done_is_in_doubt(error: Exception, doubtful: bool):
    unsettled = Unsettled()
    unsettled.note(PUBLISH, error)
    assert (unsettled.still(lambda _: 7) == {("CapSheet", "hall")}) is doubtful


def test_a_newer_version_ends_the_doubt_for_good():
    unsettled = Unsettled()
    unsettled.note(PUBLISH, lost(sent=True))
    assert unsettled.still(lambda _: 8) == frozenset()
    assert unsettled.still(lambda _: 7) == frozenset()


def test_a_node_that_may_have_been_created_is_in_doubt_until_it_is_seen():
    unsettled = Unsettled()
    unsettled.note(act.ChargeNode(None, "n1", GPUNodeSpec(), "new"), lost(sent=True))
    assert unsettled.still(lambda _: 0) == {("GPUNode", "n1")}
    assert unsettled.still(lambda _: 3) == frozenset()


def test_what_charges_nothing_is_never_in_doubt():
    unsettled = Unsettled()
    unsettled.note(act.Tell(GPUNode(), "Reason", "words"), lost(sent=True))
    assert unsettled.still(lambda _: 0) == frozenset()


def test_rewriting_the_same_words_changes_something():
    meta = ObjectMeta(name="hall", annotations={"kept": "yes"})
    once, twice = touched(meta), touched(meta)
    assert once.annotations["kept"] == "yes"
    assert once.annotations != twice.annotations
