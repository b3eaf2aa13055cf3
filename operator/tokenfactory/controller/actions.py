"""What a plan may ask for. Each action carries the reason that people will read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec
from tokenfactory.api.checkpoint import CheckpointSpec
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec
from tokenfactory.api.meta import Api, Resource
from tokenfactory.api.power_profile import PowerProfileSpec
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.kube.objects import ObjectRef, Pod
from tokenfactory.kube.resources import Key


@dataclass(frozen=True)
class PublishSheet:
    """Write a cap sheet over the very version that the plan has seen (None: there is none yet)."""

    held: CapSheet | None
    spec: CapSheetSpec
    reason: str
    lowers: bool = False
    """It raises nothing, whoever obeys what."""
    name: str = ""
    """Of a sheet to create, where it is not its domain's: the renewal of a tree."""


@dataclass(frozen=True)
class ChargeNode:
    """Write a GPUNode's spec: a charge, and so never over a version that the plan has not seen."""

    held: GPUNode | None
    name: str
    spec: GPUNodeSpec
    reason: str


@dataclass(frozen=True)
class ApplyWorkload:
    """A Deployment or Service of a model, with all fields that are ours."""

    kind: type[Deployment | LeaderWorkerSet | Service]
    key: Key
    manifest: Mapping[str, Any]
    reason: str
    held: Resource | None = None
    """What it is to change; None: we know of none, which does not say that nobody has one of that name."""


@dataclass(frozen=True)
class DeleteWorkload:
    held: Resource
    reason: str


@dataclass(frozen=True)
class Retire:
    """Delete a sheet or a node of ours that nothing speaks of any more: this very version, or not at all."""

    held: CapSheet | GPUNode
    reason: str


@dataclass(frozen=True)
class OpenGate:
    """The pod's GPUs are charged and capped: let the scheduler bind it to that node."""

    pod: Pod
    node: str
    restore_from: str
    reason: str


@dataclass(frozen=True)
class DeletePod:
    """Its node is lost or its place was taken; its Deployment makes another, which waits behind the gate."""

    pod: Pod
    reason: str
    as_seen: bool = False
    """This very version or not at all: a gate that opened meanwhile may have let it start."""


@dataclass(frozen=True)
class MarkPod:
    """How gladly its ReplicaSet should part with it when there are to be fewer."""

    pod: Pod
    cost: str
    reason: str


@dataclass(frozen=True)
class TaintNode:
    """Only pods that know of the power gate may come here."""

    node: str
    resource_version: str
    taints: tuple[Mapping[str, str], ...]
    reason: str


@dataclass(frozen=True)
class RecordCheckpoint:
    key: Key
    spec: CheckpointSpec
    owner: Resource
    reason: str


@dataclass(frozen=True)
class RecordProfile:
    """A PowerProfile of the operator's own, for a model that no person's profile speaks of."""

    name: str
    spec: PowerProfileSpec
    reason: str


@dataclass(frozen=True)
class WriteStatus:
    held: Resource
    status: Api
    urgent: bool = False
    """A condition changed: do not wait for the next regular write."""


@dataclass(frozen=True)
class Tell:
    """An Event on an object."""

    about: Resource | ObjectRef
    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


Action = (
    PublishSheet
    | ChargeNode
    | ApplyWorkload
    | DeleteWorkload
    | Retire
    | OpenGate
    | DeletePod
    | MarkPod
    | TaintNode
    | RecordCheckpoint
    | RecordProfile
    | WriteStatus
    | Tell
)


@dataclass(frozen=True)
class Plan:
    """Actions in the order in which they may be taken, and when to look again if nothing happens."""

    actions: tuple[Action, ...]
    again_after_seconds: float = 60.0
