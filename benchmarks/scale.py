"""A site of NODES nodes on a real API server: what the operator costs, and how long a lowered limit takes to every GPU.

The control plane is the embedded one, the operator the program that ships, under the chart's service account. The
nodes are hollow (`twin/hollow_fleet.py`): the agent's real code, each with watches, a token and a heartbeat of its own
and held by the admission policy; GPUs, PodResources and model servers are objects in one process for all nodes, and
setting a limit takes 15 ms as on a real GPU. Two factories fill every GPU.

A cut is one merge patch of the root PowerDomain. `enforced` is from before that patch is sent until a node's agent has
read all its limits back and is about to say so. Everything (control plane, operator, all nodes) shares this machine's
cores, and the nodes take turns in one process, which no real site does (above 1,000 nodes their heartbeats are spread
out, or two cores would do little else): CPU seconds stand beside the seconds, and for
comparison in the same run, with the same agents at work beside them: as many bare watchers that only receive one write,
and a design with an object for each node, where a cut is as many writes.

`over` counts the changes of any GPU's limit after the cut's deadline (DESIGN's bound on p99 for that many nodes) after
which the GPUs and the nodes' other draw together could draw more than the new limit.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.scale import yard
from tests.waiting import until

from _report import Report, quick
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.quantities import parse_power
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.kube.cache import Cache
from tokenfactory.kube.client import MERGE, Client
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.hollow_fleet import QUIET, HollowFleet

SEED = 20261121
NODES = int(os.environ.get("NODES") or (60 if quick() else 1_000))
CUTS = 4 if quick() else 8
STEP = 0.04
SETTLED_SECONDS = 10.0 if quick() else 30.0
DEADLINE_SECONDS = 0.5 if NODES <= 1_000 else 2.0
GOALS = NODES >= 1_000
HEARTBEAT_SECONDS = 5.0 * max(1.0, NODES / 1_000)
DETECT_SECONDS = round(3 * HEARTBEAT_SECONDS)
MAPS = "/api/v1/namespaces/bench/configmaps"
AT_ONCE = 32


def say(text: str) -> None:
    print(f"[{time.perf_counter():7.0f}] {text}", flush=True)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


# --- the process with all the nodes


class Bare:
    """As many watchers as there are nodes, each with a connection of its own, that do nothing but see an event."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._tasks: list[asyncio.Task[None]] = []
        self._opening = 0
        self._opened = asyncio.Event()
        self._session: aiohttp.ClientSession | None = None
        self.seen: list[float] = []

    async def begin(self, queries: list[dict[str, str]], version: str) -> None:
        async with await Client.connect(self._cluster.kubeconfig) as admin:
            ssl = admin._session().connector._ssl  # noqa: SLF001
        self._session = aiohttp.ClientSession(
            base_url=self._cluster.server, connector=aiohttp.TCPConnector(ssl=ssl, limit=0)
        )
        gate = asyncio.Semaphore(AT_ONCE)
        self._opening = len(queries)
        self._tasks = [asyncio.create_task(self._watch(query, version, gate)) for query in queries]
        await self._opened.wait()

    async def _watch(self, query: dict[str, str], version: str, gate: asyncio.Semaphore) -> None:
        assert self._session is not None
        query = {"watch": "1", "resourceVersion": version, **query}
        async with gate:
            response = await self._session.get(MAPS, params=query, timeout=aiohttp.ClientTimeout(total=None))
        self._opening -= 1
        if not self._opening:
            self._opened.set()
        async for line in response.content:
            if b'"MODIFIED"' in line[:30]:
                self.seen.append(time.monotonic())

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        self.seen = []
        self._opened.clear()


async def serve(folder: str, nodes: int) -> None:
    """Runs the nodes, and answers a question for each line of standard input."""
    random.seed(SEED)
    cluster = Cluster.attach(Path(folder))
    reader = asyncio.StreamReader(limit=2**24)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    bare = Bare(cluster)
    # In a hurry what nodes draw is told sooner, or it would still be news when the site is to be at rest.
    pace = replace(QUIET, report=6.0, meter=3.0) if quick() else QUIET
    async with HollowFleet(
        cluster, yard.plans(nodes), pace=pace, heartbeat_seconds=HEARTBEAT_SECONDS, lease_seconds=60
    ) as fleet:
        print("{}", flush=True)
        while line := await reader.readline():
            fleet.check()
            ask = json.loads(line)
            answer: Any = {}
            match ask["do"]:
                case "counts":
                    answer = {
                        "pods": fleet.pods,
                        "status_writes": fleet.status_writes,
                        "milliwatts": fleet.milliwatts,
                    }
                case "frozen":
                    gc.collect()
                    gc.freeze()  # a full collection over all nodes would be a pause that no node of its own has
                case "forget":
                    fleet.told.draws.clear()
                case "cut":
                    slot = (yard.ROOT, ask["epoch"])
                    answer = {
                        "heard": fleet.told.heard.get(slot, []),
                        "obeyed": fleet.told.obeyed.get(slot, []),
                    }
                case "draws":
                    answer = {"draws": fleet.told.draws}
                case "watch":
                    await bare.begin(ask["queries"], ask["version"])
                case "seen":
                    answer = {"seen": bare.seen}
                case "unwatch":
                    await bare.end()
            print(json.dumps(answer), flush=True)


class Nodes:
    """The process with all the nodes, from outside."""

    def __init__(self, cluster: Cluster, log: Path) -> None:
        self._log = log
        self._arguments = [sys.executable, __file__, "nodes", str(cluster.folder), str(NODES)]
        self._lock = asyncio.Lock()
        self.process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._arguments, stdin=pipe, stdout=pipe, stderr=log, limit=2**28
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        self.process.kill()
        await self.process.wait()

    async def began(self) -> None:
        await self._answer()

    async def ask(self, do: str, **more: Any) -> Any:
        async with self._lock:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")
            return await self._answer()

    async def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the nodes ended:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)


# --- the run


class Costs:
    """CPU seconds of each part since it was last asked."""

    def __init__(self, **pids: Callable[[], int]) -> None:
        self._pids = pids
        self._at = time.monotonic()
        self._used = self._now()

    def _now(self) -> dict[str, float]:
        return {name: sum(psutil.Process(pid()).cpu_times()[:2]) for name, pid in self._pids.items()}

    def since(self) -> tuple[float, dict[str, float]]:
        at, used = time.monotonic(), self._now()
        result = at - self._at, {name: used[name] - self._used[name] for name in used}
        self._at, self._used = at, used
        return result


class Run:
    def __init__(self, cluster: Cluster, folder: Path, client: Client, nodes: Nodes, report: Report) -> None:
        self.cluster = cluster
        self.client = client
        self.nodes = nodes
        self.report = report
        self.operator = yard.Operator(cluster, folder / "operator.log")
        self.audit = yard.Audit(cluster)
        self.factories = Cache(client, TokenFactory)
        self.domains = Cache(client, PowerDomain)
        self.sheets = Cache(client, CapSheet)
        self.written: dict[int, float] = {}
        """When we saw an epoch of the root's sheet."""
        self.sheets.on_change(lambda change: self._saw(change.new))
        self.limit = NODES * yard.FULL_WATTS

    def _saw(self, sheet: CapSheet | None) -> None:
        if sheet is not None and sheet.spec.renewal is None and sheet.spec.domain == yard.ROOT:
            self.written.setdefault(sheet.spec.epoch, time.monotonic())

    def costs(self) -> Costs:
        return Costs(
            operator=lambda: self.operator.process.pid,
            apiserver=lambda: self.cluster.running()["kube-apiserver"],
            nodes=lambda: self.nodes.process.pid,
        )

    async def all(self) -> None:
        caches = [asyncio.create_task(each.run()) for each in (self.factories, self.domains, self.sheets)]
        try:
            await self.come_up()
            await self.settle()
            await self.cuts()
            await self.compare()
            await self.restart()
        finally:
            for task in caches:
                task.cancel()
            self.operator.stop()

    # --- from nothing to every GPU in use

    async def come_up(self) -> None:
        began, costs = time.monotonic(), self.costs_without_operator()
        self.operator.start()
        await asyncio.to_thread(
            self.cluster.kubectl,
            "apply",
            "--server-side",
            "-f",
            "-",
            input=yard.manifests(NODES, DETECT_SECONDS),
        )
        await self.nodes.began()
        say(f"{NODES} nodes are there")
        self._told = 0.0
        await until(self._serves, "every replica to serve", 600 + NODES, every=1.0)
        _, used = costs.since()
        writes = self.audit.writes(yard.OPERATOR)
        self.report.add("fill_operator_restarts", self.operator.restarts, "count")
        self.report.add("fill_seconds", time.monotonic() - began, "s")
        self.report.add("fill_cpu_operator_seconds", self.operator.cpu_seconds(), "s")
        self.report.add("fill_cpu_apiserver_seconds", used["apiserver"], "s")
        self.report.add("fill_writes_per_node", sum(writes.values()) / NODES, "count")
        say(f"writes to get there: {_by_resource(writes)}")

    def costs_without_operator(self) -> Costs:
        return Costs(apiserver=lambda: self.cluster.running()["kube-apiserver"])

    async def _serves(self) -> bool:
        self.operator.keep()
        counts = await self.nodes.ask("counts")
        if time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            ready = {each.metadata.name: each.status.ready for each in self.factories}
            say(
                f"{counts['pods']} pods hold GPUs, {ready}, operator {self.operator.cpu_seconds():.1f} s of CPU"
            )
        return len(self.factories) == 2 and all(
            any(it.type == "Ready" and it.status == "True" for it in each.status.conditions)
            for each in self.factories
        )

    # --- at rest

    async def settle(self) -> None:
        await self.nodes.ask("frozen")
        # A node's draw is told half a minute after it changed, and then is news to its domains.
        await self.quiet(120 + NODES / 10, 3 if quick() else 8)
        costs = self.costs()
        self.audit.skip()
        before = await self.nodes.ask("counts")
        await asyncio.sleep(SETTLED_SECONDS)
        seconds, used = costs.since()
        after = await self.nodes.ask("counts")
        asked = list(self.audit.events())
        writes = Counter(
            yard.slot_of(event) for event in asked if yard.by(event, yard.OPERATOR) and yard.writes(event)
        )
        kept = sum(count for slot, count in writes.items() if yard.is_kept(slot))
        other = {slot: count for slot, count in writes.items() if not yard.is_kept(slot)}
        minutes = seconds / 60
        add = self.report.add
        add("settled_operator_cores", used["operator"] / seconds, "cores", "<= 1")
        add("settled_apiserver_cores", used["apiserver"] / seconds, "cores")
        add("settled_nodes_cores", used["nodes"] / seconds, "cores")
        add("settled_lease_and_renewal_writes", kept / minutes, "/min")
        add("settled_other_writes", sum(other.values()) / minutes, "/min", "<= 0")
        add(
            "agent_statuses",
            (after["status_writes"] - before["status_writes"]) / minutes / NODES,
            "/min/node",
        )
        beats = sum(yard.by(event, yard.AGENT) and yard.resource(event) == "leases" for event in asked)
        add("agent_heartbeats", beats / minutes / NODES, "/min/node")
        add("operator_peak", self.operator.peak_megabytes(), "MB", "<= 600")
        if other:
            say(f"at rest, but: {other}")

    async def quiet(self, seconds: float, renewals: int = 2) -> None:
        """Until the operator has renewed its Lease so often in a row and written nothing else but renewals."""
        self.audit.skip()
        deadline = time.monotonic() + seconds
        while self.audit.rested() < renewals:
            if time.monotonic() > deadline:
                say(f"not quiet after {seconds:g} s: {self.audit.last_word}")
                return
            await asyncio.sleep(0.25)

    # --- cuts

    async def cuts(self) -> None:
        domain = self.domains.get(yard.ROOT)
        assert domain is not None
        charge = int(parse_power(domain.status.charge)) / 1000
        whole = charge / 0.97
        say(f"{yard.ROOT} is charged {charge / 1e3:.1f} kW of {self.limit / 1e3:.1f} kW")
        found = []
        for number in range(1, CUTS + 1):
            found.append(await self.cut(whole * (1 - STEP * number)))
            await self.quiet(30, 1)
        say("enforced per cut: " + ", ".join(f"{max(each['enforced']):.3f}" for each in found))
        add = self.report.add
        for name in ("patched", "written", "heard", "enforced"):
            values = [value for each in found for value in each[name]]
            bound = f"<= {DEADLINE_SECONDS:g}" if name == "enforced" and GOALS else ""
            add(f"cut_{name}_p50", statistics.median(values), "s")
            add(f"cut_{name}_p99", quantile(values, 0.99), "s", bound)
        add("cut_sheets_written", max(each["sheets"] for each in found), "count", "<= 1")
        add("cut_node_writes_by_operator", max(each["charges"] for each in found), "count", "<= 0")
        add("cut_statuses_per_node", statistics.mean(each["reports"] for each in found) / NODES, "count")
        for name in ("operator", "apiserver", "nodes"):
            add(f"cut_cpu_{name}", statistics.mean(each["cpu"][name] for each in found), "s")
        add("over_after_deadline", sum(each["over"] for each in found), "count", "<= 0")
        add("over_until_p100", max(each["over_until"] for each in found), "s")

    async def cut(self, watts: float) -> dict[str, Any]:
        await self.nodes.ask("forget")
        counts = await self.nodes.ask("counts")
        base = counts["milliwatts"] + NODES * yard.OVERHEAD_WATTS * 1000
        limit = int(watts)
        self.audit.skip()
        costs = self.costs()
        seen = set(self.written)
        began = time.monotonic()
        path = f"/apis/tokenfactory.dev/v1alpha1/powerdomains/{yard.ROOT}"
        body = {"spec": {"limit": f"{limit}W"}}
        mark = self.operator.log.stat().st_size
        await self.client.request("PATCH", path, body=body, content_type=MERGE)
        patched = time.monotonic()
        epoch = await until(
            lambda: next(iter(set(self.written) - seen), None), "a lower sheet", 60, every=0.005
        )
        if self.written[epoch] - patched > DEADLINE_SECONDS:
            say(f"a slow cut; the operator meanwhile: {self.operator.tail(mark)}")
        await asyncio.sleep(DEADLINE_SECONDS)
        told: Any = {}

        async def everywhere() -> bool:
            nonlocal told
            told = await self.nodes.ask("cut", epoch=epoch)
            return len(told["obeyed"]) == NODES

        await until(everywhere, "every node to obey", 60 + NODES / 50, every=0.25)
        _, used = costs.since()
        await asyncio.sleep(2.0)  # what the cut still brings about
        draws = (await self.nodes.ask("draws"))["draws"]
        total, over, over_until = base, 0, began
        for at, milliwatts in draws:
            total += milliwatts
            if total > limit * 1000:
                over_until = at
                over += at > began + DEADLINE_SECONDS
        after = await self.nodes.ask("counts")
        writes = self.audit.writes(yard.OPERATOR)
        return {
            "patched": [patched - began],
            "written": [self.written[epoch] - began],
            "heard": [at - began for at in told["heard"]],
            "enforced": [at - began for at in told["obeyed"]],
            "sheets": sum(
                n for slot, n in writes.items() if slot[1] == "capsheets" and not yard.is_renewal(slot)
            ),
            "charges": sum(n for slot, n in writes.items() if slot[1] == "gpunodes"),
            "reports": after["status_writes"] - counts["status_writes"],
            "cpu": used,
            "over": over,
            "over_until": over_until - began,
        }

    # --- beside it

    async def compare(self) -> None:
        sheet = self.sheets.get(yard.ROOT)
        assert sheet is not None
        size = 400 + 120 * len(sheet.spec.caps)
        await self.client.request(
            "POST",
            "/api/v1/namespaces",
            body={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}},
        )
        await self._map("one", size)
        times, used = await self._race(
            [{"fieldSelector": "metadata.name=one"}] * NODES, [["one"]] * (2 if quick() else 5), size
        )
        self._compared("bare_watchers", times, used)
        gate = asyncio.Semaphore(AT_ONCE)

        async def make(name: str) -> None:
            async with gate:
                await self._map(name, size)

        names = [f"n{number}" for number in range(NODES)]
        await asyncio.gather(*map(make, names))
        queries = [{"fieldSelector": f"metadata.name={name}"} for name in names]
        times, used = await self._race(queries, [names] * (1 if quick() else 3), size)
        self._compared("object_per_node", times, used)

    def _compared(self, name: str, times: list[float], used: dict[str, float]) -> None:
        self.report.add(f"{name}_p50", statistics.median(times), "s")
        self.report.add(f"{name}_p99", quantile(times, 0.99), "s")
        self.report.add(f"{name}_cpu_apiserver", used["apiserver"], "s")

    async def _map(self, name: str, size: int) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"caps": "x" * size},
        }
        await self.client.request("POST", MAPS, body=body)

    async def _race(
        self, queries: list[dict[str, str]], rounds: list[list[str]], size: int
    ) -> tuple[list[float], dict[str, float]]:
        """From before the first write of a round until each watcher has seen its event."""
        listed = json.loads(await self.client.request("GET", MAPS))
        await self.nodes.ask("watch", queries=queries, version=listed["metadata"]["resourceVersion"])
        gate = asyncio.Semaphore(AT_ONCE)
        found: list[float] = []

        async def write(name: str, number: int) -> None:
            body = {"data": {"caps": str(number) * size}}
            async with gate:
                await self.client.request("PATCH", f"{MAPS}/{name}", body=body, content_type=MERGE)

        costs = self.costs()
        for number, names in enumerate(rounds, 1):
            await asyncio.sleep(1)
            began = time.monotonic()
            await asyncio.gather(*(write(name, number) for name in names))
            expected = number * len(queries)

            async def seen(expected: int = expected) -> list[float] | None:
                times = (await self.nodes.ask("seen"))["seen"]
                return times if len(times) >= expected else None

            times = await until(seen, "every bare watcher to see it", 120, every=0.25)
            found += [at - began for at in times[expected - len(queries) :]]
        _, used = costs.since()
        await self.nodes.ask("unwatch")
        return found, {name: seconds / len(rounds) for name, seconds in used.items()}

    # --- the operator anew, over a full site

    async def restart(self) -> None:
        for kill, name in ((False, "start"), (True, "start_after_kill")):
            await asyncio.to_thread(self.operator.stop, kill=kill)
            if kill:
                await asyncio.sleep(0.1)
            self.audit.skip()
            mark = self.operator.log.stat().st_size
            began = time.monotonic()
            self.operator.start()
            said = partial(self.operator.said, since=mark)
            await until(partial(said, "everything is listed"), "all lists", 120, every=0.05)
            listed = time.monotonic() - began
            await until(partial(said, "first plan made"), "the first plan", 120, every=0.05)
            first = time.monotonic() - began
            cpu = self.operator.cpu_seconds()
            await self.quiet(60 + NODES / 10)
            bound = "<= 30" if GOALS and not kill else ""
            self.report.add(f"{name}_listed", listed, "s")
            self.report.add(f"{name}_first_plan", first, "s", bound)
            self.report.add(f"{name}_cpu", cpu, "s")
            self.report.add(f"{name}_peak", self.operator.peak_megabytes(), "MB", "<= 600")


def _by_resource(writes: Counter[tuple[str, str, str]]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for (verb, resource, _), count in writes.items():
        found[f"{verb} {resource}"] += count
    return dict(found.most_common())


async def measure(cluster: Cluster, folder: Path, report: Report) -> None:
    async with (
        await Client.connect(cluster.kubeconfig) as client,
        Nodes(cluster, folder / "nodes.log") as nodes,
    ):
        await Run(cluster, folder, client, nodes, report).all()


def main() -> int:
    report = Report("scale", SEED)
    report.add("nodes", NODES, "count")
    report.add("gpus", NODES * yard.GPUS, "count")
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster.up(Path(folder) / "cluster", yard.options()) as cluster,
    ):
        yard.prepare(cluster)
        asyncio.run(measure(cluster, Path(folder), report))
    return report.show()


if __name__ == "__main__":
    if sys.argv[1:2] == ["nodes"]:
        asyncio.run(serve(sys.argv[2], int(sys.argv[3])))
    else:
        sys.exit(main())
