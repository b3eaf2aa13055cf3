"""An agent follows the sheets of its own path, and goes from one path to another without ever falling back behind."""

import asyncio

import pytest

from tokenfactory.agent import following
from tokenfactory.agent.following import LiveSheets
from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec, Renewal, labels_of, renewal_name
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.kube.cache import Change

HERE, THERE = ("site", "row", "rack-1"), ("site", "row", "rack-2")


def sheet(domain: str, epoch: int, version: int, tree: str = "site") -> CapSheet:
    spec = CapSheetSpec(domain=domain, tree=tree, term=1, epoch=epoch, hold_milliseconds=60_000)
    return CapSheet(metadata=ObjectMeta(name=domain, resource_version=str(version)), spec=spec)


def renewal(sequence: int, version: int) -> CapSheet:
    spec = CapSheetSpec(domain="site", tree="site", term=1, epoch=1, renewal=Renewal(sequence=sequence))
    return CapSheet(metadata=ObjectMeta(name=renewal_name("site"), resource_version=str(version)), spec=spec)


class HeldCache:
    """A watch whose list and events the test brings."""

    made: list["HeldCache"]

    def __init__(self, client, kind, *, label_selector):
        self.selector = label_selector
        self.undecodable = {}
        self.is_synced = False
        self.ended = False
        self._held: dict[str, CapSheet] = {}
        self._listed = asyncio.Event()
        HeldCache.made.append(self)

    def on_change(self, handler):
        self._handler = handler

    async def run(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.ended = True

    async def synced(self):
        await self._listed.wait()

    def __iter__(self):
        return iter(self._held.values())

    def get(self, name):
        return self._held.get(name)

    def bring(self, *sheets: CapSheet) -> None:
        for each in sheets:
            name = each.metadata.name
            old, self._held[name] = self._held.get(name), each
            self._handler(Change(("", name), old, each))

    def delete(self, name: str) -> None:
        self._handler(Change(("", name), self._held.pop(name), None))

    def list(self, *sheets: CapSheet) -> None:
        self.bring(*sheets)
        self.is_synced = True
        self._listed.set()


@pytest.fixture
async def sheets(monkeypatch):
    HeldCache.made = []
    monkeypatch.setattr(following, "Cache", HeldCache)
    async with asyncio.TaskGroup() as tasks:
        yield LiveSheets(None, tasks)
        for task in list(tasks._tasks):
            task.cancel()


def epochs(sheets: LiveSheets) -> dict[str, int]:
    return {domain: it.epoch for domain, it in sheets.sheets.items()}


async def test_of_a_tree_only_the_own_path_is_followed_and_its_renewal(sheets):
    sheets.follow(frozenset({HERE}))
    (watch,) = HeldCache.made
    assert watch.selector == "tokenfactory.dev/tree=site,tokenfactory.dev/domain in (rack-1,row,site)"
    assert labels_of(sheet("rack-1", 1, 1).spec) == {
        "tokenfactory.dev/tree": "site",
        "tokenfactory.dev/domain": "rack-1",
    }
    assert labels_of(renewal(1, 1).spec)["tokenfactory.dev/domain"] == "site"
    sheets.follow(frozenset({HERE}))
    assert len(HeldCache.made) == 1


async def test_two_paths_of_one_tree_share_a_watch_and_two_trees_do_not(sheets):
    sheets.follow(frozenset({HERE, THERE, ("other", "rack-1")}))
    assert {watch.selector.partition(" in ")[2] for watch in HeldCache.made} == {
        "(rack-1,rack-2,row,site)",
        "(other,rack-1)",
    }


async def test_the_old_path_is_obeyed_until_the_new_one_has_been_listed(sheets):
    here, both = frozenset({HERE}), frozenset({HERE, THERE})
    sheets.follow(here)
    await asyncio.sleep(0)
    old = HeldCache.made[0]
    old.list(sheet("site", 1, 10), sheet("rack-1", 1, 11), renewal(1, 12))
    assert sheets.ready(here)
    sheets.follow(both)
    assert not sheets.ready(both)
    old.bring(sheet("site", 2, 20), renewal(2, 21))
    assert epochs(sheets) == {"site": 2, "rack-1": 1}
    new = HeldCache.made[1]
    new.list(sheet("site", 2, 20), sheet("rack-1", 1, 11), sheet("rack-2", 7, 19), renewal(2, 21))
    sheets.follow(both)
    assert sheets.ready(both)
    await asyncio.sleep(0)
    assert old.ended
    assert epochs(sheets) == {"site": 2, "rack-1": 1, "rack-2": 7}
    assert sheets.renewals == {"site": 2}


async def test_neither_of_two_watches_takes_back_what_the_other_has_told(sheets):
    sheets.follow(frozenset({HERE}))
    old = HeldCache.made[0]
    old.list(sheet("site", 1, 10), sheet("row", 1, 11))
    sheets.follow(frozenset({HERE, THERE}))
    new = HeldCache.made[1]
    old.bring(sheet("site", 3, 30))
    new.list(sheet("site", 2, 20), sheet("row", 2, 21))  # a list that took its time on the way
    assert epochs(sheets) == {"site": 3, "row": 2}
    old.bring(sheet("row", 1, 15))  # an event that did
    assert epochs(sheets) == {"site": 3, "row": 2}
    new.bring(sheet("site", 3, 30))
    assert epochs(sheets) == {"site": 3, "row": 2}


async def test_what_is_no_longer_followed_is_forgotten_also_if_it_was_deleted_meanwhile(sheets):
    sheets.follow(frozenset({HERE, THERE}))
    HeldCache.made[0].list(sheet("site", 1, 1), sheet("row", 1, 2), sheet("rack-1", 1, 3), renewal(5, 4))
    sheets.follow(frozenset({THERE}))
    HeldCache.made[1].list(sheet("site", 1, 1), renewal(5, 4))  # the row's is gone
    sheets.follow(frozenset({THERE}))
    assert epochs(sheets) == {"site": 1}
    assert sheets.renewals == {"site": 5}
    sheets.follow(frozenset())
    assert epochs(sheets) == {}
    assert sheets.renewals == {}


async def test_a_path_that_was_given_up_before_it_was_listed_leaves_nothing_behind(sheets):
    sheets.follow(frozenset({HERE}))
    HeldCache.made[0].list(sheet("site", 1, 1))
    sheets.follow(frozenset({THERE}))
    await asyncio.sleep(0)
    sheets.follow(frozenset({HERE}))
    await asyncio.sleep(0)
    assert [watch.ended for watch in HeldCache.made] == [False, True]
    assert epochs(sheets) == {"site": 1}


async def test_a_cut_that_only_the_old_watch_hears_is_obeyed(sheets):
    """The new one has its list, but another tree of the new paths has none yet, and its connection breaks."""
    sheets.follow(frozenset({HERE}))
    old = HeldCache.made[0]
    old.list(sheet("site", 5, 10), sheet("rack-1", 5, 11), renewal(1, 12))
    moving = frozenset({HERE, THERE, ("other",)})
    sheets.follow(moving)
    new = next(watch for watch in HeldCache.made if "rack-2" in watch.selector)
    new.list(sheet("site", 5, 10), sheet("rack-1", 5, 11), sheet("rack-2", 5, 13), renewal(1, 12))
    sheets.follow(moving)
    assert not old.ended
    old.bring(sheet("site", 6, 20), renewal(2, 21))
    assert epochs(sheets) == {"site": 6, "rack-1": 5, "rack-2": 5}
    assert sheets.renewals == {"site": 2}
    old.bring(sheet("site", 6, 20))
    sheets.follow(frozenset({HERE}))
    assert epochs(sheets) == {"site": 6, "rack-1": 5}
    new.bring(sheet("site", 6, 20))
    assert epochs(sheets)["site"] == 6


async def test_what_was_left_to_a_watch_that_ends_is_told_by_the_one_that_stays(sheets):
    """A sheet that was written anew while the later watch, whose list had no such sheet, was cut off."""
    sheets.follow(frozenset({HERE}))
    old = HeldCache.made[0]
    old.list(sheet("site", 5, 10))
    sheets.follow(frozenset({HERE, THERE, ("other",)}))
    new = next(watch for watch in HeldCache.made if "rack-2" in watch.selector)
    new.list(sheet("site", 5, 10))
    old.bring(sheet("rack-1", 9, 30))
    assert epochs(sheets) == {"site": 5}
    sheets.follow(frozenset({HERE}))
    assert epochs(sheets) == {"site": 5, "rack-1": 9}
