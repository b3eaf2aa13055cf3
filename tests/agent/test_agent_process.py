"""The agent's own process over the C library, a real PodResources socket and a real API server."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest
from tests.agent.process import CHAT, DEFAULT, IDLE, NAMESPACE, REPOSITORY, SETTING, grant
from tests.waiting import until

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.names import heartbeat_name
from tokenfactory.kube.client import Client
from tokenfactory.kube.objects import Lease
from tokenfactory.twin.agent_node import AgentNode, SheetDesk
from tokenfactory.twin.faultproxy import Answer, writes

pytestmark = pytest.mark.cluster


async def test_a_pods_gpus_are_found_capped_read_back_reported_and_may_start(world):
    world.node.give("inference", "chat-0", 0, 1, 2, 3)
    await world.begin(grant(gpus=4))
    await world.enforced(*[600_000] * 4, *[250_000] * 4)
    await world.acknowledged()
    status = await world.status()
    assert [gpu.pod for gpu in status.gpus] == ["inference/chat-0"] * 4 + [""] * 4
    assert status.boot_id == world.node.hardware.boot_id
    assert status.gpu_count == 8
    waiting = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tokenfactory.cli", "wait-cap", f"--port={world.node.ports()['gate']}"],
        env={"NODE_IP": "127.0.0.1", "POD_UID": "uid-chat-0", "PYTHONPATH": "operator", "PATH": "/usr/bin"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert waiting.returncode == 0, waiting.stderr
    assert "may start" in waiting.stdout


async def test_the_heartbeat_beats_and_probes_and_metrics_answer(world):
    await world.begin()

    async def beaten() -> bool:
        with contextlib.suppress(Exception):
            lease = await world.desk.client.get(Lease, (NAMESPACE, heartbeat_name(world.node.name)))
            return bool(lease.spec.renew_time)
        return False

    await until(beaten)
    assert await world.get("/healthz") == "ok\n"
    assert await world.get("/readyz") == "Obeying\n"
    text = await world.get("/metrics")
    assert 'tokenfactory_agent_mode{mode="Obeying"} 1.0' in text
    assert f'tokenfactory_agent_applied_epoch{{domain="{world.site}"}} {world.epoch}.0' in text
    assert text.count("tokenfactory_gpu_enforced_power_limit_watts{") == 8


async def test_an_api_server_that_is_gone_longer_than_hold_brings_the_fallback_and_back_the_caps(world):
    world.hold = 3_000
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.desk.renew()
    await world.enforced(*[600_000] * 8)
    world.proxy.partition()
    assert world.node.enforced_milliwatts() == [600_000] * 8
    await world.enforced(*[300_000] * 8)
    world.proxy.heal()
    await world.renewed_until(600_000)


async def test_killed_and_restarted_without_an_api_server_it_never_raises(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.sheets(400_000)
    await world.acknowledged()
    await world.node.kill()
    assert world.node.enforced_milliwatts() == [400_000] * 8
    world.proxy.partition()
    world.start()
    await until(world.node.ports)
    writes = [gpu.limit_writes for gpu in world.node.hardware.gpus]
    await world.rounds(5)
    assert max(world.node.enforced_milliwatts()) <= 400_000
    assert [gpu.limit_writes for gpu in world.node.hardware.gpus] == writes
    world.proxy.heal()
    await world.sheets(500_000)
    await world.renewed_until(500_000)
    await world.acknowledged()


def freeze(world, step: str) -> int:
    """Holds the agent up in one step of a cut; returns how many GPUs have the new limit then."""
    fail = world.node.hardware.fail
    if step == "nothing is set yet":
        for gpu in range(8):
            fail(SETTING, gpu, hang=True)
        return 0
    if step == "half of them are set":
        for gpu in range(4, 8):
            fail(SETTING, gpu, hang=True)
        return 4
    if step == "set, but not read back":
        fail("nvmlDeviceGetEnforcedPowerLimit", hang=True)
    if step == "read back, but not reported":
        world.proxy.inject(Answer(writes, times=10_000, code=503))
    return 8


STEPS = (
    "nothing is set yet",
    "half of them are set",
    "set, but not read back",
    "read back, but not reported",
)


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_every_step_of_a_cut_the_next_process_ends_in_the_same_place(world, step):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.enforced(*[600_000] * 8)
    done = freeze(world, step)
    await world.sheets(300_000)
    await until(lambda: world.node.enforced_milliwatts().count(300_000) == done)
    if done == 0:
        await until(lambda: world.node.hardware.hanging == 8)
    await world.node.kill()
    assert await world.applied() < world.epoch
    assert max(world.node.enforced_milliwatts()) <= 600_000
    world.node.hardware.mend()
    world.proxy.heal()
    world.start()
    await world.obeying()
    await world.acknowledged()
    assert world.node.enforced_milliwatts() == [300_000] * 8


async def test_told_to_end_it_ends_in_order_and_leaves_the_caps(world):
    await world.begin()
    assert await world.node.kill(signal.SIGTERM) == 0
    assert world.node.enforced_milliwatts() == [250_000] * 8
    assert "caps stay as they are" in world.node.log.read_text()


async def test_without_a_gpunode_it_waits_and_touches_nothing(world, cluster):
    world.start()
    await until(world.node.ports)
    await world.rounds(3)
    assert world.node.enforced_milliwatts() == [DEFAULT] * 8
    assert world.node.process.poll() is None
    assert world.node.name not in cluster.kubectl("get", GPUNode.PLURAL, "-o", "name").stdout


async def test_a_node_that_moves_to_another_tree_obeys_it_once_it_was_heard(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.enforced(*[600_000] * 8)
    other = SheetDesk(world.desk.client, f"{world.site}-other")
    await other.publish(other.tree, 1, {CHAT: (400_000, 300_000), IDLE: (250_000, 250_000)})
    await other.renew()
    await other.grant(world.node.name, (other.tree,), grant())
    await world.enforced(*[400_000] * 8)

    async def moved() -> bool:
        return [(it.domain, it.epoch) for it in (await world.status()).applied] == [(other.tree, 1)]

    await until(moved)


async def test_killed_again_and_again_while_sheets_change_the_last_sheet_holds(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    for cap in (500_000, 350_000, 450_000, 300_000):
        await world.sheets(cap)
        await world.node.kill()
        world.start()
        await until(world.node.ports)
        assert max(world.node.enforced_milliwatts()) <= 600_000
    await world.renewed_until(300_000)
    await world.acknowledged()


async def test_under_the_charts_own_rights_it_can_do_all_that_it_does(own_cluster, tmp_path, nvml_library):
    from tests.chart.helm import Helm

    from tokenfactory.twin.toolchain import ensure_helm

    own_cluster.kubectl("create", "namespace", NAMESPACE)
    own_cluster.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds"))
    own_cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
    chart = Helm(await asyncio.to_thread(ensure_helm)).template("agent.enabled=true")
    wanted = [
        text
        for text in chart.split("\n---\n")
        if "kind: DaemonSet" not in text and "kind: Deployment" not in text
    ]
    own_cluster.kubectl("apply", "--server-side", "-f", "-", input="\n---\n".join(wanted))
    node = AgentNode("agent-rights", tmp_path)
    await node.open()
    try:
        async with await Client.connect(own_cluster.kubeconfig) as client:
            desk = SheetDesk(client, "rights")
            await desk.grant(node.name, ("rights",), grant())
            await desk.publish("rights", 1, {IDLE: (250_000, 250_000)})
            account = own_cluster.kubeconfig_for_service_account(
                NAMESPACE, "tokenfactory-agent", node_name=node.name
            )
            node.start(account)

            async def obeying() -> bool:
                await desk.renew()
                status = (await desk.node(node.name)).status
                return status.mode == "Obeying" and status.capped

            await until(obeying)
            assert node.enforced_milliwatts() == [250_000] * 8

            async def beaten() -> bool:
                with contextlib.suppress(Exception):
                    return bool(await client.get(Lease, (NAMESPACE, heartbeat_name(node.name))))
                return False

            await until(beaten)
            assert "Forbidden" not in node.log.read_text()
    finally:
        await node.close()


async def test_a_second_agent_on_the_node_ends_before_it_touches_a_gpu(world):
    """Two that set limits would each undo the other's: the start gate's port is the node's lock."""
    await world.begin()
    opened = world.node.hardware.calls("nvmlInitWithFlags")
    writes = [gpu.limit_writes for gpu in world.node.hardware.gpus]
    assert opened == 1
    second = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tokenfactory.cli", "agent"),
        f"--node={world.node.name}",
        f"--kubeconfig={world.kubeconfig}",
        f"--pod-resources={world.node.kubelet.socket}",
        f"--boot-id-file={world.node.hardware.boot_id_file}",
        *("--address=127.0.0.1", f"--start-gate-port={world.node.ports()['gate']}", "--metrics-port=-1"),
        env={**os.environ, **world.node.hardware.environment, "PYTHONPATH": str(REPOSITORY / "operator")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    told, _ = await asyncio.wait_for(second.communicate(), 60)
    assert second.returncode != 0
    assert b"address already in use" in told.lower()
    assert world.node.hardware.calls("nvmlInitWithFlags") == opened
    assert [gpu.limit_writes for gpu in world.node.hardware.gpus] == writes
    assert await world.get("/healthz") == "ok\n"
