"""The same thing said again raises a count, whoever says it and whatever happens on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from tokenfactory.kube.client import Client
from tokenfactory.kube.events import Recorder
from tokenfactory.kube.objects import Event, ObjectRef
from tokenfactory.kube.resources import collection_path, object_path
from tokenfactory.twin.faultproxy import Answer, LoseAnswer, writes

pytestmark = pytest.mark.cluster


@pytest.fixture
def about(namespace) -> ObjectRef:
    return ObjectRef(api_version="v1", kind="ConfigMap", namespace=namespace, name="chat", uid="u-1")


@pytest.fixture
async def recorder(client) -> AsyncIterator[Recorder]:
    recorder = Recorder(client, controller="tokenfactory.dev/operator", instance="operator-0")
    running = asyncio.create_task(recorder.run())
    yield recorder
    running.cancel()


async def counts(client: Client, namespace: str) -> dict[str, int]:
    class Listed(msgspec.Struct):
        items: list[Event]

    body = await client.request("GET", collection_path(Event, namespace))
    events = msgspec.json.decode(body, type=Listed).items
    assert len({event.note for event in events}) == len(events), "the same thing is there twice"
    return {event.note: event.series.count if event.series else 1 for event in events}


async def say(recorder, about, note, **options) -> None:
    recorder.event(about, "Tested", note, **options)
    await asyncio.wait_for(recorder.sent(), 90)


async def test_saying_it_again_raises_the_count(recorder, about, direct, namespace):
    for _ in range(4):
        await say(recorder, about, "no watts left")
    await say(recorder, about, "something else", type="Warning")
    assert await counts(direct, namespace) == {"no watts left": 4, "something else": 1}


async def test_what_is_said_before_it_was_sent_is_counted_together(recorder, about, direct, namespace, proxy):
    for _ in range(50):
        recorder.event(about, "Tested", "again and again")
    await asyncio.wait_for(recorder.sent(), 90)
    assert await counts(direct, namespace) == {"again and again": 50}
    assert sum(writes(seen) for seen in proxy.requests) == 1
    for _ in range(7):
        recorder.event(about, "Tested", "again and again")
    await asyncio.wait_for(recorder.sent(), 90)
    assert await counts(direct, namespace) == {"again and again": 57}


async def test_the_count_goes_on_after_a_restart(recorder, about, client, direct, namespace):
    await say(recorder, about, "x")
    await say(recorder, about, "x")
    successor = Recorder(client, controller="tokenfactory.dev/operator", instance="operator-1")
    running = asyncio.create_task(successor.run())
    await say(successor, about, "x")
    await say(recorder, about, "x")
    assert await counts(direct, namespace) == {"x": 4}
    running.cancel()


async def test_a_lost_answer_counts_once(recorder, about, direct, namespace, proxy):
    proxy.inject(LoseAnswer(writes))
    await say(recorder, about, "x")
    assert await counts(direct, namespace) == {"x": 1}
    await say(recorder, about, "x")
    assert await counts(direct, namespace) == {"x": 2}
    proxy.inject(LoseAnswer(writes))
    await say(recorder, about, "x")
    await say(recorder, about, "x")
    assert await counts(direct, namespace) == {"x": 4}


async def test_an_event_that_has_ended_is_said_anew(recorder, about, direct, namespace):
    await say(recorder, about, "x")
    await say(recorder, about, "x")
    (said,) = recorder._known
    await direct.request("DELETE", object_path(Event, said.key()))
    await say(recorder, about, "x")
    assert await counts(direct, namespace) == {"x": 1}


async def test_a_refused_event_does_not_stop_the_others(recorder, about, direct, namespace, proxy):
    proxy.inject(Answer(writes, code=403, reason="Forbidden"))
    await say(recorder, about, "refused")
    await say(recorder, about, "fine")
    assert await counts(direct, namespace) == {"fine": 1}
    assert recorder.dropped == 1


async def test_a_flood_is_bounded(client, about):
    recorder = Recorder(client, controller="c", instance="i", waiting_limit=3)
    for n in range(5):
        recorder.event(about, "Tested", f"note {n}")
    assert recorder.dropped == 2


async def test_kubectl_shows_it(recorder, direct, namespace, cluster, maps):
    about = await maps.put("chat", value="1")
    await say(recorder, about, "no watts left in hall-a", type="Warning")
    await say(recorder, about, "no watts left in hall-a", type="Warning")
    shown = cluster.kubectl("-n", namespace, "events", "--for", "configmap/chat").stdout
    assert "no watts left in hall-a" in shown
    assert "x2" in shown
