"""One real agent process on one simulated node: real pynvml over our library, a real PodResources socket.

For tests that want the very process that ships, killed and started at will, and for measuring it. Where hundreds of
nodes are wanted there is the hollow fleet.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, TypeVar

from tokenfactory.api.cap_sheet import (
    TREE_LABEL,
    CapSheet,
    CapSheetSpec,
    ClassCap,
    Renewal,
    labels_of,
    renewal_name,
)
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec, PodGrant
from tokenfactory.api.meta import Resource
from tokenfactory.kube.apply import Refused, Writer
from tokenfactory.kube.client import Client
from tokenfactory.twin.kubelet import SimulatedKubelet, SimulatedPod
from tokenfactory.twin.nvml import SimulatedNode
from tokenfactory.twin.processes import PROGRAM, environment

T = TypeVar("T", bound=Resource)


class AgentNode:
    """The node's hardware and kubelet live here; the agent is a process of its own."""

    def __init__(self, name: str, folder: Path, product: str = "H100", gpus: int = 8) -> None:
        self.name = name
        self.folder = folder
        self.hardware = SimulatedNode.create(folder / "hardware", product, gpus)
        self.kubelet = SimulatedKubelet(folder / "kubelet.sock")
        self.log = folder / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._ports = folder / "ports.json"

    async def open(self) -> None:
        await self.kubelet.start()

    async def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        await self.kubelet.stop()
        self.hardware.close()

    # --- the process

    def start(self, kubeconfig: Path, *arguments: str) -> subprocess.Popen[bytes]:
        self._ports.unlink(missing_ok=True)
        command = [
            *PROGRAM,
            "agent",
            f"--node={self.name}",
            f"--kubeconfig={kubeconfig}",
            f"--pod-resources={self.kubelet.socket}",
            f"--boot-id-file={self.hardware.boot_id_file}",
            f"--ports-file={self._ports}",
            *("--address=127.0.0.1", "--start-gate-port=0", "--metrics-port=0", "--scrape-loopback"),
            *arguments,
        ]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment(), **self.hardware.environment},
                stdout=log,
                stderr=log,
            )
        return self.process

    async def kill(self, how: signal.Signals = signal.SIGKILL) -> int:
        """Ends the process; returns its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        status = await asyncio.to_thread(self.process.wait, 30)
        self.process = None
        return status

    def ports(self) -> dict[str, int]:
        """Of the start gate and of the metrics; empty until the agent listens."""
        try:
            ports: dict[str, int] = json.loads(self._ports.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return ports

    # --- what is in force

    def enforced_milliwatts(self) -> list[int]:
        return [round(gpu.enforced_watts * 1000) for gpu in self.hardware.gpus]

    def give(self, namespace: str, name: str, *gpus: int) -> None:
        """The kubelet has given these GPUs to that pod."""
        uuids = [self.hardware.gpus[index].uuid for index in gpus]
        self.kubelet.run(SimulatedPod(namespace, name, devices={"nvidia.com/gpu": uuids}))


class SheetDesk:
    """Writes what the operator writes for one tree, by hand."""

    def __init__(self, client: Client, tree: str) -> None:
        self.client = client
        self.tree = tree
        self._writer = Writer(client)
        self._sequence = 0

    async def grant(
        self, node: str, path: tuple[str, ...], *pods: PodGrant, overhead_milliwatts: int = 0
    ) -> GPUNode:
        spec = GPUNodeSpec(path=path, pods=pods, overhead_milliwatts=overhead_milliwatts)
        return await self._apply(GPUNode, node, {"spec": spec}, {TREE_LABEL: self.tree})

    async def publish(
        self,
        domain: str,
        epoch: int,
        caps: dict[str, tuple[int, int]],
        *,
        hold_milliseconds: int = 300_000,
    ) -> CapSheet:
        """`caps`: class → (cap, fallback) in milliwatts."""
        spec = CapSheetSpec(
            domain=domain,
            tree=self.tree,
            term=1,
            epoch=epoch,
            hold_milliseconds=hold_milliseconds,
            caps=tuple(
                ClassCap(class_name=name, cap=cap, fallback=fallback)
                for name, (cap, fallback) in caps.items()
            ),
        )
        return await self._apply(CapSheet, domain, {"spec": spec}, labels_of(spec))

    async def renew(self) -> None:
        self._sequence += 1
        spec = CapSheetSpec(
            domain=self.tree, tree=self.tree, term=1, epoch=1, renewal=Renewal(sequence=self._sequence)
        )
        await self._apply(CapSheet, renewal_name(self.tree), {"spec": spec}, labels_of(spec))

    async def node(self, name: str) -> GPUNode:
        return await self.client.get(GPUNode, ("", name))

    async def _apply(self, kind: type[T], name: str, content: dict[str, Any], labels: dict[str, str]) -> T:
        answer = await self._writer.apply(kind, ("", name), content, labels=labels)
        if isinstance(answer, Refused):
            raise RuntimeError(  # noqa: TRY004  it is no type that is wrong
                f"{kind.KIND} {name} was not written: {answer.message}"
            )
        return answer.object
