"""Everything that a plan may look at, at one moment. Nothing in it ever changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.owning import TakenName
from tokenfactory.kube.objects import Namespace, Node, Pod
from tokenfactory.kube.resources import Key
from tokenfactory.kube.volumes import PersistentVolume, PersistentVolumeClaim

_CHARGING: Final = frozenset({PowerDomain.KIND, CapSheet.KIND, GPUNode.KIND, Node.KIND, Pod.KIND})


@dataclass(frozen=True)
class Leadership:
    """Under which term we write, and which earlier ones' last writes may still arrive: all before `claim_from`."""

    term: int
    claim_from: int


@dataclass(frozen=True)
class Snapshot:
    leadership: Leadership
    wall: datetime
    """For timetables and for what people read; nothing is trusted by it."""
    milliseconds: int = 0
    """On our own clock, which never goes back: for windows and hysteresis."""
    domains: Mapping[Key, PowerDomain] = field(default_factory=dict)
    factories: Mapping[Key, TokenFactory] = field(default_factory=dict)
    profiles: Mapping[Key, PowerProfile] = field(default_factory=dict)
    checkpoints: Mapping[Key, Checkpoint] = field(default_factory=dict)
    sheets: Mapping[Key, CapSheet] = field(default_factory=dict)
    sheets_version: int = 0
    """The API server's version up to which `sheets` is complete, deletions included."""
    gpu_nodes: Mapping[Key, GPUNode] = field(default_factory=dict)
    nodes: Mapping[Key, Node] = field(default_factory=dict)
    pods: Mapping[Key, Pod] = field(default_factory=dict)
    deployments: Mapping[Key, Deployment] = field(default_factory=dict)
    services: Mapping[Key, Service] = field(default_factory=dict)
    leader_worker_sets: Mapping[Key, LeaderWorkerSet] | None = None
    """None: their CRD is not installed, or we may not read them."""
    namespaces: Mapping[Key, Namespace] = field(default_factory=dict)
    claims: Mapping[Key, PersistentVolumeClaim] = field(default_factory=dict)
    volumes: Mapping[Key, PersistentVolume] = field(default_factory=dict)
    silent_seconds: Mapping[str, float] = field(default_factory=dict)
    """By node: how long its agent has been silent, on our own clock; absent: it never had one."""
    unsettled: frozenset[tuple[str, str]] = frozenset()
    """(kind, name) of sheets and nodes that we wrote without learning the outcome."""
    taken: Mapping[tuple[str, Key], TakenName] = field(default_factory=dict)
    """(kind, key) of objects that we would make, where somebody else's are."""
    undecodable: Mapping[tuple[str, Key], str] = field(default_factory=dict)
    """(kind, key) → why: these objects are not as the snapshot shows them."""
    uids: Mapping[tuple[str, Key], str] = field(default_factory=dict)
    """Of those that people wrote, as far as they are known."""

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Of what charges are made from, and why. It is not gone, and may have been a cut: nothing may rise on it."""
        return tuple(
            f"{kind} {key[1]} cannot be read: {why}"
            for (kind, key), why in sorted(self.undecodable.items())
            if kind in _CHARGING
        )

    @property
    def unread_factories(self) -> Mapping[Key, str]:
        """TokenFactories that are there and do not fit our type, and why: one of a newer version, perhaps."""
        return {key: why for (kind, key), why in self.undecodable.items() if kind == TokenFactory.KIND}
