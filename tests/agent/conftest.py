"""A simulated node behind real pynvml. One node at a time per process: pynvml is one library per process."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import time

import pynvml
import pytest
from tests.agent.process import NAMESPACE, REPOSITORY, World

from tokenfactory.agent.nvml import Failure
from tokenfactory.agent.nvml_pynvml import PynvmlDriver
from tokenfactory.kube.client import Client
from tokenfactory.twin.agent_node import AgentNode, SheetDesk
from tokenfactory.twin.faultproxy import FaultProxy
from tokenfactory.twin.nvml import STATE_VARIABLE, SimulatedNode, build_library


@pytest.fixture(scope="session")
def nvml_library():
    path = build_library()
    ctypes.CDLL(str(path))  # pynvml's own dlopen by name then finds this one, wherever it runs
    return path


@pytest.fixture
def make_node(tmp_path, nvml_library, monkeypatch):
    """make_node(product, gpus): the node that pynvml sees in this test."""
    nodes = []

    def make(product="H100", gpus=8, **more):
        node = SimulatedNode.create(
            tmp_path / f"node{len(nodes)}", product, gpus, library=nvml_library, **more
        )
        monkeypatch.setenv(STATE_VARIABLE, str(node.state_file))
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.mend()
    until = time.monotonic() + 60
    while any(node.hanging for node in nodes):
        assert time.monotonic() < until, "a call still hangs after its fault was mended"
        time.sleep(0.002)
    with contextlib.suppress(pynvml.NVMLError):
        while True:  # a test that left NVML open must not pass its node on to the next one
            pynvml.nvmlShutdown()
    for node in nodes:
        node.close()


@pytest.fixture
async def open_driver(make_node):
    """await open_driver(node): the agent's NVML, open on that node; closed after the test, whatever happened."""
    opened = []

    async def open_(node, **options):
        driver = PynvmlDriver(boot_id_file=node.boot_id_file, **options)
        opened.append((node, driver))
        answer = await driver.open()
        assert not isinstance(answer, Failure), answer
        return driver

    yield open_
    for node, driver in opened:
        node.mend()
        await driver.close()


_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def crds(cluster):
    cluster.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
    with contextlib.suppress(Exception):
        cluster.kubectl("create", "namespace", NAMESPACE)


@pytest.fixture
async def world(cluster, crds, tmp_path, nvml_library):
    number = next(_numbers)
    async with (
        await Client.connect(cluster.kubeconfig) as client,
        FaultProxy(cluster.kubeconfig) as proxy,
    ):
        node = AgentNode(f"agent-node-{number}", tmp_path)
        await node.open()
        try:
            yield World(SheetDesk(client, f"tree-{number}"), node, proxy, proxy.kubeconfig(tmp_path))
        finally:
            await node.close()
            for plural, name in (("gpunodes", node.name),):
                cluster.kubectl("delete", plural, name, "--ignore-not-found")
            if node.log.exists():
                sys.stderr.write(node.log.read_text()[-4000:])
