"""Lines of a watch, in the form that the API server sends them."""

from __future__ import annotations

import msgspec
import pytest

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.kube.errors import GoneError, UnreachableError
from tokenfactory.kube.objects import Pod
from tokenfactory.kube.wire import WatchDecoder


def line(type_: str, **obj: object) -> bytes:
    return msgspec.json.encode({"type": type_, "object": obj})


META = {"name": "hall-a", "resourceVersion": "17", "uid": "u", "managedFields": [{"f:spec": {}}]}
SHEET = {"domain": "hall-a", "tree": "site", "term": 1, "epoch": 3}


def test_an_object_comes_out_in_its_type():
    item = WatchDecoder(CapSheet).decode(line("MODIFIED", metadata=META, spec=SHEET))
    assert (item.type, item.key, item.resource_version) == ("MODIFIED", ("", "hall-a"), "17")
    assert item.object.spec.epoch == 3


@pytest.mark.parametrize("kind", [CapSheet, Pod], ids=["needs a spec", "needs nothing"])
def test_a_bookmark_carries_a_version_only(kind):
    item = WatchDecoder(kind).decode(line("BOOKMARK", metadata={"resourceVersion": "99"}))
    assert (item.type, item.resource_version, item.object, item.fault) == ("BOOKMARK", "99", None, "")


@pytest.mark.parametrize("kind", [CapSheet, Pod])
def test_an_error_is_raised_with_the_servers_words(kind):
    with pytest.raises(GoneError, match="too old"):
        WatchDecoder(kind).decode(line("ERROR", code=410, reason="Expired", message="too old"))


def test_an_object_that_breaks_its_type_is_named_with_the_reason():
    item = WatchDecoder(CapSheet).decode(line("ADDED", metadata=META, spec=SHEET | {"epoch": "three"}))
    assert item.key == ("", "hall-a")
    assert item.object is None
    assert "$.object.spec.epoch" in item.fault


def test_to_take_away_an_object_its_name_is_enough():
    item = WatchDecoder(CapSheet).decode(line("DELETED", metadata=META, spec={}))
    assert (item.type, item.key, item.fault) == ("DELETED", ("", "hall-a"), "")


@pytest.mark.parametrize("cut", [b'{"type":"ADDED","object":{"meta', b"<html>", b'{"type":7}'])
def test_what_is_no_event_is_a_fault_of_the_connection(cut):
    with pytest.raises(UnreachableError):
        WatchDecoder(CapSheet).decode(cut)
