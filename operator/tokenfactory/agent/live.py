"""The real parts around an agent: caches of the API server, its status writer, the kubelet's socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from tokenfactory.agent.kubelet_memory import KubeletMemory
from tokenfactory.agent.nvml import Gpu
from tokenfactory.agent.parts import PodDevices, PodResourcesError
from tokenfactory.agent.sources import SheetBook
from tokenfactory.api.cap_sheet import TREE_LABEL, CapSheet
from tokenfactory.api.gpu_node import GPUNode, GPUNodeStatus
from tokenfactory.kube.apply import Refused, Writer
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.planning.power.governor import Sheet

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


class LiveSheets:
    """The sheets of whatever trees the node is in: one ordered watch for each, with its renewal in it."""

    def __init__(self, client: Client, tasks: asyncio.TaskGroup) -> None:
        self._client = client
        self._tasks = tasks
        self._book = SheetBook()
        self._watches: dict[str, tuple[Cache[CapSheet], asyncio.Task[None]]] = {}
        self._changed: Callable[[], None] = lambda: None

    @property
    def sheets(self) -> Mapping[str, Sheet]:
        """A sheet that was written anew and cannot be read counts as absent: it may have been a cut."""
        unread = {name for cache, _ in self._watches.values() for _, name in cache.undecodable}
        if not unread:
            return self._book.sheets
        return {domain: sheet for domain, sheet in self._book.sheets.items() if domain not in unread}

    @property
    def renewals(self) -> Mapping[str, int]:
        return self._book.renewals

    def subscribe(self, changed: Callable[[], None]) -> None:
        self._changed = changed

    def follow(self, trees: frozenset[str]) -> None:
        for tree in self._watches.keys() - trees:
            cache, task = self._watches.pop(tree)
            task.cancel()
            self._book.forget(tree, (sheet for sheet in cache))
        for tree in trees - self._watches.keys():
            cache = Cache(self._client, CapSheet, label_selector=f"{TREE_LABEL}={tree}")
            cache.on_change(self._take)
            self._watches[tree] = cache, self._tasks.create_task(self._watch(tree, cache))

    async def _watch(self, tree: str, cache: Cache[CapSheet]) -> None:
        announce = self._tasks.create_task(self._announce(cache))
        try:
            log.info("following the sheets of a tree", extra={"tree": tree})
            await cache.run()
        finally:
            announce.cancel()

    async def _announce(self, cache: Cache[CapSheet]) -> None:
        await cache.synced()  # also a tree without any sheet is news: it allows nothing
        self._changed()

    def ready(self, trees: frozenset[str]) -> bool:
        return all(tree in self._watches and self._watches[tree][0].is_synced for tree in trees)

    def _take(self, change: Change[CapSheet]) -> None:
        self._book.take(change.old, change.new)
        self._changed()


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
