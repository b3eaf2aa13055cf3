"""The demo: a factory comes up inside its budget, a node dies, and its work goes on elsewhere.

Every claim that it prints was checked on the simulated hardware or read from the API server. `smoke` is the same
without a person: it ends by itself and fails when a claim does not hold.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live

from tokenfactory.twin.board import draw
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.fleet import NodePlan
from tokenfactory.twin.site import Site, SiteError

NAMESPACE = "tokens"
FACTORY = "demo"
DOMAIN = "demo"
MANIFEST = Path(__file__).resolve().parents[3] / "examples" / "demo.yaml"
RACK = "topology.tokenfactory.dev/rack"


def plans(count: int = 4, gpus: int = 4) -> list[NodePlan]:
    return [
        NodePlan(
            name=f"gpu-{index + 1}",
            labels={"nvidia.com/gpu.present": "true", RACK: f"r{index % 2 + 1}"},
            gpus=gpus,
        )
        for index in range(count)
    ]


def storage(claims: Path, namespace: str = NAMESPACE) -> str:
    """A volume for checkpoints, as a folder of this machine: the only part that a real cluster has already."""
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"model-cache-{namespace}"},
        "spec": {
            "capacity": {"storage": "100Gi"},
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "hostPath": {"path": str(claims / "model-cache")},
            "claimRef": {"namespace": namespace, "name": "model-cache"},
        },
    }
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "model-cache", "namespace": namespace},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": f"model-cache-{namespace}",
            "resources": {"requests": {"storage": "100Gi"}},
        },
    }
    return yaml.safe_dump_all([volume, claim])


class Demo:
    """One run of the story on one site."""

    def __init__(self, site: Site, say: Callable[[str], None]) -> None:
        self.site = site
        self._say = say
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        self._say(f"[{time.monotonic() - self._began:5.1f} s] {text}")

    async def come_up(self) -> None:
        await self.site.apply(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n")
        await self.site.apply(storage(self.site.fleet.claims))
        self.say(f"kubectl apply -f examples/{MANIFEST.name}")
        await self.site.apply(MANIFEST.read_text())
        await self.site.wait("the factory to be Ready", self._is_ready, 150)
        self.say("the factory is Ready")
        status = await self.site.wait("tokens to be counted", self._tokens, 60)
        self.say(
            f"{status['ready']} replicas serve {status['tokensPerSecond']} tokens/s at {status['tokensPerJoule']} tokens/J"
        )
        await self.tell_power()

    async def tell_power(self) -> None:
        domain = await self.site.status("pd", DOMAIN)
        truth = sum(node.gpu_milliwatts + node.overhead_milliwatts for node in self.site.truth()) / 1e6
        self.say(
            f"domain {DOMAIN}: limit {domain['limit']}, charged {domain['charge']}, "
            f"the hardware may draw {truth:.2f}kW at most, lost nodes: {domain.get('lostNodes', 0)}"
        )

    async def checkpointed(self) -> None:
        found = await self.site.wait("a checkpoint of the model cache", self._checkpoints, 60)
        spec = found[-1]["spec"]
        self.say(f"model cache saved: {spec['sizeBytes']} bytes, {spec['digest'][:19]}…")

    async def lose_a_node(self) -> dict[str, Any]:
        victim = await self._a_serving_node()
        before = await self.site.get("gn", victim)
        self.say(f"{victim} is cut off: its agent and its kubelet are gone, its GPUs draw on")
        await self.site.fleet.kill_node(victim)
        incident = await self.site.wait("the incident to be Closed", lambda: self._closed(victim), 180)
        self.say(
            f"its replica runs again as {incident['replacement']}, restored from {incident.get('restoredFrom', '')[:19] or 'nothing: a cold start'}"
        )
        recorded = {item["spec"]["digest"] for item in await self._checkpoints()}
        if incident.get("restoredFrom") not in recorded:
            raise SiteError(f"the replacement did not start from a recorded checkpoint: {incident}")
        domain = await self.site.status("pd", DOMAIN)
        if domain.get("lostNodes") != 1:
            raise SiteError(
                f"{victim} is silent and not fenced, but the domain counts {domain.get('lostNodes')} lost nodes"
            )
        after = await self.site.get("gn", victim)
        if len(after["spec"].get("pods", [])) < len(before["spec"].get("pods", [])):
            raise SiteError(f"{victim} is not fenced, but what ran there is off its books")
        await self.tell_power()
        self.say(f"{victim} stays charged until it is fenced")
        return dict(incident)

    def verdict(self) -> None:
        """The budget held in every sample of the hardware's own limits."""
        if self.site.breaches:
            raise SiteError(
                f"the budget was broken {len(self.site.breaches)} times, first: {self.site.breaches[0]}"
            )
        if self.site.samples < 100:
            raise SiteError(f"only {self.site.samples} samples were taken of the hardware")
        self.say(f"budget held in {self.site.samples} samples of the GPUs' enforced limits")

    async def _is_ready(self) -> bool:
        return await self.site.condition("tf", FACTORY, "Ready", NAMESPACE) == "True"

    async def _tokens(self) -> dict[str, Any] | None:
        status = await self.site.status("tf", FACTORY, NAMESPACE)
        return (
            status if float(status.get("tokensPerSecond") or 0) > 0 and status.get("tokensPerJoule") else None
        )

    async def _checkpoints(self) -> list[dict[str, Any]]:
        found = await self.site.get("ckpt", namespace=NAMESPACE)
        return [item for item in found["items"] if item.get("status", {}).get("phase") == "Ready"]

    async def _a_serving_node(self) -> str:
        pods = await self.site.get("pods", namespace=NAMESPACE)
        running = [pod for pod in pods["items"] if pod["status"].get("phase") == "Running"]
        return str(running[0]["spec"]["nodeName"])

    async def _closed(self, node: str) -> dict[str, Any] | None:
        status = await self.site.status("tf", FACTORY, NAMESPACE)
        mine = [incident for incident in status.get("incidents", []) if incident["node"] == node]
        return mine[0] if mine and all(incident["phase"] == "Closed" for incident in mine) else None


async def run(folder: Path, *, smoke: bool, say: Callable[[str], None]) -> None:
    """The story; without `smoke` it then goes on until it is interrupted."""
    say("starting a control plane (built once, about 10 minutes; then about 10 seconds)")
    cluster = await asyncio.to_thread(Cluster.up, folder / "cluster")
    try:
        async with Site(cluster, folder, plans()) as site:
            demo = Demo(site, say)
            say(f"KUBECONFIG={cluster.kubeconfig}")
            await demo.come_up()
            await demo.checkpointed()
            await demo.lose_a_node()
            demo.verdict()
            if not smoke:
                say(f"the factory runs on; look around with KUBECONFIG={cluster.kubeconfig}, end with Ctrl-C")
                await _watch(demo)
    finally:
        await asyncio.to_thread(cluster.down)


async def _watch(demo: Demo) -> None:
    """The board in a terminal, a line now and then elsewhere, until interrupted."""
    console = Console()
    if not console.is_terminal:
        while True:
            await asyncio.sleep(10)
            await demo.tell_power()
            demo.verdict()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(await draw(demo.site, NAMESPACE), refresh=True)
            await asyncio.sleep(1)
