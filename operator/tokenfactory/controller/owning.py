"""Whose is an object that bears a model's name? The one answer for all who write, adopt or delete such an object.

It is its factory's when its owner reference says so, by uid. What nobody controls is the factory's again if it bears the
marks that only we set: somebody deleted the factory and left its objects (`--cascade=orphan`), or took the reference off.
Everything else is somebody else's, and stays as it is, whatever a factory would like to call its own.

Our caches hold only objects with our label, so that a name is taken is mostly learned from the API server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from tokenfactory.api import names
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.workloads import SPEC_LABEL, group_called, workload_called
from tokenfactory.kube.resources import Key

Whose = Literal["Ours", "Left", "Others"]
Slot = tuple[str, Key]
"""(kind, key)."""
TRY_AGAIN_MILLISECONDS: Final = 30_000
"""Whoever has the name may delete or rename their object, and no watch of ours sees that."""
_FORGOTTEN_MILLISECONDS: Final = 600_000


def whose(meta: ObjectMeta, factory: str, uid: str) -> Whose:
    """Of the factory of that name and uid, in the same namespace."""
    if any(owner.uid == uid and owner.controller for owner in meta.owner_references):
        return "Ours"
    model = meta.labels.get(names.MODEL_LABEL, "")
    named = meta.name in {workload_called(factory, model), group_called(factory, model)}
    marked = SPEC_LABEL in meta.labels and meta.labels.get(names.FACTORY_LABEL) == factory
    controlled = any(owner.controller for owner in meta.owner_references)
    return "Left" if named and marked and not controlled else "Others"


def in_words(kind: str, meta: ObjectMeta, factory: str) -> str:
    """That somebody else has this name, and what to do."""
    what = f"{kind} {meta.name}"
    owner = next((owner for owner in meta.owner_references if owner.controller), None)
    if owner is None:
        return f"{what} is there and not this factory's: rename or delete it, or give the model another name"
    if owner.kind != TokenFactory.KIND:
        return f"{what} is {owner.kind} {owner.name}'s: give the model another name"
    if owner.name == factory:
        return (
            f"{what} is a deleted factory's of this name: it is made anew once the garbage collector has it"
        )
    return f"{what} is TokenFactory {owner.name}'s: give the model another name"


@dataclass(frozen=True)
class TakenName:
    words: str
    again: bool
    """It is time to try once more."""


class Taken:
    """Names that somebody else had when we last tried."""

    def __init__(self) -> None:
        self._known: dict[Slot, tuple[str, int]] = {}

    def note(self, slot: Slot, words: str, milliseconds: int) -> None:
        self._known[slot] = (words, milliseconds)

    def free(self, slot: Slot) -> None:
        self._known.pop(slot, None)

    def at(self, milliseconds: int) -> Mapping[Slot, TakenName]:
        """What is known at this moment. What nobody has tried for long, nobody wants."""
        self._known = {
            slot: (words, since)
            for slot, (words, since) in self._known.items()
            if milliseconds - since < _FORGOTTEN_MILLISECONDS
        }
        return {
            slot: TakenName(words, milliseconds - since >= TRY_AGAIN_MILLISECONDS)
            for slot, (words, since) in self._known.items()
        }
