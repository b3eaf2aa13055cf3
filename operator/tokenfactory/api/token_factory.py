"""TokenFactory: which models to serve, within which watts, how efficiently and how fast."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Meta

from tokenfactory.api.fields import (
    DomainName,
    DurationText,
    LabelMap,
    LatencyText,
    LimitText,
    ModelName,
    ObjectName,
    PositiveDecimalText,
    Timestamp,
    bounded_duration,
)
from tokenfactory.api.meta import Api, Conditions, ObservedGeneration, Resource
from tokenfactory.api.power_domain import Waiting
from tokenfactory.api.quantities import SHORT_DURATION_PATTERN
from tokenfactory.api.rules import AGE, LIST_SET, Column, Rule, condition_column, list_map, matches, text

FACTORY_NAME_LENGTH: Final = 40
WORKLOAD_NAME_LENGTH: Final = 52
"""`<factory>-<model>` names a Deployment and a Service (63 at most); what their controllers append needs the rest."""


class FactoryPower(Api, frozen=True, kw_only=True):
    """Where the watts come from."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.domain == oldSelf.domain",
            message="the domain of a factory cannot be changed",
            advice="'the domain cannot be changed from ' + oldSelf.domain + ' to ' + self.domain"
            " + ': make a new TokenFactory there and delete this one once it serves'",
            at=".domain",
            reason="FieldValueForbidden",
        ),
    )

    domain: Annotated[DomainName, Meta(description="The PowerDomain whose nodes may serve this factory.")]
    budget: Annotated[
        LimitText | None,
        Meta(
            description="This factory's own ceiling; a percentage is of the domain's limit; absent: the domain's."
        ),
    ] = None


class Efficiency(Api, frozen=True, kw_only=True):
    """The token-per-watt target: a constraint, while tokens per second are the objective."""

    tokens_per_joule: Annotated[
        PositiveDecimalText, Meta(description='Generated tokens per joule to reach, such as "3.5".')
    ]
    scope: Annotated[
        Literal["GPU", "Node", "Facility"],
        Meta(description="Which joules count: the GPUs', the nodes', or also the domain's fixed load."),
    ] = "Node"


class EnvVar(Api, frozen=True, kw_only=True):
    """One environment variable of the model's container."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.name != 'NGC_API_KEY'",
            message="a key does not belong in a manifest: put NGC_API_KEY in a Secret and name it in nim.authSecret",
            at=".name",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="self.name != 'NIM_MODEL_PROFILE'",
            message="the operator sets NIM_MODEL_PROFILE: write nim.profile instead",
            at=".name",
            reason="FieldValueForbidden",
        ),
    )

    name: Annotated[
        str,
        text(
            r"^[A-Za-z_][A-Za-z0-9_]*$",
            what="the name of an environment variable",
            write="letters, digits and underscores, such as NIM_LOG_LEVEL",
            max_length=128,
            description="Its name.",
        ),
    ]
    value: Annotated[str, Meta(max_length=4096, description="Its value.")] = ""


_WITH_DIGEST: Final = r"^[A-Za-z0-9][^\s@]*@sha256:[0-9a-f]{64}$"
_WITH_TAG: Final = r"^[A-Za-z0-9][^\s@]*:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$"


class Nim(Api, frozen=True, kw_only=True):
    """The NVIDIA NIM image that serves the model."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule=f"{matches(_WITH_DIGEST, 'self.image')}"
            f" || ({matches(_WITH_TAG, 'self.image')} && !self.image.endsWith(':latest'))",
            message="an image needs a tag other than latest, or a digest",
            advice='"\'" + self.image + "\' may be another image tomorrow:'
            " write a tag other than latest, such as nvcr.io/nim/meta/llama-3.3-70b-instruct:1.8.0,"
            ' or a digest @sha256:..."',
            at=".image",
        ),
    )

    image: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=512,
            description="Image with a tag other than latest, or with a digest: what is measured must stay the same.",
        ),
    ]
    auth_secret: Annotated[
        ObjectName | None,
        Meta(description="Secret with NGC_API_KEY, in the factory's namespace."),
    ] = None
    pull_secrets: Annotated[
        tuple[ObjectName, ...],
        Meta(
            max_length=8,
            description="Secrets for pulling the image, in the factory's namespace.",
            extra_json_schema=LIST_SET,
        ),
    ] = ()
    run_as_root: Annotated[
        bool,
        Meta(description="For an image that cannot run as another user; absent: it runs as user 1000."),
    ] = False
    profile: Annotated[
        Annotated[str, Meta(max_length=253)] | None,
        Meta(description="NIM_MODEL_PROFILE; absent: NIM chooses."),
    ] = None
    env: Annotated[
        tuple[EnvVar, ...],
        Meta(
            max_length=32,
            description="Further environment variables.",
            extra_json_schema=list_map("name"),
        ),
    ] = ()


class Replicas(Api, frozen=True, kw_only=True):
    """How many copies of the model may run; the operator runs as few as the SLO and the traffic allow."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.min <= self.max",
            message="min must be at most max",
            advice="'min %d is more than max %d: write max: %d or a smaller min'"
            ".format([self.min, self.max, self.min])",
            at=".min",
        ),
    )

    min: Annotated[
        int, Meta(ge=0, le=10000, description="0: may scale to zero when there is no traffic.")
    ] = 1
    max: Annotated[int, Meta(ge=1, le=10000, description="The most that may run at once.")] = 1


class Slo(Api, frozen=True, kw_only=True):
    """Latencies that hold; a model is never throttled below them while lower bands still have watts."""

    time_to_first_token: Annotated[
        LatencyText | None,
        Meta(description="From request to first token, 95th percentile, such as 500ms; 10m at most."),
    ] = None
    inter_token_latency: Annotated[
        LatencyText | None,
        Meta(description="Between two tokens of an answer, 95th percentile, such as 50ms; 10m at most."),
    ] = None


class CheckpointPolicy(Api, frozen=True, kw_only=True):
    """What is saved of a running model so that its replacement starts fast."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.strategy != 'ProcessImage' || has(self.claim)",
            message="ProcessImage needs a claim: name a PersistentVolumeClaim, as an image on a dead node is worth nothing",
            at=".claim",
            reason="FieldValueRequired",
        ),
        Rule(
            rule="self.strategy != 'HotSpare' || !has(self.claim)",
            message="HotSpare saves no files: delete claim, or use strategy WarmCache",
            at=".claim",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule=f"!{matches(SHORT_DURATION_PATTERN, 'self.every')} || duration(self.every) >= duration('1m')",
            message="every must be at least 1m",
            advice="'every ' + self.every + ' would do nothing but capture: write at least 1m, such as 30m'",
            at=".every",
        ),
    )

    strategy: Annotated[
        Literal["WarmCache", "ProcessImage", "HotSpare"],
        Meta(
            description="WarmCache: weights and engines. Planned: ProcessImage (one GPU, probed; until then like WarmCache)"
            " and HotSpare (costs standby watts; until then a cold start)."
        ),
    ] = "WarmCache"
    every: Annotated[
        DurationText, Meta(description="How often a new state is captured, at least 1m, such as 30m or 1d.")
    ] = "30m"
    keep: Annotated[int, Meta(ge=1, le=100, description="How many are kept; the last good one always.")] = 3
    claim: Annotated[
        ObjectName | None,
        Meta(
            description="PersistentVolumeClaim that holds them; absent: none, the cache is gone with its pod."
        ),
    ] = None


class ModelSpec(Api, frozen=True, kw_only=True):
    """One model to serve: what, how often, how fast and how important."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="self.checkpoint.strategy != 'ProcessImage'"
            " || (self.gpusPerReplica == 1 && self.nodesPerReplica == 1)",
            message="ProcessImage works with one GPU only",
            advice="'ProcessImage works with one GPU only, and a replica has %d: write strategy: WarmCache'"
            ".format([self.gpusPerReplica * self.nodesPerReplica])",
            at=".checkpoint",
        ),
        Rule(
            rule="self.checkpoint.strategy != 'HotSpare' || self.nodesPerReplica == 1",
            message="a HotSpare lies on one node: write strategy: WarmCache, or nodesPerReplica: 1",
            at=".checkpoint",
        ),
        Rule(
            rule="self.checkpoint.strategy != 'HotSpare' || self.replicas.max > self.replicas.min",
            message="a HotSpare is one replica more: write replicas.max above replicas.min",
            advice="'a HotSpare is one replica more than min: write replicas.max: %d or more'"
            ".format([self.replicas.min + 1])",
            at=".replicas.max",
        ),
    )

    name: Annotated[ModelName, Meta(description="Unique within the factory.")]
    nim: Annotated[Nim, Meta(description="The NVIDIA NIM image that serves it.")]
    gpus_per_replica: Annotated[
        int, Meta(ge=1, le=32, description="GPUs of one replica on each of its nodes.")
    ] = 1
    nodes_per_replica: Annotated[
        int, Meta(ge=1, le=64, description="More than 1: a LeaderWorkerSet, where its CRD is installed.")
    ] = 1
    replicas: Annotated[
        Replicas,
        Meta(
            description="How many copies may run; the operator runs as few as the SLO and the traffic allow."
        ),
    ] = Replicas()
    band: Annotated[
        int, Meta(ge=0, le=1000, description="Priority: shortages are taken from the lowest band first.")
    ] = 100
    value_per_million_tokens: Annotated[
        PositiveDecimalText,
        Meta(description="What a million generated tokens are worth, against the other models."),
    ] = "1"
    slo: Annotated[
        Slo,
        Meta(
            description="Latencies that hold; never throttled below them while lower bands still have watts."
        ),
    ] = Slo()
    checkpoint: Annotated[
        CheckpointPolicy, Meta(description="What is saved so that a replacement starts fast.")
    ] = CheckpointPolicy()
    power_profile: Annotated[
        ObjectName | None,
        Meta(description="A PowerProfile to begin with; absent: matched, else the catalogue."),
    ] = None


class Recovery(Api, frozen=True, kw_only=True):
    """What happens when a node is lost."""

    detect_after: Annotated[
        Annotated[str, bounded_duration("1s", "10m")],
        Meta(description="Silence after which a node counts as lost, from 1s to 10m."),
    ] = "15s"
    max_concurrent: Annotated[int, Meta(ge=1, le=1000, description="Recoveries that may start at once.")] = 4
    quarantine_after: Annotated[
        int, Meta(ge=1, le=100, description="Failures of a node until it gets no new work.")
    ] = 2


class TokenFactorySpec(Api, frozen=True, kw_only=True):
    """What to serve, within which watts, how efficiently and how fast."""

    power: Annotated[FactoryPower, Meta(description="Where the watts come from.")]
    efficiency: Annotated[
        Efficiency | None, Meta(description="Absent: as many tokens as the watts can buy.")
    ] = None
    node_selector: Annotated[
        LabelMap,
        Meta(description="Nodes that may serve: those with all of these labels."),
    ] = {}
    models: Annotated[
        tuple[ModelSpec, ...],
        Meta(
            min_length=1,
            max_length=64,
            description="The models to serve. Each becomes a Deployment (nodesPerReplica above 1: a LeaderWorkerSet)"
            " whose pods start once their watts are in the ledger. When watts are short, the lowest band gives"
            " first; within a band they go where a watt buys the most value.",
            extra_json_schema=list_map("name"),
        ),
    ]
    recovery: Annotated[Recovery, Meta(description="What happens when a node is lost.")] = Recovery()
    learning: Annotated[
        Literal["Observe", "Explore"],
        Meta(
            description="Observe: what GPUs make of their watts is learned from the caps that limits and traffic give"
            " them. Explore: now and then a model with an inter-token latency to keep is also tried at less, or at"
            " more with watts that nobody was sold, in one domain and for some minutes, while all its latencies"
            " are at most half of what they may be."
        ),
    ] = "Observe"


class ModelStatus(Api, frozen=True, kw_only=True):
    """One model as it runs now."""

    name: Annotated[str, Meta(max_length=40, description="The model.")]
    desired: Annotated[int, Meta(ge=0, description="Replicas that the operator wants now.")] = 0
    ready: Annotated[int, Meta(ge=0, description="Replicas that serve.")] = 0
    tokens_per_second: Annotated[str, Meta(max_length=24, description="Generated now.")] = ""
    tokens_per_joule: Annotated[str, Meta(max_length=24, description="Generated per joule, last window.")] = (
        ""
    )
    charge: Annotated[str, Meta(max_length=24, description="The most that its GPUs may be drawing.")] = ""
    cap: Annotated[str, Meta(max_length=64, description="Watts per GPU, a range where domains differ.")] = ""
    bound_by: Annotated[str, Meta(max_length=253, description="What its cap is bound by.")] = ""


class Incident(Api, frozen=True, kw_only=True):
    """One failure, from detection to tokens flowing again; each step is recorded before it is taken."""

    id: Annotated[str, Meta(max_length=96, description="Its own name, never used again.")]
    node: Annotated[str, Meta(max_length=253, description="The node that failed.")]
    model: Annotated[str, Meta(max_length=40, description="The model that lost a replica.")]
    pod: Annotated[str, Meta(max_length=253, description="The replica that was lost.")] = ""
    phase: Annotated[
        Literal["Detected", "Routed", "Charged", "Restoring", "Verified", "Closed"],
        Meta(description="How far it has come."),
    ]
    cause: Annotated[str, Meta(max_length=512, description="What was seen.")] = ""
    replacement: Annotated[str, Meta(max_length=253, description="The pod that takes its place.")] = ""
    restored_from: Annotated[
        str, Meta(max_length=253, description="The checkpoint, or empty: a cold start.")
    ] = ""
    detected_at: Annotated[Timestamp, Meta(description="When it was detected (RFC 3339).")] = ""
    phase_at: Annotated[Timestamp, Meta(description="When it came to this phase (RFC 3339).")] = ""


class TokenFactoryStatus(Api, frozen=True, kw_only=True):
    """What the factory makes now and what it costs in watts."""

    observed_generation: ObservedGeneration = 0
    conditions: Conditions = ()
    budget: Annotated[str, Meta(max_length=24, description="What it may draw now.")] = ""
    charge: Annotated[str, Meta(max_length=24, description="The most it may be drawing.")] = ""
    draw: Annotated[str, Meta(max_length=24, description="What its GPUs measure.")] = ""
    tokens_per_second: Annotated[str, Meta(max_length=24, description="Generated now, all models.")] = ""
    tokens_per_joule: Annotated[
        str, Meta(max_length=24, description="Generated per joule, last window, in the target's scope.")
    ] = ""
    ready: Annotated[str, Meta(max_length=24, description="Replicas ready of desired, such as 3/4.")] = ""
    models: Annotated[
        tuple[ModelStatus, ...],
        Meta(max_length=64, description="Each model as it runs now.", extra_json_schema=list_map("name")),
    ] = ()
    waiting: Annotated[
        tuple[Waiting, ...], Meta(max_length=16, description="What cannot happen yet, and what it waits for.")
    ] = ()
    incidents: Annotated[
        tuple[Incident, ...],
        Meta(
            max_length=64,
            description="Failures being recovered from, and the last that were.",
            extra_json_schema=list_map("id"),
        ),
    ] = ()


class TokenFactory(Resource, frozen=True, kw_only=True):
    """A factory that turns watts into tokens: models to serve, a power budget, an efficiency target, latencies."""

    KIND: ClassVar[str] = "TokenFactory"
    PLURAL: ClassVar[str] = "tokenfactories"
    SHORT: ClassVar[str] = "tf"
    NAMESPACED: ClassVar[bool] = True
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(name="Domain", path=".spec.power.domain"),
        Column(name="Replicas", path=".status.ready"),
        Column(name="Budget", path=".status.budget"),
        Column(name="Charge", path=".status.charge"),
        Column(name="Draw", path=".status.draw"),
        Column(name="Tokens/s", path=".status.tokensPerSecond"),
        Column(name="Tokens/J", path=".status.tokensPerJoule"),
        condition_column("Ready"),
        condition_column("Updated", wide=True),
        condition_column("WithinBudget", wide=True),
        condition_column("EfficiencyMet", wide=True),
        condition_column("SLOMet", wide=True),
        condition_column("Recovered", wide=True),
        AGE,
    )
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            # Before Kubernetes 1.36 a Service's name begins with a letter, and a LeaderWorkerSet's always does.
            rule=matches(r"^[a-z]([-a-z0-9]*[a-z0-9])?$", "self.metadata.name")
            + f" && size(self.metadata.name) <= {FACTORY_NAME_LENGTH}",
            at_birth=True,
            message="not the name of a TokenFactory",
            advice='"\'" + self.metadata.name + "\' is not the name of a TokenFactory:'
            f' write at most {FACTORY_NAME_LENGTH} lower-case letters, digits and dashes, no dots, beginning with a letter"',
        ),
        Rule(
            rule="self.spec.models.all(m, size(self.metadata.name) + 1 + size(m.name)"
            f" <= {WORKLOAD_NAME_LENGTH})",
            message="the names are too long together",
            advice='"\'" + self.metadata.name + "-\' and the name of a model name its workload and Service:'
            f' write names of at most {WORKLOAD_NAME_LENGTH - 1} characters together"',
        ),
    )

    spec: TokenFactorySpec
    status: TokenFactoryStatus = TokenFactoryStatus()
