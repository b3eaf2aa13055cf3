"""Whatever happens on the way to the API server, caches come to the truth, and each change is told once."""

from __future__ import annotations

import asyncio

import pytest
from tests.waiting import until

from tokenfactory.twin.faultproxy import Answer, Cut, Inject, Stall, expired_line, lists, watches

pytestmark = pytest.mark.cluster


async def write_some(maps, *, rounds: int = 3) -> None:
    """Add, change and delete, so that a lost change of each kind would show."""
    for n in range(rounds):
        await maps.put(f"kept-{n}", value=str(n))
        await maps.put("changed", value=f"{n}-" + "x" * 2000)
        await maps.put("coming-and-going", value=str(n))
        await maps.delete("coming-and-going")


async def converge(follower, maps) -> None:
    """The truth is reached: a last write is seen, and with it all that came before."""
    last = await maps.put("last", value="1")
    await asyncio.wait_for(follower.cache.reached(last.metadata.resource_version), 90)
    assert len(follower.copy) == await maps.count()
    assert follower.data("coming-and-going") is None
    assert follower.copy == dict(follower.cache.snapshot().objects)


ON_WATCH = {
    "cut before the first object": lambda: Cut(watches),
    "cut in the middle of an object": lambda: Cut(watches, after_lines=2),
    "cut again and again": lambda: Cut(watches, after_lines=1, times=4),
    "410 inside a watch": lambda: Inject(watches, line=expired_line(), after_lines=2),
    "410 again and again": lambda: Inject(watches, line=expired_line(), after_lines=1, times=3),
    "a line that is no JSON": lambda: Inject(watches, line=b'{"type":"ADDED","obj', after_lines=1),
    "a watch that falls silent": lambda: Stall(watches, after_lines=2),
}


@pytest.mark.parametrize("make_fault", ON_WATCH.values(), ids=ON_WATCH.keys())
async def test_a_running_watch_survives(make_fault, proxy, maps, follow):
    await maps.put("there-before", value="0")
    fault = proxy.inject(make_fault())
    follower = follow(stalled_after_seconds=1.0)
    await asyncio.wait_for(follower.cache.synced(), 90)
    await write_some(maps)
    await asyncio.wait_for(fault.happened.wait(), 90)
    await write_some(maps)
    await converge(follower, maps)
    assert follower.cache.stats.faults >= 1


ON_START = {
    "429 on the list": lambda: Answer(
        lists, times=2, code=429, reason="TooManyRequests", headers={"Retry-After": "1"}
    ),
    "500 on the list": lambda: Answer(lists, times=3, code=500),
    "503 on the list": lambda: Answer(lists, times=3, code=503, reason="ServiceUnavailable"),
    "the list cut in the middle": lambda: Cut(lists, times=2),
    "403 on the list": lambda: Answer(lists, times=2, code=403, reason="Forbidden"),
    "429 on the watch": lambda: Answer(
        watches, code=429, reason="TooManyRequests", headers={"Retry-After": "1"}
    ),
    "500 on the watch": lambda: Answer(watches, times=3, code=500),
    "410 on the watch": lambda: Answer(watches, code=410, reason="Expired"),
    "410 between two pages": lambda: Answer(
        lambda seen: "continue" in seen.query, code=410, reason="Expired"
    ),
}


@pytest.mark.parametrize("make_fault", ON_START.values(), ids=ON_START.keys())
async def test_a_start_succeeds_in_the_end(make_fault, proxy, maps, follow):
    for n in range(5):
        await maps.put(f"there-before-{n}", value="0")
    fault = proxy.inject(make_fault())
    follower = follow(page_size=2)
    await asyncio.wait_for(follower.cache.synced(), 90)
    assert len(follower.copy) == 5, "synced() returned before the list was complete"
    await asyncio.wait_for(fault.happened.wait(), 90)
    await write_some(maps)
    await converge(follower, maps)


async def test_retry_after_is_honoured(proxy, maps, follow):
    proxy.inject(Answer(lists, code=429, reason="TooManyRequests", headers={"Retry-After": "1"}))
    began = asyncio.get_running_loop().time()
    follower = follow()
    await asyncio.wait_for(follower.cache.synced(), 90)
    assert asyncio.get_running_loop().time() - began >= 1.0
    assert sum(lists(seen) for seen in proxy.requests) == 2


async def test_deletions_during_a_lost_history_are_noticed(proxy, maps, follow):
    await maps.put("doomed", value="1")
    await maps.put("spared", value="1")
    follower = follow()
    await asyncio.wait_for(follower.cache.synced(), 90)
    proxy.inject(Answer(watches, code=410, reason="Expired"))
    proxy.inject(Answer(lists, times=2, code=503))
    proxy.drop_connections()
    await maps.delete("doomed")
    await maps.put("new", value="1")
    await until(lambda: follower.data("doomed") is None and follower.data("new") == {"value": "1"})
    assert follower.cache.stats.lists == 2
    assert follower.data("spared") == {"value": "1"}


async def test_after_lost_history_handlers_see_the_whole_new_state(proxy, maps, follow):
    """Sheets are read together: nobody may see half of a relist."""
    for name in ("a", "b", "c"):
        await maps.put(name, value="1")
    follower = follow()
    await asyncio.wait_for(follower.cache.synced(), 90)
    seen: list[set[str]] = []
    relisted = follower.cache.stats.lists
    follower.cache.on_change(
        lambda _: (
            seen.append({obj.data["value"] for obj in follower.cache})
            if follower.cache.stats.lists > relisted
            else None
        )
    )
    proxy.inject(Answer(watches, code=410, reason="Expired"))
    proxy.inject(Answer(lists, times=3, code=503))
    proxy.drop_connections()
    for name in ("c", "a", "b"):
        await maps.put(name, value="2")
    await until(lambda: len(seen) == 3)
    assert seen == [{"2"}] * 3
    assert follower.versions[-3:] == sorted(follower.versions[-3:])


async def test_two_silent_watches_lead_to_a_fresh_list(proxy, maps, follow):
    """What we resume from may mean nothing to a server that was restored from a backup."""
    proxy.inject(Stall(watches, times=2))
    follower = follow(stalled_after_seconds=0.5)
    await asyncio.wait_for(follower.cache.synced(), 90)
    await until(lambda: follower.cache.stats.lists == 2)
    assert follower.cache.stats.stalls >= 2
    await converge(follower, maps)


async def test_a_partition_heals(proxy, maps, follow):
    await maps.put("there-before", value="0")
    follower = follow(stalled_after_seconds=1.0)
    await asyncio.wait_for(follower.cache.synced(), 90)
    proxy.partition()
    await write_some(maps)
    assert follower.data("changed") is None
    proxy.heal()
    await converge(follower, maps)


async def test_an_error_in_a_handler_is_not_swallowed(config_maps, maps):
    await maps.put("poison", value="1")
    cache = config_maps()

    def fail(_change: object) -> None:
        raise OSError("a fault of ours, not of the network")

    cache.on_change(fail)
    with pytest.raises(OSError, match="of ours"):
        await asyncio.wait_for(cache.run(), 90)
    assert not cache.is_synced


async def test_bookmarks_and_pages_are_asked_for_and_no_old_memory(proxy, maps, follow):
    for n in range(5):
        await maps.put(f"there-before-{n}", value="0")
    follower = follow(page_size=2)
    await asyncio.wait_for(follower.cache.synced(), 90)
    await until(lambda: any(watches(seen) for seen in proxy.requests))
    asked = [seen.query for seen in proxy.requests]
    assert [query.get("limit") for query in asked] == ["2", "2", "2", None]
    assert not any("resourceVersion" in query for query in asked[:3])
    assert asked[3]["allowWatchBookmarks"] == "true"
    assert asked[3]["resourceVersion"] != "0"


async def test_an_object_larger_than_a_read_is_put_together(proxy, maps, follow):
    follower = follow()
    await asyncio.wait_for(follower.cache.synced(), 90)
    for n in range(3):
        held = await maps.put("large", value=str(n) * 900_000)
        await asyncio.wait_for(follower.cache.reached(held.metadata.resource_version), 90)
        assert follower.data("large") == held.data
    assert (follower.cache.stats.watches, follower.cache.stats.faults) == (1, 0)
