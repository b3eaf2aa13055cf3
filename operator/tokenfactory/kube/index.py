"""A second way into a cache: which objects have this value, such as the pods of one node.

Kept by the changes themselves, so that a question costs what its answer is long, and an event costs the same whatever
the cache holds. (An index that is rebuilt per event is quadratic in the number of objects.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, KeysView
from typing import Generic, TypeVar

from tokenfactory.api.meta import Resource
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.resources import Key

T = TypeVar("T", bound=Resource)
V = TypeVar("V", bound=Hashable)


class Index(Generic[V, T]):
    """`Index(pods, lambda pod: [pod.spec.node_name])`. An object may have any number of values."""

    def __init__(self, cache: Cache[T], values_of: Callable[[T], Iterable[V]]) -> None:
        self._values_of = values_of
        self._objects: dict[V, dict[Key, T]] = {}
        cache.on_change(self._note)

    def _note(self, change: Change[T]) -> None:
        if change.old is not None:
            for value in self._values_of(change.old):
                held = self._objects.get(value)
                if held is not None:
                    held.pop(change.key, None)
                    if not held:
                        del self._objects[value]
        if change.new is not None:
            for value in self._values_of(change.new):
                self._objects.setdefault(value, {})[change.key] = change.new

    def get(self, value: V) -> tuple[T, ...]:
        return tuple(self._objects.get(value, {}).values())

    def count(self, value: V) -> int:
        return len(self._objects.get(value, {}))

    def values(self) -> KeysView[V]:
        """Each value that some object has now."""
        return self._objects.keys()
