"""Checkpoint: one captured state of one model, and everything that must match before it may be used."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from tokenfactory.api.fields import Timestamp
from tokenfactory.api.meta import Api, Condition, Resource


class Identity(Api, frozen=True, kw_only=True):
    """What must be the same where it is restored. An empty field was not known and matches nothing but empty."""

    architecture: Annotated[str, Meta(max_length=32)] = ""
    kernel: Annotated[str, Meta(max_length=128)] = ""
    image_digest: Annotated[str, Meta(max_length=128)] = ""
    model: Annotated[str, Meta(max_length=253)] = ""
    gpu_product: Annotated[str, Meta(max_length=96)] = ""
    gpu_count: Annotated[int, Meta(ge=0, le=2048)] = 0
    driver: Annotated[str, Meta(max_length=64)] = ""
    tensor_parallel: Annotated[int, Meta(ge=0, le=2048)] = 0


class Location(Api, frozen=True, kw_only=True):
    claim: Annotated[str, Meta(max_length=253, description="PersistentVolumeClaim.")] = ""
    path: Annotated[str, Meta(min_length=1, max_length=1024, description="Folder within it.")]
    node: Annotated[str, Meta(max_length=253, description="Only where it lies on one node's disk.")] = ""


class CheckpointSpec(Api, frozen=True, kw_only=True):
    factory: Annotated[str, Meta(min_length=1, max_length=253)]
    model: Annotated[str, Meta(min_length=1, max_length=40)]
    strategy: Literal["WarmCache", "ProcessImage", "HotSpare"]
    identity: Identity
    location: Location
    digest: Annotated[
        str,
        Meta(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71, description="Of the manifest of all files."),
    ]
    size_bytes: Annotated[int, Meta(ge=0, le=10**16)]


class CheckpointStatus(Api, frozen=True, kw_only=True):
    observed_generation: int = 0
    conditions: Annotated[tuple[Condition, ...], Meta(max_length=16)] = ()
    phase: Literal["Pending", "Capturing", "Ready", "Verified", "Corrupt", "Failed", ""] = ""
    captured_at: Timestamp = ""
    verified_at: Timestamp = ""
    pinned_by: Annotated[tuple[Annotated[str, Meta(max_length=253)], ...], Meta(max_length=64)] = ()
    message: Annotated[str, Meta(max_length=1024)] = ""


class Checkpoint(Resource, frozen=True, kw_only=True):
    """One captured state of one model: strategy, identity, where it lies, digest, size, phase."""

    KIND: ClassVar[str] = "Checkpoint"
    PLURAL: ClassVar[str] = "checkpoints"
    SHORT: ClassVar[str] = "ckpt"
    NAMESPACED: ClassVar[bool] = True

    spec: CheckpointSpec
    status: CheckpointStatus = CheckpointStatus()
