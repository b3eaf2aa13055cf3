"""Watch events and list pages: bytes in, the caller's types out.

The usual line costs one pass: it is decoded straight into `{type, object: T}`. Only a line that does not fit, which is
a bookmark, an error or an object that breaks its type, is looked at a second time.
"""

from __future__ import annotations

from typing import Any, Final, Generic, TypeVar

import msgspec

from tokenfactory.api.meta import ObjectMeta, Resource
from tokenfactory.kube.errors import UnreachableError, error_of
from tokenfactory.kube.resources import Key, key_of

T = TypeVar("T", bound=Resource)

ADDED: Final = "ADDED"
DELETED: Final = "DELETED"
BOOKMARK: Final = "BOOKMARK"
ERROR: Final = "ERROR"


class _Event(msgspec.Struct, Generic[T], frozen=True, gc=False):
    type: str
    object: T


class _RawEvent(msgspec.Struct, frozen=True, gc=False):
    type: str
    object: msgspec.Raw


class _Bare(msgspec.Struct, frozen=True):
    metadata: ObjectMeta = ObjectMeta()


class WatchItem(msgspec.Struct, Generic[T], frozen=True):
    """One line of a watch. `object` is None for a bookmark and where `fault` says why it does not fit."""

    type: str
    key: Key
    resource_version: str
    object: T | None = None
    fault: str = ""


class WatchDecoder(Generic[T]):
    """Lines of a watch on one kind."""

    def __init__(self, kind: type[T]) -> None:
        self._doing = f"WATCH {kind.PLURAL}"
        self._decode = msgspec.json.Decoder(_Event[kind]).decode  # type: ignore[valid-type]
        self._decode_raw = msgspec.json.Decoder(_RawEvent).decode

    def decode(self, line: bytes) -> WatchItem[T]:
        try:
            event: Any = self._decode(line)
        except msgspec.DecodeError as fault:
            return self._decode_odd(line, str(fault))
        if event.type in {ERROR, BOOKMARK}:
            return self._decode_odd(line, "")
        obj: T = event.object
        return WatchItem(event.type, key_of(obj), obj.metadata.resource_version or "0", obj)

    def _decode_odd(self, line: bytes, fault: str) -> WatchItem[T]:
        try:
            event = self._decode_raw(line)
            if event.type == ERROR:
                raise error_of(self._doing, *_code_and_body(event.object))
            meta = msgspec.json.decode(event.object, type=_Bare).metadata
        except msgspec.DecodeError as broken:  # not JSON at all: a connection fault, not an object's
            raise UnreachableError(self._doing, broken, sent=True) from broken
        version = meta.resource_version or "0"
        if event.type in {BOOKMARK, DELETED}:  # to take an object away, its name is enough
            return WatchItem(event.type, ("", "") if event.type == BOOKMARK else _key(meta), version)
        return WatchItem(event.type, _key(meta), version, fault=fault)


def _key(meta: ObjectMeta) -> Key:
    return (meta.namespace or "", meta.name)


class _Code(msgspec.Struct):
    code: int = 500


def _code_and_body(body: msgspec.Raw) -> tuple[int, bytes]:
    return msgspec.json.decode(body, type=_Code).code, bytes(body)
