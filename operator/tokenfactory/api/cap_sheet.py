"""CapSheet: what one domain allows, and what some node may still be obeying.

Agents obey the lowest sheet of the domains on their path. The sheet is also the ledger's memory: `earlier` holds
every cap of past epochs that some node has not yet been seen to leave, so that a restarted operator charges
exactly what the crashed one did.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from tokenfactory.api.fields import ClassName, DomainName, MilliwattsField
from tokenfactory.api.meta import Api, Resource

TREE_LABEL = "tokenfactory.dev/tree"
RENEWAL_SUFFIX = ".renewal"


def renewal_name(tree: str) -> str:
    """A domain's name has no dot, so this never is the name of a domain's own sheet."""
    return tree + RENEWAL_SUFFIX


class ClassCap(Api, frozen=True, kw_only=True):
    """What each GPU of one class may draw here."""

    class_name: Annotated[ClassName, Meta(description="The class.")] = msgspec.field(name="class")
    cap: Annotated[MilliwattsField, Meta(description="Milliwatts per GPU.")]
    fallback: Annotated[
        MilliwattsField, Meta(description="Milliwatts per GPU once hold has run out. Never above cap.")
    ] = 0


class EarlierCaps(Api, frozen=True, kw_only=True):
    """The highest caps of the epochs after the previous entry's and up to `through`, where they exceed later ones."""

    through: Annotated[int, Meta(ge=1, description="The last epoch of this stretch.")]
    caps: Annotated[tuple[ClassCap, ...], Meta(max_length=4096)]


class Renewal(Api, frozen=True, kw_only=True):
    """The leader is alive: who has seen this has seen every sheet before it."""

    sequence: Annotated[int, Meta(ge=1, description="Grows with each renewal.")]


class CapSheetSpec(Api, frozen=True, kw_only=True):
    domain: Annotated[DomainName, Meta(description="The PowerDomain that this sheet is for.")]
    tree: Annotated[DomainName, Meta(description="The root of that domain's tree.")]
    term: Annotated[int, Meta(ge=1, description="The leadership under which it was written; never falls.")]
    epoch: Annotated[int, Meta(ge=1, description="Grows with every change of what agents obey.")]
    hold_milliseconds: Annotated[
        int, Meta(ge=0, le=604_800_000, description="How long it may be trusted after the last renewal seen.")
    ] = 0
    caps: Annotated[
        tuple[ClassCap, ...], Meta(max_length=4096, description="A class that is not listed gets nothing.")
    ] = ()
    earlier: Annotated[
        tuple[EarlierCaps, ...],
        Meta(
            max_length=32,
            description="Caps of earlier epochs that some node may still be obeying, oldest first.",
        ),
    ] = ()
    complete_from: Annotated[
        int,
        Meta(
            ge=1,
            description="`caps` and `earlier` cover every epoch from this one on; older ones are forgotten.",
        ),
    ] = 1
    renewal: Annotated[
        Renewal | None, Meta(description="Only in the small object that renews a whole tree.")
    ] = None


class CapSheet(Resource, frozen=True, kw_only=True):
    """What one power domain allows: watts per GPU for each class. Written by the operator only."""

    KIND: ClassVar[str] = "CapSheet"
    PLURAL: ClassVar[str] = "capsheets"
    SHORT: ClassVar[str] = "cs"
    NAMESPACED: ClassVar[bool] = False

    spec: CapSheetSpec
