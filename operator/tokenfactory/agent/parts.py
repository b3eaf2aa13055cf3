"""What an agent is given: its node, its sheets, its kubelet and a way to report, each behind a small interface.

The process on a real node wires them to caches and sockets of its own (`main`); the hollow fleet runs hundreds of
agents in one process on one shared watch. Neither the loop nor anything it calls knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from tokenfactory.agent.nvml import Gpu
from tokenfactory.api.gpu_node import GPUNode, GPUNodeStatus
from tokenfactory.kube.times import boot_seconds, rfc3339
from tokenfactory.planning.power.governor import Sheet

Path = tuple[str, ...]
"""Domains, from the root of a tree down to a node's own."""


class NodeSource(Protocol):
    """The GPUNode of the node that the agent is on."""

    def node(self) -> GPUNode | None:
        """None: there is none, or nothing has been heard yet."""

    def subscribe(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever `node()` would answer anew."""


class SheetSource(Protocol):
    """The cap sheets of the domains that the node is in, in the governor's form."""

    def follow(self, paths: frozenset[Path]) -> None:
        """Watch the domains of these paths from now on; no other once these have been heard of."""

    def ready(self, paths: frozenset[Path]) -> bool:
        """A complete list of the domains of each of these paths was taken in since they have been followed."""

    @property
    def sheets(self) -> Mapping[str, Sheet]:
        """By domain."""

    @property
    def renewals(self) -> Mapping[str, int]:
        """The last renewal of each tree."""

    def subscribe(self, changed: Callable[[], None]) -> None: ...


class StatusWriter(Protocol):
    """Says this node's status to the API server."""

    async def write(self, held: GPUNode, status: GPUNodeStatus) -> bool:
        """False when it could not be said now; it is tried again with what is true then."""


@dataclass(frozen=True, slots=True)
class PodDevices:
    """What the kubelet handed to one pod."""

    namespace: str
    name: str
    gpus: tuple[str, ...]
    """UUIDs of GPUs; for a MIG device that of its GPU, once for each device."""

    unknown: tuple[str, ...] = ()
    """Devices of GPUs that NVML does not show."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


class PodResources(Protocol):
    """Which pod of this node holds which GPU, as its kubelet says."""

    async def list(self, gpus: tuple[Gpu, ...]) -> tuple[PodDevices, ...]:
        """Raises PodResourcesError when the kubelet does not answer."""


class PodResourcesError(Exception):
    """The kubelet did not answer; the last answer stands."""


class Clock(Protocol):
    """Time as the agent sees it; in tests it is virtual."""

    def monotonic(self) -> float:
        """Seconds that never go back and that count on while the machine sleeps."""

    def wall(self) -> str:
        """RFC 3339, for people to read."""


class SystemClock:
    """The machine's own."""

    def monotonic(self) -> float:
        return boot_seconds()

    def wall(self) -> str:
        return rfc3339(datetime.now(UTC))
