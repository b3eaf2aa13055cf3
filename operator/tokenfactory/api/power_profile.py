"""PowerProfile: measured points of one model on one GPU product."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from tokenfactory.api.fields import DecimalText, DurationText, PowerText, Timestamp
from tokenfactory.api.meta import Api, Condition, Resource


class ProfilePoint(Api, frozen=True, kw_only=True):
    """One measurement: at this concurrency, a GPU capped at these watts gave these tokens."""

    concurrency: Annotated[
        int, Meta(ge=1, le=1_000_000, description="Requests served at once by one replica.")
    ]
    watts: Annotated[PowerText, Meta(description="Per GPU.")]
    tokens_per_second: Annotated[DecimalText, Meta(description="Generated, per GPU.")]
    inter_token_latency: DurationText | None = None
    time_to_first_token: DurationText | None = None


class PowerProfileSpec(Api, frozen=True, kw_only=True):
    model: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=253,
            description="The served model: the image's repository, or a name in it.",
        ),
    ]
    gpu_product: Annotated[str, Meta(min_length=1, max_length=96, description="As NVML names it.")]
    gpus_per_replica: Annotated[int, Meta(ge=1, le=32)] = 1
    points: Annotated[tuple[ProfilePoint, ...], Meta(min_length=1, max_length=512)]
    source: Annotated[str, Meta(max_length=1024, description="Where the figures come from.")] = ""


class PowerProfileStatus(Api, frozen=True, kw_only=True):
    observed_generation: int = 0
    conditions: Annotated[tuple[Condition, ...], Meta(max_length=16)] = ()
    learned: Annotated[
        tuple[ProfilePoint, ...], Meta(max_length=512, description="What the factory measured itself.")
    ] = ()
    samples: int = 0
    confidence: Annotated[str, Meta(max_length=8, description="0 to 1; below 0.5 the catalogue is used.")] = (
        ""
    )
    updated_at: Timestamp = ""


class PowerProfile(Resource, frozen=True, kw_only=True):
    """Measured points of a model on a GPU product: concurrency, watts, tokens per second, latency."""

    KIND: ClassVar[str] = "PowerProfile"
    PLURAL: ClassVar[str] = "powerprofiles"
    SHORT: ClassVar[str] = "pp"
    NAMESPACED: ClassVar[bool] = False

    spec: PowerProfileSpec
    status: PowerProfileStatus = PowerProfileStatus()
