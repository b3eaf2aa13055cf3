"""Hundreds of whole nodes in one process: the agent's real code on real watches, over GPUs that are numbers.

Each node has what its agent has on a real one: two watches of its own (its GPUNode, the sheets of its tree), a status
and a heartbeat written under the token of a pod on that node, and the admission policy that holds it to them. What is
simulated: GPUs (`hollow_gpus`), PodResources and model servers are objects in this process, the start gate is asked
without a socket, and all nodes share one event loop and one pool of connections. So what a node computes takes turns
with its neighbours, which no real node does: times measured here are upper bounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import msgspec
from kubernetes.aio.client import Configuration

from tokenfactory.agent.exposition import Reading
from tokenfactory.agent.following import LiveSheets
from tokenfactory.agent.live import LiveNode, LiveWriter
from tokenfactory.agent.loop import Agent
from tokenfactory.agent.nvml import Gpu
from tokenfactory.agent.pace import Pace
from tokenfactory.agent.parts import PodDevices as HeldDevices
from tokenfactory.agent.startgate import StartGate
from tokenfactory.api.gpu_node import GPUNode, GPUNodeStatus
from tokenfactory.api.names import heartbeat_name
from tokenfactory.kube.client import Client
from tokenfactory.kube.credentials import Credentials
from tokenfactory.kube.errors import ConflictError
from tokenfactory.kube.lease import Heartbeat
from tokenfactory.kube.sockets import keepalive_socket
from tokenfactory.twin.access import token_pod
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.components import ISSUER
from tokenfactory.twin.fleet import AGENT_ACCOUNT, SYSTEM_NAMESPACE, NodePlan
from tokenfactory.twin.gpu_products import product_named
from tokenfactory.twin.hollow import (
    HollowKubelet,
    HollowNode,
    PodDevices,
    RunningPod,
    addresses,
    running_status,
)
from tokenfactory.twin.hollow_gpus import HollowGpus
from tokenfactory.twin.pki import Authority
from tokenfactory.twin.podrunner import ContainerFailedError

QUIET: Final = Pace(tick=15.0, observe=30.0, pods=30.0, meter=30.0, tune=60.0, wear=600.0)
"""What a node looks at every few seconds would be most of what thousands of them in one process do. A cut is not polled."""
TOKENS_PER_SECOND_AND_GPU: Final = 800.0
_GATE_SECONDS: Final = 0.5
_AT_ONCE: Final = 32


class _AgentClient(Client):
    """One node's own token, over the pool of connections that all share."""

    def __init__(self, token: str, pool: aiohttp.ClientSession) -> None:
        configuration = Configuration()
        configuration.api_key["BearerToken"] = f"Bearer {token}"

        async def load() -> Configuration:
            return configuration

        super().__init__(Credentials(load, configuration), user_agent="tokenfactory-agent")
        self._pool = pool

    def _session(self) -> aiohttp.ClientSession:
        return self._pool


@dataclass
class Told:
    """When the agents of a fleet got to know a sheet, and when they said that its caps were read back."""

    heard: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    """By (domain, epoch), in seconds of this machine's monotonic clock."""
    obeyed: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    draws: list[tuple[float, int]] = field(default_factory=list)
    """Every change of what all GPUs together may draw: when, and by how many milliwatts."""


class _Sheets(LiveSheets):
    """The real watch; notes when it brought an epoch."""

    def __init__(self, client: Client, tasks: asyncio.TaskGroup, told: Told) -> None:
        super().__init__(client, tasks)
        self._told = told
        self._epochs: dict[str, int] = {}

    def subscribe(self, changed: Callable[[], None]) -> None:
        def noted() -> None:
            for domain, sheet in self.sheets.items():
                if self._epochs.get(domain) != sheet.epoch:
                    self._epochs[domain] = sheet.epoch
                    self._told.heard.setdefault((domain, sheet.epoch), []).append(time.monotonic())
            changed()

        super().subscribe(noted)


class _Writer:
    """The real writer; notes when an epoch is first reported as obeyed: by then its caps were read back."""

    def __init__(self, client: Client, told: Told) -> None:
        self._writer = LiveWriter(client)
        self._told = told
        self._epochs: dict[str, int] = {}
        self.writes = 0

    async def write(self, held: GPUNode, status: GPUNodeStatus) -> bool:
        now = time.monotonic()
        for entry in status.applied:
            if self._epochs.get(entry.domain) != entry.epoch:
                self._epochs[entry.domain] = entry.epoch
                self._told.obeyed.setdefault((entry.domain, entry.epoch), []).append(now)
        self.writes += 1
        return await self._writer.write(held, status)


class _Pods:
    """PodResources without its socket."""

    def __init__(self) -> None:
        self.held: tuple[HeldDevices, ...] = ()

    async def list(self, gpus: tuple[Gpu, ...]) -> tuple[HeldDevices, ...]:  # noqa: ARG002
        return self.held

    def publish(self, devices: Iterable[PodDevices]) -> None:
        self.held = tuple(HeldDevices(it.namespace, it.name, it.gpu_uuids) for it in devices)


class FleetNode:
    """One node: GPUs, PodResources, and the agent once it runs."""

    def __init__(self, plan: NodePlan, address: str, told: Told) -> None:
        self.plan = plan
        self.pods = _Pods()
        self.gpus = HollowGpus(
            plan.name,
            product_named(plan.product),
            plan.gpus,
            changed=lambda milliwatts: told.draws.append((time.monotonic(), milliwatts)),
        )
        self.hollow = HollowNode(
            name=plan.name,
            address=address,
            folder=Path("/nonexistent"),  # its pods have no volumes
            gpu_uuids=tuple(self.gpus.gpus),
            product=plan.product,
            labels=plan.labels,
            enforced_watts=self.gpus.enforced_watts,
            set_load=self.gpus.set_load,
            publish=self.pods.publish,
        )
        self.agent: Agent | None = None
        self.writer: _Writer | None = None

    async def may_start(self, uid: str) -> bool:
        """P3, asked of the agent's own gate."""
        if self.agent is None:
            return False
        answer = await StartGate(self.agent).ask(uid)
        if answer.final:
            raise ContainerFailedError(answer.message)
        return answer.may_start


class LightKubelet(HollowKubelet):
    """Its pods are entries: they wait for their caps, then draw and serve, without a process or a port."""

    def __init__(self, client: Client, nodes: Iterable[FleetNode], **options: Any) -> None:
        self._fleet = {node.plan.name: node for node in nodes}
        hollow = [node.hollow for node in self._fleet.values()]
        super().__init__(client, hollow, claims=Path("/nonexistent"), **options)

    async def _bring_up(self, running: RunningPod, gpus: tuple[str, ...]) -> None:
        node = self._fleet[running.node.name]
        uid = running.pod.metadata.uid or ""
        while gpus and not await node.may_start(uid):  # noqa: ASYNC110  as the init container asks
            await asyncio.sleep(_GATE_SECONDS)
        running.node.loader(gpus)(1.0)
        await self._patch_status(running.pod, running_status(running.pod, [], addresses(running)))

    async def _take_down(self, running: RunningPod) -> None:
        running.node.loader(running.node.held.get(running.pod.metadata.uid or "", ()))(0.0)


class HollowFleet:
    """`async with HollowFleet(cluster, plans) as fleet:` then everything of it runs until the end of the block."""

    def __init__(
        self,
        cluster: Cluster,
        plans: list[NodePlan],
        *,
        first: int = 0,
        pace: Pace = QUIET,
        heartbeat_seconds: float = 5.0,
        lease_seconds: float = 10.0,
    ) -> None:
        """`first` sets apart the addresses of fleets in several processes."""
        self._cluster = cluster
        self._pace = pace
        self._heartbeat_seconds = heartbeat_seconds
        self._lease_seconds = lease_seconds
        self.told = Told()
        self.nodes = {
            plan.name: FleetNode(plan, _address(10, first + number), self.told)
            for number, plan in enumerate(plans)
        }
        self._next_pod = first * 16
        self._task: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self.kubelet: LightKubelet

    @property
    def milliwatts(self) -> int:
        """The most that all its GPUs may draw now."""
        return sum(gpu.milliwatts for node in self.nodes.values() for gpu in node.gpus.gpus.values())

    @property
    def status_writes(self) -> int:
        return sum(node.writer.writes for node in self.nodes.values() if node.writer)

    @property
    def pods(self) -> int:
        """How many pods hold GPUs."""
        return sum(bool(gpus) for node in self.nodes.values() for gpus in node.hollow.held.values())

    async def __aenter__(self) -> Self:
        started = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(started))
        await asyncio.wait({self._task, started}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            self._task.result()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def check(self) -> None:
        """Raises what ended it, if anything did."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def _run(self, started: asyncio.Future[None]) -> None:
        trusted = ssl.create_default_context(
            cafile=str(Authority(self._cluster.folder / "pki").ca.certificate)
        )
        connector = aiohttp.TCPConnector(ssl=trusted, limit=0, socket_factory=keepalive_socket)
        headers = {"Accept-Encoding": "identity", "Accept": "application/json"}
        async with (
            await Client.connect(self._cluster.kubeconfig) as admin,
            aiohttp.ClientSession(
                base_url=self._cluster.server, connector=connector, headers=headers, read_bufsize=2**21
            ) as pool,
            asyncio.TaskGroup() as tasks,
        ):
            self.kubelet = LightKubelet(
                admin,
                self.nodes.values(),
                next_pod_address=self._pod_address,
                lease_seconds=self._lease_seconds,
            )
            tasks.create_task(self.kubelet.run(), name="kubelet")
            await self.kubelet.registered.wait()
            gate = asyncio.Semaphore(_AT_ONCE)

            async def begin(node: FleetNode) -> None:
                async with gate:
                    token = await _token(admin, node.plan.name)
                self._start(node, _AgentClient(token, pool), tasks)

            await asyncio.gather(*(begin(node) for node in self.nodes.values()))
            started.set_result(None)

    def _start(self, node: FleetNode, client: Client, tasks: asyncio.TaskGroup) -> None:
        name = node.plan.name
        source = LiveNode(client, name)
        node.writer = _Writer(client, self.told)
        node.agent = Agent(
            name,
            nvml=node.gpus,
            pods=node.pods,
            nodes=source,
            sheets=_Sheets(client, tasks, self.told),
            writer=node.writer,
            scrape=self._scrape,
            pace=self._pace,
        )
        tasks.create_task(source.cache.run(), name=f"{name} node")
        tasks.create_task(node.agent.run(), name=f"{name} agent")
        tasks.create_task(self._beat(client, name), name=f"{name} heartbeat")

    async def _beat(self, client: Client, name: str) -> None:
        """Real nodes were not all started at the same moment."""
        await asyncio.sleep(random.random() * self._heartbeat_seconds)  # noqa: S311
        key = (SYSTEM_NAMESPACE, heartbeat_name(name))
        await Heartbeat(client, key, name, self._heartbeat_seconds).run()

    async def _scrape(self, url: str) -> Reading:  # noqa: ARG002
        """A model server of which one sees that it serves."""
        tokens = (time.monotonic() - self._began) * TOKENS_PER_SECOND_AND_GPU
        return Reading(
            engine="hollow",
            generated_tokens={b"": tokens},
            prompt_tokens={b"": tokens},
            running=32.0,
            queued=0.0,
            cache=0.5,
            time_to_first_token={},
            inter_token_latency={},
            process_start=self._began,
        )

    def _pod_address(self) -> str:
        self._next_pod += 1
        return _address(11, self._next_pod)


def _address(block: int, number: int) -> str:
    return f"{block}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


async def _token(admin: Client, node: str) -> str:
    """As the token of the DaemonSet's pod on that node: the admission policy reads the node's name from it."""
    pods = f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/pods"
    name = f"{AGENT_ACCOUNT}-{node}"
    pod = token_pod(SYSTEM_NAMESPACE, name, AGENT_ACCOUNT, node)
    with contextlib.suppress(ConflictError):  # made by an earlier fleet of this cluster
        await admin.request("POST", pods, body=pod)
    spec = {
        "audiences": [ISSUER],
        "expirationSeconds": 86400,
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": name},
    }
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    path = f"/api/v1/namespaces/{SYSTEM_NAMESPACE}/serviceaccounts/{AGENT_ACCOUNT}/token"
    answer = await admin.request("POST", path, body=request)
    token: str = msgspec.json.decode(answer)["status"]["token"]
    return token
