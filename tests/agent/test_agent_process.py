"""The agent's own process over the C library, a real PodResources socket and a real API server."""

import asyncio
import contextlib
import itertools
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tokenfactory.api.gpu_node import GPUNode, PodGrant
from tokenfactory.api.names import heartbeat_name
from tokenfactory.kube.client import Client
from tokenfactory.kube.objects import Lease
from tokenfactory.twin.agent_node import AgentNode, SheetDesk
from tokenfactory.twin.faultproxy import Answer, FaultProxy, writes

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
PRODUCT = "NVIDIA H100 80GB HBM3"
IDLE = f"idle@{PRODUCT}"
CHAT = f"inference/chat/llama@{PRODUCT}"
NAMESPACE = "tokenfactory-system"
DEFAULT = 700_000
SETTING = "nvmlDeviceSetPowerManagementLimit"
INSUFFICIENT_PERMISSIONS = 4
_numbers = itertools.count(1)


async def until(holds, seconds=120.0):
    async with asyncio.timeout(seconds):
        while True:
            answer = holds()
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer:
                return
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def crds(cluster):
    cluster.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds"))
    cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
    with contextlib.suppress(Exception):
        cluster.kubectl("create", "namespace", NAMESPACE)


class World:
    """One node, its own tree of two domains, and whoever writes the sheets."""

    def __init__(self, desk: SheetDesk, node: AgentNode, proxy: FaultProxy, kubeconfig: Path) -> None:
        self.desk, self.node, self.proxy, self.kubeconfig = desk, node, proxy, kubeconfig
        self.site, self.rack = desk.tree, f"{desk.tree}-rack"
        self.epoch = 1
        self.hold = 300_000

    async def begin(self, *pods: PodGrant, **start: str) -> None:
        await self.desk.grant(self.node.name, (self.site, self.rack), *pods)
        await self.sheets(600_000)
        await self.desk.renew()
        self.start()
        await self.obeying()

    def start(self, *arguments: str) -> None:
        quick = ("observe=0.5", "pods=0.5", "wear=1", "meter=1", "report=5", "reopen=0.2", "tick=1")
        self.node.start(self.kubeconfig, *(f"--pace={pace}" for pace in quick), *arguments)

    async def obeying(self) -> None:
        async def settled() -> bool:
            await self.desk.renew()
            return (await self.status()).mode == "Obeying" and (await self.status()).capped

        await until(settled)

    async def sheets(self, cap: int, fallback: int = 300_000) -> None:
        self.epoch += 1
        caps = {CHAT: (cap, min(cap, fallback)), IDLE: (250_000, 250_000)}
        for domain in (self.site, self.rack):
            await self.desk.publish(domain, self.epoch, caps, hold_milliseconds=self.hold)

    async def status(self):
        return (await self.desk.node(self.node.name)).status

    async def applied(self) -> int:
        return min((entry.epoch for entry in (await self.status()).applied), default=0)

    async def enforced(self, *want: int) -> None:
        await until(lambda: self.node.enforced_milliwatts() == list(want))

    async def renewed_until(self, milliwatts: int) -> None:
        async def so() -> bool:
            await self.desk.renew()
            return self.node.enforced_milliwatts() == [milliwatts] * 8

        await until(so)

    async def get(self, path: str) -> str:
        def fetch() -> str:
            url = f"http://127.0.0.1:{self.node.ports()['metrics']}{path}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()

        return await asyncio.to_thread(fetch)

    async def rounds(self, count: int) -> None:
        """The agent's loop has got round so many times."""

        async def so() -> bool:
            line = next(
                it
                for it in (await self.get("/metrics")).splitlines()
                if "agent_steps_total " in it and it[0] != "#"
            )
            return float(line.split()[1]) >= count

        await until(so)

    async def acknowledged(self) -> None:
        async def is_so() -> bool:
            return await self.applied() == self.epoch

        await until(is_so)


def grant(name="chat-0", gpus=8, **more) -> PodGrant:
    return PodGrant(namespace="inference", name=name, uid=f"uid-{name}", class_name=CHAT, gpus=gpus, **more)


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


async def test_after_a_reboot_limits_are_set_again_before_anything_may_start(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.node.kill()
    world.node.hardware.reboot()
    assert world.node.enforced_milliwatts() == [DEFAULT] * 8
    world.start()

    async def capped() -> bool:
        await world.desk.renew()
        status = await world.status()
        return status.capped and status.boot_id == world.node.hardware.boot_id

    await until(capped)
    await world.enforced(*[600_000] * 8)


async def test_a_driver_reloaded_under_the_agent_is_capped_again(world):
    await world.begin()
    world.node.hardware.unload_driver()

    async def degraded() -> bool:
        return (await world.status()).mode == "Degraded"

    await until(degraded)
    world.node.hardware.load_driver()
    await world.enforced(*[250_000] * 8)
    await world.obeying()


async def test_a_lost_gpu_a_reset_limit_and_an_xid_are_told(world):
    await world.begin()
    world.node.hardware.gpus[3].xid(79)
    world.node.hardware.gpus[5].lose()
    with world.node.hardware.change() as state:
        state.gpus[1].requested_mw = DEFAULT

    async def told() -> bool:
        gpus = (await world.status()).gpus
        return not gpus[3].healthy and not gpus[5].healthy and any("79" in fault for fault in gpus[3].faults)

    await until(told)
    await until(lambda: world.node.enforced_milliwatts()[1] == 250_000)


async def test_a_kubelet_that_restarts_changes_nothing(world):
    world.node.give("inference", "chat-0", 0, 1)
    await world.begin(grant(gpus=2))
    await world.enforced(*[600_000] * 2, *[250_000] * 6)
    await world.node.kubelet.stop()

    async def silent() -> bool:
        conditions = {it.type: it for it in (await world.status()).conditions}
        return conditions["PodsKnown"].reason == "KubeletSilent"

    await until(silent)
    assert world.node.enforced_milliwatts()[:2] == [600_000] * 2
    await world.node.kubelet.start()
    world.node.kubelet.end("inference", "chat-0")
    await world.enforced(*[250_000] * 8)


async def test_without_a_gpunode_it_waits_and_touches_nothing(world, cluster):
    world.start()
    await until(world.node.ports)
    await world.rounds(3)
    assert world.node.enforced_milliwatts() == [DEFAULT] * 8
    assert world.node.process.poll() is None
    assert world.node.name not in cluster.kubectl("get", GPUNode.PLURAL, "-o", "name").stdout


async def test_a_call_that_hangs_holds_up_its_own_gpu_and_nothing_else(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    await world.enforced(*[600_000] * 8)
    world.node.hardware.fail(SETTING, 2, hang=True)
    await world.sheets(300_000)
    await until(lambda: world.node.enforced_milliwatts().count(300_000) == 7)
    await world.sheets(350_000)
    await until(lambda: world.node.enforced_milliwatts().count(350_000) == 7)

    async def told() -> bool:
        status = await world.status()
        return not status.gpus[2].healthy and status.mode == "Degraded"

    await until(told)
    assert await world.applied() < world.epoch - 1
    assert await world.get("/healthz") == "ok\n"
    world.node.hardware.mend()
    await world.acknowledged()
    assert world.node.enforced_milliwatts() == [350_000] * 8


async def test_without_permission_nothing_is_acknowledged_and_nothing_may_start(world):
    world.node.give("inference", "chat-0", *range(8))
    world.node.hardware.fail(SETTING, error=INSUFFICIENT_PERMISSIONS)
    await world.desk.grant(world.node.name, (world.site, world.rack), grant())
    await world.sheets(600_000)
    await world.desk.renew()
    world.start()

    async def told() -> bool:
        await world.desk.renew()
        conditions = {it.type: it for it in (await world.status()).conditions}
        return "Capped" in conditions and conditions["Capped"].reason == "LimitDoesNotHold"

    await until(told)
    status = await world.status()
    assert not status.capped
    assert status.applied == ()
    assert status.gpus[0].enforced_milliwatts == DEFAULT
    assert "permission" in status.gpus[0].faults[0]
    world.node.hardware.mend()
    await world.renewed_until(600_000)
    await world.acknowledged()


async def test_a_bmc_that_lowers_a_limit_is_read_back_and_one_that_lifts_it_gets_the_sheet(world):
    world.node.give("inference", "chat-0", *range(8))
    await world.begin(grant())
    world.node.hardware.gpus[0].out_of_band_limit(450.0)

    async def reported(milliwatts: int) -> bool:
        return (await world.status()).gpus[0].enforced_milliwatts == milliwatts

    await until(lambda: reported(450_000))
    assert (await world.status()).capped
    await world.acknowledged()
    world.node.hardware.gpus[0].out_of_band_limit(None)
    await until(lambda: reported(600_000))


async def test_a_driver_that_is_not_there_at_the_start_is_waited_for(world):
    world.node.hardware.unload_driver()
    await world.desk.grant(world.node.name, (world.site, world.rack))
    await world.sheets(600_000)
    world.start()

    async def told() -> bool:
        conditions = {it.type: it for it in (await world.status()).conditions}
        return "Capped" in conditions and conditions["Capped"].reason == "NoDriver"

    await until(told)
    assert (await world.status()).mode == "Degraded"
    world.node.hardware.load_driver()
    await world.obeying()
    await world.enforced(*[250_000] * 8)


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


class Model:
    """A model server on loopback that says what a test wants."""

    def __init__(self, page) -> None:
        self.page = page
        self.asked = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_) -> None:
        self._server.close()

    async def _answer(self, reader, writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            body = self.page(self.asked)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            await writer.drain()
        writer.close()


def honest(asked: int) -> bytes:
    return (
        b'vllm:generation_tokens_total{m="a"} %d\nvllm:prompt_tokens_total{m="a"} %d\n'
        b'vllm:num_requests_running{m="a"} 3\n' % (asked * 500, asked * 2000)
    )


async def test_tokens_and_joules_of_two_pods_are_metered_while_one_of_them_lies(world):
    world.node.give("inference", "chat-0", 0, 1)
    world.node.give("inference", "chat-1", 2, 3)
    for gpu in world.node.hardware.gpus[:4]:
        gpu.set_demand(400.0)
    async with (
        Model(honest) as model,
        Model(lambda asked: b"vllm:generation_tokens_total NaN\n" * asked) as liar,
    ):
        await world.begin(
            grant(gpus=2, metrics=model.url), grant("chat-1", gpus=2, metrics=f"{liar.url}/v1/metrics")
        )

        async def metered() -> bool:
            meters = {it.pod: it for it in (await world.status()).meters}
            return "inference/chat-0" in meters and meters["inference/chat-0"].generated_tokens >= 1_000

        await until(metered)
        status = await world.status()
        meter = next(it for it in status.meters if it.pod == "inference/chat-0")
        assert meter.prompt_tokens == 4 * meter.generated_tokens
        assert meter.running == 3
        seconds = meter.generated_tokens / 500  # one reading a second
        assert 2 * 250_000 * seconds < meter.millijoules < 2 * 700_000 * (seconds + 5) * 2
        assert all(it.generated_tokens == 0 for it in status.meters if it.pod == "inference/chat-1")
        conditions = {it.type: it for it in status.conditions}
        assert "chat-1" in conditions["Metered"].message
        assert liar.asked > 0


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
