"""A node's agent: from a sheet written to limits read back, and what it costs meanwhile, on a real API server.

The agent is the process that ships, over the simulated NVML library with 15 ms for each call that sets a limit (real
ones take 10 to 20 ms). Beside it, on a node of its own and under the same sheets, a loop that asks every 15 seconds,
as other power agents do. `own` is what the agent adds between a bare watcher's sight of the sheet and the limits,
without NVML's own time.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil

from _report import Report, quick
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode, PodGrant
from tokenfactory.kube.cache import Cache
from tokenfactory.kube.client import Client
from tokenfactory.twin.agent_node import AgentNode, SheetDesk
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.components import ClusterOptions
from tokenfactory.twin.nvml import SimulatedNode

SEED = 20261121
CUTS = 50 if quick() else 600
POLL_SECONDS = 15.0
STEADY_SECONDS = POLL_SECONDS if quick() else 120.0
assert STEADY_SECONDS >= POLL_SECONDS, "the loop that polls comes round once more meanwhile"
CALL_SECONDS = 0.015
PRODUCT = "NVIDIA H100 80GB HBM3"
CHAT, IDLE = f"bench/chat/llama@{PRODUCT}", f"idle@{PRODUCT}"
GPUS = 8
REPOSITORY = Path(__file__).resolve().parents[1]


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def slow_setting(node: SimulatedNode) -> None:
    for function in ("nvmlDeviceSetPowerManagementLimit", "nvmlDeviceSetPowerManagementLimit_v2"):
        node.fail(function, delay_seconds=CALL_SECONDS)


# --- the loop that polls, in a process of its own


async def poll(kubeconfig: str, sheet: str) -> None:
    """GET the sheet, set and read back every GPU, sleep. Nothing else."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    async with await Client.connect(Path(kubeconfig)) as client:
        while True:
            spec = (await client.get(CapSheet, ("", sheet))).spec
            cap = next(entry.cap for entry in spec.caps if entry.class_name == CHAT)
            for handle in handles:
                pynvml.nvmlDeviceSetPowerManagementLimit(handle, cap)
                assert pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) <= cap
            await asyncio.sleep(POLL_SECONDS)


# --- the measurement


class Watcher:
    """When a bare watcher saw each epoch, and when the acknowledgement came."""

    def __init__(self, client: Client, node: str) -> None:
        self.sheets = Cache(client, CapSheet)
        self.nodes = Cache(client, GPUNode, field_selector=f"metadata.name={node}")
        self.seen: dict[int, float] = {}
        self.acknowledged: dict[int, float] = {}
        self.sheets.on_change(lambda change: self._saw(change.new))
        self.nodes.on_change(lambda change: self._acked(change.new))

    def _saw(self, sheet: CapSheet | None) -> None:
        if sheet is not None and sheet.spec.renewal is None:
            self.seen.setdefault(sheet.spec.epoch, time.perf_counter())

    def _acked(self, node: GPUNode | None) -> None:
        for entry in node.status.applied if node is not None else ():
            self.acknowledged.setdefault(entry.epoch, time.perf_counter())


def watch_hardware(nodes: dict[str, SimulatedNode], out: Path) -> None:
    """In a process of its own: when did the enforced limits of each node last change, all GPUs together."""
    last: dict[str, int] = {}
    with out.open("w", buffering=1) as log:
        while True:
            for name, node in nodes.items():
                limits = {round(gpu.enforced_watts * 1000) for gpu in node.gpus}
                now = time.perf_counter()
                if len(limits) == 1 and (limit := limits.pop()) != last.get(name):
                    last[name] = limit
                    log.write(f"{name} {limit} {now}\n")
            time.sleep(0.001)


async def until(holds: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        await asyncio.sleep(0.02)


async def model_server() -> asyncio.Server:
    """A model server's metrics page of the usual size."""
    began = time.monotonic()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        tokens = int((time.monotonic() - began) * 3000)
        page = f'vllm:generation_tokens_total{{model_name="m"}} {tokens}\n'
        page += "".join(f'vllm:other_seconds_bucket{{le="{n}",model_name="m"}} {n}\n' for n in range(600))
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode())
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def measure(folder: Path, cluster: Cluster, report: Report) -> None:
    draw = random.Random(SEED)
    node = AgentNode("bench", folder / "node", gpus=GPUS)
    polled = SimulatedNode.create(folder / "polled", gpus=GPUS)
    for hardware in (node.hardware, polled):
        slow_setting(hardware)
    await node.open()
    server = await model_server()
    node.give("bench", "chat-0", *range(GPUS))
    children: list[subprocess.Popen[bytes]] = []
    async with await Client.connect(cluster.kubeconfig) as client:
        desk = SheetDesk(client, "site")
        watcher = Watcher(client, "bench")
        following = [asyncio.create_task(cache.run()) for cache in (watcher.sheets, watcher.nodes)]
        try:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            pod = PodGrant(
                namespace="bench", name="chat-0", uid="u0", class_name=CHAT, gpus=GPUS, metrics=url
            )
            await desk.grant("bench", ("site",), pod)
            await desk.publish("site", 1, {CHAT: (700_000, 300_000), IDLE: (200_000, 200_000)})
            await desk.renew()
            node.start(cluster.kubeconfig, "--log-level=WARNING")
            await until(lambda: 1 in watcher.acknowledged)
            log = folder / "limits"
            spies = {"agent": str(node.hardware.folder), "poll": str(polled.folder)}
            children.append(_child("spy", json.dumps(spies), str(log)))
            children.append(_child("poll", str(cluster.kubeconfig), "site", environment=polled.environment))
            await until(lambda: log.exists() and {"agent", "poll"} <= set(log.read_text().split()))
            await desk.renew()
            assert node.process is not None
            process = psutil.Process(node.process.pid)
            used = cpu_seconds(process)
            written = await cuts(desk, watcher, draw)
            report.add("own_cpu_seconds_per_cut", (cpu_seconds(process) - used) / CUTS, "s", "<= 0.05")
            await steady(report, desk, process, node.ports()["metrics"])
            told(report, written, watcher, log)
        finally:
            for child in children:
                child.kill()
                child.wait()
            for task in following:
                task.cancel()
            server.close()
            await node.close()
            polled.close()


def _child(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, *arguments], env={**os.environ, **(environment or {})})


async def cuts(desk: SheetDesk, watcher: Watcher, draw: random.Random) -> dict[int, tuple[int, float]]:
    """Epoch → (cap, when its write began). Each waits for the one before to be acknowledged."""
    written: dict[int, tuple[int, float]] = {}
    for epoch in range(2, CUTS + 2):
        cap = 200_000 + 1_000 * draw.randrange(500)
        if epoch > 2 and cap == written[epoch - 1][0]:
            cap += 1_000
        written[epoch] = cap, time.perf_counter()
        await desk.publish("site", epoch, {CHAT: (cap, 200_000), IDLE: (200_000, 200_000)})
        await until(lambda: epoch in watcher.acknowledged)  # noqa: B023
        await asyncio.sleep(draw.uniform(0.02, 0.1))
        if epoch % 50 == 0:
            await desk.renew()
    return written


def told(report: Report, written: dict[int, tuple[int, float]], watcher: Watcher, log: Path) -> None:
    changes: dict[str, list[tuple[int, float]]] = {"agent": [], "poll": []}
    for line in log.read_text().splitlines():
        name, limit, at = line.split()
        changes[name].append((int(limit), float(at)))
    enforced, own, acked = [], [], []
    for epoch, (cap, began) in written.items():
        at = next((when for limit, when in changes["agent"] if limit == cap and when > began), None)
        if at is None:
            raise RuntimeError(f"epoch {epoch} ({cap} mW) was never seen in force")
        enforced.append(at - began)
        own.append(at - watcher.seen[epoch] - CALL_SECONDS)
        acked.append(watcher.acknowledged[epoch] - began)
    polled = sorted((when, newest(written, limit, when)) for limit, when in changes["poll"])
    waits = [
        when - began
        for epoch, (_, began) in written.items()
        if (when := next((at for at, seen in polled if seen >= epoch), None)) is not None
    ]
    report.add("enforced_seconds_p50", statistics.median(enforced), "s")
    report.add("enforced_seconds_p99", quantile(enforced, 0.99), "s", "<= 0.5")
    report.add("own_seconds_p50", statistics.median(own), "s", "<= 0.05")
    report.add("own_seconds_p99", quantile(own, 0.99), "s")
    report.add("acknowledged_seconds_p99", quantile(acked, 0.99), "s")
    report.add("cuts", len(enforced), "")
    report.add("poll_15s_enforced_seconds_p50", statistics.median(waits), "s")
    report.add("poll_15s_enforced_seconds_p99", quantile(waits, 0.99), "s")


def newest(written: dict[int, tuple[int, float]], limit: int, when: float) -> int:
    """The poller obeys a sheet once it has set that one or a later one; a cap may come twice."""
    return max((epoch for epoch, (cap, began) in written.items() if cap == limit and began < when), default=0)


async def steady(report: Report, desk: SheetDesk, process: psutil.Process, metrics_port: int) -> None:
    """Renewals, observation, PodResources, metering and Prometheus go on as on any node; nothing changes."""
    await asyncio.sleep(2)
    began, used = time.perf_counter(), cpu_seconds(process)
    for _ in range(int(STEADY_SECONDS // 5)):
        await desk.renew()
        await asyncio.to_thread(scrape, metrics_port)
        await asyncio.sleep(5)
    share = (cpu_seconds(process) - used) / (time.perf_counter() - began)
    report.add("steady_cpu_percent_of_a_core", share * 100, "%", "<= 1")
    report.add("steady_resident_megabytes", process.memory_info().rss / 2**20, "MB", "<= 80")
    report.add("steady_unshared_megabytes", process.memory_full_info().uss / 2**20, "MB")


def scrape(port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        assert b"tokenfactory_gpu_enforced_power_limit_watts" in page.read()


def main() -> int:
    report = Report("agent", SEED)
    with tempfile.TemporaryDirectory() as folder:
        options = ClusterOptions(scheduler=False, controller_manager=False)
        with Cluster.up(Path(folder) / "cluster", options) as cluster:
            cluster.kubectl("apply", "--server-side", "-f", str(REPOSITORY / "crds"))
            cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
            cluster.kubectl("create", "namespace", "tokenfactory-system")
            asyncio.run(measure(Path(folder), cluster, report))
    return report.show()


if __name__ == "__main__":
    if sys.argv[1:2] == ["poll"]:
        asyncio.run(poll(sys.argv[2], sys.argv[3]))
    elif sys.argv[1:2] == ["spy"]:
        watch_hardware(
            {name: SimulatedNode(Path(where)) for name, where in json.loads(sys.argv[2]).items()},
            Path(sys.argv[3]),
        )
    else:
        sys.exit(main())
