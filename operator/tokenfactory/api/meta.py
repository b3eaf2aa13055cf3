"""What every object of the API server has, as far as this product reads it.

All types here are frozen and lenient in one direction: fields that we do not know are ignored, so that an older
operator survives a newer CRD.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from tokenfactory.api.fields import LabelKey, LabelMap, LabelValue
from tokenfactory.api.rules import LIST_SET, Column, Rule, list_map

GROUP: Final = "tokenfactory.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"


class Api(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True, gc=False):
    """The base of every type that goes over the wire.

    What is decoded is a tree and never a cycle, so the garbage collector need not look at it (`gc=False`): with ten
    thousand nodes its rounds would cost as much as the decoding.
    """

    RULES: ClassVar[tuple[Rule, ...]] = ()


class OwnerReference(Api, frozen=True, kw_only=True):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(Api, frozen=True, kw_only=True):
    name: str = ""
    namespace: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[OwnerReference, ...] = ()


class SelectorRequirement(Api, frozen=True, kw_only=True):
    """One requirement on one label."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="!(self.operator in ['In', 'NotIn']) || (has(self.values) && size(self.values) > 0)",
            message="In and NotIn need values",
            advice="self.operator + ' needs values: write values: [...], or use Exists or DoesNotExist'",
            at=".values",
            reason="FieldValueRequired",
        ),
        Rule(
            rule="self.operator in ['In', 'NotIn'] || !has(self.values) || size(self.values) == 0",
            message="Exists and DoesNotExist take no values",
            advice="self.operator + ' takes no values: delete them, or use In or NotIn'",
            at=".values",
            reason="FieldValueForbidden",
        ),
    )

    key: Annotated[LabelKey, Meta(description="Label key.")]
    operator: Annotated[
        Literal["In", "NotIn", "Exists", "DoesNotExist"],
        Meta(description="In and NotIn compare with values; Exists and DoesNotExist only look at the key."),
    ]
    values: Annotated[
        tuple[LabelValue, ...],
        Meta(max_length=32, description="For In and NotIn.", extra_json_schema=LIST_SET),
    ] = ()


class LabelSelector(Api, frozen=True, kw_only=True):
    """Kubernetes' own label selector: all of matchLabels and matchExpressions must hold."""

    match_labels: Annotated[LabelMap, Meta(description="Labels that must all be there.")] = {}
    match_expressions: Annotated[
        tuple[SelectorRequirement, ...], Meta(max_length=16, description="Requirements that must all hold.")
    ] = ()


ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(Api, frozen=True, kw_only=True, omit_defaults=False):
    """A condition as the Kubernetes API conventions define it."""

    type: Annotated[str, Meta(max_length=64, description="What it is about, such as Ready.")]
    status: Annotated[ConditionStatus, Meta(description="True, False or Unknown.")]
    reason: Annotated[str, Meta(max_length=128, description="One CamelCase word for programs.")]
    message: Annotated[str, Meta(max_length=4096, description="A sentence for people.")] = ""
    last_transition_time: Annotated[
        str, Meta(max_length=40, description="When the status last changed (RFC 3339).")
    ] = ""
    observed_generation: Annotated[int, Meta(ge=0, description="The generation it was computed from.")] = 0


Conditions = Annotated[
    tuple[Condition, ...],
    Meta(
        max_length=16,
        description="What holds and what does not, each with its reason; `kubectl wait --for=condition=…` waits for one.",
        extra_json_schema=list_map("type"),
    ),
]
ObservedGeneration = Annotated[
    int, Meta(ge=0, description="The generation of the spec that this status was computed from.")
]


class Resource(Api, frozen=True, kw_only=True):
    """One of our kinds. Subclasses add spec and status."""

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]
    SHORT: ClassVar[str]
    NAMESPACED: ClassVar[bool]
    COLUMNS: ClassVar[tuple[Column, ...]]

    api_version: str = API_VERSION
    kind: str = ""
    metadata: ObjectMeta = ObjectMeta()
