"""What broke: replicas on silent nodes, and how far each incident has come."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import msgspec

from tokenfactory.api.token_factory import Incident, TokenFactory
from tokenfactory.checkpoints.warm_cache import Restored
from tokenfactory.controller.actions import Action, DeletePod
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.world import Replica, World, whole
from tokenfactory.kube.resources import key_of
from tokenfactory.kube.times import rfc3339
from tokenfactory.planning.recovery.incidents import LostReplica, ReplicaFacts, Situation, step


@dataclass(frozen=True)
class Recovered:
    """A factory's incidents as they are to be recorded, and what may be done now."""

    incidents: tuple[Incident, ...]
    actions: tuple[Action, ...]
    storm: str


def recover(world: World, staffing: Staffing, factory: TokenFactory) -> Recovered:
    after = world.detect_seconds(factory)
    replicas = world.replicas_of(factory)
    lost = []
    for replica in replicas:
        host = world.hosts.get(replica.node)
        if host is not None and not replica.finished and world.lost(host, after):
            # The cause is said once: a text that changed each second would be a write each second.
            cause = f"the agent of {host.name} fell silent" + (
                "" if host.node_ready else ", and so did its kubelet"
            )
            lost.append(LostReplica(replica.name, replica.uid, replica.model.name, host.name, cause))
    is_open = any(incident.phase != "Closed" for incident in factory.status.incidents)
    situation = Situation(
        now=rfc3339(world.snapshot.wall),
        lost=lost,
        # Of no meaning while nothing is lost and nothing is open, which is nearly always.
        replicas={replica.name: _facts(world, replica) for replica in replicas} if lost or is_open else {},
        fleet_nodes=world.fleet_nodes,
        lost_nodes=world.lost_nodes(after),
        enough=_enough(factory, staffing, replicas, {each.pod_uid for each in lost})
        if is_open
        else frozenset(),
    )
    verdict = step(factory.status.incidents, situation, factory.spec.recovery)
    by_name = {replica.name: replica for replica in replicas}
    actions = tuple(
        DeletePod(by_name[name].pod, f"its node {by_name[name].node} is lost; it restarts elsewhere")
        for name in verdict.delete
    )
    return Recovered(verdict.incidents, actions, verdict.storm)


def _enough(
    factory: TokenFactory, staffing: Staffing, replicas: Sequence[Replica], lost: Container[str]
) -> frozenset[str]:
    """Models that an open incident names and for which no replacement is to come."""
    wanted = {model.name: staffing.count(key_of(factory), model.name) for model in factory.spec.models}
    serving = {
        name: whole(
            replica
            for replica in replicas
            if replica.model.name == name
            and replica.ready
            and not replica.terminating
            and replica.uid not in lost
        )
        for name in wanted
    }
    named = {incident.model for incident in factory.status.incidents}
    return frozenset(name for name in named if serving.get(name, 0) >= wanted.get(name, 0))


def _facts(world: World, replica: Replica) -> ReplicaFacts:
    return ReplicaFacts(
        pod=replica.name,
        model=replica.model.name,
        node=replica.node,
        created=replica.pod.metadata.creation_timestamp or "",
        terminating=replica.terminating or replica.finished,
        charged=replica.uid in world.granted_on,
        opened=not replica.gated,
        ready=replica.ready,
        tokens_flow=replica.ready and _tokens(world, replica),
        restored_from=restored_from(replica),
    )


def _tokens(world: World, replica: Replica) -> bool:
    host = world.hosts.get(replica.node)
    meters = host.held.status.meters if host and host.held else ()
    return any(meter.uid == replica.uid and meter.generated_tokens > 0 for meter in meters)


def restored_from(replica: Replica) -> str:
    """The digest that the restore proved, or empty: a cold start."""
    for status in replica.pod.status.init_container_statuses:
        if status.name == "restore" and status.state.terminated is not None:
            try:
                return msgspec.json.decode(status.state.terminated.message, type=Restored).digest
            except msgspec.DecodeError:
                return ""
    return ""
