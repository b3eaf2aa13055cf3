"""The few fields of Kubernetes' own kinds that this product reads or writes.

Everything else in an object is skipped while decoding, which is most of the time and memory that a pod costs. What
is decoded is a tree and never a cycle, so the garbage collector need not look at it (`gc=False`): with ten thousand
pods its rounds would be a quarter of the cost of an event.
"""

from __future__ import annotations

from functools import lru_cache
from typing import ClassVar

import msgspec

from tokenfactory.api.meta import Api, Resource
from tokenfactory.kube.constraints import Affinity, PodToleration, PodVolume, SpreadConstraint


class ObjectRef(Api, frozen=True, kw_only=True, gc=False):
    api_version: str = ""
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    field_path: str = ""


class KubeCondition(Api, frozen=True, kw_only=True, gc=False):
    """Conditions of pods, nodes and deployments alike."""

    type: str = ""
    status: str = "Unknown"
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


# --- pods


class SchedulingGate(Api, frozen=True, kw_only=True, gc=False):
    name: str = ""


class ResourceRequirements(Api, frozen=True, kw_only=True, gc=False):
    limits: dict[str, str] = {}
    requests: dict[str, str] = {}


class ContainerPort(Api, frozen=True, kw_only=True, gc=False):
    name: str = ""
    container_port: int = 0


class RestartRule(Api, frozen=True, kw_only=True, gc=False):
    action: str = ""


class Container(Api, frozen=True, kw_only=True, gc=False):
    name: str = ""
    image: str = ""
    resources: ResourceRequirements = ResourceRequirements()
    ports: tuple[ContainerPort, ...] = ()
    restart_policy_rules: tuple[RestartRule, ...] = ()


class FieldRef(Api, frozen=True, kw_only=True, gc=False):
    field_path: str = ""


class EnvSource(Api, frozen=True, kw_only=True, gc=False):
    field_ref: FieldRef = FieldRef()


class EnvVar(Api, frozen=True, kw_only=True, gc=False):
    name: str = ""
    value_from: EnvSource = EnvSource()


class InitContainer(Api, frozen=True, kw_only=True, gc=False):
    """With all that decides what it runs: a pod's init containers hold it back from its GPUs."""

    name: str = ""
    image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[EnvVar, ...] = ()
    restart_policy: str = ""
    resources: ResourceRequirements = ResourceRequirements()


@lru_cache(maxsize=4096)
def _shared_tolerations(tolerations: tuple[PodToleration, ...]) -> tuple[PodToleration, ...]:
    return tolerations


class PodSpec(Api, frozen=True, kw_only=True, gc=False):
    node_name: str = ""
    scheduling_gates: tuple[SchedulingGate, ...] = ()
    init_containers: tuple[InitContainer, ...] = ()
    containers: tuple[Container, ...] = ()
    resources: ResourceRequirements = ResourceRequirements()
    """Of the pod as a whole, where somebody said so; else its containers' sum."""
    overhead: dict[str, str] = {}
    node_selector: dict[str, str] = {}
    affinity: Affinity | None = None
    tolerations: tuple[PodToleration, ...] = ()
    topology_spread_constraints: tuple[SpreadConstraint, ...] = ()
    volumes: tuple[PodVolume, ...] = ()
    """Only those that are claims."""
    priority: int = 0
    termination_grace_period_seconds: int = 30

    def __post_init__(self) -> None:
        """Of ten thousand pods nearly all tolerate the same, and few of their volumes are claims."""
        if self.tolerations:
            msgspec.structs.force_setattr(self, "tolerations", _shared_tolerations(self.tolerations))
        if self.volumes:
            claims = tuple(volume for volume in self.volumes if volume.persistent_volume_claim)
            msgspec.structs.force_setattr(self, "volumes", claims)


class TerminatedState(Api, frozen=True, kw_only=True, gc=False):
    exit_code: int = 0
    reason: str = ""
    message: str = ""


class ContainerState(Api, frozen=True, kw_only=True, gc=False):
    terminated: TerminatedState | None = None


class ContainerStatus(Api, frozen=True, kw_only=True, gc=False):
    name: str = ""
    ready: bool = False
    restart_count: int = 0
    state: ContainerState = ContainerState()


class PodStatus(Api, frozen=True, kw_only=True, gc=False):
    phase: str = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    nominated_node_name: str = ""
    """Where others were evicted for it, and it is not bound yet."""
    start_time: str | None = None
    conditions: tuple[KubeCondition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "Pod"
    PLURAL: ClassVar[str] = "pods"
    SHORT: ClassVar[str] = "po"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "v1"
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


# --- nodes


class Taint(Api, frozen=True, kw_only=True, gc=False):
    key: str = ""
    value: str = ""
    effect: str = ""


class NodeSpec(Api, frozen=True, kw_only=True, gc=False):
    unschedulable: bool = False
    taints: tuple[Taint, ...] = ()
    provider_id: str = msgspec.field(name="providerID", default="")


class NodeInfo(Api, frozen=True, kw_only=True, gc=False):
    boot_id: str = msgspec.field(name="bootID", default="")
    kubelet_version: str = ""


class NodeAddress(Api, frozen=True, kw_only=True, gc=False):
    type: str = ""
    address: str = ""


class NodeImage(Api, frozen=True, kw_only=True, gc=False):
    names: tuple[str, ...] | None = ()
    """None: the API server says null of an image that has lost its names."""


_shared_image = lru_cache(maxsize=1 << 16)(NodeImage)
"""Thousands of nodes name the same images, fifty each: every name is held once."""


class NodeStatus(Api, frozen=True, kw_only=True, gc=False):
    allocatable: dict[str, str] = {}
    capacity: dict[str, str] = {}
    conditions: tuple[KubeCondition, ...] = ()
    addresses: tuple[NodeAddress, ...] = ()
    node_info: NodeInfo = NodeInfo()
    images: tuple[NodeImage, ...] = ()
    """That lie on its disk, largest first; a kubelet names 50 unless it is told otherwise."""
    declared_features: tuple[str, ...] = ()
    """What its kubelet can do besides what all can: pods that need one of these are bound to no other node."""

    def __post_init__(self) -> None:
        if self.images:
            shared = tuple(_shared_image(names=image.names) for image in self.images if image.names)
            msgspec.structs.force_setattr(self, "images", shared)


class Node(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "Node"
    PLURAL: ClassVar[str] = "nodes"
    SHORT: ClassVar[str] = "no"
    NAMESPACED: ClassVar[bool] = False

    api_version: str = "v1"
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


class Namespace(Resource, frozen=True, kw_only=True, gc=False):
    """Its labels decide who a PowerDomain admits."""

    KIND: ClassVar[str] = "Namespace"
    PLURAL: ClassVar[str] = "namespaces"
    SHORT: ClassVar[str] = "ns"
    NAMESPACED: ClassVar[bool] = False

    api_version: str = "v1"


# --- leases


class LeaseSpec(Api, frozen=True, kw_only=True, gc=False):
    holder_identity: str = ""
    lease_duration_seconds: int = 0
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int = 0


class Lease(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "Lease"
    PLURAL: ClassVar[str] = "leases"
    SHORT: ClassVar[str] = ""
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "coordination.k8s.io/v1"
    spec: LeaseSpec = LeaseSpec()


# --- deployments and services


class DeploymentStatus(Api, frozen=True, kw_only=True, gc=False):
    observed_generation: int = 0
    replicas: int = 0
    ready_replicas: int = 0
    available_replicas: int = 0
    updated_replicas: int = 0
    conditions: tuple[KubeCondition, ...] = ()


class ServicePort(Api, frozen=True, kw_only=True, gc=False):
    name: str = ""
    port: int = 0


class ServiceSpec(Api, frozen=True, kw_only=True, gc=False):
    selector: dict[str, str] = {}
    ports: tuple[ServicePort, ...] = ()
    cluster_ip: str = msgspec.field(name="clusterIP", default="")


class Service(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "Service"
    PLURAL: ClassVar[str] = "services"
    SHORT: ClassVar[str] = "svc"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "v1"
    spec: ServiceSpec = ServiceSpec()


# --- events


class EventSeries(Api, frozen=True, kw_only=True, gc=False):
    count: int = 0
    last_observed_time: str | None = None


class Event(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "Event"
    PLURAL: ClassVar[str] = "events"
    SHORT: ClassVar[str] = "ev"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "events.k8s.io/v1"
    event_time: str | None = None
    series: EventSeries | None = None
    reporting_controller: str = ""
    reporting_instance: str = ""
    action: str = ""
    reason: str = ""
    regarding: ObjectRef = ObjectRef()
    note: str = ""
    type: str = ""
