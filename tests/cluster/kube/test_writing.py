"""Each write happens once or is told not to have happened; what says nothing new is not sent."""

from __future__ import annotations

import asyncio

import pytest
from tests.cluster.kube.conftest import ConfigMap

from tokenfactory.api.meta import Api
from tokenfactory.kube.apply import Precondition, Refused, Unchanged, Writer, Written, builtins_of
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.kube.objects import Lease, LeaseSpec, Service
from tokenfactory.twin.faultproxy import Answer, Cut, LoseAnswer, writes

pytestmark = pytest.mark.cluster


def sent(proxy) -> int:
    return sum(writes(seen) for seen in proxy.requests)


@pytest.fixture
def writer(client) -> Writer:
    return Writer(client)


async def test_what_we_no_longer_say_disappears_and_what_others_say_stays(writer, maps, direct, namespace):
    await maps.put("shared", theirs="1")
    key = (namespace, "shared")
    await writer.apply(ConfigMap, key, {"data": {"ours": "1", "old": "1"}})
    answer = await writer.apply(ConfigMap, key, {"data": {"ours": "2"}})
    assert isinstance(answer, Written)
    assert answer.object.data == {"theirs": "1", "ours": "2"}
    assert (await direct.get(ConfigMap, key)).data == answer.object.data


SAFE_TO_REPEAT = {
    "429 with Retry-After": lambda: Answer(
        writes, code=429, reason="TooManyRequests", headers={"Retry-After": "0"}
    ),
    "500": lambda: Answer(writes, times=2, code=500),
    "503": lambda: Answer(writes, times=2, code=503),
    "the answer is lost": lambda: LoseAnswer(writes, times=2),
    "the answer is cut": lambda: Cut(writes),
}


@pytest.mark.parametrize("make_fault", SAFE_TO_REPEAT.values(), ids=SAFE_TO_REPEAT.keys())
async def test_an_apply_gets_through_and_counts_once(make_fault, proxy, writer, direct, namespace):
    fault = proxy.inject(make_fault())
    key = (namespace, "applied")
    answer = await writer.apply(ConfigMap, key, {"data": {"a": "1"}})
    assert isinstance(answer, Written)
    assert fault.happened.is_set()
    held = await direct.get(ConfigMap, key)
    assert held == answer.object, "a repeated apply changed the object again"


async def test_a_create_whose_answer_is_lost_is_not_repeated(proxy, writer, direct, namespace):
    proxy.inject(LoseAnswer(writes))
    key = (namespace, "created")
    with pytest.raises(UnreachableError) as told:
        await writer.create(ConfigMap, key, {"data": {"a": "1"}})
    assert told.value.sent
    assert sent(proxy) == 1
    assert isinstance(await writer.create(ConfigMap, key, {}), Refused), "it was created by the first attempt"
    assert (await direct.get(ConfigMap, key)).data == {"a": "1"}


async def test_a_create_refused_with_429_is_repeated(proxy, writer, direct, namespace):
    proxy.inject(Answer(writes, times=2, code=429, reason="TooManyRequests", headers={"Retry-After": "0"}))
    assert isinstance(await writer.create(ConfigMap, (namespace, "created"), {}), Written)
    assert sent(proxy) == 3


async def test_a_create_answered_with_500_is_not_repeated(proxy, writer, namespace):
    proxy.inject(Answer(writes, code=500))
    with pytest.raises(ApiError, match="500"):
        await writer.create(ConfigMap, (namespace, "created"), {})
    assert sent(proxy) == 1


async def test_a_write_on_an_old_view_is_refused(writer, maps, direct, namespace):
    seen = await maps.put("contended", value="1")
    await maps.put("contended", value="2")
    key = (namespace, "contended")
    mine = {"data": {"mine": "1"}}
    assert isinstance(await writer.apply(ConfigMap, key, mine, only_if=Precondition.of(seen)), Refused)
    assert isinstance(await writer.delete(ConfigMap, key, only_if=Precondition.of(seen)), Refused)
    held = await direct.get(ConfigMap, key)
    assert held.data == {"value": "2"}
    assert isinstance(await writer.apply(ConfigMap, key, mine, only_if=Precondition.of(held)), Written)


async def test_a_write_never_lands_on_a_successor_of_the_same_name(writer, maps, direct, namespace):
    old = await maps.put("reborn", value="1")
    await maps.delete("reborn")
    await maps.put("reborn", value="2")
    key = (namespace, "reborn")
    same = Precondition.of(old, exact=False)
    assert isinstance(await writer.apply(ConfigMap, key, {"data": {"a": "1"}}, only_if=same), Refused)
    assert isinstance(await writer.delete(ConfigMap, key, only_if=same), Refused)
    assert (await direct.get(ConfigMap, key)).data == {"value": "2"}


async def test_a_write_meant_for_a_deleted_object_makes_no_new_one(writer, maps, namespace):
    old = await maps.put("gone", value="1")
    await maps.delete("gone")
    answer = await writer.apply(
        ConfigMap, (namespace, "gone"), {"data": {}}, only_if=Precondition.of(old, exact=False)
    )
    assert isinstance(answer, Refused)
    assert await maps.count() == 0


async def test_deleting_is_done_once_even_when_the_answer_is_lost(proxy, writer, maps, namespace):
    held = await maps.put("doomed", value="1")
    proxy.inject(LoseAnswer(writes))
    only_if = Precondition.of(held, exact=False)
    assert await writer.delete(ConfigMap, (namespace, "doomed"), only_if=only_if) == Unchanged()
    assert await maps.count() == 0


async def test_another_managers_field_is_not_taken_without_force(writer, maps, namespace):
    await maps.put("theirs", value="1")
    answer = await writer.apply(ConfigMap, (namespace, "theirs"), {"data": {"value": "2"}}, force=False)
    assert isinstance(answer, Refused)
    assert "value" in answer.message


async def test_a_guard_is_asked_before_each_attempt(proxy, client, namespace):
    proxy.inject(Answer(writes, times=5, code=503))
    asked = []

    def guard() -> None:
        asked.append(sent(proxy))
        if len(asked) == 3:
            raise PermissionError("no longer the leader")

    with pytest.raises(PermissionError):
        await Writer(client, guard=guard).apply(ConfigMap, (namespace, "x"), {})
    assert asked == [0, 1, 2]
    assert sent(proxy) == 2


# --- status


class Ingress(Api, frozen=True, kw_only=True):
    ip: str = ""


class Balancer(Api, frozen=True, kw_only=True):
    ingress: tuple[Ingress, ...] = ()


class BalancedStatus(Api, frozen=True, kw_only=True):
    load_balancer: Balancer = Balancer()


class Balanced(Service, frozen=True, kw_only=True):
    """A built-in kind with a status that no controller here touches."""

    status: BalancedStatus = BalancedStatus()


def at(*addresses: str) -> BalancedStatus:
    return BalancedStatus(load_balancer=Balancer(ingress=tuple(Ingress(ip=ip) for ip in addresses)))


@pytest.fixture
async def service(direct, namespace):
    spec = {"type": "LoadBalancer", "ports": [{"port": 80}]}
    written = await Writer(direct).create(Balanced, (namespace, "s"), {"spec": spec})
    assert isinstance(written, Written)
    return written.object


async def test_a_status_is_sent_only_when_it_says_something_new(proxy, writer, service, direct, namespace):
    key, said = (namespace, "s"), at("10.1.1.1")
    assert isinstance(await writer.status(service, said), Written)
    # The cache still holds the old object: our own words are remembered.
    assert await writer.status(service, said) == Unchanged()
    held = await direct.get(Balanced, key)
    assert held.status == said
    assert await writer.status(held, said) == Unchanged()
    assert sent(proxy) == 1
    # Somebody else changed it, and the cache has seen that: it is said again.
    theirs = {"status": builtins_of(at("10.9.9.9"))}
    await Writer(direct).apply(Balanced, key, theirs, subresource="status")
    held = await direct.get(Balanced, key)
    assert isinstance(await writer.status(held, said), Written)
    assert sent(proxy) == 2
    # A changed mind is sent although the cache has not caught up, there and back.
    assert isinstance(await writer.status(held, at("10.1.1.2")), Written)
    assert isinstance(await writer.status(held, said), Written)
    assert sent(proxy) == 4
    assert (await direct.get(Balanced, key)).status == said


async def test_an_exact_status_goes_over_nothing_but_what_was_seen_or_said_last(writer, service, direct):
    """A request of an earlier life that lingers on its way must not land over what was said since."""
    assert isinstance(await writer.status(service, at("10.1.1.1"), exact=True), Written)
    # The cache has not caught up with our own write: what that answered is the version to go over.
    assert isinstance(await writer.status(service, at("10.1.1.2"), exact=True), Written)
    # Somebody who still holds the object as it was at first comes too late.
    assert isinstance(await Writer(direct).status(service, at("10.9.9.9"), exact=True), Refused)


async def test_a_status_for_an_object_that_is_gone_is_refused(writer, service, direct, namespace):
    await Writer(direct).delete(Balanced, (namespace, "s"))
    assert isinstance(await writer.status(service, at("10.1.1.1")), Refused)


async def test_replacing_needs_the_version_that_was_read(writer, namespace):
    lease = (await writer.create(Lease, (namespace, "l"), {"spec": LeaseSpec(holder_identity="a")})).object
    assert isinstance(await writer.replace(lease), Written)
    other = await writer.apply(Lease, (namespace, "l"), {"spec": {"holderIdentity": "b"}})
    assert isinstance(other, Written)
    assert isinstance(await writer.replace(lease), Refused)


async def test_own_writes_are_waited_for(writer, follow, namespace):
    follower = follow(label_selector="")
    await asyncio.wait_for(follower.cache.synced(), 90)
    for n in range(10):
        answer = await writer.apply(ConfigMap, (namespace, "mine"), {"data": {"n": str(n)}})
        await asyncio.wait_for(follower.cache.reached(answer.object.metadata.resource_version), 90)
        assert follower.data("mine") == {"n": str(n)}
