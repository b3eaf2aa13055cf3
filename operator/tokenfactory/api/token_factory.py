"""TokenFactory: which models to serve, within which watts, how efficiently and how fast."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from tokenfactory.api.fields import DecimalText, DomainName, DurationText, PowerOrPercentText, Timestamp
from tokenfactory.api.meta import Api, Condition, Resource
from tokenfactory.api.power_domain import Waiting


class FactoryPower(Api, frozen=True, kw_only=True):
    domain: Annotated[DomainName, Meta(description="The PowerDomain whose nodes may serve this factory.")]
    budget: Annotated[
        PowerOrPercentText | None,
        Meta(
            description="This factory's own ceiling; a percentage is of the domain's limit; absent: the domain's."
        ),
    ] = None


class Efficiency(Api, frozen=True, kw_only=True):
    """The token-per-watt target: a constraint, while tokens per second are the objective."""

    tokens_per_joule: Annotated[
        DecimalText, Meta(description='Generated tokens per joule to reach, such as "3.5".')
    ]
    scope: Annotated[
        Literal["GPU", "Node", "Facility"],
        Meta(description="Which joules count: the GPUs', the nodes', or also the domain's fixed load."),
    ] = "Node"


class EnvVar(Api, frozen=True, kw_only=True):
    name: Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: Annotated[str, Meta(max_length=4096)] = ""


class Nim(Api, frozen=True, kw_only=True):
    """The NVIDIA NIM image that serves the model."""

    image: Annotated[str, Meta(min_length=1, max_length=512, description="Image with tag or digest.")]
    auth_secret: Annotated[
        Annotated[str, Meta(max_length=253)] | None,
        Meta(description="Secret with NGC_API_KEY, in the factory's namespace."),
    ] = None
    pull_secrets: Annotated[tuple[Annotated[str, Meta(max_length=253)], ...], Meta(max_length=8)] = ()
    profile: Annotated[
        Annotated[str, Meta(max_length=253)] | None,
        Meta(description="NIM_MODEL_PROFILE; absent: NIM chooses."),
    ] = None
    env: Annotated[tuple[EnvVar, ...], Meta(max_length=64, description="Further environment variables.")] = ()


class Replicas(Api, frozen=True, kw_only=True):
    min: Annotated[
        int, Meta(ge=0, le=10000, description="0: may scale to zero when there is no traffic.")
    ] = 1
    max: Annotated[int, Meta(ge=1, le=10000)] = 1


class Slo(Api, frozen=True, kw_only=True):
    """Latencies that hold; a model is never throttled below them while lower bands still have watts."""

    time_to_first_token: Annotated[DurationText | None, Meta(description="95th percentile.")] = None
    inter_token_latency: Annotated[DurationText | None, Meta(description="95th percentile.")] = None


class CheckpointPolicy(Api, frozen=True, kw_only=True):
    strategy: Annotated[
        Literal["WarmCache", "ProcessImage", "HotSpare"],
        Meta(
            description="WarmCache: weights and engines. ProcessImage: one GPU, probed. HotSpare: costs standby watts."
        ),
    ] = "WarmCache"
    every: Annotated[DurationText, Meta(description="How often a new state is captured.")] = "30m"
    keep: Annotated[int, Meta(ge=1, le=100, description="How many are kept; the last good one always.")] = 3
    claim: Annotated[
        Annotated[str, Meta(max_length=253)] | None,
        Meta(description="PersistentVolumeClaim that holds them."),
    ] = None


class ModelSpec(Api, frozen=True, kw_only=True):
    name: Annotated[
        str,
        Meta(
            pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
            max_length=40,
            description="Unique within the factory.",
        ),
    ]
    nim: Nim
    gpus_per_replica: Annotated[
        int, Meta(ge=1, le=32, description="GPUs of one replica on each of its nodes.")
    ] = 1
    nodes_per_replica: Annotated[
        int, Meta(ge=1, le=64, description="More than 1: a LeaderWorkerSet, where its CRD is installed.")
    ] = 1
    replicas: Replicas = Replicas()
    band: Annotated[
        int, Meta(ge=0, le=1000, description="Priority: shortages are taken from the lowest band first.")
    ] = 100
    value_per_million_tokens: Annotated[
        DecimalText, Meta(description="What a million generated tokens are worth, against the other models.")
    ] = "1"
    slo: Slo = Slo()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    power_profile: Annotated[
        Annotated[str, Meta(max_length=253)] | None,
        Meta(description="A PowerProfile to begin with; absent: matched, else the catalogue."),
    ] = None


class Recovery(Api, frozen=True, kw_only=True):
    detect_after: Annotated[DurationText, Meta(description="Silence after which a node counts as lost.")] = (
        "15s"
    )
    max_concurrent: Annotated[int, Meta(ge=1, le=1000, description="Recoveries that may start at once.")] = 4
    quarantine_after: Annotated[
        int, Meta(ge=1, le=100, description="Failures of a node until it gets no new work.")
    ] = 2


class TokenFactorySpec(Api, frozen=True, kw_only=True):
    power: FactoryPower
    efficiency: Annotated[
        Efficiency | None, Meta(description="Absent: as many tokens as the watts can buy.")
    ] = None
    node_selector: Annotated[
        dict[Annotated[str, Meta(max_length=317)], Annotated[str, Meta(max_length=63)]],
        Meta(max_length=32, description="Nodes that may serve; all of these labels."),
    ] = {}
    models: Annotated[tuple[ModelSpec, ...], Meta(min_length=1, max_length=64)]
    recovery: Recovery = Recovery()


class ModelStatus(Api, frozen=True, kw_only=True):
    name: Annotated[str, Meta(max_length=40)]
    desired: int = 0
    ready: int = 0
    tokens_per_second: Annotated[str, Meta(max_length=24)] = ""
    tokens_per_joule: Annotated[str, Meta(max_length=24)] = ""
    charge: Annotated[str, Meta(max_length=24)] = ""
    cap: Annotated[str, Meta(max_length=64, description="Watts per GPU, a range where domains differ.")] = ""
    bound_by: Annotated[str, Meta(max_length=253, description="What its cap is bound by.")] = ""


class Incident(Api, frozen=True, kw_only=True):
    """One failure, from detection to tokens flowing again; each step is recorded before it is taken."""

    id: Annotated[str, Meta(max_length=96)]
    node: Annotated[str, Meta(max_length=253)]
    model: Annotated[str, Meta(max_length=40)]
    pod: Annotated[str, Meta(max_length=253, description="The replica that was lost.")] = ""
    phase: Literal["Detected", "Routed", "Charged", "Restoring", "Verified", "Closed"]
    cause: Annotated[str, Meta(max_length=512)] = ""
    replacement: Annotated[str, Meta(max_length=253)] = ""
    restored_from: Annotated[
        str, Meta(max_length=253, description="The checkpoint, or empty: a cold start.")
    ] = ""
    detected_at: Timestamp = ""
    phase_at: Timestamp = ""


class TokenFactoryStatus(Api, frozen=True, kw_only=True):
    observed_generation: int = 0
    conditions: Annotated[tuple[Condition, ...], Meta(max_length=16)] = ()
    budget: Annotated[str, Meta(max_length=24, description="What it may draw now.")] = ""
    charge: Annotated[str, Meta(max_length=24, description="The most it may be drawing.")] = ""
    draw: Annotated[str, Meta(max_length=24, description="What its GPUs measure.")] = ""
    tokens_per_second: Annotated[str, Meta(max_length=24)] = ""
    tokens_per_joule: Annotated[str, Meta(max_length=24)] = ""
    ready: Annotated[str, Meta(max_length=24, description="Replicas ready of desired, such as 3/4.")] = ""
    models: Annotated[tuple[ModelStatus, ...], Meta(max_length=64)] = ()
    waiting: Annotated[tuple[Waiting, ...], Meta(max_length=16)] = ()
    incidents: Annotated[tuple[Incident, ...], Meta(max_length=64)] = ()


class TokenFactory(Resource, frozen=True, kw_only=True):
    """A factory that turns watts into tokens: models to serve, a power budget, an efficiency target, latencies."""

    KIND: ClassVar[str] = "TokenFactory"
    PLURAL: ClassVar[str] = "tokenfactories"
    SHORT: ClassVar[str] = "tf"
    NAMESPACED: ClassVar[bool] = True

    spec: TokenFactorySpec
    status: TokenFactoryStatus = TokenFactoryStatus()
