"""What the tests on a real node do to it: sheets as the operator writes them, pods as people do, one agent."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import yaml
from tests import waiting
from tests.node.device_plugin import RESOURCE
from tests.node.image import IMAGE, MODEL, REPOSITORY
from tests.node.real_node import NodeError, RealNode

from tokenfactory.api.gpu_node import GPUNodeStatus, PodGrant
from tokenfactory.controller.workloads import THROUGH_THE_GATE
from tokenfactory.twin.agent_node import SheetDesk
from tokenfactory.twin.nvml import SimulatedNode

PRODUCT = "NVIDIA H100 80GB HBM3"
IDLE = f"idle@{PRODUCT}"
CHAT = f"inference/chat/llama@{PRODUCT}"
NAMESPACE = "tokenfactory-system"
CHAT_CAP, IDLE_CAP, DEFAULT_CAP = 600_000, 250_000, 700_000
QUICK = ("observe=0.5", "pods=0.5", "report=2", "reopen=0.2", "tick=1")
RENEW_SECONDS = 0.5


until = functools.partial(waiting.until, every=0.1)
"""A question here is a request to the API server or a program on the node."""


class World:
    """One node in its own domain; `site` is a tree of one."""

    def __init__(self, node: RealNode, hardware: SimulatedNode, desk: SheetDesk) -> None:
        self.node, self.hardware, self.desk = node, hardware, desk
        self.site = desk.tree
        self.grants: list[PodGrant] = []
        self._epoch = 0
        self._agent_runs = False

    @contextlib.asynccontextmanager
    async def renewing(self) -> AsyncIterator[None]:
        async def renew() -> None:
            while True:
                await self.desk.renew()
                await asyncio.sleep(RENEW_SECONDS)

        await self.desk.grant(self.node.name, (self.site,))
        await self.sheet()
        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        kubectl = self.node.cluster.kubectl
        await asyncio.to_thread(
            kubectl, "delete", "pods", "--all", "-n", "inference", "--force", "--grace-period=0"
        )
        if self._agent_runs:
            self.stop_agent(signal.SIGKILL)
        kubectl("delete", "gpunode", self.node.name, "--ignore-not-found")
        await nobody(self.node)

    # --- sheets

    async def sheet(self, cap: int = CHAT_CAP) -> None:
        self._epoch += 1
        caps = {CHAT: (cap, cap), IDLE: (IDLE_CAP, IDLE_CAP)}
        await self.desk.publish(self.site, self._epoch, caps)

    async def grant(self, name: str, gpus: int) -> None:
        uid = self.pod(name)["metadata"]["uid"]
        self.grants.append(PodGrant(namespace="inference", name=name, uid=uid, class_name=CHAT, gpus=gpus))
        await self.desk.grant(self.node.name, (self.site,), *self.grants)

    # --- the agent

    def start_agent(self) -> None:
        """On the node as a DaemonSet's pod with the host's network would be, every path at its default."""
        self._agent_runs = True
        command = [
            *(sys.executable, "-m", "tokenfactory.cli", "agent"),
            f"--node={self.node.name}",
            f"--kubeconfig={self.node.cluster.kubeconfig}",
            f"--address={self.node.address}",
            f"--boot-id-file={self.hardware.boot_id_file}",
            *(f"--pace={pace}" for pace in QUICK),
        ]
        path = os.pathsep.join((str(REPOSITORY / "operator"), os.environ.get("PYTHONPATH", "")))
        self.node.start("agent", command, {**self.hardware.environment, "PYTHONPATH": path})

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> None:
        with contextlib.suppress(NodeError):
            self.node.stop("agent", number)
        self._agent_runs = False

    async def status(self) -> GPUNodeStatus:
        return (await self.desk.node(self.node.name)).status

    async def capped(self) -> None:
        async def so() -> bool:
            status = await self.status()
            return status.capped and status.mode == "Obeying" and status.boot_id == self.hardware.boot_id

        await until(so, "the agent to obey with every limit read back")

    def limits(self) -> dict[str, int]:
        """What really limits each GPU, in milliwatts."""
        return {gpu.uuid: round(gpu.enforced_watts * 1000) for gpu in self.hardware.gpus}

    async def limited(self, want: dict[str, int]) -> None:
        await until(lambda: self.limits() == want or None, f"limits {want}, now {self.limits()}")

    # --- pods

    def run_pod(self, name: str, gpus: int, *, waits: bool = True) -> None:
        init = {
            "name": "wait-cap",
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "args": ["wait-cap"],
            "env": [
                {"name": "NODE_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}},
                {"name": "POD_UID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.uid"}}},
            ],
        }
        model = {
            "name": "model",
            "image": MODEL,
            "imagePullPolicy": "Never",
            "resources": {"limits": {RESOURCE: gpus}},
            **(THROUGH_THE_GATE if waits else {}),
        }
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "inference"},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "initContainers": [init] if waits else [],
                "containers": [model],
            },
        }
        self.node.cluster.kubectl("create", "-f", "-", input=yaml.safe_dump(pod))

    def pod(self, name: str) -> dict[str, Any]:
        text = self.node.cluster.kubectl("get", "pod", name, "-n", "inference", "-o", "json").stdout
        found: dict[str, Any] = json.loads(text)
        return found

    async def waiting(self, name: str, reason: str) -> None:
        """The init container runs, has been told `reason`, and the model has not started."""
        await until(
            lambda: f"power cap: {reason}" in self.log(name, "wait-cap"), f"{name} to wait for {reason}"
        )
        state = self.pod(name)["status"]["containerStatuses"][0]
        assert set(state["state"]) == {"waiting"}, state
        assert not state["started"]

    async def started(self, name: str) -> dict[str, int]:
        """The model's own words: its GPUs and their limits at its start, in milliwatts."""
        text = await until(lambda: self.log(name, "model").strip(), f"the model of {name} to start")
        limits: dict[str, int] = json.loads(text)
        return limits

    def log(self, name: str, container: str) -> str:
        """From the node, as `kubectl logs` has it from the kubelet."""
        return self.node.cluster.kubectl("logs", name, "-n", "inference", "-c", container, check=False).stdout

    def starts(self, name: str, container: str) -> int:
        """How often this container of the pod has been started."""
        status = self.pod(name)["status"]
        every = (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ()))
        found = next(it for it in every if it["name"] == container)
        return int(found["restartCount"]) + int("running" in found["state"] or "terminated" in found["state"])

    def kill_model(self) -> None:
        """As a crash would end it."""
        self.node.run("pkill", "-KILL", "-f", "python3 /model.py")

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self.node.cluster.kubectl, "delete", "pod", name, "-n", "inference")


async def nobody(node: RealNode) -> None:
    """Every pod has ended, in containerd and so for the kubelet's PodResources."""

    def left() -> str:
        return node.run("sh", "-c", PODS_CTR).strip()

    await until(lambda: not left(), "the node to have ended every pod")


PODS_CTR = "ctr --address=/run/containerd/containerd.sock --namespace=k8s.io tasks list --quiet"
