"""The agent's process on a real node: parts wired together, start, liveness, ordered end.

Run as `python -m tokenfactory.agent <options as JSON>`; `tokenfactory agent` replaces itself with that, so that
nothing of the command line stays in a process that is to be small and to live for months.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from pathlib import Path

import msgspec

from tokenfactory.agent.following import LiveSheets
from tokenfactory.agent.live import LiveNode, LivePods, LiveWriter
from tokenfactory.agent.loop import Agent
from tokenfactory.agent.nim import Scraper
from tokenfactory.agent.nodepower import Source, meter_of
from tokenfactory.agent.nvml_pynvml import BOOT_ID, PynvmlDriver
from tokenfactory.agent.pace import Pace
from tokenfactory.agent.startgate import StartGate
from tokenfactory.agent.waiting import START_PATH
from tokenfactory.agent.watchdog import Watchdog
from tokenfactory.agent.web import Answer, WebServer
from tokenfactory.api.names import START_GATE_PORT, heartbeat_name
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.kube.lease import Heartbeat
from tokenfactory.kube.logs import log_as_json

log = logging.getLogger(__name__)

KUBELET_SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"


class AgentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a node's agent is started with."""

    node: str
    namespace: str = "tokenfactory-system"
    kubeconfig: str = ""
    """Empty: as the pod that it runs in."""
    address: str = "0.0.0.0"  # noqa: S104  the host's, unless the chart says which
    gate_port: int = START_GATE_PORT
    metrics_port: int = 9401
    """Prometheus and probes; -1: none."""
    pod_resources: str = KUBELET_SOCKET
    boot_id_file: str = str(BOOT_ID)
    heartbeat_seconds: float = 5.0
    metering: bool = True
    scrape_loopback: bool = False
    """Read model servers on loopback: for tests and demos."""
    node_power: Source = ""
    """What measures the whole node: the kernel's hwmon, the BMC's Redfish, or nothing."""
    node_power_from: str = ""
    """hwmon: a file, or the folder to search. redfish: the resource's URL; `{node}` is the node's name."""
    node_power_credentials: str = ""
    """A folder with username and password, and ca.crt if the BMC's certificate is of an authority of its own."""
    node_power_verify: bool = True
    pace: dict[str, float] = {}
    """Overrides of `Pace`, by name."""
    ports_file: str = ""
    """Where to write the ports that were taken when 0 was asked for."""
    log_level: str = "INFO"


async def run(options: AgentOptions) -> None:
    """Until SIGTERM or SIGINT. Caps stay as they are, whatever ends it."""
    pace = Pace(**options.pace)
    pods = LivePods(options.pod_resources, pace.kubelet_settle)
    scraper = Scraper(allow_loopback=options.scrape_loopback) if options.metering else None
    kubeconfig = Path(options.kubeconfig) if options.kubeconfig else None
    node_meter = meter_of(
        options.node_power,
        options.node_power_from,
        credentials=options.node_power_credentials,
        verify=options.node_power_verify,
        node=options.node,
    )
    try:
        async with (
            await Client.connect(kubeconfig, user_agent="tokenfactory-agent") as client,
            asyncio.TaskGroup() as tasks,
        ):
            node = LiveNode(client, options.node)
            agent = Agent(
                options.node,
                nvml=PynvmlDriver(boot_id_file=Path(options.boot_id_file)),
                pods=pods,
                nodes=node,
                sheets=LiveSheets(client, tasks),
                writer=LiveWriter(client),
                scrape=scraper.scrape if scraper else None,
                node_meter=node_meter,
                pace=pace,
            )
            await _serve(agent, options, lambda: node.cache.is_synced)
            watchdog = Watchdog(agent.progress)
            watchdog.start()
            tasks.create_task(node.cache.run(), name="node")
            tasks.create_task(_beat(client, agent, options), name="heartbeat")
            obeying = tasks.create_task(agent.run(), name="agent")
            tasks.create_task(_end_on_signal(obeying), name="signals")
    except* _Ended:
        log.info("ended; caps stay as they are", extra={"node": options.node})
    finally:
        await pods.close()
        if scraper is not None:
            await scraper.close()


class _Ended(Exception):  # noqa: N818  it is no error
    """The agent was told to end."""


async def _end_on_signal(obeying: asyncio.Task[None]) -> None:
    told = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    await told.wait()
    obeying.cancel()
    await asyncio.wait([obeying])  # its last words need what the other tasks keep alive
    raise _Ended


async def _beat(client: Client, agent: Agent, options: AgentOptions) -> None:
    """The heartbeat says that the agent gets round, not only that its process exists."""
    key = (options.namespace, heartbeat_name(options.node))
    fresh = partial(Heartbeat, client, key, holder=options.node, every_seconds=options.heartbeat_seconds)
    heartbeat, failing = fresh(), False
    backoff = Backoff(first_seconds=0.2, longest_seconds=options.heartbeat_seconds)
    while True:
        late = agent.progress.late()
        problem = f"no progress: {late}" if late else await _beat_once(heartbeat, options.heartbeat_seconds)
        if problem and not failing:
            log.warning("no heartbeat", extra={"node": options.node, "error": problem})
        failing = bool(problem)
        if problem:
            # A beat whose answer was lost may have been written: the next one looks first, and soon.
            heartbeat = fresh()
            await asyncio.sleep(backoff.next())
        else:
            backoff.reset()
            await asyncio.sleep(options.heartbeat_seconds)


async def _beat_once(heartbeat: Heartbeat, within_seconds: float) -> str:
    """Why there was no beat; empty when there was."""
    try:
        async with asyncio.timeout(within_seconds):
            return "" if await heartbeat.beat() else "the Lease was not as it was left"
    except (ApiError, UnreachableError, TimeoutError) as error:
        return str(error) or "no answer in time"


async def _serve(agent: Agent, options: AgentOptions, heard: Callable[[], bool]) -> None:
    """The start gate for the pods of this node; Prometheus and the kubelet's probes beside it."""

    async def alive(_rest: str) -> Answer:
        late = agent.progress.late()
        text = "".join(f"{part}: nothing for {age:.0f} s\n" for part, age in late.items())
        return Answer(HTTPStatus.SERVICE_UNAVAILABLE if late else HTTPStatus.OK, (text or "ok\n").encode())

    async def ready(_rest: str) -> Answer:
        decision = agent.state.decision
        mode: str = decision.mode if decision is not None else "no decision yet"
        if heard() and agent.state.node is None:
            # An installation before its first PowerDomain is a working one.
            mode = "no GPUNode: this node is in no power domain"
        known = decision is not None and heard()
        return Answer(HTTPStatus.OK if known else HTTPStatus.SERVICE_UNAVAILABLE, f"{mode}\n".encode())

    async def metrics(_rest: str) -> Answer:
        from tokenfactory.agent.metrics import render

        return Answer(HTTPStatus.OK, render(agent), "text/plain; version=0.0.4; charset=utf-8")

    probes = {"/healthz": alive, "/readyz": ready}
    gate = WebServer({START_PATH: StartGate(agent).route, **probes})
    ports = {"gate": await gate.start(options.address, options.gate_port)}
    if options.metrics_port >= 0:
        server = WebServer({"/metrics": metrics, **probes})
        ports["metrics"] = await server.start(options.address, options.metrics_port)
    log.info("serving", extra={"node": options.node, "ports": ports})
    if options.ports_file:
        await asyncio.to_thread(Path(options.ports_file).write_text, json.dumps(ports))


def main(argument: str) -> None:
    options = msgspec.json.decode(argument, type=AgentOptions)
    log_as_json(options.log_level)
    asyncio.run(run(options))
