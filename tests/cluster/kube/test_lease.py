"""At most one leads at any time, terms grow, and a leader knows when to stop trusting itself."""

from __future__ import annotations

import asyncio

import pytest
from tests.cluster.kube.conftest import quick
from tests.waiting import until

from tokenfactory.kube.apply import Writer
from tokenfactory.kube.cache import Cache
from tokenfactory.kube.client import MERGE
from tokenfactory.kube.lease import Election, Heartbeat, Heartbeats, NotLeadingError
from tokenfactory.kube.objects import Lease
from tokenfactory.kube.resources import object_path
from tokenfactory.twin.faultproxy import Answer, LoseAnswer, writes

pytestmark = pytest.mark.cluster


class Clock:
    """Everybody's own clock, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def candidate(client, namespace, clock):
    def make(identity: str, **options: object) -> Election:
        chosen = {"client": client, "clock": clock, "backoff": quick(), "renew_seconds": 0.05} | options
        return Election(key=(namespace, "leader"), identity=identity, **chosen)

    return make


async def in_time(what):
    return await asyncio.wait_for(what, 90)


async def waits(task, client, proxy) -> None:
    """The candidate has looked at the record a few times, and still waits."""
    looked = len(proxy.requests)
    await until(lambda: len(proxy.requests) >= looked + 4)
    assert not task.done()


async def test_a_crashed_leader_is_followed_after_its_lease(candidate, client, proxy, clock):
    first, second = candidate("a"), candidate("b")
    term = await in_time(first.acquire())
    assert (term.number, term.previous, term.released_cleanly) == (1, "", False)
    task = asyncio.create_task(second.acquire())
    await waits(task, client, proxy)
    clock.now += 14.9
    assert first.still_leading()
    await waits(task, client, proxy)
    clock.now += 0.2
    assert not first.still_leading(), "the old leader must stop before the new one starts"
    term = await in_time(task)
    assert (term.number, term.previous, term.released_cleanly) == (2, "a", False)


async def test_a_clean_release_is_followed_at_once_and_known_as_clean(candidate):
    first, second = candidate("a"), candidate("b")
    await in_time(first.acquire())
    await first.release()
    assert not first.still_leading()
    term = await in_time(second.acquire())
    assert (term.number, term.released_cleanly, term.claim_from) == (2, True, 1)


async def test_clean_hand_overs_add_up_and_a_crash_ends_them(candidate, client, proxy, clock):
    for number in (1, 2, 3):
        leader = candidate(f"clean-{number}")
        term = await in_time(leader.acquire())
        assert (term.number, term.claim_from) == (number, 1)
        await leader.release()
    crashing = candidate("crashing")
    assert (await in_time(crashing.acquire())).claim_from == 1
    task = asyncio.create_task(candidate("after").acquire())
    await waits(task, client, proxy)
    clock.now += 16
    term = await in_time(task)
    assert (term.number, term.claim_from, term.released_cleanly) == (5, 5, False)


async def test_a_release_with_doubtful_writes_is_followed_at_once_and_claims_everything(candidate):
    first = candidate("a")
    await in_time(first.acquire())
    await first.release(clean=False)
    term = await in_time(candidate("b").acquire())
    assert (term.number, term.claim_from, term.released_cleanly) == (2, 2, False)


async def test_a_holder_that_somebody_erased_is_no_clean_hand_over(candidate, client, namespace):
    first = candidate("a")
    await in_time(first.acquire())
    await first.release()
    second = candidate("b")
    await in_time(second.acquire())
    body = {"spec": {"holderIdentity": ""}}
    await client.request(
        "PATCH", object_path(Lease, (namespace, "leader")), body=body, content_type=MERGE, repeatable=True
    )
    assert (await in_time(candidate("c").acquire())).claim_from == 3


async def test_the_highest_term_in_the_api_counts_when_the_lease_is_gone(candidate):
    async def highest() -> int:
        return 41

    term = await in_time(candidate("a", highest_term=highest).acquire())
    assert (term.number, term.claim_from) == (42, 42)


async def test_coming_back_is_a_new_term(candidate):
    only = candidate("a")
    assert (await in_time(only.acquire())).number == 1
    await only.release()
    assert (await in_time(only.acquire())).number == 2


async def test_terms_grow_even_if_somebody_deletes_the_lease(candidate, client, namespace):
    await in_time(candidate("a", term_above=41).acquire())
    await client.request("DELETE", object_path(Lease, (namespace, "leader")))
    term = await in_time(candidate("b", term_above=42).acquire())
    assert term.number == 43
    assert not term.released_cleanly


async def test_two_at_once_and_one_wins(candidate):
    clocked = [candidate(name) for name in "abcd"]
    tasks = [asyncio.create_task(one.acquire()) for one in clocked]
    done, waiting = await asyncio.wait(tasks, timeout=90, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 1
    assert sum(one.still_leading() for one in clocked) == 1
    for task in waiting:
        task.cancel()


async def test_margin_and_guard(candidate, clock):
    leader = candidate("a")
    check = leader.guard(margin_seconds=5)
    with pytest.raises(NotLeadingError):
        check()
    await in_time(leader.acquire())
    check()
    clock.now += 10.1
    assert leader.still_leading()
    assert not leader.still_leading(margin_seconds=5)
    with pytest.raises(NotLeadingError, match="not sent"):
        check()


async def test_renewals_keep_the_leadership(candidate, clock, proxy):
    leader = candidate("a")
    await in_time(leader.acquire())
    keeping = asyncio.create_task(leader.keep())
    for _ in range(5):
        clock.now += 10
        renewed = sum(writes(seen) for seen in proxy.requests) + 2
        await until(lambda enough=renewed: sum(writes(seen) for seen in proxy.requests) >= enough)
    assert leader.still_leading()
    keeping.cancel()


@pytest.mark.parametrize(
    "make_fault",
    [lambda: LoseAnswer(writes, times=3), lambda: Answer(writes, times=3, code=500)],
    ids=["answers are lost", "500"],
)
async def test_faults_of_renewals_do_not_end_a_leadership(make_fault, candidate, proxy):
    leader = candidate("a")
    await in_time(leader.acquire())
    fault = proxy.inject(make_fault())
    keeping = asyncio.create_task(leader.keep())
    await in_time(fault.happened.wait())
    held = leader._held
    await until(lambda: leader._held is not held)
    assert leader.still_leading()
    assert leader.term.number == 1
    keeping.cancel()


async def test_a_lost_answer_while_acquiring_is_found_again(candidate, proxy):
    leader = candidate("a")
    proxy.inject(LoseAnswer(writes))
    term = await in_time(leader.acquire())
    assert leader.still_leading()
    assert term.number == 2, "nobody can know whether the first answer was ours to trust"


async def test_a_partitioned_leader_stops_by_itself(candidate, proxy, clock):
    leader = candidate("a")
    await in_time(leader.acquire())
    proxy.partition()
    keeping = asyncio.create_task(leader.keep())
    clock.now += 15
    assert not leader.still_leading()
    await in_time(keeping)
    assert leader.term is None


@pytest.mark.parametrize(
    "other",
    [{"holderIdentity": "b", "leaseTransitions": 2}, {"leaseTransitions": 2}],
    ids=["another", "ourselves"],
)
async def test_a_leader_that_was_overtaken_stops(other, candidate, client, namespace):
    """Also by a namesake: the term tells."""
    leader = candidate("a")
    await in_time(leader.acquire())
    other = {"spec": other}
    await Writer(client).apply(Lease, (namespace, "leader"), other)
    await in_time(leader.keep())
    assert not leader.still_leading()


def test_a_lease_too_short_for_its_renewals_is_refused():
    with pytest.raises(ValueError, match="renew at least twice"):
        Election(None, ("ns", "l"), "a", lease_seconds=10, renew_seconds=6)


# --- heartbeats


async def test_silence_is_counted_on_the_readers_own_clock(client, namespace, clock):
    cache = Cache(client, Lease, namespace=namespace, backoff=quick())
    beats = Heartbeats(cache, clock=clock)
    node = Heartbeat(client, (namespace, "node-1"), "agent-1")
    running = asyncio.create_task(cache.run())
    await in_time(cache.synced())
    assert beats.silent_seconds((namespace, "node-1")) is None
    for _ in range(3):
        clock.now += 7
        assert await node.beat()
        await in_time(cache.reached(node._held.metadata.resource_version))
        assert beats.silent_seconds((namespace, "node-1")) == 0
    clock.now += 7
    assert beats.silent_seconds((namespace, "node-1")) == 7
    running.cancel()


async def test_a_heartbeat_survives_a_second_writer_and_a_deletion(client, namespace):
    key = (namespace, "node-1")
    node = Heartbeat(client, key, "agent-1")
    assert await node.beat()
    await Writer(client).apply(Lease, key, {"spec": {"holderIdentity": "predecessor"}})
    assert [await node.beat(), await node.beat()] == [False, True]
    assert (await client.get(Lease, key)).spec.holder_identity == "agent-1"
    await client.request("DELETE", object_path(Lease, key))
    assert [await node.beat(), await node.beat()] == [False, True]
