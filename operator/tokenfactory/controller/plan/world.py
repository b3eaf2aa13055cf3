"""What is there: replicas with their models, nodes with their agents, told from the snapshot once for all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUNode, GPUStatus, PodGrant, PodMeter
from tokenfactory.api.quantities import parse_duration
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.plan.waiting import gpus_of, unwaiting
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.controller.workloads import WorkloadOptions
from tokenfactory.kube.objects import Node, Pod
from tokenfactory.kube.resources import Key, key_of

DEFAULT_DETECT_SECONDS = 15.0
_FINISHED = frozenset({"Succeeded", "Failed"})


def is_gated(pod: Pod) -> bool:
    return any(gate.name == names.GATE for gate in pod.spec.scheduling_gates)


def has_finished(pod: Pod) -> bool:
    return pod.status.phase in _FINISHED


@dataclass(frozen=True)
class Replica:
    """A pod of a model of a factory."""

    pod: Pod
    factory: TokenFactory
    model: ModelSpec

    @property
    def uid(self) -> str:
        return self.pod.metadata.uid or ""

    @property
    def name(self) -> str:
        return self.pod.metadata.name

    @property
    def node(self) -> str:
        return self.pod.spec.node_name

    @property
    def gated(self) -> bool:
        return is_gated(self.pod)

    @property
    def terminating(self) -> bool:
        return self.pod.metadata.deletion_timestamp is not None

    @property
    def finished(self) -> bool:
        return has_finished(self.pod)

    @property
    def ready(self) -> bool:
        return not self.terminating and any(
            condition.type == "Ready" and condition.status == "True"
            for condition in self.pod.status.conditions
        )

    @property
    def group(self) -> str:
        """Which of its model's replicas the pod is a part of, where a replica spans nodes; else empty."""
        if self.model.nodes_per_replica <= 1:
            return ""
        index = self.pod.metadata.labels.get(names.LWS_GROUP_LABEL, "")
        return f"{self.pod.metadata.namespace}/{self.factory.metadata.name}-{self.model.name}/{index}"

    def class_on(self, product: str) -> str:
        """The class of its GPUs on a node of that product."""
        namespace = self.pod.metadata.namespace or ""
        return names.class_name(namespace, self.factory.metadata.name, self.model.name, product)


@dataclass(frozen=True)
class GpuHost:
    """A node with GPUs: the Node object, its GPUNode (None: not made yet), how long its agent has been silent."""

    name: str
    node: Node | None
    held: GPUNode | None
    silent_seconds: float | None

    @cached_property
    def product(self) -> str:
        """As NVML names it; known once the agent has reported."""
        gpus = self.held.status.gpus if self.held else ()
        return gpus[0].product if gpus else ""

    @cached_property
    def gpu_count(self) -> int:
        if self.held and self.held.status.gpus:
            return len(self.held.status.gpus)
        capacity = self.node.status.allocatable.get(names.GPU_RESOURCE, "0") if self.node else "0"
        return int(capacity) if capacity.isdigit() else 0

    @property
    def grants(self) -> tuple[PodGrant, ...]:
        return self.held.spec.pods if self.held else ()

    @cached_property
    def applied(self) -> Mapping[str, int]:
        """Domain → the epoch that its agent acknowledged."""
        return {entry.domain: entry.epoch for entry in self.held.status.applied} if self.held else {}

    @property
    def fenced(self) -> bool:
        return self.held is not None and self.held.spec.fence is not None

    @property
    def acknowledged(self) -> bool:
        """The agent obeys the spec as it stands, with limits read back in this boot."""
        held = self.held
        if held is None:
            return False
        return held.status.observed_generation >= held.metadata.generation and held.status.capped

    @property
    def node_ready(self) -> bool:
        if self.node is None:
            return False
        return any(
            condition.type == "Ready" and condition.status == "True"
            for condition in self.node.status.conditions
        )


@dataclass(frozen=True)
class World:
    """The snapshot with its relations made plain."""

    snapshot: Snapshot
    replicas: tuple[Replica, ...]
    hosts: Mapping[str, GpuHost]
    foreign: Mapping[str, tuple[Pod, ...]] = field(default_factory=dict)
    """By node: pods with GPUs that belong to no factory."""
    unguarded: tuple[tuple[Replica, str], ...] = ()
    """Gated pods that look like a model's and would not wait for their cap, and why: none is granted or opened."""
    kept: Mapping[str, Pod] = field(default_factory=dict)
    """By UID: pods of factories that cannot be read. Nobody knows what they should be, so they stay as they are."""

    @cached_property
    def by_uid(self) -> Mapping[str, Replica]:
        return {replica.uid: replica for replica in self.replicas}

    @cached_property
    def granted_on(self) -> Mapping[str, str]:
        """Pod UID → the node that it is charged on."""
        return {
            grant.uid: host.name
            for host in self.hosts.values()
            for grant in host.grants
            if not grant.released
        }

    @cached_property
    def under(self) -> Mapping[str, tuple[GpuHost, ...]]:
        """Domain → the hosts whose spec names it on its path."""
        found: dict[str, list[GpuHost]] = {}
        for host in self.hosts.values():
            for domain in host.held.spec.path if host.held else ():
                found.setdefault(domain, []).append(host)
        return {domain: tuple(hosts) for domain, hosts in found.items()}

    @cached_property
    def gpus_under(self) -> Mapping[str, int]:
        return {domain: sum(host.gpu_count for host in hosts) for domain, hosts in self.under.items()}

    @cached_property
    def enforced(self) -> Mapping[str, frozenset[int]]:
        """Class → the limits that its GPUs read back, in milliwatts."""
        found: dict[str, set[int]] = {}
        for host in self.hosts.values():
            for gpu in host.held.status.gpus if host.held else ():
                found.setdefault(gpu.class_name, set()).add(gpu.enforced_milliwatts)
        return {label: frozenset(limits) for label, limits in found.items()}

    @cached_property
    def lowest(self) -> Mapping[str, tuple[GpuHost, GPUStatus]]:
        """Class → the GPU of it that read back the lowest limit."""
        found: dict[str, tuple[GpuHost, GPUStatus]] = {}
        for host in self.hosts.values():
            for gpu in host.held.status.gpus if host.held else ():
                known = found.get(gpu.class_name)
                if known is None or gpu.enforced_milliwatts < known[1].enforced_milliwatts:
                    found[gpu.class_name] = host, gpu
        return found

    @cached_property
    def labels_of(self) -> Mapping[tuple[str, str, str], tuple[str, ...]]:
        """(namespace, factory, model) → its classes that GPUs read a limit back for: one on each product."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for label in self.lowest:
            owner = names.class_owner(label)
            if owner is not None:
                found.setdefault(owner, []).append(label)
        return {owner: tuple(labels) for owner, labels in found.items()}

    @cached_property
    def standing(self) -> Mapping[tuple[str, str, str], frozenset[tuple[str, str]]]:
        """(namespace, factory, model) → the (domain, class) pairs that it is granted in."""
        found: dict[tuple[str, str, str], set[tuple[str, str]]] = {}
        for host in self.hosts.values():
            for grant in host.grants if host.held and host.held.spec.path else ():
                owner = names.class_owner(grant.class_name)
                if owner is not None and host.held is not None:
                    found.setdefault(owner, set()).add((host.held.spec.path[-1], grant.class_name))
        return {owner: frozenset(pairs) for owner, pairs in found.items()}

    @cached_property
    def meters(self) -> Mapping[str, tuple[GpuHost, PodMeter]]:
        """Pod UID → what its node's agent last counted for it, heard lately or not."""
        return {
            meter.uid: (host, meter)
            for host in self.hosts.values()
            if host.held
            for meter in host.held.status.meters
        }

    @cached_property
    def _by_factory(self) -> Mapping[Key, tuple[Replica, ...]]:
        found: dict[Key, list[Replica]] = {}
        for replica in self.replicas:
            found.setdefault(key_of(replica.factory), []).append(replica)
        return {key: tuple(replicas) for key, replicas in found.items()}

    def replicas_of(self, factory: TokenFactory, model: ModelSpec | None = None) -> list[Replica]:
        mine = self._by_factory.get(key_of(factory), ())
        return [replica for replica in mine if model is None or replica.model.name == model.name]

    @cached_property
    def unasked(self) -> Mapping[Key, Mapping[str, int]]:
        """By factory and model: how many pods there are of models that it no longer asks for, before they are deleted."""
        wanted = {
            key: {model.name for model in each.spec.models} for key, each in self.snapshot.factories.items()
        }
        found: dict[Key, dict[str, int]] = {}
        for pod in self.snapshot.pods.values():
            key, name = _factory_key(pod), pod.metadata.labels.get(names.MODEL_LABEL, "")
            ours = key in wanted and names.TEMPLATE_ANNOTATION in pod.metadata.annotations
            if (
                ours
                and name not in wanted[key]
                and not pod.metadata.deletion_timestamp
                and not has_finished(pod)
            ):
                mine = found.setdefault(key, {})
                mine[name] = mine.get(name, 0) + 1
        return found

    @cached_property
    def fleet_nodes(self) -> int:
        """Nodes whose agent was ever heard."""
        return sum(1 for host in self.hosts.values() if host.silent_seconds is not None)

    @cached_property
    def _silences(self) -> Sequence[float]:
        """Rising; of nodes that nobody fenced."""
        return sorted(
            host.silent_seconds
            for host in self.hosts.values()
            if host.silent_seconds is not None and not host.fenced
        )

    def lost_nodes(self, after_seconds: float = DEFAULT_DETECT_SECONDS) -> int:
        return len(self._silences) - bisect_right(self._silences, after_seconds)

    def detect_seconds(self, factory: TokenFactory) -> float:
        return parse_duration(factory.spec.recovery.detect_after) / 1000

    def lost(self, host: GpuHost, after_seconds: float = DEFAULT_DETECT_SECONDS) -> bool:
        """Its agent had been heard and has fallen silent. Whether it still draws is another question."""
        return host.silent_seconds is not None and host.silent_seconds > after_seconds

    def cut_off(self, host: GpuHost) -> str:
        """Why nothing can begin to run there, whatever was granted; empty: it can, once its agent obeys."""
        if host.fenced:
            return "it is fenced"
        if host.node is None:
            return "its Node object is gone"
        return "its agent fell silent" if self.lost(host) else ""

    def obeyed(self, host: GpuHost) -> bool:
        """Its agent has acknowledged its spec, and the sheets of its path that there are, as they stand."""
        sheets = self.snapshot.sheets
        return host.acknowledged and all(
            sheet is None or host.applied.get(domain, 0) >= sheet.spec.epoch
            for domain in (host.held.spec.path if host.held else ())
            for sheet in (sheets.get(("", domain)),)
        )


def whole(replicas: Iterable[Replica]) -> int:
    """How many replicas these pods make: a group counts once all of its pods are among them."""
    groups: dict[str, int] = {}
    single = 0
    size = 1
    for replica in replicas:
        if replica.group:
            groups[replica.group] = groups.get(replica.group, 0) + 1
            size = replica.model.nodes_per_replica
        else:
            single += 1
    return single + sum(count >= size for count in groups.values())


def see(snapshot: Snapshot, workloads: WorkloadOptions) -> World:
    replicas = []
    unguarded = []
    foreign: dict[str, list[Pod]] = {}
    # Pods of a factory or model that was deleted drain under the grants that they have: they are no strangers.
    charged = {grant.uid for node in snapshot.gpu_nodes.values() for grant in node.spec.pods}
    unread = snapshot.unread_factories
    kept: dict[str, Pod] = {}
    for pod in snapshot.pods.values():
        owner = _owner(pod, snapshot.factories)
        gated = is_gated(pod)
        # What has been let through stays a replica whatever is changed of it: it draws, under the charge that it has.
        lacking = unwaiting(pod, workloads) if owner and (gated or pod.metadata.uid not in charged) else ""
        if owner is not None and not lacking:
            replicas.append(Replica(pod, *owner))
        elif owner is not None and gated:
            unguarded.append((Replica(pod, *owner), lacking))
        elif unread and _factory_key(pod) in unread and pod.metadata.uid in charged:
            kept[pod.metadata.uid or ""] = pod
        elif pod.metadata.uid in charged:
            continue
        elif pod.spec.node_name and pod.status.phase not in _FINISHED and gpus_asked(pod):
            foreign.setdefault(pod.spec.node_name, []).append(pod)
    hosts = {
        name: GpuHost(
            name=name,
            node=snapshot.nodes.get(("", name)),
            held=snapshot.gpu_nodes.get(("", name)),
            silent_seconds=snapshot.silent_seconds.get(name),
        )
        for name in sorted(_gpu_node_names(snapshot))
    }
    replicas.sort(key=lambda replica: (replica.pod.metadata.namespace or "", replica.name))
    strangers = {name: tuple(pods) for name, pods in foreign.items()}
    unguarded.sort(key=lambda pair: (pair[0].pod.metadata.namespace or "", pair[0].name))
    return World(snapshot, tuple(replicas), hosts, strangers, tuple(unguarded), kept)


def _factory_key(pod: Pod) -> Key:
    return (pod.metadata.namespace or "", pod.metadata.labels.get(names.FACTORY_LABEL, ""))


def _owner(pod: Pod, factories: Mapping[Key, TokenFactory]) -> tuple[TokenFactory, ModelSpec] | None:
    factory = factories.get(_factory_key(pod))
    if factory is None:
        return None
    wanted = pod.metadata.labels.get(names.MODEL_LABEL)
    return next(((factory, model) for model in factory.spec.models if model.name == wanted), None)


def gpus_asked(pod: Pod) -> int:
    """Init containers run before the others, and get GPUs of these."""
    before = max((gpus_of(container) for container in pod.spec.init_containers), default=0)
    return max(before, sum(gpus_of(container) for container in pod.spec.containers))


def _gpu_node_names(snapshot: Snapshot) -> set[str]:
    found = {name for _, name in snapshot.gpu_nodes}
    for node in snapshot.nodes.values():
        labelled = node.metadata.labels.get("nvidia.com/gpu.present") == "true"
        if labelled or node.status.allocatable.get(names.GPU_RESOURCE, "0") not in {"0", ""}:
            found.add(node.metadata.name)
    return found
