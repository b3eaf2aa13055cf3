"""A node's agent: from a sheet written to limits read back, and what it costs meanwhile, on a real API server.

The agent is the process that ships, over the simulated NVML library with 15 ms for each call that sets a limit (real
ones take 10 to 20 ms). Beside it, on a node of its own and under the same sheets, a loop that asks every 15 seconds,
as other power agents do.

`own_seconds` is what the agent adds between a bare watcher's sight of the sheet and the moment at which the library
took the last GPU's limit, without NVML's own time. A process that is ready and gets no core is not the agent's doing, so
what its threads waited for one between these two moments (the kernel counts it: the main thread, and the lane that
waited longest) is shown by itself and taken off; `own_wall_seconds` still has it. `own_cpu_seconds` is all that the whole process computed from the write to
the acknowledgement, whatever else it did meanwhile.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
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
        self.used: dict[int, Used] = {}
        """By the agent when the epoch was seen."""
        self.pid = 0
        self.acknowledged: dict[int, float] = {}
        self.sheets.on_change(lambda change: self._saw(change.new))
        self.nodes.on_change(lambda change: self._acked(change.new))

    def _saw(self, sheet: CapSheet | None) -> None:
        if sheet is not None and sheet.spec.renewal is None:
            self.seen.setdefault(sheet.spec.epoch, time.perf_counter())
            if self.pid:
                self.used.setdefault(sheet.spec.epoch, Used.by(self.pid))

    def _acked(self, node: GPUNode | None) -> None:
        for entry in node.status.applied if node is not None else ():
            self.acknowledged.setdefault(entry.epoch, time.perf_counter())


def watch_hardware(node: SimulatedNode, out: Path) -> None:
    """In a process of its own: when did the enforced limits of a node last change, all GPUs together."""
    last = 0
    with out.open("w", buffering=1) as log:
        while True:
            limits = {round(gpu.enforced_watts * 1000) for gpu in node.gpus}
            now = time.perf_counter()
            if len(limits) == 1 and (limit := limits.pop()) != last:
                last = limit
                log.write(f"{limit} {now}\n")
            time.sleep(0.001)


@dataclass(frozen=True)
class Used:
    """What a process has used so far: computing, and being ready without a core, thread by thread."""

    cpu_seconds: float
    waits: dict[str, float]
    main: str

    @classmethod
    def by(cls, pid: int) -> Used:
        clock = ctypes.c_int()
        if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise ProcessLookupError(pid)
        waits = {}
        for thread in Path(f"/proc/{pid}/task").iterdir():
            _, ready_nanoseconds, _ = (thread / "schedstat").read_text().split()
            waits[thread.name] = int(ready_nanoseconds) / 1e9
        return cls(time.clock_gettime(clock.value), waits, str(pid))

    def waited_since(self, before: Used) -> float:
        """On the way of one cut: the main thread, then the lanes side by side."""
        more = {thread: wait - before.waits.get(thread, 0.0) for thread, wait in self.waits.items()}
        main = more.pop(self.main)
        return main + max(more.values(), default=0.0)


@dataclass(frozen=True)
class Cut:
    cap: int
    began: float
    enforced: float
    cpu_seconds: float
    waited_seconds: float


async def until(holds: object, seconds: float = 60.0, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s")
        await asyncio.sleep(pause)


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
            children.append(_child("spy", str(polled.folder), str(log)))
            children.append(_child("poll", str(cluster.kubeconfig), "site", environment=polled.environment))
            await until(lambda: log.exists() and log.read_text())
            await desk.renew()
            assert node.process is not None
            process = psutil.Process(node.process.pid)
            written = await cuts(desk, watcher, draw, node)
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


async def cuts(desk: SheetDesk, watcher: Watcher, draw: random.Random, node: AgentNode) -> dict[int, Cut]:
    """By epoch. Each waits for the one before to be acknowledged."""
    assert node.process is not None
    pid = watcher.pid = node.process.pid
    made: dict[int, Cut] = {}
    for epoch in range(2, CUTS + 2):
        cap = 200_000 + 1_000 * draw.randrange(500)
        if epoch > 2 and cap == made[epoch - 1].cap:
            cap += 1_000
        before, began = Used.by(pid), time.perf_counter()
        await desk.publish("site", epoch, {CHAT: (cap, 200_000), IDLE: (200_000, 200_000)})
        await until(lambda: min(_set_at(node)) >= began, pause=0.0005)  # noqa: B023
        there = Used.by(pid)
        await until(lambda: epoch in watcher.acknowledged)  # noqa: B023
        after = Used.by(pid)
        assert node.enforced_milliwatts() == [cap] * GPUS
        made[epoch] = Cut(
            cap,
            began,
            max(_set_at(node)),
            after.cpu_seconds - before.cpu_seconds,
            there.waited_since(watcher.used[epoch]),
        )
        await asyncio.sleep(draw.uniform(0.02, 0.1))
        if epoch % 50 == 0:
            await desk.renew()
    return made


def _set_at(node: AgentNode) -> list[float]:
    return [gpu.limit_set_at for gpu in node.hardware.gpus]


def told(report: Report, made: dict[int, Cut], watcher: Watcher, log: Path) -> None:
    enforced = [cut.enforced - cut.began for cut in made.values()]
    wall = [cut.enforced - watcher.seen[epoch] - CALL_SECONDS for epoch, cut in made.items()]
    own = [seconds - cut.waited_seconds for seconds, cut in zip(wall, made.values(), strict=True)]
    acked = [watcher.acknowledged[epoch] - cut.began for epoch, cut in made.items()]
    polled = []
    for line in log.read_text().splitlines():
        limit, at = line.split()
        polled.append((float(at), newest(made, int(limit), float(at))))
    waits = [
        when - cut.began
        for epoch, cut in made.items()
        if (when := next((at for at, seen in sorted(polled) if seen >= epoch), None)) is not None
    ]
    figures: tuple[tuple[str, list[float], str | None, str | None], ...] = (
        ("enforced_seconds", enforced, None, "<= 0.5"),
        ("own_seconds", own, "<= 0.05", "<= 0.05"),
        ("own_cpu_seconds", [cut.cpu_seconds for cut in made.values()], "<= 0.05", "<= 0.05"),
        ("own_wall_seconds", wall, None, None),
        ("waited_for_a_core_seconds", [cut.waited_seconds for cut in made.values()], None, None),
        ("acknowledged_seconds", acked, None, None),
        ("poll_15s_enforced_seconds", waits, None, None),
    )
    for name, values, middle, tail in figures:
        report.add(f"{name}_p50", statistics.median(values), "s", middle)
        report.add(f"{name}_p99", quantile(values, 0.99), "s", tail)
    report.add("cuts", len(made), "")


def newest(made: dict[int, Cut], limit: int, when: float) -> int:
    """The poller obeys a sheet once it has set that one or a later one; a cap may come twice."""
    return max((epoch for epoch, cut in made.items() if cut.cap == limit and cut.began < when), default=0)


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
        watch_hardware(SimulatedNode(Path(sys.argv[2])), Path(sys.argv[3]))
    else:
        sys.exit(main())
