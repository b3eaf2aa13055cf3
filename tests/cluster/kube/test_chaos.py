"""Faults of every kind, at random moments, while objects come, change and go: a seed tells the whole story."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from tokenfactory.twin.faultproxy import (
    Answer,
    Cut,
    Fault,
    FaultProxy,
    Inject,
    LoseAnswer,
    Stall,
    expired_line,
    lists,
    watches,
)

pytestmark = pytest.mark.cluster

SEEDS = int(os.environ.get("FAULT_SEEDS", "3"))


def any_fault(rng: random.Random) -> Fault:
    lines = rng.randrange(4)
    return rng.choice(
        [
            lambda: Cut(watches, after_lines=lines),
            lambda: Cut(lists),
            lambda: Stall(watches, after_lines=lines),
            lambda: Inject(watches, line=expired_line(), after_lines=lines),
            lambda: Answer(watches, code=410, reason="Expired"),
            lambda: Answer(lists, code=rng.choice([429, 500, 503])),
            lambda: Answer(watches, code=rng.choice([429, 500, 503])),
            lambda: LoseAnswer(lists),
        ]
    )()


async def change_something(rng: random.Random, maps, there: set[str]) -> None:
    name = f"map-{rng.randrange(12)}"
    if name in there and rng.random() < 0.4:
        await maps.delete(name)
        there.remove(name)
    else:
        await maps.put(name, value=str(rng.random()), filler="x" * rng.randrange(5000))
        there.add(name)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_caches_come_to_the_truth(seed, proxy: FaultProxy, maps, follow):
    rng = random.Random(seed)
    followers = [follow(page_size=rng.choice([3, 1000]), stalled_after_seconds=0.5) for _ in range(3)]
    there: set[str] = set()
    for _ in range(60):
        if rng.random() < 0.4:
            proxy.inject(any_fault(rng))
        if rng.random() < 0.15:
            proxy.drop_connections()
        await change_something(rng, maps, there)
    proxy.heal()
    last = await maps.put("last", value="1")
    truth = await maps.versions()
    for follower in followers:
        await asyncio.wait_for(follower.cache.reached(last.metadata.resource_version), 90)
        assert follower.copy == dict(follower.cache.snapshot().objects)
        assert {name: held.metadata.resource_version for (_, name), held in follower.copy.items()} == truth
    assert set(truth) == there | {"last"}
    assert sum(follower.cache.stats.faults for follower in followers) > 0
