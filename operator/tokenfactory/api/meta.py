"""What every object of the API server has, as far as this product reads it.

All types here are frozen and lenient in one direction: fields that we do not know are ignored, so that an older
operator survives a newer CRD.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

GROUP: Final = "tokenfactory.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"


class Api(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The base of every type that goes over the wire."""


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
    key: Annotated[str, Meta(max_length=317, description="Label key.")]
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Annotated[
        tuple[Annotated[str, Meta(max_length=63)], ...], Meta(max_length=64, description="For In and NotIn.")
    ] = ()


class LabelSelector(Api, frozen=True, kw_only=True):
    """Kubernetes' own label selector: all of matchLabels and matchExpressions must hold."""

    match_labels: Annotated[
        dict[
            Annotated[str, Meta(max_length=317)],
            Annotated[str, Meta(max_length=63)],
        ],
        Meta(max_length=32),
    ] = {}
    match_expressions: Annotated[tuple[SelectorRequirement, ...], Meta(max_length=32)] = ()


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
    observed_generation: Annotated[int, Meta(description="The generation it was computed from.")] = 0


class Resource(Api, frozen=True, kw_only=True):
    """One of our kinds. Subclasses add spec and status."""

    KIND: ClassVar[str]
    PLURAL: ClassVar[str]
    SHORT: ClassVar[str]
    NAMESPACED: ClassVar[bool]

    api_version: str = API_VERSION
    kind: str = ""
    metadata: ObjectMeta = ObjectMeta()
