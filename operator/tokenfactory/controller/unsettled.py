"""Writes of charges whose outcome was not learned.

An answer that got lost says nothing about the write: it may have landed, may yet land, or never will. Until the object is
seen in a newer version than the one that was written over, the ledger must treat it as one that may still change, and
rewriting it (which changes its version) is what ends the doubt.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from tokenfactory.api.meta import GROUP, ObjectMeta
from tokenfactory.controller import actions as act
from tokenfactory.kube.errors import ApiError, UnreachableError

TOUCHED = f"{GROUP}/touched"
Slot = tuple[str, str]


class Unsettled:
    """By (kind, name): the version that was written over."""

    def __init__(self) -> None:
        self._over: dict[Slot, int] = {}

    def note(self, action: act.Action, error: ApiError | UnreachableError) -> None:
        """Remember an action that may have been done all the same."""
        doubtful = error.sent if isinstance(error, UnreachableError) else error.code >= 500
        if not doubtful:
            return
        match action:
            case act.PublishSheet(held, spec):
                slot = ("CapSheet", spec.domain)
            case act.ChargeNode(held, name):
                slot = ("GPUNode", name)
            case _:
                return
        self._over[slot] = int(held.metadata.resource_version or 0) if held is not None else 0

    def still(self, version_of: Callable[[Slot], int]) -> frozenset[Slot]:
        """Those that have not been seen in a newer version; the others are forgotten."""
        self._over = {slot: over for slot, over in self._over.items() if version_of(slot) <= over}
        return frozenset(self._over)


def touched(meta: ObjectMeta) -> ObjectMeta:
    """Different from before in something that means nothing: the API server ignores a write that changes nothing."""
    return msgspec.structs.replace(meta, annotations={**meta.annotations, TOUCHED: uuid.uuid4().hex})
