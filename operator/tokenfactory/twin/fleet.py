"""A few whole simulated GPU nodes: real agent processes over simulated NVML, and a hollow kubelet that runs pods.

Each node is as close to a real one as this machine allows: its agent is the product's own program in a process of
its own, under a token that is bound to that node, with real NVML calls and the kubelet's real PodResources protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from tokenfactory.api import names
from tokenfactory.kube.client import Client
from tokenfactory.twin.addresses import LoopbackBlock
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.hollow import HollowKubelet, HollowNode, PodDevices
from tokenfactory.twin.kubelet import SimulatedKubelet, SimulatedPod
from tokenfactory.twin.nvml import SimulatedNode
from tokenfactory.twin.processes import PROGRAM, environment

SYSTEM_NAMESPACE: Final = "tokenfactory-system"
OPERATOR_ACCOUNT: Final = "tokenfactory-operator"
AGENT_ACCOUNT: Final = "tokenfactory-agent"


@dataclass(frozen=True)
class NodePlan:
    """A node to be: its name, what hangs in it and where it stands."""

    name: str
    labels: dict[str, str]
    product: str = "NVIDIA H100 80GB HBM3"
    gpus: int = 8


class FleetNode:
    """One node: simulated GPUs, its PodResources socket, its agent's process."""

    def __init__(self, plan: NodePlan, address: str, folder: Path, cluster: Cluster) -> None:
        self.plan = plan
        self.folder = folder
        self.address = address
        self.hardware = SimulatedNode.create(folder / "nvml", plan.product, plan.gpus)
        self._gpus = {gpu.uuid: gpu for gpu in self.hardware.gpus}
        self._cluster = cluster
        self._agent: subprocess.Popen[bytes] | None = None
        self._pods = SimulatedKubelet(folder / "podresources.sock")
        self.hollow = HollowNode(
            name=plan.name,
            address=self.address,
            folder=folder,
            gpu_uuids=tuple(self._gpus),
            product=plan.product,
            labels=plan.labels,
            enforced_watts=lambda uuid: self._gpus[uuid].enforced_watts,
            set_load=lambda uuid, load: self._gpus[uuid].set_load(load),
            publish=self._publish,
        )

    async def start(self) -> None:
        await self._pods.start()
        self.start_agent()

    def start_agent(self) -> None:
        """The product's agent, as its DaemonSet would run it."""
        kubeconfig = self._cluster.kubeconfig_for_service_account(
            SYSTEM_NAMESPACE, AGENT_ACCOUNT, node_name=self.plan.name, duration="12h"
        )
        env = environment(**self.hardware.environment, KUBECONFIG=str(kubeconfig))
        command = [
            *PROGRAM,
            "agent",
            f"--node={self.plan.name}",
            f"--namespace={SYSTEM_NAMESPACE}",
            f"--pod-resources={self._pods.socket}",
            f"--boot-id-file={self.hardware.boot_id_file}",
            f"--address={self.address}",
            "--scrape-loopback",
            "--pace=meter=2",
            "--pace=report=5",
        ]
        with (self.folder / "agent.log").open("ab") as output:
            self._agent = subprocess.Popen(
                command, env=env, stdout=output, stderr=output, start_new_session=True
            )

    def stop_agent(self, *, kill: bool = False) -> None:
        if self._agent is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._agent.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self._agent.wait(10)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait(10)
        self._agent = None

    async def stop(self) -> None:
        self.stop_agent()
        await self._pods.stop()
        self.hardware.close()

    def enforced_watts(self) -> dict[str, float]:
        return {uuid: gpu.enforced_watts for uuid, gpu in self._gpus.items()}

    def _publish(self, devices: list[PodDevices]) -> None:
        self._pods.pods = {
            (entry.namespace, entry.name): SimulatedPod(
                entry.namespace, entry.name, {names.GPU_RESOURCE: entry.gpu_uuids}
            )
            for entry in devices
        }


class Fleet:
    """All nodes of a small simulated site, and the kubelet behind them."""

    def __init__(
        self, cluster: Cluster, folder: Path, plans: list[NodePlan], *, cold_seconds: float = 3.0
    ) -> None:
        self._cluster = cluster
        self._folder = folder
        self.claims = folder / "claims"
        self._addresses = LoopbackBlock.acquire()
        self._made = 0
        self.nodes = {plan.name: self._make(plan) for plan in plans}
        self._cold_seconds = cold_seconds
        self._task: asyncio.Task[Any] | None = None
        self._client: Client | None = None
        self.kubelet: HollowKubelet

    async def __aenter__(self) -> Self:
        self.claims.mkdir(parents=True, exist_ok=True)
        self._client = await Client.connect(self._cluster.kubeconfig)
        hollow = [node.hollow for node in self.nodes.values()]
        self.kubelet = HollowKubelet(
            self._client,
            hollow,
            claims=self.claims,
            cold_seconds=self._cold_seconds,
            next_pod_address=self._addresses.next_pod,
        )
        self._task = asyncio.create_task(self.kubelet.run())
        await self.kubelet.registered.wait()
        for node in self.nodes.values():
            await node.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for node in self.nodes.values():
            await node.stop()
        if self._client is not None:
            await self._client.close()
        self._addresses.release()

    def _make(self, plan: NodePlan) -> FleetNode:
        self._made += 1
        address = self._addresses.node(self._made - 1)
        return FleetNode(plan, address, self._folder / "nodes" / plan.name, self._cluster)

    async def add(self, plan: NodePlan) -> None:
        """One more node, as if it had just been racked and booted."""
        node = self.nodes[plan.name] = self._make(plan)
        await self.kubelet.join(node.hollow)
        await node.start()

    async def remove(self, name: str) -> None:
        """The node is carried out: nothing of it answers, and nothing of it draws."""
        await self.kill_node(name)
        node = self.nodes.pop(name)
        self.kubelet.nodes.pop(name)
        await node.stop()

    async def kill_node(self, name: str) -> None:
        """From one moment to the next nothing of the node answers. Its GPUs go on at their last caps."""
        self.nodes[name].stop_agent(kill=True)
        await self.kubelet.kill(name)

    def running_on(self, name: str) -> set[str]:
        """UUIDs of GPUs on which something runs, or for all one knows may still run."""
        return {uuid for uuids in self.nodes[name].hollow.held.values() for uuid in uuids}
