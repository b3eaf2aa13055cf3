"""Nodes that keep failing get no new work until a person has looked at them.

A failure counts in the round that opens its incident, so that a node whose quarantine a person has ended is not taken
back for what it did before: it takes another failure. A factory may call a node lost after less silence than an agent
needs between two heartbeats: that is its own affair, and takes the node from nobody else. There the node counts as
failed once it has been silent for as long as everybody waits.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenfactory.api.gpu_node import Quarantine
from tokenfactory.api.token_factory import Incident
from tokenfactory.controller.plan.world import DEFAULT_DETECT_SECONDS, World
from tokenfactory.kube.times import rfc3339
from tokenfactory.planning.recovery.incidents import failures, is_storm


def repeat_offenders(world: World) -> Mapping[str, Quarantine]:
    """Nodes that have just failed once too often, with the words for the person who clears it."""
    found: dict[str, Quarantine] = {}
    now = rfc3339(world.snapshot.wall)
    history = _history(world)
    for factory in world.snapshot.factories.values():
        after = world.detect_seconds(factory)
        if is_storm(world.fleet_nodes, world.lost_nodes(after)):
            continue
        hasty = after < DEFAULT_DETECT_SECONDS
        phases = {incident.id: incident.phase for incident in factory.status.incidents}
        for replica in world.replicas_of(factory):
            host = world.hosts.get(replica.node)
            phase = phases.get(replica.uid)
            fresh = phase not in {None, "Closed"} if hasty else phase is None
            if host is None or replica.finished or not fresh:
                continue
            if not world.lost(host, max(after, DEFAULT_DETECT_SECONDS)):
                continue
            times = failures(history.get(host.name, ())) + (phase is None)
            if times >= factory.spec.recovery.quarantine_after:
                words = (
                    f"lost {times} times with replicas on it, the last of {factory.metadata.namespace}/"
                    f"{factory.metadata.name}: find out why, then remove spec.quarantine"
                )
                found[host.name] = Quarantine(reason=words, since=now)
    return found


def health_of(world: World) -> Mapping[str, float]:
    """Below 1 for nodes on which replicas were lost: each failure makes the others look better."""
    return {node: 1.0 / (1 + failures(incidents)) for node, incidents in _history(world).items()}


def _history(world: World) -> dict[str, list[Incident]]:
    found: dict[str, list[Incident]] = {}
    for factory in world.snapshot.factories.values():
        for incident in factory.status.incidents:
            found.setdefault(incident.node, []).append(incident)
    return found
