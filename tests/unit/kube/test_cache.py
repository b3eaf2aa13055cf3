"""What a cache makes of lists and events, without any network."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.api.meta import ObjectMeta
from tokenfactory.kube.cache import Cache
from tokenfactory.kube.index import Index
from tokenfactory.kube.listing import ListPage
from tokenfactory.kube.objects import Pod, PodSpec
from tokenfactory.kube.resources import key_of


def pod(name: str, version: int, node: str = "") -> Pod:
    meta = ObjectMeta(name=name, namespace="ns", resource_version=str(version), uid=f"u-{name}")
    return Pod(metadata=meta, spec=PodSpec(node_name=node))


def line(type_: str, obj: Pod) -> bytes:
    return msgspec.json.encode({"type": type_, "object": msgspec.to_builtins(obj)})


def page(version: int, *pods: Pod) -> ListPage[Pod]:
    return ListPage(version, list(pods))


@pytest.fixture
def cache() -> Cache[Pod]:
    return Cache(None, Pod)


NAMES = st.sampled_from("abcd")
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), NAMES, st.sampled_from(["n1", "n2", ""])),
        st.tuples(st.just("delete"), NAMES, st.just("")),
        st.tuples(st.just("relist"), st.just(""), st.just("")),
        st.tuples(st.just("replay"), st.just(""), st.just("")),
    ),
    max_size=30,
)


@given(steps=STEPS)
def test_a_follower_and_an_index_always_equal_the_truth(steps):
    """Some steps are seen as events, those before a relist only through it, and a replay says nothing new."""
    cache: Cache[Pod] = Cache(None, Pod)
    told: dict[tuple[str, str], Pod] = {}
    by_node = Index(cache, lambda one: [one.spec.node_name] if one.spec.node_name else [])

    def note(change):
        assert told.get(change.key) == change.old
        assert change.old != change.new
        assert cache.get(change.key[1], "ns") == change.new
        told.pop(change.key, None) if change.new is None else told.update({change.key: change.new})

    cache.on_change(note)
    truth: dict[tuple[str, str], Pod] = {}
    sent: list[bytes] = []
    for n, (step, name, node) in enumerate(steps, start=1):
        hidden = "relist" in [later for later, _, _ in steps[n : n + 3]]
        if step == "set":
            type_ = "MODIFIED" if ("ns", name) in truth else "ADDED"
            truth["ns", name] = pod(name, n, node)
            sent.append(line(type_, truth["ns", name]))
        elif step == "delete" and ("ns", name) in truth:
            gone = truth.pop(("ns", name))
            sent.append(line("DELETED", pod(name, n, gone.spec.node_name)))
        elif step == "replay":
            for old in sent[:-1]:
                cache._take(old)
            continue
        elif step == "relist":
            cache._replace(page(n, *truth.values()))
            continue
        if sent and not hidden:
            cache._take(sent[-1])
    cache._replace(page(len(steps) + 1, *truth.values()))
    assert told == truth == dict(cache.snapshot().objects)
    for node in ("n1", "n2"):
        want = {key: one for key, one in truth.items() if one.spec.node_name == node}
        assert {key_of(one): one for one in by_node.get(node)} == want
        assert by_node.count(node) == len(want)
    assert set(by_node.values()) == {one.spec.node_name for one in truth.values()} - {""}


def test_a_list_is_told_as_a_whole_deletions_first_then_in_order_of_versions(cache):
    cache._replace(page(5, pod("a", 1), pod("b", 2), pod("c", 3)))
    told = []
    seen = []
    cache.on_change(lambda change: told.append(change.key[1]) or seen.append(len(cache)))
    del told[:], seen[:]
    cache._replace(page(20, pod("c", 3), pod("e", 12), pod("a", 15), pod("d", 11)))
    assert told == ["b", "d", "e", "a"]
    assert seen == [4, 4, 4, 4]


def test_never_back_in_time(cache):
    cache._replace(page(10, pod("a", 9)))
    cache._take(line("MODIFIED", pod("a", 8, "old")))
    assert cache.get("a", "ns").spec.node_name == ""
    assert cache.stats.stale_events == 1


def test_an_object_that_no_longer_fits_keeps_its_last_good_state_and_is_named(cache):
    cache._replace(page(10, pod("a", 9, "n1")))
    broken = b'{"type":"MODIFIED","object":{"metadata":{"namespace":"ns","name":"a","resourceVersion":"11"},"spec":7}}'
    cache._take(broken)
    assert cache.get("a", "ns").spec.node_name == "n1"
    snapshot = cache.snapshot()
    assert "spec" in snapshot.undecodable["ns", "a"]
    assert snapshot.resource_version == 11
    cache._take(line("MODIFIED", pod("a", 12, "n2")))
    assert not cache.undecodable
    assert cache.get("a", "ns").spec.node_name == "n2"
    assert snapshot.undecodable, "a snapshot never changes"


def test_a_list_with_a_broken_object_keeps_the_last_good_one(cache):
    cache._replace(page(10, pod("a", 9, "n1"), pod("b", 8)))
    cache._replace(ListPage(20, [], {("ns", "a"): "bad"}))
    assert cache.get("a", "ns").spec.node_name == "n1"
    assert cache.get("b", "ns") is None
    assert cache.snapshot().undecodable == {("ns", "a"): "bad"}


def test_snapshots_do_not_change_and_cost_nothing_when_nothing_did(cache):
    cache._replace(page(10, pod("a", 9)))
    before = cache.snapshot()
    assert cache.snapshot() is before
    cache._take(line("ADDED", pod("b", 11)))
    assert set(before.objects) == {("ns", "a")}
    assert set(cache.snapshot().objects) == {("ns", "a"), ("ns", "b")}
    with pytest.raises(TypeError):
        before.objects["ns", "c"] = pod("c", 1)


def test_a_handler_that_comes_late_is_told_of_all_there_is(cache):
    cache._replace(page(10, pod("a", 9), pod("b", 8)))
    told = []
    cache.on_change(lambda change: told.append((change.key[1], change.old)))
    assert sorted(told) == [("a", None), ("b", None)]


async def test_reached_waits_for_events_bookmarks_and_the_first_list(cache):
    waiting = [asyncio.ensure_future(cache.reached(version)) for version in (5, 12, 30)]
    await asyncio.sleep(0)
    assert not any(one.done() for one in waiting)
    cache._replace(page(10, pod("a", 9)))
    cache._synced.set()
    cache._wake()
    await asyncio.wait_for(waiting[0], 1)
    cache._take(line("ADDED", pod("b", 12)))
    await asyncio.wait_for(waiting[1], 1)
    assert not waiting[2].done()
    cache._take(b'{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"30"}}}')
    await asyncio.wait_for(waiting[2], 1)
