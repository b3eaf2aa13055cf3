"""An incident, step by step: Detected → Routed → Charged → Restoring → Verified → Closed.

Each step is recorded before it is taken, so that a restarted operator goes on where the crashed one was. This module
says which step an incident is in, and what may be done in it; it starts nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from tokenfactory.api.token_factory import Incident, Recovery

RETURNED = "; it came back by itself"
ENOUGH = "; as many serve as are wanted, so nothing replaces it"
ORDER = ("Detected", "Routed", "Charged", "Restoring", "Verified", "Closed")


@dataclass(frozen=True)
class LostReplica:
    """A replica on a node whose agent is silent."""

    pod: str
    pod_uid: str
    model: str
    node: str
    cause: str


@dataclass(frozen=True)
class ReplicaFacts:
    """What is known of a replica now."""

    pod: str
    model: str
    node: str = ""
    created: str = ""
    """RFC 3339 in UTC, as the API server writes it."""
    terminating: bool = False
    charged: bool = False
    opened: bool = False
    ready: bool = False
    tokens_flow: bool = False
    restored_from: str = ""


@dataclass(frozen=True)
class Situation:
    """One factory's replicas at one moment."""

    now: str
    lost: Sequence[LostReplica]
    replicas: Mapping[str, ReplicaFacts]
    """By pod name."""
    fleet_nodes: int
    lost_nodes: int
    enough: frozenset[str] = frozenset()
    """Models of which as many serve as are wanted, or that are not wanted any more: nothing more will come."""


@dataclass(frozen=True)
class Verdict:
    """The incidents as they are now to be recorded, and what recording them permits next time."""

    incidents: tuple[Incident, ...]
    delete: tuple[str, ...] = ()
    """Pods of recorded incidents that may be deleted, so that their work starts elsewhere."""
    storm: str = ""
    """Not empty: too many nodes were lost at once for this to be their own fault. Nothing new is started."""


def step(recorded: Sequence[Incident], situation: Situation, policy: Recovery) -> Verdict:
    """Advance each incident by what is seen, open new ones, and say which lost pods may go.

    A pod may be deleted only when its incident is already recorded (it is in `recorded`).
    """
    advanced: list[Incident] = []
    for position, incident in enumerate(recorded):
        advanced.append(_advance(incident, situation, (*advanced, *recorded[position + 1 :])))
    missed = {_identity(lost): lost for lost in situation.lost if not _was_leaving(lost, situation)}
    # Whoever came back may be lost again; and an operator that has just begun thinks so of all for a while.
    advanced = [incident for incident in advanced if incident.phase != "Closed" or incident.id not in missed]
    known = {incident.id for incident in advanced}
    opened = [_open(lost, situation.now) for identity, lost in missed.items() if identity not in known]
    storm = _storm(situation)
    incidents = _trim(advanced + opened)
    if storm:
        return Verdict(incidents=incidents, storm=storm)
    running = sum(1 for incident in recorded if incident.phase in {"Routed", "Charged", "Restoring"})
    delete: list[str] = []
    for incident in recorded:
        replica = situation.replicas.get(incident.pod)
        if incident.phase != "Detected" or replica is None or replica.terminating:
            continue
        if running + len(delete) >= policy.max_concurrent:
            break
        if any(_identity(lost) == incident.id for lost in situation.lost):
            delete.append(incident.pod)
    return Verdict(incidents=incidents, delete=tuple(delete))


def _was_leaving(lost: LostReplica, situation: Situation) -> bool:
    """Nobody misses what somebody had deleted already: with its factory, say, of whose name there is a new one."""
    replica = situation.replicas.get(lost.pod)
    return replica is not None and replica.terminating


def _identity(lost: LostReplica) -> str:
    return f"{lost.pod_uid}"


def _open(lost: LostReplica, now: str) -> Incident:
    return Incident(
        id=_identity(lost),
        node=lost.node,
        model=lost.model,
        pod=lost.pod,
        phase="Detected",
        cause=lost.cause,
        detected_at=now,
        phase_at=now,
    )


def _advance(incident: Incident, situation: Situation, others: Sequence[Incident]) -> Incident:
    """As far as what is seen allows, one step at a time."""
    if incident.phase == "Closed":
        return incident
    if incident.phase == "Detected":
        return _after_detection(incident, situation)
    replacement = situation.replicas.get(incident.replacement) if incident.replacement else None
    if replacement is None:
        replacement = _unclaimed(incident, situation, others)
        if replacement is None and incident.model in situation.enough:
            return _to(incident, "Closed", situation.now, cause=f"{incident.cause}{ENOUGH}", replacement="")
        if replacement is None:
            return (
                incident
                if not incident.replacement
                else _to(incident, "Routed", situation.now, replacement="")
            )
    return _follow(msgspec.structs.replace(incident, replacement=replacement.pod), replacement, situation.now)


def _after_detection(incident: Incident, situation: Situation) -> Incident:
    old = situation.replicas.get(incident.pod)
    if old is None or old.terminating:
        return _to(incident, "Routed", situation.now)
    if any(_identity(lost) == incident.id for lost in situation.lost):
        return incident
    return _to(incident, "Closed", situation.now, cause=f"{incident.cause}{RETURNED}")


def _follow(incident: Incident, replacement: ReplicaFacts, now: str) -> Incident:
    """What the replacement has reached, one phase at a time."""
    match incident.phase:
        case "Routed" if replacement.charged:
            return _to(incident, "Charged", now)
        case "Charged" if replacement.opened:
            return _to(incident, "Restoring", now)
        case "Restoring" if replacement.ready:
            return _to(incident, "Verified", now, restored_from=replacement.restored_from)
        case "Verified" if replacement.tokens_flow:
            return _to(incident, "Closed", now)
    return incident


def _unclaimed(incident: Incident, situation: Situation, others: Sequence[Incident]) -> ReplicaFacts | None:
    """A replica of the same model that came after the loss and that no other incident names."""
    claimed = {other.replacement for other in others}
    lost = {lost.pod for lost in situation.lost}
    fresh = [
        replica
        for name, replica in sorted(situation.replicas.items())
        if replica.model == incident.model
        and name != incident.pod
        and name not in claimed
        and name not in lost
        and not replica.terminating
        and (not replica.ready or replica.created >= incident.detected_at)
    ]
    return fresh[0] if fresh else None


def _to(incident: Incident, phase: str, now: str, **changes: str) -> Incident:
    return msgspec.structs.replace(incident, phase=phase, phase_at=now, **changes)


def failures(incidents: Sequence[Incident]) -> int:
    """How often one node failed: all replicas that it took along at one moment are one failure."""
    return len({incident.detected_at[:16] for incident in incidents if not incident.cause.endswith(RETURNED)})


def is_storm(fleet_nodes: int, lost_nodes: int) -> bool:
    """A third of the fleet does not die by itself: more likely the network or we ourselves are cut off."""
    return lost_nodes >= 3 and lost_nodes * 3 > fleet_nodes


def _storm(situation: Situation) -> str:
    if is_storm(situation.fleet_nodes, situation.lost_nodes):
        return (
            f"{situation.lost_nodes} of {situation.fleet_nodes} nodes are silent at once: nothing is restarted until "
            "fewer are, or a person fences those that are off"
        )
    return ""


def _trim(incidents: list[Incident]) -> tuple[Incident, ...]:
    """All that are open, and the last few closed ones."""
    closed = [incident for incident in incidents if incident.phase == "Closed"]
    drop = {incident.id for incident in closed[: max(0, len(closed) - 16)]}
    return tuple(incident for incident in incidents if incident.id not in drop)[:64]
