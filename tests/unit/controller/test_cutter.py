"""A lowered limit becomes lower sheets, whoever else writes, and what was planned on the old one raises nothing."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta

import msgspec
import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller import actions as act
from tokenfactory.controller.cutting import Cutter
from tokenfactory.planning.power.sheets import caps_of


def limited(limit: str) -> PowerDomain:
    return msgspec.convert({"metadata": ObjectMeta(name="hall"), "spec": {"limit": limit}}, PowerDomain)


def test_a_limit_that_rose_for_a_moment_only_leaves_no_raise_behind():
    domains = {("", "hall"): limited("100kW")}
    cutter = Cutter(lambda: domains, dict, None)  # type: ignore[arg-type]

    def change(limit: str) -> None:
        domains["", "hall"] = limited(limit)
        cutter.domain_changed()

    cutter.domain_changed()
    assert cutter.generation() == cutter.generation()
    change("200kW")
    observed = cutter.generation()
    change("200kW")
    assert cutter.generation() == observed, "nothing fell"
    change("100kW")
    assert cutter.generation() != observed, "planned on 200 kW"
    again = cutter.generation()
    change("200kW")
    change("100kW")
    assert cutter.generation() == again, "nobody has seen the 200 kW"
    domains.clear()
    cutter.domain_changed()
    assert cutter.generation() != again, "a domain that is gone hands out nothing"


EVENING = {"name": "evening", "start": "17:00", "end": "20:00", "timeZone": "UTC", "limit": "50%"}


class Site:
    """A world at full caps with a cutter on it. `refusals` are answered before the first cut is taken."""

    def __init__(self, *windows: dict[str, str]) -> None:
        self.world = SmallWorld.of(2)
        self.windows = windows
        self.limit("20kW")
        self.world.apply(factory(model(replicas=(4, 4))))
        self.world.settle()
        self.refusals = 0
        self.attempts = 0
        self.landed = asyncio.Event()
        self.refused = asyncio.Event()
        self.cutter = Cutter(
            lambda: self.world.objects[PowerDomain],
            lambda: self.world.objects[CapSheet],
            self,  # type: ignore[arg-type]
            clock=lambda: self.world.now,
        )

    def limit(self, watts: str) -> None:
        self.world.apply(hall(watts, timetable=self.windows))

    @property
    def cap(self) -> int:
        caps = caps_of(self.world.objects[CapSheet]["", "hall"].spec)
        return next(cap for name, cap in caps.items() if name.startswith("inference/"))

    async def execute(self, actions: Sequence[act.Action]) -> bool:
        self.attempts += 1
        if self.attempts <= self.refusals:
            self.world.put(self.world.objects[CapSheet]["", "hall"])  # somebody else was first
            self.refused.set()
            return False
        for action in actions:
            self.world.take(action)
        self.landed.set()
        return True

    async def until_cut(self) -> None:
        running = asyncio.create_task(self.cutter.run())
        try:
            await asyncio.wait_for(self.landed.wait(), 10)
        finally:
            running.cancel()


@pytest.mark.parametrize("refusals", [1, 3])
async def test_a_cut_that_is_refused_is_tried_again_over_the_newer_sheet(refusals: int):
    site = Site()
    before = site.cap
    site.cutter.planned(site.world.plan())
    site.refusals = refusals
    site.limit("6kW")
    site.cutter.domain_changed()
    await site.until_cut()
    assert site.attempts == refusals + 1
    assert site.cap < before


async def test_a_cut_that_is_owed_is_not_forgotten_when_the_next_plan_knows_of_the_limit():
    """That plan's own write may be refused as well, and its other writes may take their time."""
    site = Site()
    before = site.cap
    site.cutter.planned(site.world.plan())
    site.limit("6kW")
    site.cutter.domain_changed()
    site.refusals = 1
    running = asyncio.create_task(site.cutter.run())
    await asyncio.wait_for(site.refused.wait(), 10)
    site.cutter.planned(site.world.plan())
    await asyncio.wait_for(site.landed.wait(), 10)
    running.cancel()
    assert site.cap < before


async def test_a_limit_that_falls_while_the_first_plan_is_made_is_cut_before_its_writes():
    site = Site()
    before = site.cap
    composed = site.world.plan()
    site.limit("6kW")
    site.cutter.domain_changed()
    running = asyncio.create_task(site.cutter.run())
    for _ in range(3):
        await asyncio.sleep(0)
    assert not site.attempts, "nothing is known of the supply yet"
    await asyncio.to_thread(site.cutter.planned, composed)
    await asyncio.wait_for(site.landed.wait(), 10)
    running.cancel()
    assert site.cap < before


async def test_a_timetable_that_turns_is_cut_without_an_event_and_without_a_round():
    site = Site(EVENING)
    before = site.cap
    site.world.now = site.world.now.replace(hour=16, minute=59, second=57, microsecond=900_000)
    site.world.others()
    site.cutter.planned(site.world.plan())
    generation = site.cutter.generation()
    running = asyncio.create_task(site.cutter.run())
    for _ in range(3):
        await asyncio.sleep(0)
    site.world.now += timedelta(seconds=1)
    await asyncio.wait_for(site.landed.wait(), 10)
    running.cancel()
    assert site.cap < before
    assert site.cutter.generation() != generation, "what the round under way would raise is dropped"
