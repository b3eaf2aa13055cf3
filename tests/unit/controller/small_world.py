"""A cluster in memory that does what the controllers, the scheduler, kubelets and agents would: enough to plan on.

It is no API server: it exists so that a plan's consequences can be followed for thousands of rounds in a second.
"""

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import yaml

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode, GPUNodeStatus, GPUStatus, PodMeter
from tokenfactory.api.meta import ObjectMeta, OwnerReference
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.compose import Composed, Options, compose
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.plan.memory import Memory as PlanMemory
from tokenfactory.controller.snapshot import Leadership, Snapshot
from tokenfactory.controller.workloads import WorkloadOptions
from tokenfactory.kube.objects import (
    KubeCondition,
    Namespace,
    Node,
    NodeStatus,
    Pod,
    PodStatus,
    Taint,
)
from tokenfactory.planning.power.governor import GpuView, Memory, Sheet, View, govern, read_back
from tokenfactory.twin.invariants import Breach, NodeTruth, breaches, gpu_truth

H100 = "NVIDIA H100 80GB HBM3"
START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
IDLE_WATTS = 100.0
TEMPLATE = "template-hash"
OPTIONS = Options(workloads=WorkloadOptions(image="tokenfactory:test"))


@dataclass
class Agent:
    """A node's agent: the shipped governor over GPUs that obey at once."""

    name: str
    gpus: int
    alive: bool = True
    boot_id: str = "boot-1"
    memory: Memory = field(default_factory=Memory)
    enforced: dict[str, int] = field(default_factory=dict)
    heard_at: datetime = START
    overhead_milliwatts: int = 0
    """What its meter has taught it."""
    overhead_proven: bool = False
    load_permille: int = 0
    """What its GPUs draw of their limits."""
    reported_at: datetime | None = None
    reports: bool = True
    """Whether its reports arrive; its heartbeat does anyway."""

    def uuid(self, index: int) -> str:
        return f"{self.name}-gpu-{index}"


class SmallWorld:
    def __init__(self, *, term: int = 1) -> None:
        self.now = START
        self.term = term
        self.has_groups = False
        """Whether LeaderWorkerSets are installed."""
        self.refusing: dict[str, str] = {}
        """Nodes that kube-scheduler does not bind to, and why."""
        self.lingering: set[str | None] = set()
        """UIDs of pods that take their time to end."""
        self.claim_from: int | None = None
        """None: nobody handed over to this leader."""
        self.version = 0
        self.objects: dict[type, dict[tuple[str, str], Any]] = {
            kind: {}
            for kind in (
                PowerDomain,
                PowerProfile,
                TokenFactory,
                CapSheet,
                GPUNode,
                Node,
                Pod,
                Deployment,
                LeaderWorkerSet,
                Service,
                Namespace,
            )
        }
        self.agents: dict[str, Agent] = {}
        self.writes: list[act.Action] = []
        self.events: list[tuple[str, str]] = []
        self.renewals = 0
        self.memory = PlanMemory()
        self.before_write: Callable[[act.Action], None] = lambda _: None
        self.meters: Callable[[Agent, dict[str, Pod]], tuple[PodMeter, ...]] = lambda _agent, _holding: ()
        """What an agent counts for the pods that hold its GPUs (pod by GPU's uuid)."""
        self._drew: dict[str, int] = {}

    def fork(self) -> "SmallWorld":
        """A world that goes on from here by itself."""
        other = copy.copy(self)
        other.objects = {kind: dict(held) for kind, held in self.objects.items()}
        other.agents = {
            name: replace(agent, enforced=dict(agent.enforced)) for name, agent in self.agents.items()
        }
        other.writes, other.events = list(self.writes), list(self.events)
        other._drew = dict(self._drew)
        return other

    # --- people

    def apply(self, text: str) -> None:
        for raw in yaml.safe_load_all(text):
            kind = {it.KIND: it for it in (PowerDomain, PowerProfile, TokenFactory)}[raw["kind"]]
            obj = msgspec.convert(raw, kind)
            held = self.objects[kind].get(_key(obj))
            meta = msgspec.structs.replace(obj.metadata, uid=f"uid-{obj.metadata.name}")
            obj = msgspec.structs.replace(obj, metadata=meta)
            if held is not None:
                obj = msgspec.structs.replace(obj, status=held.status)
            self.put(obj, new_generation=True)

    def add_node(self, name: str, gpus: int = 8, **labels: str) -> None:
        all_labels = {"nvidia.com/gpu.present": "true", names.HOSTNAME_LABEL: name, **labels}
        node = Node(
            metadata=ObjectMeta(name=name, uid=f"uid-{name}", labels=all_labels),
            status=NodeStatus(
                allocatable={names.GPU_RESOURCE: str(gpus)},
                conditions=(KubeCondition(type="Ready", status="True"),),
            ),
        )
        self.put(node)
        self.agents[name] = Agent(name, gpus)

    def label_node(self, name: str, **labels: str) -> None:
        node = self.objects[Node]["", name]
        meta = msgspec.structs.replace(node.metadata, labels={**node.metadata.labels, **labels})
        self.put(msgspec.structs.replace(node, metadata=meta))

    def cordon(self, name: str, on: bool = True) -> None:
        node = self.objects[Node]["", name]
        spec = msgspec.structs.replace(node.spec, unschedulable=on)
        self.put(msgspec.structs.replace(node, spec=spec))

    def label_namespace(self, name: str, **labels: str) -> None:
        self.put(Namespace(metadata=ObjectMeta(name=name, labels=labels)))

    def delete_factory(self, namespace: str, name: str) -> None:
        """And what the garbage collector takes with it."""
        gone = self.objects[TokenFactory].pop((namespace, name))
        for kind in (Deployment, LeaderWorkerSet, Service):
            for key, held in list(self.objects[kind].items()):
                if any(owner.uid == gone.metadata.uid for owner in held.metadata.owner_references):
                    del self.objects[kind][key]

    # --- the API

    def put(self, obj: Any, *, new_generation: bool = False) -> Any:
        self.version += 1
        meta = msgspec.structs.replace(
            obj.metadata,
            resource_version=str(self.version),
            generation=obj.metadata.generation + 1 if new_generation else obj.metadata.generation,
            creation_timestamp=obj.metadata.creation_timestamp or self.stamp(),
        )
        obj = msgspec.structs.replace(obj, metadata=meta)
        self.objects[type(obj)][_key(obj)] = obj
        return obj

    def stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    def snapshot(self) -> Snapshot:
        return Snapshot(
            leadership=Leadership(self.term, self.term if self.claim_from is None else self.claim_from),
            wall=self.now,
            milliseconds=int((self.now - START).total_seconds() * 1000),
            domains=dict(self.objects[PowerDomain]),
            factories=dict(self.objects[TokenFactory]),
            profiles=dict(self.objects[PowerProfile]),
            sheets=dict(self.objects[CapSheet]),
            sheets_version=self.version,
            gpu_nodes=dict(self.objects[GPUNode]),
            nodes=dict(self.objects[Node]),
            pods=dict(self.objects[Pod]),
            deployments=dict(self.objects[Deployment]),
            services=dict(self.objects[Service]),
            leader_worker_sets=dict(self.objects[LeaderWorkerSet]) if self.has_groups else None,
            namespaces=dict(self.objects[Namespace]),
            silent_seconds={
                name: (self.now - agent.heard_at).total_seconds() for name, agent in self.agents.items()
            },
        )

    # --- the operator

    def plan(self) -> Composed:
        return self.plan_of(self.snapshot())

    def plan_of(self, snapshot: Snapshot) -> Composed:
        return compose(snapshot, OPTIONS, self.memory)

    def operate(self, most_writes: int | None = None) -> int:
        """One round; dies after `most_writes`. Returns how many writes there were."""
        done = 0
        composed = self.plan()
        self.memory = composed.memory
        for action in composed.plan.actions:
            if most_writes is not None and done >= most_writes:
                break
            self.take(action)
            done += 1
        return done

    def crash(self) -> None:
        """The operator is killed, and another process leads: nothing is left of the first but what it wrote."""
        self.term += 1
        self.memory = PlanMemory()

    def take(self, action: act.Action) -> None:
        self.before_write(action)
        self.writes.append(action)
        match action:
            case act.PublishSheet(held, spec):
                current = self.objects[CapSheet].get(("", spec.domain))
                assert (current is None) == (held is None)
                if current is not None and held is not None:
                    assert current.metadata.resource_version == held.metadata.resource_version
                    assert spec.epoch > current.spec.epoch or spec.caps == current.spec.caps
                    assert spec.term >= current.spec.term
                self.put(CapSheet(metadata=ObjectMeta(name=spec.domain), spec=spec), new_generation=True)
            case act.ChargeNode(held, name, spec):
                node = held or GPUNode(metadata=ObjectMeta(name=name))
                self.put(msgspec.structs.replace(node, spec=spec), new_generation=True)
            case act.ApplyWorkload(kind, key, manifest):
                old = self.objects[kind].get(key)
                meta = manifest["metadata"]
                owners = tuple(msgspec.convert(owner, OwnerReference) for owner in meta["ownerReferences"])
                made = kind(
                    metadata=ObjectMeta(
                        name=key[1],
                        namespace=key[0],
                        labels=meta["labels"],
                        owner_references=owners,
                        generation=old.metadata.generation if old else 0,
                    ),
                    spec=manifest["spec"],
                )
                self.put(made, new_generation=True)
            case act.Retire(held):
                self.version += 1
                current = self.objects[type(held)].pop(_key(held))
                assert current.metadata.resource_version == held.metadata.resource_version
            case act.DeleteWorkload(held):
                del self.objects[type(held)][_key(held)]
            case act.OpenGate(pod, node):
                assert pod.spec.scheduling_gates
                self._schedule(pod, node)
            case act.DeletePod(pod):
                self.delete_pod(pod)
            case act.MarkPod(pod, cost):
                meta = self.objects[Pod][_key(pod)].metadata
                meta = msgspec.structs.replace(
                    meta, annotations={**meta.annotations, names.DELETION_COST: cost}
                )
                self.put(msgspec.structs.replace(self.objects[Pod][_key(pod)], metadata=meta))
            case act.TaintNode(node, _, taints):
                held = self.objects[Node][("", node)]
                spec = msgspec.structs.replace(
                    held.spec, taints=tuple(msgspec.convert(dict(taint), type=Taint) for taint in taints)
                )
                self.put(msgspec.structs.replace(held, spec=spec))
            case _:
                self._note(action)

    def _note(self, action: act.Action) -> None:
        """What is only told or written down."""
        match action:
            case act.RecordProfile(name, spec):
                assert ("", name) not in self.objects[PowerProfile]
                meta = ObjectMeta(name=name, labels={names.LEARNED_LABEL: "true"})
                self.put(PowerProfile(metadata=meta, spec=spec), new_generation=True)
            case act.WriteStatus(held, status):
                current = self.objects[type(held)][_key(held)]
                self.put(msgspec.structs.replace(current, status=status))
            case act.Tell(_, reason, message):
                self.events.append((reason, message))

    # --- everybody else

    def _schedule(self, pod: Pod, node: str) -> None:
        why = self.refusing.get(node)
        spec = msgspec.structs.replace(pod.spec, scheduling_gates=(), node_name="" if why else node)
        unbound = KubeCondition(
            type="PodScheduled", status="False", reason="Unschedulable", message=why or ""
        )
        status = msgspec.structs.replace(pod.status, conditions=(unbound,)) if why else pod.status
        self.put(msgspec.structs.replace(pod, spec=spec, status=status))

    def delete_pod(self, pod: Pod) -> None:
        """A pod on a live node ends; one on a dead node stays as it is, marked."""
        agent = self.agents.get(pod.spec.node_name)
        if agent is not None and not agent.alive:
            meta = msgspec.structs.replace(pod.metadata, deletion_timestamp=self.stamp())
            self.put(msgspec.structs.replace(pod, metadata=meta))
        else:
            self.objects[Pod].pop(_key(pod), None)

    def others(self) -> None:
        """Deployment controller, kubelets and agents, once each; then two seconds pass."""
        self._deploy()
        self._run_pods()
        self._beat()
        self.now += timedelta(seconds=2)

    def _deploy(self) -> None:
        """Every Deployment to its replicas, and to its template without surge; what no Deployment owns goes."""
        wanted: set[tuple[str, str]] = set()
        for (namespace, name), held in self.objects[Deployment].items():
            template = held.spec["template"]
            labels = template["metadata"]["labels"]
            mark = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
            mine = [
                pod
                for pod in self.objects[Pod].values()
                if pod.metadata.labels == labels and not pod.metadata.deletion_timestamp
            ]
            # A ReplicaSet parts first with what does not serve, then by the deletion cost.
            mine.sort(key=lambda pod: (not _serves(pod), -_cost(pod)))
            kept = _rolled(mine, mark, held.spec["replicas"])
            wanted |= {_key(pod) for pod in kept}
            for _ in range(held.spec["replicas"] - len(kept)):
                wanted.add(_key(self._make_pod(namespace, name, template, mark)))
        for key, pod in list(self.objects[Pod].items()):
            ours = names.MODEL_LABEL in pod.metadata.labels
            if ours and key not in wanted and not pod.metadata.deletion_timestamp:
                self.delete_pod(pod)

    def _make_pod(self, namespace: str, name: str, template: Any, mark: str) -> Pod:
        self.version += 1
        pod_name = f"{name}-{self.version}"
        meta = {
            "name": pod_name,
            "namespace": namespace,
            "uid": f"uid-{pod_name}",
            "labels": template["metadata"]["labels"],
            "annotations": {TEMPLATE: mark},
        }
        return self.put(msgspec.convert({"metadata": meta, "spec": template["spec"]}, Pod))

    def _run_pods(self) -> None:
        ready = (KubeCondition(type="Ready", status="True"),)
        for pod in list(self.objects[Pod].values()):
            agent = self.agents.get(pod.spec.node_name)
            if agent is None or not agent.alive:
                continue
            if pod.metadata.deletion_timestamp:
                if pod.metadata.uid in self.lingering:
                    continue
                del self.objects[Pod][_key(pod)]
                continue
            if _serves(pod):
                continue
            status = PodStatus(phase="Running", pod_ip="10.0.0.1", conditions=ready)
            self.put(msgspec.structs.replace(pod, status=status))

    def _beat(self) -> None:
        self.renewals += 1
        for agent in self.agents.values():
            if agent.alive:
                agent.heard_at = self.now
                self._agent(agent)

    def _agent(self, agent: Agent) -> None:
        node = self.objects[GPUNode].get(("", agent.name))
        if node is None:
            return
        holding: dict[str, Pod] = {}
        free = [agent.uuid(index) for index in range(agent.gpus)]
        for pod in sorted(self.objects[Pod].values(), key=lambda pod: pod.metadata.name):
            if pod.spec.node_name == agent.name:
                for _ in range(int(pod.spec.containers[0].resources.limits[names.GPU_RESOURCE])):
                    holding[free.pop(0)] = pod
        view = View(
            boot_id=agent.boot_id,
            spec=node.spec,
            generation=node.metadata.generation,
            status=node.status,
            sheets={name: Sheet.of(sheet.spec) for (_, name), sheet in self.objects[CapSheet].items()},
            renewals=dict.fromkeys(
                (sheet.spec.tree for sheet in self.objects[CapSheet].values()), self.renewals
            ),
            gpus=tuple(_gpu_view(agent, index, holding) for index in range(agent.gpus)),
        )
        milliseconds = int((self.now - START).total_seconds() * 1000)
        agent.memory, decision = govern(agent.memory, view, milliseconds)
        for uuid, order in decision.caps.items():
            if order.cap_milliwatts is not None:
                agent.enforced[uuid] = order.cap_milliwatts
        enforced = {
            agent.uuid(index): agent.enforced.get(agent.uuid(index), 700_000) for index in range(agent.gpus)
        }
        agent.memory, said = read_back(agent.memory, decision, enforced)
        status = GPUNodeStatus(
            observed_generation=said.observed_generation or node.status.observed_generation,
            boot_id=agent.boot_id,
            capped=said.capped,
            mode=decision.mode,
            draw_milliwatts=sum(enforced.values()) * agent.load_permille // 1000,
            applied=tuple(
                AppliedEpoch(domain=name, epoch=epoch) for name, epoch in sorted(said.applied.items())
            ),
            gpus=tuple(_gpu_status(agent, index, holding, enforced) for index in range(agent.gpus)),
            overhead_milliwatts=agent.overhead_milliwatts,
            overhead_proven=agent.overhead_proven,
            meters=self.meters(agent, holding),
            reported_at=node.status.reported_at,
        )
        since = (self.now - agent.reported_at).total_seconds() if agent.reported_at else 30.0
        if agent.reports and (status != node.status or since >= 30):
            agent.reported_at = self.now
            status = msgspec.structs.replace(status, reported_at=self.stamp())
        if agent.reports and status != node.status:
            self.put(msgspec.structs.replace(node, status=status))

    def settle(
        self, most_rounds: int = 80, each_round: Callable[["SmallWorld"], None] = lambda _: None
    ) -> int:
        """Rounds until the operator has nothing to write any more, however patient it is."""
        patience = [11, 31, 301]
        for number in range(most_rounds):
            self.others()
            each_round(self)
            writes = self.operate()
            each_round(self)
            if writes:
                patience = [11, 31, 301]
            elif not patience:
                return number
            else:
                self.now += timedelta(seconds=patience.pop(0))
        left = [str(action)[:200] for action in self.plan().plan.actions]
        raise AssertionError(f"not settled after {most_rounds} rounds; the operator still wants: {left}")

    # --- the truth

    def truth(self) -> list[NodeTruth]:
        """What the GPUs may draw; where nothing runs, no more than idle."""
        found = []
        for (_, name), node in self.objects[Node].items():
            agent = self.agents[name]
            held = self.objects[GPUNode].get(("", name))
            busy = {gpu.uuid for gpu in held.status.gpus if gpu.pod} if held else set()
            enforced = {
                uuid: agent.enforced.get(uuid, 700_000) / 1000 for uuid in map(agent.uuid, range(agent.gpus))
            }
            overhead = held.spec.overhead_milliwatts if held else 0
            found.append(
                NodeTruth(name, node.metadata.labels, gpu_truth(enforced, busy, IDLE_WATTS), overhead)
            )
        return found

    def drawing(self) -> dict[str, int]:
        """By domain: what the hardware under it may draw, in milliwatts. Nodes are where the operator has seen them."""
        found = dict.fromkeys((name for _, name in self.objects[PowerDomain]), 0)
        for node in self.truth():
            held = self.objects[GPUNode].get(("", node.name))
            for name in held.spec.path if held else ():
                if name in found:
                    found[name] += node.gpu_milliwatts + node.overhead_milliwatts
        return found

    def new_breaches(self) -> list[Breach]:
        """Domains over their limit that draw more than at the last look: a lowered limit may only be approached."""
        found = breaches(self.objects[PowerDomain].values(), self.truth())
        drew = dict(self._drew)
        self.look()
        return [breach for breach in found if breach.drawing_milliwatts > drew.get(breach.domain, 0)]

    def look(self) -> None:
        """Remember what each domain's nodes draw, wherever people have just put them."""
        nowhere = [
            msgspec.structs.replace(each, spec=msgspec.structs.replace(each.spec, limit="1W"))
            for each in self.objects[PowerDomain].values()
        ]
        self._drew = {breach.domain: breach.drawing_milliwatts for breach in breaches(nowhere, self.truth())}

    def ready_pods(self) -> list[Pod]:
        return [pod for pod in self.objects[Pod].values() if _serves(pod)]


def _rolled(pods: list[Pod], mark: str, replicas: int) -> list[Pod]:
    """Which of a Deployment's pods stay: up to date ones, and as many old ones as maxUnavailable 25% asks for."""
    new = [pod for pod in pods if pod.metadata.annotations[TEMPLATE] == mark]
    old = [pod for pod in pods if pod.metadata.annotations[TEMPLATE] != mark and _serves(pod)]
    spare = replicas - max(1, replicas // 4) - sum(_serves(pod) for pod in new)
    return (new + old[: max(0, spare)])[:replicas]


def _serves(pod: Pod) -> bool:
    return any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions)


def _key(obj: Any) -> tuple[str, str]:
    return (obj.metadata.namespace or "", obj.metadata.name)


def _cost(pod: Pod) -> int:
    return int(pod.metadata.annotations.get(names.DELETION_COST, "0"))


def _gpu_view(agent: Agent, index: int, holding: dict[str, Pod]) -> GpuView:
    uuid = agent.uuid(index)
    return GpuView(
        uuid=uuid,
        product=H100,
        min_milliwatts=200_000,
        max_milliwatts=700_000,
        enforced_milliwatts=agent.enforced.get(uuid, 700_000),
        pod_uid=(holding[uuid].metadata.uid or "") if uuid in holding else "",
    )


def _gpu_status(agent: Agent, index: int, holding: dict[str, Pod], enforced: dict[str, int]) -> GPUStatus:
    uuid = agent.uuid(index)
    pod = holding.get(uuid)
    return GPUStatus(
        index=index,
        uuid=uuid,
        product=H100,
        min_milliwatts=200_000,
        max_milliwatts=700_000,
        default_milliwatts=700_000,
        enforced_milliwatts=enforced[uuid],
        pod=f"{pod.metadata.namespace}/{pod.metadata.name}" if pod else "",
        pod_uid=(pod.metadata.uid or "") if pod else "",
    )
