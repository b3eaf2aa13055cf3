"""Checkpoint: one captured state of one model, and everything that must match before it may be used."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from tokenfactory.api.fields import ModelName, ObjectName, Timestamp
from tokenfactory.api.meta import Api, Conditions, ObservedGeneration, Resource
from tokenfactory.api.rules import AGE, LIST_SET, Column, Rule, matches, text


class Identity(Api, frozen=True, kw_only=True):
    """What must be the same where it is restored. An empty field was not known and matches nothing but empty."""

    architecture: Annotated[str, Meta(max_length=32, description="Of the processor, such as x86_64.")] = ""
    kernel: Annotated[str, Meta(max_length=128, description="The kernel's release.")] = ""
    image_digest: Annotated[str, Meta(max_length=128, description="Digest of the NIM image.")] = ""
    model: Annotated[str, Meta(max_length=253, description="The served model.")] = ""
    gpu_product: Annotated[str, Meta(max_length=96, description="The GPU as NVML names it.")] = ""
    gpu_count: Annotated[int, Meta(ge=0, le=2048, description="GPUs of the replica.")] = 0
    driver: Annotated[str, Meta(max_length=64, description="The GPU driver's version.")] = ""
    tensor_parallel: Annotated[int, Meta(ge=0, le=2048, description="Ways of tensor parallelism.")] = 0


class Location(Api, frozen=True, kw_only=True):
    """Where it lies: in a claim, or on one node's disk."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="(has(self.claim) && self.claim != '') != (has(self.node) && self.node != '')",
            message="exactly one of claim and node: write the PersistentVolumeClaim that holds it,"
            " or the node on whose disk it lies",
        ),
        Rule(
            rule="!" + matches(r"(^|/)\.\.(/|$)", "self.path"),
            message="a path may not climb out of its volume: delete the ..",
            at=".path",
        ),
    )

    claim: Annotated[str, Meta(max_length=253, description="PersistentVolumeClaim.")] = ""
    path: Annotated[str, Meta(min_length=1, max_length=1024, description="Folder within it.")]
    node: Annotated[str, Meta(max_length=253, description="Only where it lies on one node's disk.")] = ""


class CheckpointSpec(Api, frozen=True, kw_only=True):
    """What was saved, of what, and where it lies. Never changes: another state is another Checkpoint."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self == oldSelf",
            message="a checkpoint never changes: make another Checkpoint for another state",
            reason="FieldValueForbidden",
        ),
    )

    factory: Annotated[ObjectName, Meta(description="The TokenFactory, in the same namespace.")]
    model: Annotated[ModelName, Meta(description="The model within that factory.")]
    strategy: Annotated[
        Literal["WarmCache", "ProcessImage", "HotSpare"], Meta(description="How it was saved.")
    ]
    identity: Annotated[Identity, Meta(description="What must be the same where it is restored.")]
    location: Annotated[Location, Meta(description="Where it lies.")]
    digest: Annotated[
        str,
        text(
            r"^sha256:[0-9a-f]{64}$",
            what="a digest",
            write="sha256: and 64 lower-case hexadecimal digits",
            max_length=71,
            description="Of the manifest of all files.",
        ),
    ]
    size_bytes: Annotated[int, Meta(ge=0, le=2**53, description="Bytes of all files.")]


class CheckpointStatus(Api, frozen=True, kw_only=True):
    """How far it is and who uses it."""

    observed_generation: ObservedGeneration = 0
    conditions: Conditions = ()
    phase: Annotated[
        Literal["Pending", "Capturing", "Ready", "Verified", "Corrupt", "Failed", ""],
        Meta(description="Only Ready and Verified ones are restored from."),
    ] = ""
    captured_at: Annotated[Timestamp, Meta(description="When it was saved (RFC 3339).")] = ""
    verified_at: Annotated[Timestamp, Meta(description="When its digest was last checked (RFC 3339).")] = ""
    pinned_by: Annotated[
        tuple[Annotated[str, Meta(max_length=253)], ...],
        Meta(max_length=64, description="Pods that use it: it is not collected.", extra_json_schema=LIST_SET),
    ] = ()
    message: Annotated[str, Meta(max_length=1024, description="A sentence for people.")] = ""


class Checkpoint(Resource, frozen=True, kw_only=True):
    """One captured state of one model: strategy, identity, where it lies, digest, size, phase."""

    KIND: ClassVar[str] = "Checkpoint"
    PLURAL: ClassVar[str] = "checkpoints"
    SHORT: ClassVar[str] = "ckpt"
    NAMESPACED: ClassVar[bool] = True
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(name="Factory", path=".spec.factory"),
        Column(name="Model", path=".spec.model"),
        Column(name="Strategy", path=".spec.strategy"),
        Column(name="Phase", path=".status.phase"),
        Column(name="Bytes", path=".spec.sizeBytes", type="integer"),
        Column(name="GPU", path=".spec.identity.gpuProduct", wide=True),
        Column(name="Verified", path=".status.verifiedAt", type="date", wide=True),
        AGE,
    )

    spec: CheckpointSpec
    status: CheckpointStatus = CheckpointStatus()
