"""A site of as many nodes as one asks for: its manifests, its operator, and what was asked of the API server meanwhile.

One tree (a site, halls of 32 nodes, racks of 8) and two factories that fill every GPU of it: half of the nodes with
replicas of 8 GPUs, half with two replicas of 4 each, in a lower band.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil

from tokenfactory.api.cap_sheet import RENEWAL_SUFFIX
from tokenfactory.twin.cluster import Cluster, ClusterOptions
from tokenfactory.twin.fleet import AGENT_ACCOUNT, OPERATOR_ACCOUNT, SYSTEM_NAMESPACE, NodePlan
from tokenfactory.twin.processes import end_process, start_operator
from tokenfactory.twin.site import install_chart

RACK_LABEL: Final = "topology.tokenfactory.dev/rack"
ROOT: Final = "site"
NAMESPACE: Final = "inference"
RACK, HALL, GPUS = 8, 32, 8
OVERHEAD_WATTS: Final = 1_500
FULL_WATTS: Final = GPUS * 700 + OVERHEAD_WATTS
"""What a node draws with every GPU at its default limit."""
OPERATOR: Final = f"system:serviceaccount:{SYSTEM_NAMESPACE}:{OPERATOR_ACCOUNT}"
AGENT: Final = f"system:serviceaccount:{SYSTEM_NAMESPACE}:{AGENT_ACCOUNT}"
WRITING: Final = frozenset({"create", "update", "patch", "delete", "deletecollection"})


def options() -> ClusterOptions:
    """The audit log is what counts the writes: nothing of it may be dropped. Kubelets are not what is looked at."""
    return ClusterOptions(audit_megabytes=8_000, node_monitor_grace_seconds=600)


def plans(count: int, first: int = 0) -> list[NodePlan]:
    return [
        NodePlan(
            f"n{number:05}",
            {"nvidia.com/gpu.present": "true", RACK_LABEL: f"r{number // RACK:04}"},
            gpus=GPUS,
        )
        for number in range(first, first + count)
    ]


def manifests(nodes: int, detect_seconds: int = 15) -> str:
    racks = -(-nodes // RACK)
    halls = -(-nodes // HALL)
    found: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        domain(ROOT, nodes * FULL_WATTS, nodeOverhead=f"{OVERHEAD_WATTS}W"),
    ]
    found += [domain(f"h{hall}", HALL * 7_500, parent=ROOT) for hall in range(halls)]
    for rack in range(racks):
        selector = {"matchLabels": {RACK_LABEL: f"r{rack:04}"}}
        parent = f"h{rack * RACK // HALL}"
        found.append(domain(f"r{rack:04}", RACK * 8_000, parent=parent, nodeSelector=selector))
    found.append(_factory("chat", "llama-70b", "llama-3.1-70b", 8, nodes - nodes // 2, 100))
    found.append(_factory("batch", "llama-8b", "llama-3.1-8b", 4, nodes // 2 * 2, 50))
    for factory in found[-2:]:
        factory["spec"]["recovery"] = {"detectAfter": f"{detect_seconds}s"}
    return "\n---\n".join(map(json.dumps, found))


def domain(name: str, watts: int, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "tokenfactory.dev/v1alpha1",
        "kind": "PowerDomain",
        "metadata": {"name": name},
        "spec": {"limit": f"{watts}W", **spec},
    }


def _factory(name: str, model: str, image: str, gpus: int, replicas: int, band: int) -> dict[str, Any]:
    return {
        "apiVersion": "tokenfactory.dev/v1alpha1",
        "kind": "TokenFactory",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "power": {"domain": ROOT},
            "models": [
                {
                    "name": model,
                    "nim": {"image": f"nvcr.io/nim/meta/{image}-instruct:1.8.0"},
                    "gpusPerReplica": gpus,
                    "replicas": {"min": replicas, "max": replicas},
                    "band": band,
                }
            ],
        },
    }


Slot = tuple[str, str, str]
"""Verb, resource, name."""


def is_lease(slot: Slot) -> bool:
    return slot[1] == "leases"


def is_renewal(slot: Slot) -> bool:
    return slot[1] == "capsheets" and slot[2].endswith(RENEWAL_SUFFIX)


def is_kept(slot: Slot) -> bool:
    """What a settled factory costs."""
    return is_lease(slot) or is_renewal(slot)


def by(event: dict[str, Any], user: str) -> bool:
    return event["user"].get("username") == user and "objectRef" in event


def writes(event: dict[str, Any]) -> bool:
    return event["verb"] in WRITING


def accepted(event: dict[str, Any]) -> bool:
    return int(event.get("responseStatus", {}).get("code", 0)) < 300


def resource(event: dict[str, Any]) -> str:
    """`gpunodes/status`."""
    what = event["objectRef"]
    return "/".join(filter(None, (what.get("resource", ""), what.get("subresource", ""))))


def slot_of(event: dict[str, Any]) -> Slot:
    return event["verb"], resource(event), event["objectRef"].get("name", "")


class Audit:
    """What was asked of the API server since one last looked, from its own log."""

    def __init__(self, cluster: Cluster) -> None:
        self._path = cluster.folder / "audit" / "audit.log"
        self._at = 0
        self._kept = 0
        self.last_word: Slot | None = None
        """Of the operator, besides its Lease and renewals."""

    @classmethod
    def from_now(cls, cluster: Cluster) -> Audit:
        made = cls(cluster)
        made.skip()
        return made

    def skip(self) -> None:
        """What was asked until now is not looked at."""
        self._at = self._path.stat().st_size
        self._kept = 0

    def events(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as log:
            log.seek(self._at)
            for line in log:
                if not line.endswith(b"\n"):  # still being written
                    return
                self._at += len(line)
                yield json.loads(line)

    def writes(self, user: str) -> Counter[Slot]:
        """Those that were accepted."""
        return Counter(
            slot_of(event) for event in self.events() if by(event, user) and writes(event) and accepted(event)
        )

    def rested(self) -> int:
        """How often in a row the operator has renewed its Lease (every few seconds) and written nothing else."""
        for event in self.events():
            if not by(event, OPERATOR) or not writes(event):
                continue
            slot = slot_of(event)
            self._kept = self._kept + is_lease(slot) if is_kept(slot) else 0
            if not is_kept(slot):
                self.last_word = slot
        return self._kept


class Operator:
    """The real program under the chart's own service account."""

    def __init__(self, cluster: Cluster, log: Path) -> None:
        self.log = log
        self.restarts = 0
        self._cluster = cluster
        self._running: Any = None
        self.process: psutil.Process

    def start(self) -> None:
        who = self._cluster.kubeconfig_for_service_account(SYSTEM_NAMESPACE, OPERATOR_ACCOUNT, duration="24h")
        self._running = start_operator(who, SYSTEM_NAMESPACE, self.log)
        self.process = psutil.Process(self._running.pid)

    def stop(self, *, kill: bool = False) -> None:
        if self._running is not None:
            end_process(self._running, kill=kill)
            self._running = None

    def keep(self) -> None:
        """As its Deployment would: a process that has ended (it may have lost its Lease) is started anew."""
        if self._running.poll() is not None:
            self.restarts += 1
            self.start()

    def check(self) -> None:
        if self._running.poll() is not None:
            text = self.log.read_text()
            raise RuntimeError(f"the operator ended with {self._running.returncode}:\n{text[-4000:]}")

    def said(self, what: str, since: int = 0) -> bool:
        """Is this event in its log, from that byte on?"""
        return what in self.tail(since)

    def tail(self, since: int) -> str:
        with self.log.open("rb") as log:
            log.seek(since)
            return log.read().decode(errors="replace")

    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def peak_megabytes(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def prepare(cluster: Cluster) -> None:
    """The chart: kinds, rights, admission policy."""
    install_chart(cluster)
