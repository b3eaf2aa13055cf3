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
from tokenfactory.api.rules import AGE, Column, Rule

TREE_LABEL = "tokenfactory.dev/tree"
DOMAIN_LABEL = "tokenfactory.dev/domain"
"""An agent follows the sheets of its own path alone: of a tree of thousands of racks it hears of one."""
RENEWAL_SUFFIX = ".renewal"


def renewal_name(tree: str) -> str:
    """A domain's name has no dot, so this never is the name of a domain's own sheet."""
    return tree + RENEWAL_SUFFIX


class ClassCap(Api, frozen=True, kw_only=True):
    """What each GPU of one class may draw here."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="!has(self.fallback) || self.fallback <= self.cap",
            message="fallback must be at most cap: a node that hears nothing may not draw more",
            at=".fallback",
        ),
    )

    class_name: Annotated[ClassName, Meta(description="The class.")] = msgspec.field(name="class")
    cap: Annotated[MilliwattsField, Meta(description="Milliwatts per GPU.")]
    fallback: Annotated[
        MilliwattsField, Meta(description="Milliwatts per GPU once hold has run out. Never above cap.")
    ] = 0


class EarlierCaps(Api, frozen=True, kw_only=True):
    """The highest caps of the epochs after the previous entry's and up to `through`, where they exceed later ones."""

    through: Annotated[int, Meta(ge=1, description="The last epoch of this stretch.")]
    caps: Annotated[
        tuple[ClassCap, ...], Meta(max_length=4096, description="The highest cap of each class in it.")
    ]


class Renewal(Api, frozen=True, kw_only=True):
    """The leader is alive: who has seen this has seen every sheet before it."""

    sequence: Annotated[int, Meta(ge=1, description="Grows with each renewal.")]


class CapSheetSpec(Api, frozen=True, kw_only=True):
    """What one domain allows now, and what some node may still be obeying."""

    # P5: an object that moved on can never be put back, whoever writes.
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.domain == oldSelf.domain",
            message="a sheet stays with its domain: write another sheet",
            at=".domain",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="self.term >= oldSelf.term",
            message="an older leadership may not write",
            advice="'term %d is an older leadership than %d: another leader has taken over, so this one must stop'"
            ".format([self.term, oldSelf.term])",
            at=".term",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="self.epoch >= oldSelf.epoch",
            message="an epoch never falls",
            advice="'an epoch never falls: read the sheet again and write epoch %d or more, not %d'"
            ".format([oldSelf.epoch, self.epoch])",
            at=".epoch",
            reason="FieldValueForbidden",
        ),
        # The same content in a newer term, or with less to remember, keeps its epoch: nobody need obey anew.
        Rule(
            rule="has(self.renewal) || self.epoch > oldSelf.epoch || (self.tree == oldSelf.tree"
            " && self.?holdMilliseconds.orValue(0) == oldSelf.?holdMilliseconds.orValue(0)"
            " && (has(self.caps) ? has(oldSelf.caps) && self.caps == oldSelf.caps : !has(oldSelf.caps)))",
            message="what agents obey changes with a higher epoch only",
            advice="'what agents obey changes with a higher epoch only: write epoch %d or more, not %d'"
            ".format([oldSelf.epoch + 1, self.epoch])",
            at=".epoch",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="self.?completeFrom.orValue(1) >= oldSelf.?completeFrom.orValue(1)",
            message="what is forgotten stays forgotten: leave completeFrom as it is or raise it",
            at=".completeFrom",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="self.?completeFrom.orValue(1) <= self.epoch",
            message="the present epoch is always known: write completeFrom at most epoch",
            advice="'completeFrom %d is not an epoch yet: write at most %d'"
            ".format([self.?completeFrom.orValue(1), self.epoch])",
            at=".completeFrom",
        ),
        Rule(
            rule="self == oldSelf || !has(self.renewal) || !has(oldSelf.renewal)"
            " || self.renewal.sequence > oldSelf.renewal.sequence",
            message="every renewal needs a higher sequence",
            advice="'every renewal needs a higher sequence: write %d or more, not %d'"
            ".format([oldSelf.renewal.sequence + 1, self.renewal.sequence])",
            at=".renewal.sequence",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="has(self.renewal) == has(oldSelf.renewal)",
            message="a renewal stays a renewal and a sheet stays a sheet: write another object",
            at=".renewal",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="!has(self.renewal) || ((!has(self.caps) || size(self.caps) == 0)"
            " && (!has(self.earlier) || size(self.earlier) == 0))",
            message="exactly one of caps and renewal: a renewal carries no caps, so delete caps and earlier",
            at=".caps",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="!has(self.renewal) || self.domain == self.tree",
            message="a renewal is for a whole tree: write the tree's root as domain",
            at=".domain",
        ),
        Rule(
            rule="!has(self.earlier) || self.earlier.all(e, e.through < self.epoch)",
            message="earlier epochs end before the present one: write through below epoch",
            at=".earlier",
        ),
        Rule(
            rule="!has(self.earlier) || self.earlier.map(e, e.through).isSorted()",
            message="earlier epochs are listed oldest first: sort them by through",
            at=".earlier",
        ),
    )

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
    SHORT: ClassVar[str] = "sheet"  # not cs: to kubectl that is componentstatuses, whatever else there is
    NAMESPACED: ClassVar[bool] = False
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(name="Domain", path=".spec.domain"),
        Column(name="Tree", path=".spec.tree"),
        Column(name="Term", path=".spec.term", type="integer"),
        Column(name="Epoch", path=".spec.epoch", type="integer"),
        Column(name="Renewal", path=".spec.renewal.sequence", type="integer", wide=True),
        AGE,
    )
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="has(self.spec.renewal) || self.metadata.name == self.spec.domain",
            at_birth=True,
            message="a sheet has its domain's name",
            advice="'a sheet has its domain\\'s name: write metadata.name: ' + self.spec.domain",
        ),
        Rule(
            rule=f"!has(self.spec.renewal) || self.metadata.name == self.spec.tree + '{RENEWAL_SUFFIX}'",
            at_birth=True,
            message="a renewal has its tree's name and a suffix",
            advice=f"'a renewal is named after its tree: write metadata.name: ' + self.spec.tree + '{RENEWAL_SUFFIX}'",
        ),
    )

    spec: CapSheetSpec


def labels_of(spec: CapSheetSpec) -> dict[str, str]:
    """By which agents follow a sheet. A renewal carries its root's, so whoever follows a tree at all hears of it."""
    return {TREE_LABEL: spec.tree, DOMAIN_LABEL: spec.domain}
