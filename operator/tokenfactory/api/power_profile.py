"""PowerProfile: measured points of one model on one GPU product."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from tokenfactory.api.actuators import Actuators
from tokenfactory.api.fields import DecimalText, LatencyText, PositivePowerText, Timestamp
from tokenfactory.api.meta import Api, Conditions, ObservedGeneration, Resource
from tokenfactory.api.rules import AGE, Column, immutable, list_map, rules

_ANOTHER = "measure another model or product in a PowerProfile of its own"


class ProfilePoint(Api, frozen=True, kw_only=True):
    """One measurement: at this concurrency, a GPU capped at these watts gave these tokens."""

    concurrency: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Requests served at once by one replica.")
    ]
    watts: Annotated[PositivePowerText, Meta(description="Cap per GPU, such as 450W.")]
    tokens_per_second: Annotated[DecimalText, Meta(description="Generated, per GPU.")]
    inter_token_latency: Annotated[LatencyText | None, Meta(description="95th percentile.")] = None
    time_to_first_token: Annotated[LatencyText | None, Meta(description="95th percentile.")] = None


class PowerProfileSpec(Api, frozen=True, kw_only=True):
    """What was measured, and on what."""

    model: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=253,
            description="The served model: the image's repository, or a name in it.",
            extra_json_schema=rules(immutable("the model", _ANOTHER)),
        ),
    ]
    gpu_product: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=96,
            description="The GPU as NVML names it, such as NVIDIA H100 80GB HBM3.",
            extra_json_schema=rules(immutable("the GPU product", _ANOTHER)),
        ),
    ]
    gpus_per_replica: Annotated[
        int,
        Meta(
            ge=1,
            le=32,
            description="GPUs of one replica when it was measured.",
            extra_json_schema=rules(immutable("the number of GPUs", _ANOTHER)),
        ),
    ] = 1
    points: Annotated[
        tuple[ProfilePoint, ...],
        Meta(
            min_length=1,
            max_length=512,
            description="The measurements; each pair of concurrency and watts once.",
            extra_json_schema=list_map("concurrency", "watts"),
        ),
    ]
    actuators: Annotated[
        Actuators | None,
        Meta(
            description="Set on each GPU while the model runs there, as it was when the points were measured."
        ),
    ] = None
    source: Annotated[str, Meta(max_length=1024, description="Where the figures come from.")] = ""


class PowerProfileStatus(Api, frozen=True, kw_only=True):
    """What the factory learned while it ran."""

    observed_generation: ObservedGeneration = 0
    conditions: Conditions = ()
    learned: Annotated[
        tuple[ProfilePoint, ...], Meta(max_length=512, description="What the factory measured itself.")
    ] = ()
    samples: Annotated[int, Meta(ge=0, description="Windows that were learned from.")] = 0
    confidence: Annotated[str, Meta(max_length=8, description="0 to 1; below 0.5 the catalogue is used.")] = (
        ""
    )
    updated_at: Annotated[Timestamp, Meta(description="When it last learned (RFC 3339).")] = ""


class PowerProfile(Resource, frozen=True, kw_only=True):
    """Measured points of a model on a GPU product: concurrency, watts, tokens per second, latency."""

    KIND: ClassVar[str] = "PowerProfile"
    PLURAL: ClassVar[str] = "powerprofiles"
    SHORT: ClassVar[str] = "pp"
    NAMESPACED: ClassVar[bool] = False
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(name="Model", path=".spec.model"),
        Column(name="GPU", path=".spec.gpuProduct"),
        Column(name="GPUs", path=".spec.gpusPerReplica", type="integer"),
        Column(name="Confidence", path=".status.confidence"),
        Column(name="Source", path=".spec.source", wide=True),
        AGE,
    )

    spec: PowerProfileSpec
    status: PowerProfileStatus = PowerProfileStatus()
