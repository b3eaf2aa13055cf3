"""A real node for the whole run, its GPUs, and the agent on it."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import yaml
from tests.lacking import lacking
from tests.node import machine, nvidia_runtime
from tests.node.device_plugin import DevicePlugin
from tests.node.image import REPOSITORY, Images
from tests.node.real_node import RealNode
from tests.node.world import NAMESPACE, World, nobody
from tests.waiting import wait_for

from tokenfactory.kube.client import Client
from tokenfactory.twin import workshop
from tokenfactory.twin.agent_node import SheetDesk
from tokenfactory.twin.nvml import SimulatedNode

GPUS = 4
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> machine.Runtime:
    """What a node is made of; here every test that needs one is skipped where there can be none.

    What could be installed is another matter: see tests/lacking.py.
    """
    paths = (REPOSITORY, sys.prefix, sys.base_prefix, tempfile.gettempdir(), workshop.cache_folder())
    if problem := machine.why_not(tmp_path_factory.mktemp("trial"), *(Path(it).resolve() for it in paths)):
        pytest.skip(problem)
    if problem := machine.lacks():
        lacking(problem)
    try:
        return machine.runtime()
    except workshop.ToolError as error:
        lacking(f"no containerd for a real node: {error}")


@pytest.fixture(scope="session")
def real_node(runtime: machine.Runtime, request: pytest.FixtureRequest) -> Iterator[RealNode]:
    with RealNode.open(runtime, Images()) as node:
        cluster = node.cluster
        cluster.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds"))
        cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
        for namespace in ("inference", NAMESPACE):
            cluster.kubectl("create", "namespace", namespace)
        yield node
        if request.session.testsfailed:
            sys.stderr.write(node.logs())


@pytest.fixture(scope="session")
def hardware(real_node: RealNode) -> Iterator[SimulatedNode]:
    simulated = SimulatedNode.create(real_node.folder / "gpus", "H100", GPUS)
    yield simulated
    simulated.close()


@pytest.fixture(scope="session")
def plugin(real_node: RealNode, hardware: SimulatedNode) -> Iterator[DevicePlugin]:
    """The GPUs are offered: pods can ask for them."""
    serving = DevicePlugin(real_node.kubelet_folder / "device-plugins", hardware)
    nvidia_runtime.install(real_node.nvidia_runtime, hardware)
    real_node.cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump(nvidia_runtime.RUNTIME_CLASS))
    serving.start()
    wait_for(lambda: real_node.gpus_offered() == GPUS, f"{GPUS} GPUs to be offered")
    yield serving
    serving.stop()


@pytest.fixture
async def world(real_node: RealNode, hardware: SimulatedNode, plugin: DevicePlugin) -> AsyncIterator[World]:
    """GPUs as after a reboot, sheets of this test's own, no pod and no agent yet."""
    # A pod of an earlier test would be a stranger, and a stranger's GPUs are left as they are.
    await nobody(real_node)
    hardware.reboot()
    async with await Client.connect(real_node.cluster.kubeconfig) as client:
        one = World(real_node, hardware, SheetDesk(client, f"site-{next(_numbers)}"))
        try:
            async with one.renewing():
                yield one
        finally:
            hardware.mend()
            await one.close()
