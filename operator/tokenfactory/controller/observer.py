"""Observe: the caches of the fleet and the stores of what people wrote, as one snapshot for the planner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import Resource
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.owning import Taken
from tokenfactory.controller.shell import WATCHED
from tokenfactory.controller.snapshot import Leadership, Snapshot
from tokenfactory.controller.store import Store
from tokenfactory.controller.unsettled import Unsettled
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.kube.lease import Heartbeats
from tokenfactory.kube.listing import Listing
from tokenfactory.kube.objects import Lease, Namespace, Node, Pod
from tokenfactory.kube.resources import Key, collection_path
from tokenfactory.kube.times import boot_seconds
from tokenfactory.kube.volumes import PersistentVolume, PersistentVolumeClaim

log = logging.getLogger(__name__)
_GROUPS_SECONDS = 10.0


def is_report(change: Change[Any]) -> bool:
    """Does it tell measured figures alone? What charges, caps and pods are made from is as it was."""
    old, new = change.old, change.new
    if old is None or new is None or old.metadata.uid != new.metadata.uid:
        return False
    return bool(_meaning(old) == _meaning(new))


def _meaning(obj: Resource) -> Resource:
    meta = msgspec.structs.replace(obj.metadata, resource_version=None)
    if not isinstance(obj, GPUNode):
        return msgspec.structs.replace(obj, metadata=meta)
    status = msgspec.structs.replace(
        obj.status,
        meters=(),
        draw_milliwatts=0,
        peak_milliwatts=0,
        overhead_milliwatts=0,
        reported_at="",
    )
    return msgspec.structs.replace(obj, metadata=meta, status=status)


class Observer:
    """Holds what is seen. `ready` returns once every first list is complete."""

    def __init__(self, client: Client, namespace: str) -> None:
        self._client = client
        self._listeners: list[Callable[[], None]] = []
        self._report_listeners: list[Callable[[], None]] = []
        self.stores: dict[type[Resource], Store[Any]] = {kind: Store(kind) for kind in WATCHED}
        self.sheets = Cache(client, CapSheet)
        self.gpu_nodes = Cache(client, GPUNode)
        self.nodes = Cache(client, Node)
        self.pods = Cache(client, Pod)
        self.deployments = Cache(client, Deployment, label_selector=names.FACTORY_LABEL)
        self.services = Cache(client, Service, label_selector=names.FACTORY_LABEL)
        self.namespaces = Cache(client, Namespace)
        self.claims = Cache(client, PersistentVolumeClaim)
        self.volumes = Cache(client, PersistentVolume)
        self.leader_worker_sets: Cache[LeaderWorkerSet] | None = None
        self.leases = Cache(client, Lease, namespace=namespace)
        self.heartbeats = Heartbeats(self.leases)
        self._caches: tuple[Cache[Any], ...] = (
            self.sheets,
            self.gpu_nodes,
            self.nodes,
            self.pods,
            self.deployments,
            self.services,
            self.namespaces,
            self.claims,
            self.volumes,
        )
        self._listed = asyncio.Event()
        for cache in self._caches:
            cache.on_change(self._noticed)
        for store in self.stores.values():
            store.on_change(self._changed)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` for each change of anything here."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for listener in self._listeners:
            listener()

    def on_report(self, listener: Callable[[], None]) -> None:
        """Call `listener` for what is only measured anew: thousands of nodes each say so twice a minute."""
        self._report_listeners.append(listener)

    def _noticed(self, change: Change[Any]) -> None:
        if is_report(change):
            for listener in self._report_listeners:
                listener()
        else:
            self._changed()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for cache in (*self._caches, self.leases):
                tasks.create_task(cache.run())
            tasks.create_task(self._sweep())
            tasks.create_task(self._groups())

    async def _groups(self) -> None:
        """LeaderWorkerSets, from when their CRD is there: nothing else waits for them."""
        while True:
            try:
                # Everybody may ask what there is; only where there are any do we need the right to list them.
                await self._client.request("GET", collection_path(LeaderWorkerSet).rpartition("/")[0])
                await Listing(self._client, LeaderWorkerSet, collection_path(LeaderWorkerSet), {}, 500).read()
            except (ApiError, UnreachableError):
                await asyncio.sleep(_GROUPS_SECONDS)
                continue
            break
        cache = Cache(self._client, LeaderWorkerSet, label_selector=names.FACTORY_LABEL)
        cache.on_change(self._noticed)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(cache.run())
            await cache.synced()
            self.leader_worker_sets = cache
            self._changed()

    async def ready(self) -> None:
        """P1 needs all of it: nothing may be decided on half a view."""
        for cache in (*self._caches, self.leases):
            await cache.synced()
        await self._listed.wait()

    async def reached(self, written: Mapping[type[Resource], int], within_seconds: float = 2.0) -> bool:
        """True once the caches of charges show at least these versions; false if that takes too long."""
        try:
            async with asyncio.timeout(within_seconds):
                await self.sheets.reached(written.get(CapSheet, 0))
                await self.gpu_nodes.reached(written.get(GPUNode, 0))
        except TimeoutError:
            return False
        return True

    async def _sweep(self) -> None:
        """Complete lists of what people wrote: see `store`."""
        while True:
            for kind, store in self.stores.items():
                try:
                    page = await Listing(self._client, kind, collection_path(kind), {}, 500).read()
                except (ApiError, UnreachableError) as error:
                    log.warning("list failed", extra={"kind": kind.KIND, "error": str(error)})
                    continue
                store.replace_all(page.items, page.resource_version, page.undecodable, page.uids)
            complete = all(store.complete for store in self.stores.values())
            if complete:
                self._listed.set()
            await asyncio.sleep(60 if complete else 1)

    def snapshot(self, leadership: Leadership, unsettled: Unsettled, taken: Taken) -> Snapshot:
        silent: dict[str, float] = {}
        for lease in self.leases:
            name = lease.metadata.name
            if name.startswith(names.HEARTBEAT_PREFIX):
                seconds = self.heartbeats.silent_seconds((lease.metadata.namespace or "", name))
                if seconds is not None:
                    silent[name.removeprefix(names.HEARTBEAT_PREFIX)] = seconds
        sheets = self.sheets.snapshot()
        milliseconds = int(boot_seconds() * 1000)
        return Snapshot(
            leadership=leadership,
            wall=datetime.now(UTC),
            milliseconds=milliseconds,
            domains=self.stores[PowerDomain].snapshot(),
            factories=self.stores[TokenFactory].snapshot(),
            profiles=self.stores[PowerProfile].snapshot(),
            checkpoints=self.stores[Checkpoint].snapshot(),
            sheets=sheets.objects,
            sheets_version=sheets.resource_version,
            gpu_nodes=self.gpu_nodes.snapshot().objects,
            nodes=self.nodes.snapshot().objects,
            pods=self.pods.snapshot().objects,
            deployments=self.deployments.snapshot().objects,
            services=self.services.snapshot().objects,
            leader_worker_sets=self.leader_worker_sets.snapshot().objects
            if self.leader_worker_sets is not None
            else None,
            namespaces=self.namespaces.snapshot().objects,
            claims=self.claims.snapshot().objects,
            volumes=self.volumes.snapshot().objects,
            silent_seconds=silent,
            unsettled=unsettled.still(self.version_of),
            taken=taken.at(milliseconds),
            undecodable=self._undecodable(),
            uids={
                (store.kind.KIND, key): store.uids.get(key, "")
                for store in self.stores.values()
                for key in store.undecodable
            },
        )

    def version_of(self, slot: tuple[str, str]) -> int:
        kind, name = slot
        held = self.sheets.get(name) if kind == CapSheet.KIND else self.gpu_nodes.get(name)
        return int(held.metadata.resource_version or 0) if held is not None else 0

    def _undecodable(self) -> dict[tuple[str, Key], str]:
        found: dict[tuple[str, Key], str] = {}
        for store in self.stores.values():
            found |= {(store.kind.KIND, key): why for key, why in store.undecodable.items()}
        for cache in self._caches:
            found |= {(cache.kind.KIND, key): why for key, why in cache.undecodable.items()}
        return found
