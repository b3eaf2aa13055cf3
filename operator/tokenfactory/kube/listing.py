"""A complete list of one kind, read page by page, all pages from one moment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from tokenfactory.api.meta import ObjectMeta, Resource
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import GoneError, UnreachableError
from tokenfactory.kube.resources import Key

T = TypeVar("T", bound=Resource)


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = "0"
    continue_: str = msgspec.field(name="continue", default="")


class _Page(msgspec.Struct, Generic[T]):
    metadata: _ListMeta
    items: list[T] | None = None


class _Bare(msgspec.Struct, frozen=True):
    metadata: ObjectMeta = ObjectMeta()


@dataclass(slots=True)
class ListPage(Generic[T]):
    """What a list says. Objects that do not fit their type are named with the reason."""

    resource_version: int = 0
    items: list[T] = field(default_factory=list)
    undecodable: dict[Key, str] = field(default_factory=dict)
    uids: dict[Key, str] = field(default_factory=dict)
    """Of these."""


class Listing(Generic[T]):
    """Lists of one kind under fixed selectors."""

    def __init__(
        self, client: Client, kind: type[T], path: str, selectors: dict[str, str], page_size: int
    ) -> None:
        self._client = client
        self._path = path
        self._selectors = selectors
        self._page_size = page_size
        self._decode = msgspec.json.Decoder(_Page[kind]).decode  # type: ignore[valid-type]
        self._decode_raw = msgspec.json.Decoder(_Page[msgspec.Raw]).decode  # type: ignore[type-var]
        self._decode_one = msgspec.json.Decoder(kind).decode

    async def read(self) -> ListPage[T]:
        """No resourceVersion is asked for, so that no API server may answer from an older memory of its own."""
        try:
            return await self._read(self._page_size)
        except GoneError:  # compacted between two pages: in one piece there is nothing between
            return await self._read(0)

    async def _read(self, page_size: int) -> ListPage[T]:
        complete: ListPage[T] = ListPage()
        query = dict(self._selectors)
        if page_size:
            query["limit"] = str(page_size)
        while True:
            body = await self._client.request("GET", self._path, query=query, seconds=120, attempt_seconds=60)
            meta = self._add(complete, body)
            if not meta.continue_:
                return complete
            query["continue"] = meta.continue_

    def _add(self, complete: ListPage[T], body: bytes) -> _ListMeta:
        try:
            page: Any = self._decode(body)
            complete.items.extend(page.items or ())
        except msgspec.ValidationError:
            page = self._decode_raw(body)
            for raw in page.items or ():
                self._add_one(complete, raw)
        except msgspec.DecodeError as broken:
            raise UnreachableError(f"LIST {self._path}", broken, sent=True) from broken
        complete.resource_version = int(page.metadata.resource_version)
        meta: _ListMeta = page.metadata
        return meta

    def _add_one(self, complete: ListPage[T], raw: bytes) -> None:
        try:
            complete.items.append(self._decode_one(raw))
        except msgspec.ValidationError as fault:
            meta = msgspec.json.decode(raw, type=_Bare).metadata
            key = (meta.namespace or "", meta.name)
            complete.undecodable[key] = str(fault)
            complete.uids[key] = meta.uid or ""
