"""GPUNode: one node's place in the tree and what may run there (spec), and what its agent reports (status).

`spec` is a charge: a pod is listed here before it may start, stays listed with `released: true` until the agent has
reported without it, and only then leaves the list. So at every instant the present spec covers everything that an
agent with an older copy may be doing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from tokenfactory.api.fields import ClassName, DomainName, MilliwattsField, Timestamp
from tokenfactory.api.meta import Api, Condition, Resource

Path = Annotated[tuple[DomainName, ...], Meta(max_length=16)]


class PodGrant(Api, frozen=True, kw_only=True):
    """A pod that may use GPUs of this node."""

    namespace: Annotated[str, Meta(max_length=63)]
    name: Annotated[str, Meta(max_length=253)]
    uid: Annotated[str, Meta(max_length=64)]
    class_name: Annotated[ClassName, Meta(description="The class whose cap its GPUs get.")] = msgspec.field(
        name="class"
    )
    gpus: Annotated[int, Meta(ge=1, le=32, description="How many GPUs it may hold.")]
    metrics: Annotated[
        str,
        Meta(
            max_length=512,
            description="Where the agent reads the model's metrics, once the pod has an address.",
        ),
    ] = ""
    released: Annotated[
        bool,
        Meta(
            description="The grant is being taken back; it stays charged until the agent has reported without it."
        ),
    ] = False


class Fence(Api, frozen=True, kw_only=True):
    """Proof that a lost node draws nothing and serves nothing."""

    method: Annotated[
        Literal["PowerOff", "Person", "NodeDeleted"],
        Meta(
            description="PowerOff: confirmed by BMC, PDU or cloud. Person: somebody's word. NodeDeleted: opt-in."
        ),
    ]
    by: Annotated[str, Meta(min_length=1, max_length=253, description="Who or what confirmed it.")]
    at: Annotated[Timestamp, Meta(description="When it was confirmed.")]
    boot_id: Annotated[
        str,
        Meta(max_length=64, description="The boot that ended; a report from a later boot lifts the fence."),
    ] = msgspec.field(name="bootID", default="")


class Quarantine(Api, frozen=True, kw_only=True):
    """No new work goes to this node until a person removes this."""

    reason: Annotated[str, Meta(min_length=1, max_length=1024)]
    since: Timestamp


class GPUNodeSpec(Api, frozen=True, kw_only=True):
    path: Annotated[Path, Meta(description="Its power domains, root first.")] = ()
    former_paths: Annotated[
        tuple[Path, ...],
        Meta(max_length=4, description="Paths that the agent may still be obeying; charged there as well."),
    ] = ()
    term: Annotated[
        int, Meta(ge=0, description="The leadership under which it was last written; never falls.")
    ] = 0
    overhead_milliwatts: Annotated[
        MilliwattsField, Meta(description="What the node draws besides its GPUs, at most.")
    ] = 0
    pods: Annotated[
        tuple[PodGrant, ...], Meta(max_length=64, description="Which pods may use its GPUs.")
    ] = ()
    fence: Annotated[Fence | None, Meta(description="Proof that the node is off.")] = None
    quarantine: Annotated[Quarantine | None, Meta(description="No new work goes here.")] = None


class AppliedEpoch(Api, frozen=True, kw_only=True):
    domain: DomainName
    epoch: Annotated[int, Meta(ge=0)]


class GPUStatus(Api, frozen=True, kw_only=True):
    """One GPU as NVML reports it."""

    index: Annotated[int, Meta(ge=0, le=63)]
    uuid: Annotated[str, Meta(max_length=96)]
    product: Annotated[str, Meta(max_length=96)]
    pci_bus_id: Annotated[str, Meta(max_length=32)] = msgspec.field(name="pciBusID", default="")
    min_milliwatts: MilliwattsField = 0
    max_milliwatts: MilliwattsField = 0
    default_milliwatts: MilliwattsField = 0
    enforced_milliwatts: Annotated[MilliwattsField, Meta(description="Read back after the last change.")] = 0
    cap_milliwatts: Annotated[MilliwattsField, Meta(description="What the agent last asked for.")] = 0
    class_name: Annotated[str, Meta(max_length=253)] = msgspec.field(name="class", default="")
    pod: Annotated[str, Meta(max_length=320, description="namespace/name of the pod that holds it.")] = ""
    pod_uid: Annotated[str, Meta(max_length=64)] = msgspec.field(name="podUID", default="")
    fabric: Annotated[str, Meta(max_length=96, description="NVLink domain and clique.")] = ""
    healthy: bool = True
    faults: Annotated[tuple[Annotated[str, Meta(max_length=256)], ...], Meta(max_length=16)] = ()


class PodMeter(Api, frozen=True, kw_only=True):
    """What the agent counted for one pod; counters only grow while `since` stays the same."""

    pod: Annotated[str, Meta(max_length=320)]
    uid: Annotated[str, Meta(max_length=64)]
    since: Annotated[Timestamp, Meta(description="When these counters began.")] = ""
    generated_tokens: Annotated[int, Meta(ge=0)] = 0
    prompt_tokens: Annotated[int, Meta(ge=0)] = 0
    millijoules: Annotated[int, Meta(ge=0)] = 0
    running: Annotated[int, Meta(ge=0, description="Requests being served.")] = 0
    queued: Annotated[int, Meta(ge=0, description="Requests waiting.")] = 0
    cache_permille: Annotated[int, Meta(ge=0, le=1000, description="KV cache in use.")] = 0
    time_to_first_token_ms: Annotated[int, Meta(ge=0, description="95th percentile of the last window.")] = 0
    inter_token_latency_us: Annotated[
        int, Meta(ge=0, description="95th percentile of the last window, µs.")
    ] = 0
    tokens_per_kilosecond: Annotated[
        int, Meta(ge=0, description="Generated tokens per 1000 s, last window.")
    ] = 0


class GPUNodeStatus(Api, frozen=True, kw_only=True):
    observed_generation: Annotated[int, Meta(description="The spec that the agent obeys.")] = 0
    conditions: Annotated[tuple[Condition, ...], Meta(max_length=16)] = ()
    mode: Annotated[
        Literal["Starting", "Obeying", "Fallback", "Degraded", ""],
        Meta(
            description="Starting: keeps what it found. Obeying: follows the sheets. Fallback: hold ran out."
        ),
    ] = ""
    boot_id: Annotated[str, Meta(max_length=64)] = msgspec.field(name="bootID", default="")
    capped: Annotated[bool, Meta(description="Every GPU's limit was read back in this boot.")] = False
    driver: Annotated[str, Meta(max_length=64)] = ""
    agent: Annotated[str, Meta(max_length=64, description="The agent's version.")] = ""
    applied: Annotated[
        tuple[AppliedEpoch, ...],
        Meta(max_length=32, description="The epochs that the read-back limits obey."),
    ] = ()
    gpus: Annotated[tuple[GPUStatus, ...], Meta(max_length=32)] = ()
    gpu_count: Annotated[int, Meta(description="How many GPUs answer.")] = 0
    enforced_milliwatts: Annotated[MilliwattsField, Meta(description="Sum of the enforced limits.")] = 0
    draw_milliwatts: Annotated[
        MilliwattsField, Meta(description="What the node measures, at the last report.")
    ] = 0
    overhead_milliwatts: Annotated[
        MilliwattsField, Meta(description="Measured draw besides the GPUs, if known.")
    ] = 0
    meters: Annotated[tuple[PodMeter, ...], Meta(max_length=64)] = ()
    reported_at: Annotated[str, Meta(max_length=40)] = ""


class GPUNode(Resource, frozen=True, kw_only=True):
    """One GPU node: its path of power domains, which pods may use its GPUs, and what its agent reads back."""

    KIND: ClassVar[str] = "GPUNode"
    PLURAL: ClassVar[str] = "gpunodes"
    SHORT: ClassVar[str] = "gn"
    NAMESPACED: ClassVar[bool] = False

    spec: GPUNodeSpec = GPUNodeSpec()
    status: GPUNodeStatus = GPUNodeStatus()
