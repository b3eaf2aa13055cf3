"""What the operator would see and plan now, for a person who asks: read from the API, and nothing is written.

No Lease is taken, so it may run beside the operator, anywhere. What an operator only remembers (loads of the last minutes,
the draw that an oversubscribed domain was seen to have) is in no API: where that matters, its statuses say more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Final

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import Resource
from tokenfactory.controller.compose import Options, compose
from tokenfactory.controller.objects import Deployment, Service
from tokenfactory.controller.observer import Observer
from tokenfactory.controller.owning import Taken
from tokenfactory.controller.plan.books import Books
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.shell import WATCHED
from tokenfactory.controller.snapshot import Leadership, Snapshot
from tokenfactory.controller.unsettled import Unsettled
from tokenfactory.controller.workloads import WorkloadOptions
from tokenfactory.kube.client import Client
from tokenfactory.kube.errors import ApiError
from tokenfactory.kube.objects import Lease, Namespace, Node, Pod
from tokenfactory.kube.resources import api_version_of, collection_path

READS: Final[tuple[type[Resource], ...]] = (
    *WATCHED,
    CapSheet,
    GPUNode,
    Node,
    Pod,
    Deployment,
    Service,
    Namespace,
    Lease,
)

WAIT_CAP: Final = "wait-cap"


class MayNotReadError(Exception):
    """The user lacks rights; says which rules a role needs."""


async def look(client: Client, namespace: str, *, within_seconds: float = 60.0) -> Books:
    """The plan that the operator would make now, with all that it is made from."""
    await _may_read(client, namespace)
    observer = Observer(client, namespace)
    async with _running(observer), asyncio.timeout(within_seconds):
        await observer.ready()
        snapshot = observer.snapshot(Leadership(term=0, claim_from=0), Unsettled(), Taken())
        leases = observer.leases.snapshot().objects
    snapshot = replace(
        snapshot,
        leadership=Leadership(term=_term(snapshot), claim_from=0),
        silent_seconds=_silent(leases.values(), snapshot.wall),
    )
    options = Options(workloads=_as_installed(snapshot))
    return compose(snapshot, options, Memory()).books


@contextlib.asynccontextmanager
async def _running(observer: Observer) -> AsyncIterator[None]:
    task = asyncio.create_task(observer.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _may_read(client: Client, namespace: str) -> None:
    """One object of each kind: a refusal is told at once, with what to add, instead of tried again for ever."""
    missing = []
    for kind in READS:
        where = namespace if kind is Lease else ""
        try:
            await client.request("GET", collection_path(kind, where), query={"limit": "1"})
        except ApiError as error:
            if error.code == 404:
                raise MayNotReadError(
                    f"the API server does not know {kind.PLURAL}: is Token Factory installed in this cluster?"
                ) from error
            if error.code != 403:
                raise
            missing.append(_rule(kind))
    if missing:
        raise MayNotReadError(
            "you may not read all that a plan is made from. A ClusterRole for it needs these rules besides "
            f"(leases only in the namespace {namespace}):\n" + "\n".join(missing)
        )


def _rule(kind: type[Resource]) -> str:
    group, slash, _ = api_version_of(kind).partition("/")
    return f'- {{apiGroups: ["{group if slash else ""}"], resources: [{kind.PLURAL}], verbs: [get, list, watch]}}'


def _term(snapshot: Snapshot) -> int:
    written = [sheet.spec.term for sheet in snapshot.sheets.values()]
    written += [node.spec.term for node in snapshot.gpu_nodes.values()]
    return max(written, default=1)


def _silent(leases: Iterable[Lease], wall: datetime) -> dict[str, float]:
    """By the wall clock, as the heartbeats themselves say: one look cannot see how long they have not changed."""
    silent: dict[str, float] = {}
    for lease in leases:
        name = lease.metadata.name
        if not name.startswith(names.HEARTBEAT_PREFIX) or not lease.spec.renew_time:
            continue
        with contextlib.suppress(ValueError, TypeError):
            age = (wall - datetime.fromisoformat(lease.spec.renew_time)).total_seconds()
            silent[name.removeprefix(names.HEARTBEAT_PREFIX)] = max(0.0, age)
    return silent


def _as_installed(snapshot: Snapshot) -> WorkloadOptions:
    """The operator's own image and port, as a pod of its making has them: they tell its pods from others."""
    for pod in snapshot.pods.values():
        if names.FACTORY_LABEL not in pod.metadata.labels:
            continue
        for container in pod.spec.init_containers:
            port = next((arg.partition("=")[2] for arg in container.args if arg.startswith("--port=")), "")
            if container.name == WAIT_CAP and port.isdigit():
                return WorkloadOptions(image=container.image, start_gate_port=int(port))
    return WorkloadOptions(image="tokenfactory")
