"""A follower that checks every promise of the cache while faults happen, and a proxy that makes them happen."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from typing import ClassVar

import msgspec
import pytest

from tokenfactory.api.meta import Resource
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.cache import Cache, Change
from tokenfactory.kube.client import Client
from tokenfactory.kube.resources import Key, body_of, collection_path, object_path
from tokenfactory.twin.faultproxy import FaultProxy


class ConfigMap(Resource, frozen=True, kw_only=True):
    KIND: ClassVar[str] = "ConfigMap"
    PLURAL: ClassVar[str] = "configmaps"
    SHORT: ClassVar[str] = "cm"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "v1"
    data: dict[str, str] = {}


def quick() -> Backoff:
    return Backoff(0.01, 0.1)


class Follower:
    """A cache whose handler keeps its own copy: only if nothing is lost or told twice do the two stay equal."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.copy: dict[Key, Resource] = {}
        self.versions: list[int] = []
        cache.on_change(self.note)

    def note(self, change: Change) -> None:
        assert self.copy.get(change.key) == change.old, "a change was lost"
        assert change.old != change.new, "a change was told twice"
        assert self.cache.get(change.key[1], change.key[0]) == change.new, "the handler sees another state"
        if change.new is None:
            del self.copy[change.key]
        else:
            self.copy[change.key] = change.new
            self.versions.append(int(change.new.metadata.resource_version))

    def data(self, name: str) -> dict[str, str] | None:
        held = next((obj for (_, held_name), obj in self.copy.items() if held_name == name), None)
        return None if held is None else held.data


class Maps:
    """ConfigMaps written past the proxy: the truth that caches must come to."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace

    async def put(self, name: str, **data: str) -> ConfigMap:
        body = body_of(ConfigMap, (self.namespace, name), {"data": data}, {"labels": {"test": "kube"}})
        query = {"fieldManager": "test", "force": "true"}
        path = object_path(ConfigMap, (self.namespace, name))
        await self.client.request(
            "PATCH", path, query=query, body=body, content_type="application/apply-patch+yaml"
        )
        return await self.client.get(ConfigMap, (self.namespace, name))

    async def delete(self, name: str) -> None:
        await self.client.request("DELETE", object_path(ConfigMap, (self.namespace, name)))

    async def versions(self) -> dict[str, str]:
        """What there is now, and at which version."""
        path = collection_path(ConfigMap, self.namespace)
        body = await self.client.request("GET", path, query={"labelSelector": "test=kube"})
        metas = [item["metadata"] for item in msgspec.json.decode(body)["items"]]
        return {meta["name"]: meta["resourceVersion"] for meta in metas}

    async def count(self) -> int:
        return len(await self.versions())


@pytest.fixture
def namespace(cluster) -> Iterator[str]:
    """One per test: each begins with nothing there."""
    name = f"kube-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture
async def direct(cluster) -> AsyncIterator[Client]:
    async with await Client.connect(cluster.kubeconfig) as client:
        yield client


@pytest.fixture
async def proxy(cluster) -> AsyncIterator[FaultProxy]:
    async with FaultProxy(cluster.kubeconfig) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy, tmp_path) -> AsyncIterator[Client]:
    async with await Client.connect(proxy.kubeconfig(tmp_path), backoff=quick) as client:
        yield client


@pytest.fixture
def maps(direct, namespace) -> Maps:
    return Maps(direct, namespace)


@pytest.fixture
def config_maps(client, namespace) -> Callable[..., Cache]:
    def make(through: Client = client, **options: object) -> Cache:
        chosen = {"backoff": quick(), "label_selector": "test=kube", "namespace": namespace} | options
        return Cache(through, ConfigMap, **chosen)

    return make


@pytest.fixture
async def follow(config_maps) -> AsyncIterator[Callable[..., Follower]]:
    """Start a cache of the namespace's ConfigMaps through the proxy."""
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        running: list[asyncio.Task[None]] = []

        def start(**options: object) -> Follower:
            follower = Follower(config_maps(**options))
            running.append(tasks.create_task(follower.cache.run()))
            return follower

        yield start
        for task in running:
            task.cancel()
