"""The operator's process: lead, observe, plan, act, until the leadership or the process ends.

Crash-only: whatever goes wrong beyond a single request ends the process, and a new one rebuilds everything from the
API. Kopf starts only after this process leads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import uuid
from functools import partial
from pathlib import Path

import msgspec

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.checkpoints.keeper import Saved
from tokenfactory.checkpoints.warm_cache import Restored
from tokenfactory.controller.actions import Plan
from tokenfactory.controller.actor import Actor
from tokenfactory.controller.barring import Barring
from tokenfactory.controller.collector import CheckpointCollector
from tokenfactory.controller.compose import Options, compose
from tokenfactory.controller.cutting import Cutter
from tokenfactory.controller.handover import highest_term, keep_labelled, label_sheets, settled
from tokenfactory.controller.metrics import Metrics
from tokenfactory.controller.objects import Deployment, Service
from tokenfactory.controller.observer import Observer
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.reconciler import Reconciler
from tokenfactory.controller.renewer import Renewer
from tokenfactory.controller.shell import WATCHED, KopfShell
from tokenfactory.controller.snapshot import Leadership, Snapshot
from tokenfactory.controller.workloads import RESTART_PROBE
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError
from tokenfactory.kube.events import Recorder
from tokenfactory.kube.lease import Election
from tokenfactory.kube.objects import Event, Lease, Namespace, Node, Pod

log = logging.getLogger(__name__)


class OperatorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the installation decides."""

    namespace: str
    plan: Options
    kubeconfig: Path | None = None
    lease_seconds: int = 15
    liveness_endpoint: str | None = None
    metrics_port: int = 0
    metrics_address: str = ""


def _learn_types() -> None:
    """All types that are decoded later, before there is a second thread (see `shell._take_in`)."""
    for kind in (
        *WATCHED,
        CapSheet,
        GPUNode,
        Deployment,
        Service,
        Lease,
        Namespace,
        Node,
        Pod,
        Event,
        Restored,
        Saved,
    ):
        msgspec.json.Decoder(kind)


async def run(options: OperatorOptions) -> None:
    """Return after a polite stop; raise when anything ended that must not."""
    _learn_types()
    async with await Client.connect(options.kubeconfig) as client:
        identity = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        election = Election(
            client,
            (options.namespace, "tokenfactory-operator"),
            identity,
            options.lease_seconds,
            highest_term=partial(highest_term, client),
        )
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        stopping = asyncio.create_task(stop.wait())
        acquiring = asyncio.create_task(election.acquire())
        await asyncio.wait({stopping, acquiring}, return_when=asyncio.FIRST_COMPLETED)
        if not acquiring.done():
            acquiring.cancel()
            return
        term = acquiring.result()
        clean = False
        try:
            leadership = Leadership(term=term.number, claim_from=term.claim_from)
            clean = await _lead(client, election, leadership, options, identity, stop)
        finally:
            with contextlib.suppress(Exception):
                await election.release(clean=clean)


async def _lead(
    client: Client,
    election: Election,
    leadership: Leadership,
    options: OperatorOptions,
    identity: str,
    stop: asyncio.Event,
) -> bool:
    """Until we are told to stop. True: the outcome of every write of ours is known."""
    clean = False
    through_gate = await restarts_through_gate(client, options.namespace)
    workloads = msgspec.structs.replace(options.plan.workloads, restart_through_gate=through_gate)
    plan_options = msgspec.structs.replace(options.plan, workloads=workloads)
    recorder = Recorder(client, controller="tokenfactory", instance=identity)
    actor = Actor(client, recorder, election.guard(margin_seconds=2.0))
    metrics = Metrics()
    observer = Observer(client, options.namespace)
    cutter = Cutter(observer.stores[PowerDomain].snapshot, lambda: observer.sheets.snapshot().objects, actor)
    reconciler = Reconciler(
        partial(observer.snapshot, leadership, actor.unsettled, actor.taken),
        _Planner(plan_options, metrics, cutter),
        actor,
        generation=cutter.generation,
        caught_up=lambda: observer.reached(actor.written),
    )
    observer.on_change(reconciler.changed)
    observer.on_report(reconciler.reported)
    observer.stores[PowerDomain].on_change(cutter.domain_changed)
    observer.sheets.on_change(lambda _: cutter.sheet_changed())
    renewer = Renewer(client, observer, leadership, election.guard(margin_seconds=2.0))
    collector = CheckpointCollector(observer, actor.writer)
    shell = KopfShell(
        observer.stores,
        asyncio.get_running_loop(),
        liveness=reconciler.liveness,
        liveness_endpoint=options.liveness_endpoint,
        on_end=stop.set,
    )
    metrics.serve(options.metrics_address, options.metrics_port)
    shell.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(observer.run()),
                tasks.create_task(recorder.run()),
                tasks.create_task(_keep(election)),
            ]
            await _until(observer.ready(), stop)
            if not stop.is_set():
                log.info("everything is listed", extra={"term": leadership.term})
                await label_sheets(actor.writer, observer.sheets)
                running.append(tasks.create_task(keep_labelled(actor.writer, observer.sheets)))
                running.append(tasks.create_task(renewer.run()))
                running.append(tasks.create_task(collector.run()))
                running.append(tasks.create_task(cutter.run()))
                running.append(tasks.create_task(reconciler.run()))
            await stop.wait()
            clean = await settled(actor, observer.version_of)
            for task in running:
                task.cancel()
    finally:
        stopped_by_itself = shell.ended
        await asyncio.to_thread(shell.stop)
    if stopped_by_itself:
        raise RuntimeError(
            "kopf ended by itself: this process is deaf to what people write, so it ends as well"
        )
    return clean


async def restarts_through_gate(client: Client, namespace: str) -> bool:
    """Can a container that restarts be sent through its pod's init containers again? Asked, not guessed of a version."""
    try:
        answer = await client.request(
            "POST",
            f"/apis/apps/v1/namespaces/{namespace}/deployments",
            query={"dryRun": "All"},
            body=RESTART_PROBE,
            repeatable=True,
        )
    except ApiError as error:
        log.warning("containers restart without asking the gate", extra={"error": str(error)})
        return False
    container = msgspec.json.decode(answer)["spec"]["template"]["spec"]["containers"][0]
    known = bool(container.get("restartPolicyRules"))
    if not known:
        log.warning("containers restart without asking the gate: the cluster is older than Kubernetes 1.36")
    return known


class _Planner:
    """Hands what one plan remembers to the next, and shows it to whom it concerns."""

    def __init__(self, options: Options, metrics: Metrics, cutter: Cutter) -> None:
        self._options = options
        self._metrics = metrics
        self._cutter = cutter
        self._memory = Memory()
        self._compose = Barring(lambda snapshot: compose(snapshot, self._options, self._memory))

    def __call__(self, snapshot: Snapshot) -> Plan:
        composed = self._compose(snapshot)
        self._memory = composed.memory
        self._cutter.planned(composed)
        self._metrics.show(composed)
        return composed.plan


async def _keep(election: Election) -> None:
    await election.keep()
    raise RuntimeError("the leadership was lost: another operator may lead now, so this process ends")


async def _until(work: object, stop: asyncio.Event) -> None:
    """`work`, unless we are told to stop first."""
    tasks = {asyncio.ensure_future(work), asyncio.create_task(stop.wait())}  # type: ignore[call-overload]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    for task in done:
        task.result()
