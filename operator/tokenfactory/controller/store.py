"""What people wrote: TokenFactories, PowerDomains, PowerProfiles, Checkpoints, as Kopf's events bring them.

Kopf gives no sign that its first list is complete, and after a broken watch it does not report what vanished
meanwhile. So the truth of "complete" comes from lists of our own: one before anything is decided, one every minute.
Between them Kopf's events keep the store fresh; an event older than what is held is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final, Generic, TypeVar

from tokenfactory.api.meta import Resource
from tokenfactory.kube.resources import Key, key_of

T = TypeVar("T", bound=Resource)
NONE: Final[Mapping[Key, str]] = MappingProxyType({})


class Store(Generic[T]):
    """Objects of one kind. All calls come from one event loop."""

    def __init__(self, kind: type[T]) -> None:
        self.kind = kind
        self.complete = False
        self.undecodable: dict[Key, str] = {}
        self.uids: dict[Key, str] = {}
        """Of what is undecodable: which object it is that people are told about."""
        self._objects: dict[Key, T] = {}
        self._deleted: dict[str, int] = {}
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def put(self, obj: T) -> None:
        """Take in a newer state of an object; an older one changes nothing."""
        key, version = key_of(obj), _version(obj)
        held = self._objects.get(key)
        if version <= self._deleted.get(obj.metadata.uid or "", 0):
            return
        if held is not None and held.metadata.uid == obj.metadata.uid and _version(held) >= version:
            return
        self._objects[key] = obj
        self.undecodable.pop(key, None)
        self._changed()

    def delete(self, key: Key, uid: str, version: int) -> None:
        """Forget this very object; a namesake that was created since stays."""
        self._deleted[uid] = max(version, self._deleted.get(uid, 0))
        held = self._objects.get(key)
        self.undecodable.pop(key, None)
        if held is not None and held.metadata.uid == uid:
            del self._objects[key]
            self._changed()

    def broken(self, key: Key, why: str, uid: str = "") -> None:
        """An object does not fit its type: the last good state stays, and its reader must say so."""
        self.uids[key] = uid
        if self.undecodable.get(key) != why:
            self.undecodable[key] = why
            self._changed()

    def replace_all(
        self,
        objects: Iterable[T],
        version: int,
        undecodable: Mapping[Key, str] = NONE,
        uids: Mapping[Key, str] = NONE,
    ) -> None:
        """A complete list as of `version`: what is not in it and not newer is gone, whether it could be read or not."""
        listed = {key_of(obj): obj for obj in objects}
        for key, why in undecodable.items():
            self.broken(key, why, uids.get(key, ""))
        for key in [key for key in self.undecodable if key not in listed and key not in undecodable]:
            del self.undecodable[key]
            self._changed()
        for key, held in list(self._objects.items()):
            if key not in listed and key not in self.undecodable and _version(held) <= version:
                del self._objects[key]
                self._changed()
        for obj in listed.values():
            self.put(obj)
        self._deleted.clear()
        if not self.complete:
            self.complete = True
            self._changed()

    def snapshot(self) -> Mapping[Key, T]:
        return MappingProxyType(dict(self._objects))


def _version(obj: Resource) -> int:
    return int(obj.metadata.resource_version or 0)
