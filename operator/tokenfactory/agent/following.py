"""The sheets of an agent's own path, through one ordered watch for each tree, with its renewal in it.

Of a site of hundreds of racks an agent hears of its own rack, row and site: what is published for one rack must not
go to thousands of nodes. When the path changes, a new watch begins beside the old one. The old one is obeyed until the
new one has brought a complete list, and ends then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tokenfactory.agent.parts import Path
from tokenfactory.agent.sources import SheetBook
from tokenfactory.api.cap_sheet import DOMAIN_LABEL, TREE_LABEL, CapSheet
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import Client
from tokenfactory.planning.power.governor import Sheet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Branch:
    """The domains of one tree that are on a node's paths."""

    tree: str
    domains: frozenset[str]

    @property
    def selector(self) -> str:
        return f"{TREE_LABEL}={self.tree},{DOMAIN_LABEL} in ({','.join(sorted(self.domains))})"


def branches(paths: Iterable[Path]) -> frozenset[Branch]:
    found: dict[str, set[str]] = {}
    for path in paths:
        found.setdefault(path[0], set()).update(path)
    return frozenset(Branch(tree, frozenset(domains)) for tree, domains in found.items())


@dataclass
class _Watch:
    branch: Branch
    cache: Cache[CapSheet]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def holds_newer(self, change: Change[CapSheet]) -> bool:
        held, told = self.cache.get(change.key[1]), change.new or change.old
        return held is not None and told is not None and _version(held) > _version(told)

    def knows_better(self, change: Change[CapSheet]) -> bool:
        """Of a later and complete list: it holds this or something newer, or it has no such sheet, which is news too.

        What it holds of an earlier version may be long outdated: its connection may be broken just now.
        """
        told = change.new or change.old
        if not self.cache.is_synced or told is None or told.spec.domain not in self.branch.domains:
            return False
        held = self.cache.get(change.key[1])
        return change.new is None or held is None or _version(held) >= _version(change.new)


class LiveSheets:
    """The sheets of whatever paths the node is on."""

    def __init__(self, client: Client, tasks: asyncio.TaskGroup) -> None:
        self._client = client
        self._tasks = tasks
        self._book = SheetBook()
        self._watches: dict[Branch, _Watch] = {}
        """In the order in which they began."""
        self._changed: Callable[[], None] = lambda: None

    @property
    def sheets(self) -> Mapping[str, Sheet]:
        """A sheet that was written anew and cannot be read counts as absent: it may have been a cut."""
        unread = {name for watch in self._watches.values() for _, name in watch.cache.undecodable}
        if not unread:
            return self._book.sheets
        return {domain: sheet for domain, sheet in self._book.sheets.items() if domain not in unread}

    @property
    def renewals(self) -> Mapping[str, int]:
        return self._book.renewals

    def subscribe(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def follow(self, paths: frozenset[Path]) -> None:
        wanted = branches(paths)
        for branch in wanted - self._watches.keys():
            self._begin(branch)
        ready = self.ready(paths)
        for branch in self._watches.keys() - wanted:
            if ready or not self._watches[branch].cache.is_synced:
                self._end(branch)

    def ready(self, paths: frozenset[Path]) -> bool:
        found = (self._watches.get(branch) for branch in branches(paths))
        return all(watch is not None and watch.cache.is_synced for watch in found)

    def _begin(self, branch: Branch) -> None:
        watch = _Watch(branch, Cache(self._client, CapSheet, label_selector=branch.selector))
        watch.cache.on_change(lambda change: self._take(watch, change))
        watch.tasks += [
            self._tasks.create_task(watch.cache.run()),
            self._tasks.create_task(self._announce(watch.cache)),
        ]
        self._watches[branch] = watch
        log.info("following sheets", extra={"tree": branch.tree, "domains": sorted(branch.domains)})

    def _end(self, branch: Branch) -> None:
        gone = self._watches.pop(branch)
        for task in gone.tasks:
            task.cancel()
        left = [watch for watch in self._watches.values() if watch.branch.tree == branch.tree]
        if not left:
            self._book.forget(branch.tree, gone.cache)
            return
        # Also what the new watch has not listed: it was deleted meanwhile.
        kept = {sheet.metadata.name for watch in left for sheet in watch.cache}
        self._book.drop(sheet for sheet in gone.cache if sheet.metadata.name not in kept)
        # And what was left to it to tell.
        for sheet in (each for watch in left for each in watch.cache):
            if sheet.spec.renewal is None and sheet.spec.domain not in self._book.sheets:
                self._book.take(None, sheet)

    async def _announce(self, cache: Cache[CapSheet]) -> None:
        await cache.synced()  # also a tree without any sheet is news: it allows nothing
        self._changed()

    def _take(self, watch: _Watch, change: Change[CapSheet]) -> None:
        """Of two watches of a tree the later one's list is the newer: never back behind what either has told."""
        later, alone = False, True
        for other in self._watches.values():
            if other is watch:
                later = True
            elif other.branch.tree != watch.branch.tree:
                continue
            elif later and other.knows_better(change):
                return
            elif not later and other.holds_newer(change):
                return  # this watch will bring it as well
            else:
                alone = False
        # What this watch told before may not be what the book holds, if it is not the only one.
        self._book.take(change.old if alone or change.new is None else None, change.new)
        self._changed()


def _version(sheet: CapSheet) -> int:
    return int(sheet.metadata.resource_version or 0)
