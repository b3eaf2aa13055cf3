"""Writing: each write says exactly what it is based on, and is left out where it would say nothing new.

All objects of this product are written by server-side apply with one field manager, so that what we no longer say
disappears, and what others say stays. A conflict is an answer, not an error: the caller decides anew on a fresh
view instead of trying the same again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import msgspec

from tokenfactory.api.meta import Api, Resource
from tokenfactory.kube.client import APPLY, Client, Guard
from tokenfactory.kube.errors import ApiError, ConflictError, NotFoundError, UnfitError
from tokenfactory.kube.resources import Key, body_of, collection_path, key_of, object_path

FIELD_MANAGER: Final = "tokenfactory"

T = TypeVar("T", bound=Resource)


@dataclass(frozen=True, slots=True)
class Written(Generic[T]):
    """It is there, as `object` says."""

    object: T


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Nothing was sent: the API server already holds these very words."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The object is not as the write assumed (changed, replaced, gone, or there already). Nothing was done."""

    message: str
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Precondition:
    """What a write is based on. An empty field is not checked."""

    uid: str = ""
    resource_version: str = ""

    @classmethod
    def of(cls, obj: Resource, *, exact: bool = True) -> Precondition:
        """The very object `obj`, and with `exact` also unchanged since."""
        meta = obj.metadata
        return cls(meta.uid or "", (meta.resource_version or "") if exact else "")

    def metadata(self) -> dict[str, str]:
        pairs = {"uid": self.uid, "resourceVersion": self.resource_version}
        return {name: value for name, value in pairs.items() if value}


_NONE: Final = Precondition()


def builtins_of(content: Api | Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(content)
    return made


class Writer:
    """All writes of one process; `guard` is asked before each attempt (is this still the leader?)."""

    def __init__(self, client: Client, *, guard: Guard | None = None) -> None:
        self._client = client
        self._guard = guard
        self._statuses: dict[tuple[str, Key, str], _Said] = {}
        self.unchanged_statuses = 0

    async def apply(
        self,
        kind: type[T],
        key: Key,
        content: Api | Mapping[str, Any],
        *,
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        owners: tuple[Api, ...] = (),
        only_if: Precondition = _NONE,
        subresource: str = "",
        force: bool = True,
        urgent: bool = False,
    ) -> Written[T] | Refused:
        """Server-side apply of all that we say about one object: `content` is its top level (spec, status, data).

        Force is right for objects that are ours: another manager's claim on our field is a mistake that we correct.
        """
        meta: dict[str, Any] = dict(only_if.metadata())
        if labels:
            meta["labels"] = dict(labels)
        if annotations:
            meta["annotations"] = dict(annotations)
        if owners:
            meta["ownerReferences"] = [builtins_of(owner) for owner in owners]
        body = body_of(kind, key, builtins_of(content), meta)
        query = {"fieldManager": FIELD_MANAGER, "force": "true" if force else "false"}
        # With a resourceVersion the second of two equal attempts is refused, which is told as such.
        return await self._send(
            kind, "PATCH", object_path(kind, key, subresource), body, query,
            content_type=APPLY, repeatable=True, urgent=urgent,
        )  # fmt: skip

    async def create(
        self,
        kind: type[T],
        key: Key,
        content: Api | Mapping[str, Any],
        *,
        labels: Mapping[str, str] | None = None,
        urgent: bool = False,
    ) -> Written[T] | Refused:
        """Only if there is none of that name yet."""
        body = body_of(kind, key, builtins_of(content), {"labels": dict(labels)} if labels else None)
        return await self._send(
            kind, "POST", collection_path(kind, key[0]), body, {"fieldManager": FIELD_MANAGER}, urgent=urgent
        )

    async def replace(self, obj: T, *, urgent: bool = False) -> Written[T] | Refused:
        """The whole object, only over the very version that it was read at."""
        kind, key = type(obj), key_of(obj)
        if not obj.metadata.resource_version:
            message = f"replacing {kind.KIND} {key} needs the resourceVersion that it was read at"
            raise ValueError(message)
        body = body_of(kind, key, builtins_of(obj), builtins_of(obj.metadata))
        return await self._send(
            kind, "PUT", object_path(kind, key), body, {"fieldManager": FIELD_MANAGER}, urgent=urgent
        )

    async def delete(
        self,
        kind: type[T],
        key: Key,
        *,
        only_if: Precondition = _NONE,
        grace_seconds: int | None = None,
        propagation: str = "Background",
    ) -> Unchanged | Refused:
        """Unchanged means that there is none now (or that it is on its way out)."""
        options: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": propagation,
            "preconditions": only_if.metadata(),
        }
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self._client.request(
                "DELETE",
                object_path(kind, key),
                body=options,
                repeatable=bool(only_if.uid),
                guard=self._guard,
            )
        except NotFoundError:
            return Unchanged()
        except ConflictError as conflict:
            return Refused(str(conflict))
        return Unchanged()

    async def status(
        self,
        held: T,
        status: Api,
        *,
        only_if: Precondition | None = None,
        exact: bool = False,
        urgent: bool = False,
    ) -> Written[T] | Unchanged | Refused:
        """Say `status` of the object that the cache holds, unless it says just that already.

        With `exact` only over the newest version that we know, from the cache or from our own last write: a request
        that lingers on its way cannot overtake what was said since.

        The cache may lag behind our own last write; what that said is remembered until the cache has caught up, so
        that the same words are not sent twice meanwhile.
        """
        kind, key = type(held), key_of(held)
        wanted = normal_form(status)
        slot = (kind.KIND, key, held.metadata.uid or "")
        said = self._statuses.get(slot)
        version = int(held.metadata.resource_version or 0)
        if said is not None and version >= said.resource_version:
            del self._statuses[slot]
            said = None
        if exact:
            newest = version if said is None else said.resource_version
            only_if = Precondition(held.metadata.uid or "", str(newest))
        known = said.words if said is not None else normal_form(getattr(held, "status", None))
        if known == wanted:
            self.unchanged_statuses += 1
            return Unchanged()
        answer = await self.apply(
            kind, key, {"status": builtins_of(status)}, subresource="status",
            only_if=only_if or Precondition.of(held, exact=False), urgent=urgent,
        )  # fmt: skip
        if isinstance(answer, Written):
            new_version = int(answer.object.metadata.resource_version or 0)
            self._statuses[slot] = _Said(wanted, new_version)
        return answer

    def forget(self, kind: type[Resource], key: Key, uid: str) -> None:
        """An object is gone; what was said of it need not be remembered."""
        self._statuses.pop((kind.KIND, key, uid), None)

    async def _send(
        self,
        kind: type[T],
        method: str,
        path: str,
        body: dict[str, Any],
        query: dict[str, str],
        **options: Any,
    ) -> Written[T] | Refused:
        try:
            answer = await self._client.request(
                method, path, query=query, body=body, guard=self._guard, **options
            )
        except ConflictError as conflict:
            return Refused(str(conflict))
        except NotFoundError as missing:
            return Refused(str(missing), missing=True)
        except ApiError as error:
            if _is_another(error):
                return Refused(str(error))
            raise
        try:
            return Written(msgspec.json.decode(answer, type=kind))
        except msgspec.ValidationError as unfit:
            raise UnfitError(f"{method} {path}", unfit) from unfit


def _is_another(error: ApiError) -> bool:
    """An apply with the uid of a predecessor is not answered with a conflict, but as an invalid change of the uid."""
    details = error.status.details
    return (
        error.code == 422 and details is not None and any(c.field == "metadata.uid" for c in details.causes)
    )


@dataclass(frozen=True, slots=True)
class _Said:
    words: bytes
    resource_version: int


def normal_form(content: Any) -> bytes:
    """Equal for two contents that mean the same: no order of keys, no empty fields, no type."""
    return msgspec.json.encode(_pruned(msgspec.to_builtins(content)), order="sorted")


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        pairs = ((name, _pruned(item)) for name, item in value.items())
        return {name: item for name, item in pairs if item not in (None, {}, [])}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value
