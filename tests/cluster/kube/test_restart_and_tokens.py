"""The API server goes away and comes back; our token ends and is replaced. Neither needs a restart of ours."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.cluster.kube.conftest import ConfigMap, Follower, Maps, quick
from tests.waiting import until

from tokenfactory.kube.apply import Writer, Written
from tokenfactory.kube.cache import Cache
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import UnauthorizedError

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("kill", [False, True], ids=["asked to end", "killed"])
async def test_a_restarted_api_server(own_cluster, kill):
    async with (
        await Client.connect(own_cluster.kubeconfig, backoff=quick) as client,
        asyncio.TaskGroup() as tasks,
    ):
        maps = Maps(client, "default")
        for n in range(20):
            await maps.put(f"before-{n}", value="1")
        follower = Follower(
            Cache(client, ConfigMap, namespace="default", label_selector="test=kube", backoff=quick())
        )
        running = tasks.create_task(follower.cache.run())
        await asyncio.wait_for(follower.cache.synced(), 90)
        await asyncio.to_thread(own_cluster.stop_component, "kube-apiserver", kill=kill)
        during = tasks.create_task(
            Writer(client).apply(ConfigMap, ("default", "during"), {"data": {"a": "1"}})
        )
        await asyncio.to_thread(own_cluster.start_component, "kube-apiserver")
        assert isinstance(await asyncio.wait_for(during, 90), Written), "a write waits for the API server"
        await maps.delete("before-0")
        last = await maps.put("after", value="1")
        await asyncio.wait_for(follower.cache.reached(last.metadata.resource_version), 90)
        assert len(follower.copy) == await maps.count() == 20
        assert follower.cache.stats.faults >= 1
        running.cancel()


class Robot:
    """A service account whose token ends the moment the account is deleted: a real 401 without waiting an hour."""

    def __init__(self, cluster, namespace: str, file: Path) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.file = file
        self.name = ""

    def new_token(self, name: str) -> None:
        self.cluster.kubectl("-n", self.namespace, "create", "serviceaccount", name)
        self.cluster.kubectl(
            "-n", self.namespace, "create", "rolebinding", name, "--clusterrole=cluster-admin",
            f"--serviceaccount={self.namespace}:{name}",
        )  # fmt: skip
        self.name = name
        self._token = self.cluster.kubectl("-n", self.namespace, "create", "token", name).stdout

    def write_token(self) -> None:
        self.file.write_text(self._token)

    def end_token(self) -> None:
        self.cluster.kubectl("-n", self.namespace, "delete", "serviceaccount", self.name)


@pytest.fixture
def robot(cluster, namespace, tmp_path) -> Robot:
    robot = Robot(cluster, namespace, tmp_path / "token")
    robot.new_token("first")
    robot.write_token()
    return robot


@pytest.fixture
async def as_robot(robot, proxy, tmp_path):
    kubeconfig = proxy.kubeconfig(tmp_path, token_file=robot.file)
    async with await Client.connect(kubeconfig, backoff=quick) as client:
        yield client


async def refused(client, namespace) -> bool:
    try:
        await client.get(ConfigMap, (namespace, "kube-root-ca.crt"))
    except UnauthorizedError:
        return True
    return False


async def until_refused(client, namespace) -> None:
    """The API server remembers good tokens for a few seconds."""
    await until(lambda: refused(client, namespace), seconds=40)


async def test_a_cache_recovers_once_the_token_is_replaced(robot, as_robot, follow, maps, proxy, namespace):
    follower = follow(through=as_robot)
    await asyncio.wait_for(follower.cache.synced(), 90)
    robot.end_token()
    await until_refused(as_robot, namespace)
    proxy.drop_connections()
    await maps.put("meanwhile", value="1")
    await until(lambda: isinstance(follower.cache.last_fault, UnauthorizedError))
    robot.new_token("second")
    robot.write_token()
    await until(lambda: follower.data("meanwhile") == {"value": "1"})
    assert follower.cache.stats.lists == 1, "a watch goes on where it was"


async def test_a_write_with_an_expired_token_is_done_with_the_new_one(robot, as_robot, namespace, proxy):
    writer = Writer(as_robot)
    assert isinstance(await writer.create(ConfigMap, (namespace, "one"), {}), Written)
    robot.end_token()
    await until_refused(as_robot, namespace)
    robot.new_token("second")
    robot.write_token()
    asked = len(proxy.requests)
    assert isinstance(await writer.create(ConfigMap, (namespace, "two"), {}), Written)
    assert [seen.method for seen in proxy.requests[asked:]] == ["POST", "POST"]


async def test_without_a_new_token_the_error_is_told(robot, as_robot, namespace, proxy):
    robot.end_token()
    await until_refused(as_robot, namespace)
    asked = len(proxy.requests)
    with pytest.raises(UnauthorizedError):
        await as_robot.get(ConfigMap, (namespace, "x"))
    assert len(proxy.requests) == asked + 2, "once more with credentials read anew, and no further"
