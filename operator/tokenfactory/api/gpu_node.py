"""GPUNode: one node's place in the tree and what may run there (spec), and what its agent reports (status).

`spec` is a charge: a pod is listed here before it may start, stays listed with `released: true` until the agent has
reported without it, and only then leaves the list. So at every instant the present spec covers everything that an
agent with an older copy may be doing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta

from tokenfactory.api.actuators import Actuators
from tokenfactory.api.fields import ClassName, DomainName, MilliwattsField, StatedTime, Timestamp
from tokenfactory.api.meta import Api, Conditions, Resource
from tokenfactory.api.rules import AGE, Column, Rule, condition_column, list_map, rules

# Order matters, so it is no set of Kubernetes', whose order is free.
Path = Annotated[
    tuple[DomainName, ...],
    Meta(
        max_length=16,
        description="Power domains, root first.",
        extra_json_schema=rules(
            Rule(
                rule="self.all(d, self.exists_one(e, e == d))",
                message="a domain is on a path once: delete the repetition",
                advice="'path ' + self.join('/') + ' names a domain twice: delete the repetition'",
            )
        ),
    ),
]
GPUS_PER_NODE: Final = 32


class PodGrant(Api, frozen=True, kw_only=True):
    """A pod that may use GPUs of this node."""

    namespace: Annotated[str, Meta(min_length=1, max_length=63, description="The pod's namespace.")]
    name: Annotated[str, Meta(min_length=1, max_length=253, description="The pod's name.")]
    uid: Annotated[
        str, Meta(min_length=1, max_length=64, description="The pod's uid: a namesake is another pod.")
    ]
    class_name: Annotated[ClassName, Meta(description="The class whose cap its GPUs get.")] = msgspec.field(
        name="class"
    )
    gpus: Annotated[int, Meta(ge=1, le=GPUS_PER_NODE, description="How many GPUs it may hold.")]
    metrics: Annotated[
        str,
        Meta(
            max_length=512,
            description="Where the agent reads the model's metrics, once the pod has an address.",
        ),
    ] = ""
    actuators: Annotated[
        Actuators | None, Meta(description="What is set on its GPUs besides the power limit.")
    ] = None
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
    at: Annotated[StatedTime, Meta(description="When it was confirmed.")]
    boot_id: Annotated[
        str,
        Meta(max_length=64, description="The boot that ended; a report from a later boot lifts the fence."),
    ] = msgspec.field(name="bootID", default="")


class Quarantine(Api, frozen=True, kw_only=True):
    """No new work goes to this node until a person removes this."""

    reason: Annotated[
        str, Meta(min_length=1, max_length=1024, description="Why, for the person who clears it.")
    ]
    since: Annotated[StatedTime, Meta(description="Since when (RFC 3339).")]


class GPUNodeSpec(Api, frozen=True, kw_only=True):
    """Where the node hangs in the tree and what may run there; all of it is charged."""

    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            rule="!has(oldSelf.term) || (has(self.term) && self.term >= oldSelf.term)",
            message="an older leadership may not write: another leader has taken over, so this one must stop",
            at=".term",
            reason="FieldValueForbidden",
        ),
        Rule(
            rule="!has(self.pods) || self.pods.filter(p, !has(p.released) || !p.released).map(p, p.gpus).sum()"
            f" <= {GPUS_PER_NODE}",
            message=f"a node has at most {GPUS_PER_NODE} GPUs",
            advice=f"'the pods that are not released ask for %d GPUs: a node has at most {GPUS_PER_NODE},"
            " so grant fewer'.format([self.pods.filter(p, !has(p.released) || !p.released).map(p, p.gpus).sum()])",
            at=".pods",
        ),
    )

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
        tuple[PodGrant, ...],
        Meta(max_length=64, description="Which pods may use its GPUs.", extra_json_schema=list_map("uid")),
    ] = ()
    fence: Annotated[Fence | None, Meta(description="Proof that the node is off.")] = None
    quarantine: Annotated[Quarantine | None, Meta(description="No new work goes here.")] = None


class AppliedEpoch(Api, frozen=True, kw_only=True):
    """The epoch of one domain's sheet."""

    domain: Annotated[DomainName, Meta(description="The domain.")]
    epoch: Annotated[int, Meta(ge=0, description="Its sheet's epoch.")]


class GPUStatus(Api, frozen=True, kw_only=True):
    """One GPU as NVML reports it."""

    index: Annotated[int, Meta(ge=0, le=63, description="Its number in this boot; may change in the next.")]
    uuid: Annotated[str, Meta(min_length=1, max_length=96, description="Its name for ever.")]
    product: Annotated[str, Meta(max_length=96, description="The product as NVML names it.")]
    pci_bus_id: Annotated[str, Meta(max_length=32, description="Its address on the PCI bus.")] = (
        msgspec.field(name="pciBusID", default="")
    )
    min_milliwatts: Annotated[MilliwattsField, Meta(description="The lowest limit that NVML accepts.")] = 0
    max_milliwatts: Annotated[MilliwattsField, Meta(description="The highest limit that NVML accepts.")] = 0
    default_milliwatts: Annotated[
        MilliwattsField, Meta(description="The limit that it has after a reboot or a driver reload.")
    ] = 0
    enforced_milliwatts: Annotated[MilliwattsField, Meta(description="Read back after the last change.")] = 0
    cap_milliwatts: Annotated[MilliwattsField, Meta(description="What the agent last asked for.")] = 0
    withheld_milliwatts: Annotated[
        MilliwattsField, Meta(description="Taken off what its sheets allow, because too much was drawn.")
    ] = 0
    class_name: Annotated[str, Meta(max_length=253, description="The class that it runs as.")] = (
        msgspec.field(name="class", default="")
    )
    pod: Annotated[str, Meta(max_length=320, description="namespace/name of the pod that holds it.")] = ""
    pod_uid: Annotated[str, Meta(max_length=64, description="uid of that pod.")] = msgspec.field(
        name="podUID", default=""
    )
    actuators: Annotated[
        Actuators | None, Meta(description="What the agent has set on it besides its limit.")
    ] = None
    fabric: Annotated[str, Meta(max_length=96, description="NVLink domain and clique.")] = ""
    healthy: Annotated[bool, Meta(description="False: no new work may use it.")] = True
    faults: Annotated[
        tuple[Annotated[str, Meta(max_length=256)], ...],
        Meta(max_length=16, description="What is wrong with it, such as XIDs."),
    ] = ()


class PodMeter(Api, frozen=True, kw_only=True):
    """What the agent counted for one pod; counters only grow while `since` stays the same."""

    pod: Annotated[str, Meta(max_length=320, description="namespace/name.")]
    uid: Annotated[str, Meta(max_length=64, description="Its uid.")]
    since: Annotated[Timestamp, Meta(description="When these counters began.")] = ""
    generated_tokens: Annotated[int, Meta(ge=0, description="Tokens that it generated.")] = 0
    prompt_tokens: Annotated[int, Meta(ge=0, description="Tokens that it read.")] = 0
    millijoules: Annotated[int, Meta(ge=0, description="Energy of its GPUs in the same time.")] = 0
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
    """What the node's agent read back. One writer, so its lists are atomic: managedFields stay small."""

    observed_generation: Annotated[int, Meta(ge=0, description="The spec that the agent obeys.")] = 0
    conditions: Conditions = ()
    mode: Annotated[
        Literal["Starting", "Obeying", "Fallback", "Degraded", ""],
        Meta(
            description="Starting: keeps what it found. Obeying: follows the sheets. Fallback: hold ran out."
        ),
    ] = ""
    boot_id: Annotated[str, Meta(max_length=64, description="The kernel's name of this boot.")] = (
        msgspec.field(name="bootID", default="")
    )
    capped: Annotated[bool, Meta(description="Every GPU's limit was read back in this boot.")] = False
    driver: Annotated[str, Meta(max_length=64, description="The driver's version.")] = ""
    agent: Annotated[str, Meta(max_length=64, description="The agent's version.")] = ""
    applied: Annotated[
        tuple[AppliedEpoch, ...],
        Meta(max_length=32, description="The epochs that the read-back limits obey."),
    ] = ()
    gpus: Annotated[
        tuple[GPUStatus, ...],
        Meta(
            max_length=GPUS_PER_NODE,
            description="Each GPU as NVML reports it.",
            extra_json_schema=rules(
                Rule(
                    rule="self.all(g, self.exists_one(h, h.uuid == g.uuid))",
                    message="a GPU is listed once: delete the repetition of its uuid",
                )
            ),
        ),
    ] = ()
    gpu_count: Annotated[int, Meta(ge=0, le=GPUS_PER_NODE, description="How many GPUs answer.")] = 0
    enforced_milliwatts: Annotated[MilliwattsField, Meta(description="Sum of the enforced limits.")] = 0
    draw_milliwatts: Annotated[
        MilliwattsField, Meta(description="What the node measures, at the last report.")
    ] = 0
    peak_milliwatts: Annotated[
        MilliwattsField,
        Meta(description="The most its GPUs drew together at one reading of the last minute."),
    ] = 0
    overhead_milliwatts: Annotated[
        MilliwattsField, Meta(description="Measured draw besides the GPUs, if known.")
    ] = 0
    overhead_proven: Annotated[
        bool, Meta(description="That was measured for an hour under load: less than the worst case counts.")
    ] = False
    meters: Annotated[
        tuple[PodMeter, ...], Meta(max_length=64, description="What was counted for each pod.")
    ] = ()
    reported_at: Annotated[Timestamp, Meta(description="When this was written (RFC 3339).")] = ""


_FENCED_BOOT: Final = "(has(self.spec.fence.bootID) ? self.spec.fence.bootID : '')"
_LAST_BOOT: Final = "(has(self.status) && has(self.status.bootID) ? self.status.bootID : '')"


class GPUNode(Resource, frozen=True, kw_only=True):
    """One GPU node: its path of power domains, which pods may use its GPUs, and what its agent reads back."""

    KIND: ClassVar[str] = "GPUNode"
    PLURAL: ClassVar[str] = "gpunodes"
    SHORT: ClassVar[str] = "gn"
    NAMESPACED: ClassVar[bool] = False
    COLUMNS: ClassVar[tuple[Column, ...]] = (
        Column(name="Mode", path=".status.mode"),
        Column(name="GPUs", path=".status.gpuCount", type="integer"),
        Column(name="Enforced-mW", path=".status.enforcedMilliwatts", type="integer"),
        Column(name="Draw-mW", path=".status.drawMilliwatts", type="integer"),
        condition_column("Healthy", wide=True),
        Column(name="Fence", path=".spec.fence.method"),
        Column(name="Quarantine", path=".spec.quarantine.reason", wide=True),
        Column(name="Driver", path=".status.driver", wide=True),
        Column(name="Reported", path=".status.reportedAt", type="date"),
        AGE,
    )
    RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(
            # A fence that stands is left alone: the report of a later boot must not be refused for it.
            rule="!has(self.spec) || !has(self.spec.fence)"
            " || (has(oldSelf.spec) && has(oldSelf.spec.fence) && oldSelf.spec.fence == self.spec.fence)"
            f" || {_FENCED_BOOT} == {_LAST_BOOT}",
            message="a fence names the boot that it ended: write status.bootID into spec.fence.bootID",
            advice=f"{_LAST_BOOT} == '' ? 'this node never reported a boot: leave spec.fence.bootID out'"
            " : 'a fence that does not name the boot that it ended frees nothing: write spec.fence.bootID: '"
            f" + {_LAST_BOOT}",
            at=".spec.fence",
        ),
    )

    spec: GPUNodeSpec = GPUNodeSpec()
    status: GPUNodeStatus = GPUNodeStatus()
