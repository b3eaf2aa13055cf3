"""The real parts around an agent: a watch of its node, its status writer, the kubelet's socket. Its sheets: `following`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from tokenfactory.agent.kubelet_memory import KubeletMemory
from tokenfactory.agent.nvml import Gpu
from tokenfactory.agent.parts import PodDevices, PodResourcesError
from tokenfactory.api.gpu_node import GPUNode, GPUNodeStatus
from tokenfactory.kube.apply import Refused, Writer
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, UnreachableError

log = logging.getLogger(__name__)

WRITE_SECONDS = 10.0


class LiveNode:
    """The agent's own GPUNode, through a watch of nothing else."""

    def __init__(self, client: Client, name: str) -> None:
        self.cache = Cache(client, GPUNode, field_selector=f"metadata.name={name}")
        self._name = name

    def node(self) -> GPUNode | None:
        return self.cache.get(self._name) if self.cache.is_synced else None

    def subscribe(self, changed: Callable[[], None]) -> None:
        def told(change: Change[GPUNode]) -> None:
            old, new = change.old, change.new
            # Our own status coming back tells us nothing.
            if old is None or new is None or new.spec != old.spec or new.metadata.uid != old.metadata.uid:
                changed()

        self.cache.on_change(told)


class LiveWriter:
    """Writes the status of the own GPUNode."""

    def __init__(self, client: Client) -> None:
        self._writer = Writer(client)
        self._failing = False

    async def write(self, held: GPUNode, status: GPUNodeStatus) -> bool:
        problem = ""
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                # P4: a status of an earlier boot that lingers on its way must not land over this one's.
                answer = await self._writer.status(held, status, exact=True, urgent=True)
            problem = answer.message if isinstance(answer, Refused) else ""
        except (ApiError, UnreachableError, TimeoutError) as error:
            problem = str(error) or "no answer in time"
        if problem and not self._failing:
            log.warning("the status could not be written", extra={"error": problem})
        self._failing = bool(problem)
        return not problem


class LivePods:
    """The kubelet's PodResources socket."""

    def __init__(self, socket: str, settle_seconds: float) -> None:
        from tokenfactory.agent.pods import PodResources

        self._client = PodResources(socket)
        self._memory = KubeletMemory(Path(socket), settle_seconds=settle_seconds)
        self._told: dict[tuple[str, str], list[str]] = {}

    async def list(self, gpus: tuple[Gpu, ...]) -> tuple[PodDevices, ...]:
        from tokenfactory.agent.pods import Unavailable

        answer = await self._client.holdings(gpus)
        if isinstance(answer, Unavailable):
            raise PodResourcesError(answer.text)
        held: dict[tuple[str, str], list[str]] = {}
        unknown: dict[tuple[str, str], list[str]] = {}
        for gpu, pods in answer.by_gpu.items():
            for pod in pods:
                held.setdefault((pod.namespace, pod.name), []).append(gpu)
        for it in answer.unresolved:
            held.setdefault((it.pod.namespace, it.pod.name), [])
            unknown.setdefault((it.pod.namespace, it.pod.name), []).append(f"{it.resource} {it.device}")
        if unknown and unknown != self._told:
            log.warning(
                "pods hold GPUs that NVML does not show",
                extra={"devices": [f"{'/'.join(pod)}: {text}" for pod, text in unknown.items()]},
            )
        self._told = unknown
        return self._memory.complete(
            tuple(PodDevices(*pod, tuple(uuids), tuple(unknown.get(pod, ()))) for pod, uuids in held.items())
        )

    async def close(self) -> None:
        await self._client.close()
