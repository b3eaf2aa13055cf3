"""A kubelet for nodes that exist only on this machine: it registers them, keeps their leases and runs their pods.

What it runs is real where that is cheap: init containers and sidecars of this product are processes of this product,
with the pod's own arguments, environment and volumes (as folders). The model server is simulated. GPUs are handed
out as the device plugin would, and told through PodResources as the real kubelet does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from tokenfactory.api import names
from tokenfactory.api.meta import Resource
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import MERGE, Client
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.twin.nim import SimulatedNim
from tokenfactory.twin.podrunner import ContainerFailedError, Containers

log = logging.getLogger(__name__)
Object = dict[str, Any]
_AT_ONCE = 32
"""Requests on their way for the nodes themselves."""
_IMAGES_NAMED = 50
"""As many as a kubelet names unless it is told otherwise."""


class HollowPod(Resource, frozen=True, kw_only=True):
    """A pod with all that a kubelet needs of it."""

    KIND: ClassVar[str] = "Pod"
    PLURAL: ClassVar[str] = "pods"
    NAMESPACED: ClassVar[bool] = True
    api_version: str = "v1"
    spec: Object = {}
    status: Object = {}


@dataclass
class HollowNode:
    """One node: what the API server is told, and where its simulated hardware is."""

    name: str
    address: str
    folder: Path
    gpu_uuids: tuple[str, ...]
    product: str
    labels: dict[str, str]
    enforced_watts: Callable[[str], float]
    set_load: Callable[[str, float], None]
    publish: Callable[[list[PodDevices]], None] = lambda _: None
    """Tells PodResources who holds what."""
    held: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """GPUs by pod UID."""
    images: list[str] = field(default_factory=list)
    """Pulled for some pod, the last one first."""
    alive: bool = True

    def allocate(self, uid: str, count: int) -> tuple[str, ...]:
        if uid not in self.held:
            taken = {gpu for gpus in self.held.values() for gpu in gpus}
            free = [gpu for gpu in self.gpu_uuids if gpu not in taken]
            if len(free) < count:
                raise ContainerFailedError(
                    f"UnexpectedAdmissionError: {count} GPUs asked for, {len(free)} free"
                )
            self.held[uid] = tuple(free[:count])
        return self.held[uid]

    def loader(self, gpus: tuple[str, ...]) -> Callable[[float], None]:
        """Sets the load of all of them."""

        def load(share: float) -> None:
            for gpu in gpus:
                self.set_load(gpu, share)

        return load


@dataclass(frozen=True)
class PodDevices:
    """What PodResources says of one pod."""

    namespace: str
    name: str
    gpu_uuids: tuple[str, ...]


@dataclass
class RunningPod:
    """A pod that was bound to one of our nodes, until it is gone."""

    pod: HollowPod
    task: asyncio.Task[None]
    node: HollowNode
    nim: SimulatedNim | None = None
    containers: Containers | None = None
    ip: str = ""


class HollowKubelet:
    """Runs the pods of many hollow nodes from one watch.

    `_bring_up` and `_take_down` are what running a pod's containers means: a lighter kubelet has others.
    """

    def __init__(
        self,
        client: Client,
        nodes: list[HollowNode],
        *,
        claims: Path,
        next_pod_address: Callable[[], str],
        cold_seconds: float = 3.0,
        lease_seconds: float = 10.0,
    ) -> None:
        self._client = client
        self._lease_seconds = lease_seconds
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self.nodes = {node.name: node for node in nodes}
        self._claims = claims
        self._cold_seconds = cold_seconds
        self._next_pod_address = next_pod_address
        self._pods = Cache(client, HollowPod, field_selector="spec.nodeName!=")
        self._running: dict[str, RunningPod] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.registered = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; then everything that it started has ended."""
        await asyncio.gather(*(self._register(node) for node in self.nodes.values()))
        self.registered.set()
        self._pods.on_change(self._pod_changed)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pods.run())
                tasks.create_task(self._keep_leases())
        finally:
            for running in list(self._running.values()):
                running.task.cancel()
            await asyncio.gather(
                *(running.task for running in self._running.values()), return_exceptions=True
            )

    def nim_of(self, pod_name: str) -> SimulatedNim | None:
        """The model server of a pod, for a test that wants it worse."""
        return next((run.nim for run in self._running.values() if run.pod.metadata.name == pod_name), None)

    async def kill(self, node_name: str) -> None:
        """The node is gone from the network, and nobody can say whether its GPUs still draw (they do)."""
        node = self.nodes[node_name]
        node.alive = False
        for running in [run for run in self._running.values() if run.node is node]:
            running.task.cancel()
            await asyncio.gather(running.task, return_exceptions=True)
        for uuids in node.held.values():
            for uuid in uuids:
                node.set_load(uuid, 1.0)

    async def revive(self, node_name: str) -> None:
        """The node is back after a reboot: its pods of before are gone."""
        node = self.nodes[node_name]
        node.alive = True
        node.held.clear()
        self._publish(node)
        await self._register(node)
        for pod in self._pods:
            if pod.spec.get("nodeName") == node_name:
                self._pod_changed(Change((pod.metadata.namespace or "", pod.metadata.name), None, pod))

    # --- nodes

    async def join(self, node: HollowNode) -> None:
        """One more node, while the others run."""
        self.nodes[node.name] = node
        await self._register(node)

    async def _register(self, node: HollowNode) -> None:
        async with self._at_once:
            await self._tell_of(node)

    async def _tell_of(self, node: HollowNode) -> None:
        manifest = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name, "labels": {names.HOSTNAME_LABEL: node.name, **node.labels}},
        }
        try:
            await self._client.request("POST", "/api/v1/nodes", body=manifest)
        except ApiError as error:
            if error.code != 409:
                raise
        resources = {
            "cpu": "64",
            "memory": "512Gi",
            "pods": "110",
            names.GPU_RESOURCE: str(len(node.gpu_uuids)),
        }
        status = {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [{"type": "InternalIP", "address": node.address}],
            "conditions": [_condition("Ready", "True", "KubeletReady")],
            "nodeInfo": {
                "kubeletVersion": "v1.36.3-hollow",
                "architecture": "amd64",
                "operatingSystem": "linux",
            },
            "declaredFeatures": ["RestartAllContainersOnContainerExits"],
        }
        path = f"/api/v1/nodes/{node.name}"
        await self._client.request("PATCH", path + "/status", body={"status": status}, content_type=MERGE)
        # Only the controller manager's own health taints stay; a fresh node is ready for pods.
        await self._renew(node)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.gather(*(self._renew_alive(node) for node in self.nodes.values()))
            await asyncio.sleep(self._lease_seconds)

    async def _renew_alive(self, node: HollowNode) -> None:
        async with self._at_once:
            if node.alive:
                with contextlib.suppress(ApiError, UnreachableError):
                    await self._renew(node)

    async def _renew(self, node: HollowNode) -> None:
        spec = {"holderIdentity": node.name, "leaseDurationSeconds": 40, "renewTime": _micro_now()}
        collection = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        try:
            await self._client.request(
                "PATCH", f"{collection}/{node.name}", body={"spec": spec}, content_type=MERGE
            )
        except ApiError as error:
            if error.code != 404:
                raise
            await self._client.request(
                "POST", collection, body={"metadata": {"name": node.name}, "spec": spec}
            )

    # --- pods

    def _pod_changed(self, change: Change[HollowPod]) -> None:
        pod = change.new or change.old
        assert pod is not None
        node = self.nodes.get(pod.spec.get("nodeName", ""))
        if node is None or not node.alive:
            return
        uid = pod.metadata.uid or ""
        running = self._running.get(uid)
        if change.new is None or pod.metadata.deletion_timestamp:
            if running is not None:
                running.task.cancel()
            elif change.new is not None:
                self._spawn(self._finish(pod))
            return
        if running is None and pod.status.get("phase") not in {"Succeeded", "Failed"}:
            self._running[uid] = RunningPod(pod, asyncio.create_task(self._live(pod)), node)

    async def _live(self, pod: HollowPod) -> None:
        uid = pod.metadata.uid or ""
        running = self._running[uid]
        try:
            await self._start(running)
            await asyncio.Event().wait()
        except ContainerFailedError as error:
            await self._patch_status(pod, {"phase": "Failed", "reason": "Error", "message": str(error)})
        finally:
            await asyncio.shield(self._spawn(self._stop(running)))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _start(self, running: RunningPod) -> None:
        pod, node = running.pod, running.node
        uid = pod.metadata.uid or ""
        gpus = node.allocate(uid, _gpus_asked(pod))
        self._publish(node)
        await self._pull(node, pod)
        running.ip = self._next_pod_address()
        await self._bring_up(running, gpus)

    async def _bring_up(self, running: RunningPod, gpus: tuple[str, ...]) -> None:
        """Until it serves: its init containers as processes, its model server simulated."""
        pod, node = running.pod, running.node
        uid = pod.metadata.uid or ""
        folder = node.folder / "pods" / uid
        containers = running.containers = Containers(pod.spec, self._values(running), folder, self._claims)
        common = addresses(running)
        await self._patch_status(pod, {"phase": "Pending", "startTime": _now(), **common})
        async for statuses in containers.run_init():
            await self._patch_status(pod, {"phase": "Pending", "initContainerStatuses": statuses, **common})
        cache = containers.volume("cache")
        running.nim = SimulatedNim(
            model=pod.metadata.labels.get(names.MODEL_LABEL, ""),
            cache=cache,
            enforced_watts=lambda: [node.enforced_watts(gpu) for gpu in gpus],
            set_load=node.loader(gpus),
            cold_seconds=self._cold_seconds,
        )
        await running.nim.start(running.ip, names.NIM_PORT)
        await self._patch_status(pod, running_status(pod, containers.statuses, common))

    async def _pull(self, node: HollowNode, pod: HollowPod) -> None:
        """Images stay on a node's disk when their pods have gone, and the node says which there are."""
        wanted = [each["image"] for each in pod.spec.get("containers", []) if each.get("image")]
        if set(wanted) <= set(node.images):
            return
        node.images = list(dict.fromkeys([*wanted, *node.images]))[:_IMAGES_NAMED]
        body = {"status": {"images": [{"names": [image], "sizeBytes": 1 << 30} for image in node.images]}}
        with contextlib.suppress(ApiError):
            path = f"/api/v1/nodes/{node.name}/status"
            await self._client.request("PATCH", path, body=body, content_type=MERGE, repeatable=True)

    async def _stop(self, running: RunningPod) -> None:
        pod, node = running.pod, running.node
        uid = pod.metadata.uid or ""
        await self._take_down(running)
        self._running.pop(uid, None)
        if not node.alive:
            return
        node.held.pop(uid, None)
        self._publish(node)
        shutil.rmtree(node.folder / "pods" / uid, ignore_errors=True)
        await self._finish(pod)

    async def _take_down(self, running: RunningPod) -> None:
        if running.nim is not None:
            await running.nim.stop()
        if running.containers is not None:
            await running.containers.stop()

    async def _finish(self, pod: HollowPod) -> None:
        """A pod that is being deleted goes once its containers have ended."""
        path = f"/api/v1/namespaces/{pod.metadata.namespace}/pods/{pod.metadata.name}"
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod.metadata.uid}}
        current = self._pods.get(pod.metadata.name, pod.metadata.namespace or "")
        if current is None or not current.metadata.deletion_timestamp:
            return
        with contextlib.suppress(ApiError, UnreachableError):
            await self._client.request("DELETE", path, body=body, repeatable=True)

    async def _patch_status(self, pod: HollowPod, status: Object) -> None:
        path = f"/api/v1/namespaces/{pod.metadata.namespace}/pods/{pod.metadata.name}/status"
        with contextlib.suppress(ApiError):
            body = {"metadata": {"uid": pod.metadata.uid}, "status": status}
            await self._client.request("PATCH", path, body=body, content_type=MERGE, repeatable=True)

    def _values(self, running: RunningPod) -> dict[str, str]:
        pod = running.pod
        values = {
            "metadata.name": pod.metadata.name,
            "metadata.namespace": pod.metadata.namespace or "",
            "metadata.uid": pod.metadata.uid or "",
            "spec.nodeName": running.node.name,
            "status.hostIP": running.node.address,
            "status.podIP": running.ip,
        }
        values |= {f"metadata.annotations['{key}']": value for key, value in pod.metadata.annotations.items()}
        return values

    def _publish(self, node: HollowNode) -> None:
        devices = []
        for uid, gpus in node.held.items():
            running = self._running.get(uid)
            if running is not None and gpus:
                meta = running.pod.metadata
                devices.append(PodDevices(meta.namespace or "", meta.name, gpus))
        node.publish(devices)


def _gpus_asked(pod: HollowPod) -> int:
    limits = [
        container.get("resources", {}).get("limits", {}) for container in pod.spec.get("containers", [])
    ]
    return sum(int(limit.get(names.GPU_RESOURCE, 0)) for limit in limits)


def addresses(running: RunningPod) -> Object:
    """What a status says of where a pod is."""
    return {"hostIP": running.node.address, "podIP": running.ip, "podIPs": [{"ip": running.ip}]}


def running_status(pod: HollowPod, init: list[Object], common: Object) -> Object:
    started = {"running": {"startedAt": _now()}}
    return {
        "phase": "Running",
        **common,
        "conditions": [
            _condition(kind, "True", "")
            for kind in (
                "PodReadyToStartContainers",
                "Initialized",
                "Ready",
                "ContainersReady",
                "PodScheduled",
            )
        ],
        "initContainerStatuses": init,
        "containerStatuses": [
            {
                "name": container["name"],
                "image": container.get("image", ""),
                "imageID": container.get("image", ""),
                "ready": True,
                "started": True,
                "restartCount": 0,
                "state": started,
            }
            for container in pod.spec.get("containers", [])
        ],
    }


def _condition(kind: str, status: str, reason: str) -> Object:
    condition = {"type": kind, "status": status, "lastTransitionTime": _now()}
    return condition | ({"reason": reason} if reason else {})


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _micro_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
