"""The API server's objects of one kind, here and up to date.

One list, then one ordered watch. Both planner and agents decide on what such a cache holds, so it promises:

- `synced()` returns only once a complete and consistent list has been taken in;
- handlers run in the order of resource versions, each change once, and always see the cache with that change in it;
- after history was lost (410), the new list is taken in as a whole before the first handler runs, and objects that
  vanished meanwhile are reported as deleted;
- a watch that has gone silent is not trusted: bookmarks must come, or the connection is made anew;
- an object that does not fit its type is never dropped silently: see `undecodable`.

An error in a handler ends `run()`, and with it the process: a view that disagrees with what its reader made of it
must not go on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import msgspec

from tokenfactory.api.meta import Resource
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, GoneError, UnreachableError
from tokenfactory.kube.listing import Listing, ListPage
from tokenfactory.kube.resources import Key, collection_path, key_of
from tokenfactory.kube.wire import BOOKMARK, DELETED, WatchDecoder, WatchItem

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Resource)


class Change(msgspec.Struct, Generic[T], frozen=True):
    """One object before and after: old is None when added, new is None when deleted."""

    key: Key
    old: T | None
    new: T | None


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[T]):
    """What the cache held at one moment. Nothing in it ever changes."""

    objects: Mapping[Key, T]
    resource_version: int
    undecodable: Mapping[Key, str]
    """Objects that do not fit their type, and why: `objects` has their last good state, or nothing."""


@dataclass(slots=True)
class CacheStats:
    """Counts since the start, for metrics and tests."""

    lists: int = 0
    watches: int = 0
    events: int = 0
    bookmarks: int = 0
    stale_events: int = 0
    stalls: int = 0
    faults: int = 0


class Cache(Generic[T]):
    """`async with TaskGroup() as tasks: tasks.create_task(cache.run()); await cache.synced()`."""

    def __init__(
        self,
        client: Client,
        kind: type[T],
        *,
        namespace: str = "",
        label_selector: str = "",
        field_selector: str = "",
        page_size: int = 1000,
        stalled_after_seconds: float = 90.0,  # the API server sends a bookmark about once a minute
        backoff: Backoff | None = None,
    ) -> None:
        self.kind = kind
        self.stats = CacheStats()
        self.undecodable: dict[Key, str] = {}
        self.last_fault: Exception | None = None
        self.resource_version = 0
        self._client = client
        self._path = collection_path(kind, namespace)
        self._selectors = {
            name: value
            for name, value in (("labelSelector", label_selector), ("fieldSelector", field_selector))
            if value
        }
        self._listing = Listing(client, kind, self._path, self._selectors, page_size)
        self._decoder = WatchDecoder(kind)
        self._silent_seconds = stalled_after_seconds
        self._backoff = backoff or Backoff()
        self._handlers: list[Callable[[Change[T]], None]] = []
        self._objects: dict[Key, T] = {}
        self._snapshot: Snapshot[T] | None = None
        self._synced = asyncio.Event()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._must_list = True
        self._quiet_stalls = 0

    # --- for readers

    def on_change(self, handler: Callable[[Change[T]], None]) -> None:
        """Call `handler` for each change. One that comes late is first told of all there is."""
        self._handlers.append(handler)
        for key, held in self._objects.items():
            handler(Change(key, None, held))

    async def synced(self) -> None:
        """Return once the first list is complete and all handlers have been told of it."""
        await self._synced.wait()

    @property
    def is_synced(self) -> bool:
        return self._synced.is_set()

    async def reached(self, resource_version: str | int) -> None:
        """Return once this cache shows what was written at that version (of an object of this kind)."""
        wanted = int(resource_version)
        if self.resource_version >= wanted and self.is_synced:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, waiter))
        await waiter

    def get(self, name: str, namespace: str = "") -> T | None:
        return self._objects.get((namespace, name))

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[T]:
        return iter(self.snapshot().objects.values())

    def snapshot(self) -> Snapshot[T]:
        """All objects at this moment; costs nothing when nothing has changed since the last one."""
        if self._snapshot is None:
            objects, undecodable = self._objects.copy(), self.undecodable.copy()
            self._snapshot = Snapshot(
                MappingProxyType(objects), self.resource_version, MappingProxyType(undecodable)
            )
        return self._snapshot

    # --- the loop

    async def run(self) -> None:
        """List, watch, and go on whatever the API server or the network does. Ends only when cancelled."""
        while True:
            pause = 0.0
            try:
                if self._must_list:
                    await self._list()
                await self._watch()
            except GoneError as gone:
                self._must_list = True
                self._note(gone)
            except ApiError as error:
                pause = error.retry_after_seconds or 0.0
                self._note(error)
            except UnreachableError as fault:
                self._note(fault)
            await asyncio.sleep(max(pause, self._backoff.next()))

    def _note(self, fault: ApiError | UnreachableError) -> None:
        self.stats.faults += 1
        self.last_fault = fault
        level = logging.INFO if self.is_synced else logging.WARNING
        log.log(level, "watch interrupted: %s", fault, extra={"kind": self.kind.KIND})

    async def _list(self) -> None:
        self.stats.lists += 1
        self._replace(await self._listing.read())
        self._must_list = False
        self._synced.set()
        self._wake()

    async def _watch(self) -> None:
        self.stats.watches += 1
        query = {
            **self._selectors,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": str(self.resource_version),
        }
        rest: list[bytes] = []  # the beginning of a line whose end has not come yet
        try:
            async with self._client.stream(self._path, query, silent_seconds=self._silent_seconds) as chunks:
                async for data in chunks:
                    *lines, end = data.split(b"\n")
                    for line in lines:
                        self._take(b"".join([*rest, line]) if rest else line)
                        rest.clear()
                    if end:
                        rest.append(end)
        except UnreachableError as fault:
            self._judge_silence(fault)
            raise

    def _judge_silence(self, fault: UnreachableError) -> None:
        """Two silent watches in a row: what we resume from may be unknown to the server (a restored etcd)."""
        if isinstance(fault.__cause__, TimeoutError):
            self.stats.stalls += 1
            self._quiet_stalls += 1
            self._must_list = self._quiet_stalls >= 2

    # --- taking in

    def _take(self, line: bytes) -> None:
        if not line:
            return
        item = self._decoder.decode(line)
        self._backoff.reset()
        self._quiet_stalls = 0
        version = int(item.resource_version)
        if version < self.resource_version:
            self.stats.stale_events += 1  # never back in time, whatever a proxy replays
            return
        if item.type == BOOKMARK:
            self.stats.bookmarks += 1
        else:
            self._store(item)
        self._advance(version)

    def _store(self, item: WatchItem[T]) -> None:
        self.stats.events += 1
        key = item.key
        if item.fault:
            self._cannot_decode(key, item.fault)
            return
        if self.undecodable:
            self.undecodable.pop(key, None)
        old = self._objects.get(key)
        if item.type == DELETED:
            if old is None:
                return
            del self._objects[key]
            new = None
        else:
            new = item.object
            assert new is not None
            if old is not None and old.metadata.resource_version == item.resource_version:
                self.stats.stale_events += 1
                return
            self._objects[key] = new
        self._snapshot = None
        self.resource_version = int(item.resource_version)
        change = Change(key, old, new)
        for handler in self._handlers:
            handler(change)

    def _cannot_decode(self, key: Key, fault: str) -> None:
        """The last good object stays, and whoever decides on it must look at `undecodable` as well."""
        self.undecodable[key] = fault
        self._snapshot = None
        log.error("%s %s does not fit its type: %s", self.kind.KIND, key, fault)

    def _advance(self, version: int) -> None:
        if version > self.resource_version:
            self.resource_version = version
            self._snapshot = None
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        if not self._waiting:
            return
        still = []
        for wanted, waiter in self._waiting:
            if wanted <= self.resource_version and self.is_synced:
                if not waiter.done():
                    waiter.set_result(None)
            elif not waiter.done():
                still.append((wanted, waiter))
        self._waiting = still

    def _replace(self, page: ListPage[T]) -> None:
        """Take in a complete list: first all of it, then the handlers, deletions before the rest."""
        held = self._objects
        fresh: dict[Key, T] = {}
        changes: list[tuple[int, Change[T]]] = []
        for obj in page.items:
            key = key_of(obj)
            old = held.get(key)
            if old is not None and old.metadata.resource_version == obj.metadata.resource_version:
                fresh[key] = old
                continue
            fresh[key] = obj
            changes.append((int(obj.metadata.resource_version or 0), Change(key, old, obj)))
        for key in page.undecodable:
            if key in held:
                fresh[key] = held[key]
        changes.extend((0, Change(key, old, None)) for key, old in held.items() if key not in fresh)
        changes.sort(key=lambda change: change[0])
        self._objects = fresh
        self._snapshot = None
        self.resource_version = page.resource_version
        self.undecodable.clear()
        for key, fault in page.undecodable.items():
            self._cannot_decode(key, fault)
        for _, change in changes:
            for handler in self._handlers:
                handler(change)
