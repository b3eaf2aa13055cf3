"""Nodes that keep failing get no new work until a person has looked at them.

A failure counts in the round that opens its incident, so that a node whose quarantine a person has ended is not taken
back for what it did before: it takes another failure.
"""

from __future__ import annotations

from collections.abc import Mapping

from tokenfactory.api.gpu_node import Quarantine
from tokenfactory.api.token_factory import Incident
from tokenfactory.controller.plan.status import rfc3339
from tokenfactory.controller.plan.world import World
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
        known = {incident.id for incident in factory.status.incidents}
        for replica in world.replicas_of(factory):
            host = world.hosts.get(replica.node)
            fresh = host is not None and not replica.finished and replica.uid not in known
            if host is None or not fresh or not world.lost(host, after):
                continue
            times = failures(history.get(host.name, ())) + 1
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
