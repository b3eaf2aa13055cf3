"""A cluster in memory without our operator: its nodes and agents, controllers, scheduler, kubelets, and what is drawn."""

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
from tests.unit.controller.small_agent import Agent
from tests.unit.controller.small_api import SmallApi, key_of

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode, PodMeter
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet
from tokenfactory.kube.objects import KubeCondition, Node, NodeStatus, Pod, PodStatus
from tokenfactory.twin.invariants import Breach, NodeTruth, breaches, drawn, gpu_truth

IDLE_WATTS = 100.0
TEMPLATE = "template-hash"


class SmallCluster(SmallApi):
    def __init__(self) -> None:
        super().__init__()
        self.agents: dict[str, Agent] = {}
        self.has_groups = False
        """Whether LeaderWorkerSets are installed."""
        self.refusing: dict[str, str] = {}
        """Nodes that kube-scheduler does not bind to, and why."""
        self.webhook: Callable[[Pod], Pod] = lambda pod: pod
        """What somebody's admission makes of a pod that a Deployment creates."""
        self.lingering: set[str | None] = set()
        """UIDs of pods that take their time to end."""
        self.renewals = 0
        self.meters: Callable[[Agent, dict[str, Pod]], tuple[PodMeter, ...]] = lambda _agent, _holding: ()
        """What an agent counts for the pods that hold its GPUs (pod by GPU's uuid)."""
        self._drew: dict[str, int] = {}

    # --- people

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

    # --- controllers, scheduler, kubelets and agents

    def others(self) -> None:
        """Deployment controller, kubelets and agents, once each; then two seconds pass."""
        self.deploy()
        self.run_pods()
        self.beat()
        self.now += timedelta(seconds=2)

    def deploy(self) -> None:
        """Every Deployment to its replicas, and to its template without surge; what no Deployment owns goes."""
        wanted: set[tuple[str, str]] = set()
        for (namespace, name), held in self.objects[Deployment].items():
            template = held.spec["template"]
            labels = template["metadata"]["labels"]
            mark = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:8]
            mine = [
                pod
                for pod in self.objects[Pod].values()
                if pod.metadata.namespace == namespace
                and pod.metadata.labels == labels
                and not pod.metadata.deletion_timestamp
            ]
            # A ReplicaSet parts first with what does not serve, then by the deletion cost.
            mine.sort(key=lambda pod: (not _serves(pod), -_cost(pod)))
            kept = _rolled(mine, mark, held.spec)
            wanted |= {key_of(pod) for pod in kept}
            for _ in range(held.spec["replicas"] - len(kept)):
                wanted.add(key_of(self._make_pod(namespace, name, template, mark)))
        for (namespace, name), held in self.objects[LeaderWorkerSet].items():
            for number in range(held.spec["replicas"]):
                wanted |= self._group(namespace, name, held.spec["leaderWorkerTemplate"], number)
        for key, pod in list(self.objects[Pod].items()):
            ours = names.MODEL_LABEL in pod.metadata.labels
            if ours and key not in wanted and not pod.metadata.deletion_timestamp:
                self.delete_pod(pod)

    def _group(self, namespace: str, name: str, parts: Any, number: int) -> set[tuple[str, str]]:
        """All pods of one replica that spans nodes; one that lost a pod starts anew as a whole."""
        mark = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
        keys = [
            (namespace, f"{name}-{number}-{worker}" if worker else f"{name}-{number}")
            for worker in range(parts["size"])
        ]
        there = [self.objects[Pod][key] for key in keys if key in self.objects[Pod]]
        if len(there) == len(keys) and all(pod.metadata.annotations[TEMPLATE] == mark for pod in there):
            return set(keys)
        for pod in there:
            self.delete_pod(pod)
        for worker, key in enumerate(keys):
            if key in self.objects[Pod]:  # its node is lost
                continue
            part = parts["workerTemplate" if worker else "leaderTemplate"]
            labels = {names.LWS_GROUP_LABEL: str(number), names.LWS_WORKER_LABEL: str(worker)}
            meta = {
                "name": key[1],
                "namespace": namespace,
                "uid": f"uid-{key[1]}-{self.version}",
                "labels": part["metadata"]["labels"] | labels,
                "annotations": part["metadata"]["annotations"] | {TEMPLATE: mark},
            }
            self.put(msgspec.convert({"metadata": meta, "spec": part["spec"]}, Pod))
        return set(keys)

    def _make_pod(self, namespace: str, name: str, template: Any, mark: str) -> Pod:
        self.version += 1
        pod_name = f"{name}-{self.version}"
        meta = {
            "name": pod_name,
            "namespace": namespace,
            "uid": f"uid-{pod_name}",
            "labels": template["metadata"]["labels"],
            "annotations": template["metadata"]["annotations"] | {TEMPLATE: mark},
        }
        return self.put(self.webhook(msgspec.convert({"metadata": meta, "spec": template["spec"]}, Pod)))

    def delete_pod(self, pod: Pod) -> None:
        """A pod on a live node ends; one on a dead node stays as it is, marked."""
        agent = self.agents.get(pod.spec.node_name)
        if agent is not None and not agent.alive:
            meta = msgspec.structs.replace(pod.metadata, deletion_timestamp=self.stamp())
            self.put(msgspec.structs.replace(pod, metadata=meta))
        else:
            self.objects[Pod].pop(key_of(pod), None)

    def schedule(self, pod: Pod, node: str) -> None:
        """Its gate is open: kube-scheduler binds it, or says why not."""
        why = self.refusing.get(node)
        spec = msgspec.structs.replace(pod.spec, scheduling_gates=(), node_name="" if why else node)
        unbound = KubeCondition(
            type="PodScheduled", status="False", reason="Unschedulable", message=why or ""
        )
        status = msgspec.structs.replace(pod.status, conditions=(unbound,)) if why else pod.status
        self.put(msgspec.structs.replace(pod, spec=spec, status=status))

    def run_pods(self) -> None:
        ready = (KubeCondition(type="Ready", status="True"),)
        for pod in list(self.objects[Pod].values()):
            agent = self.agents.get(pod.spec.node_name)
            if agent is None or not agent.alive:
                continue
            if pod.metadata.deletion_timestamp:
                if pod.metadata.uid in self.lingering:
                    continue
                del self.objects[Pod][key_of(pod)]
                continue
            if _serves(pod) or pod.status.phase in {"Succeeded", "Failed"}:
                continue
            status = PodStatus(phase="Running", pod_ip="10.0.0.1", conditions=ready)
            self.put(msgspec.structs.replace(pod, status=status))

    def beat(self) -> None:
        """The sheets are renewed, and every agent that lives is heard."""
        self.renewals += 1
        for agent in self.agents.values():
            node = self.objects[GPUNode].get(("", agent.name))
            if agent.alive:
                agent.heard_at = self.now
            if agent.alive and node is not None:
                self._ask(agent, node)

    def _ask(self, agent: Agent, node: GPUNode) -> None:
        holding = agent.holding(self.objects[Pod].values())
        status = agent.obey(node, self.objects[CapSheet], self.renewals, holding, self.milliseconds)
        reported = agent.report(status, node, self.meters(agent, holding), self.now)
        if reported is not None:
            self.put(reported)

    # --- the truth

    def truth(self) -> list[NodeTruth]:
        """What the GPUs may draw; where nothing runs, no more than idle."""
        found = []
        for (_, name), node in self.objects[Node].items():
            held = self.objects[GPUNode].get(("", name))
            # What runs does not end because nobody speaks of it any more, nor because its pod's object is gone.
            busy = set(self.agents[name].holding(self.objects[Pod].values()))
            busy |= {gpu.uuid for gpu in held.status.gpus if gpu.pod} if held else set()
            enforced = {uuid: limit / 1000 for uuid, limit in self.agents[name].limits().items()}
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
        found = breaches(self.objects[PowerDomain].values(), self.truth(), self.now)
        drew = dict(self._drew)
        self.look()
        return [breach for breach in found if breach.drawing_milliwatts > drew.get(breach.domain, 0)]

    def look(self) -> None:
        """Remember what each domain's nodes draw, wherever people have just put them."""
        self._drew = drawn(self.objects[PowerDomain].values(), self.truth(), self.now)

    def ready_pods(self) -> list[Pod]:
        return [pod for pod in self.objects[Pod].values() if _serves(pod)]


def _rolled(pods: list[Pod], mark: str, spec: Any) -> list[Pod]:
    """Which of a Deployment's pods stay: up to date ones, and as many old ones as maxUnavailable asks for."""
    replicas = spec["replicas"]
    most = spec.get("strategy", {}).get("rollingUpdate", {}).get("maxUnavailable", "25%")
    unavailable = max(1, replicas // 4) if most == "25%" else most
    new = [pod for pod in pods if pod.metadata.annotations[TEMPLATE] == mark]
    old = [pod for pod in pods if pod.metadata.annotations[TEMPLATE] != mark and _serves(pod)]
    spare = replicas - unavailable - sum(_serves(pod) for pod in new)
    return (new + old[: max(0, spare)])[:replicas]


def _serves(pod: Pod) -> bool:
    return any(each.type == "Ready" and each.status == "True" for each in pod.status.conditions)


def _cost(pod: Pod) -> int:
    return int(pod.metadata.annotations.get(names.DELETION_COST, "0"))
