"""Pods that do not come to start on the node that was chosen for them, and are placed anew elsewhere.

Two may keep them from it. kube-scheduler knows things that we do not: ports, volumes, another scheduler's pods. An opened
pod is bound to its node by affinity, and that cannot be taken back, so after a while the pod is replaced, and its
successor goes elsewhere: the node is left alone for that model until it may have changed.

And the gate opens only once the node's agent obeys the charge: an agent that died in between, or that cannot set a limit,
never says so. Such a node gets no pods until its agent answers again. What was charged there stays charged until the
ledger's rules let it go (P4): the agent acknowledges a spec without it, or the node is fenced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from tokenfactory.controller.actions import Action, DeletePod
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.world import GpuHost, Replica, World
from tokenfactory.kube.resources import Key, key_of
from tokenfactory.planning.recovery.incidents import is_storm

Slot = tuple[Key, str]
"""(factory, model)."""
PATIENCE_MILLISECONDS: Final = 10_000
"""A pod that ended there a moment ago may still hold its GPUs for kube-scheduler."""
MOST_PATIENCE_MILLISECONDS: Final = 160_000
"""Twice as long for each node that has refused the model lately: what no node can give (a volume that is not there)
must not make a new pod, new charges and new sheets every few seconds for ever."""
REMEMBERED_MILLISECONDS: Final = 600_000
ANSWER_MILLISECONDS: Final = 35_000
"""An agent acknowledges within a second or two, and one that lives reports every 30 s at the latest, whatever it could
not do. So by then at least one report has come that says nothing new, or none comes."""


@dataclass(frozen=True)
class Behind:
    """A node whose agent does not obey what stands, as far as it said."""

    said: tuple[object, ...]
    since: int
    """When it was first seen to have said just this."""


@dataclass(frozen=True)
class Refusals:
    """What is remembered from round to round; all of it may be lost at the cost of one more try."""

    since: Mapping[str, int] = field(default_factory=dict)
    """Pod UID → when it was first seen refused."""
    until: Mapping[tuple[Slot, str], int] = field(default_factory=dict)
    """(model, node) → how long that node is left alone."""
    behind: Mapping[str, Behind] = field(default_factory=dict)
    """By node."""
    mute: frozenset[str] = frozenset()
    """Nodes whose agents have not answered for too long: no gate would open there."""
    said: Mapping[tuple[Slot, str], str] = field(default_factory=dict)
    """What kube-scheduler said of a node that is left alone."""

    def nodes(self, slot: Slot) -> dict[str, str]:
        """Each with what was said."""
        return {node: self.said.get((held, node), "") for held, node in self.until if held == slot}


@dataclass(frozen=True)
class Replanned:
    """What becomes of the places that were given and not taken."""

    refusals: Refusals
    actions: tuple[Action, ...]
    waiting: tuple[Unplaced, ...]
    """Gated pods that are charged, and wait for an agent that does not answer."""
    again_after_seconds: float = 30.0


@dataclass(frozen=True)
class _Outlook:
    """A pod that has a place and does not start there: why, and how much longer that is waited for."""

    why: str
    patience_milliseconds: float


def replan(world: World, before: Refusals) -> Replanned:
    now = world.snapshot.milliseconds
    behind = _behind(world, before.behind)
    mute = frozenset(name for name, each in behind.items() if now - each.since >= ANSWER_MILLISECONDS)
    until = {pair: end for pair, end in before.until.items() if end > now}
    said = {pair: words for pair, words in before.said.items() if pair in until}
    since: dict[str, int] = {}
    actions: list[Action] = []
    waiting: list[Unplaced] = []
    soonest = 30_000.0
    for replica in world.replicas:
        node = world.granted_on.get(replica.uid)
        if node is None or replica.node or replica.terminating or replica.finished:
            continue
        outlook: _Outlook | None = None
        if replica.gated:
            outlook = _gated(world, world.hosts[node], behind)
        elif refused(replica) is not None:
            since[replica.uid] = before.since.get(replica.uid, now)
            soonest = min(soonest, 2_000.0)
            outlook = _unbound(replica, node, before, now - since[replica.uid])
        if outlook is None:
            continue
        if outlook.patience_milliseconds <= 0:
            reason = f"{outlook.why}, so it is placed anew elsewhere"
            actions.append(DeletePod(replica.pod, reason[:1024], as_seen=replica.gated))
            if not replica.gated:
                pair = (key_of(replica.factory), replica.model.name), node
                until[pair], said[pair] = now + REMEMBERED_MILLISECONDS, _in_short(refused(replica) or "")
        elif replica.gated:
            soonest = min(soonest, outlook.patience_milliseconds)
            waiting.append(Unplaced(replica, "AgentNotAnswering", outlook.why))
    return Replanned(
        Refusals(since, until, behind, mute, said), tuple(actions), tuple(waiting), max(soonest / 1000, 0.1)
    )


def _unbound(replica: Replica, node: str, before: Refusals, waited: int) -> _Outlook:
    slot = (key_of(replica.factory), replica.model.name)
    why = f"kube-scheduler does not bind it to {node} ({refused(replica)})"
    return _Outlook(why, _patience(len(before.nodes(slot))) - waited)


def _gated(world: World, host: GpuHost, behind: Mapping[str, Behind]) -> _Outlook | None:
    """Nothing of it has run. While the agent may yet answer, a pod is told of the wait once it is longer than usual."""
    if why := world.cut_off(host):
        # Rather is it we who hear nothing: elsewhere nobody would answer either.
        silent = host.node is not None and not host.fenced
        storm = silent and is_storm(world.fleet_nodes, world.lost_nodes())
        why = f"it cannot start on {host.name}: {why}"
        return _Outlook(f"{why}, like too many others at once", math.inf) if storm else _Outlook(why, 0)
    if host.name not in behind:
        return None
    quiet = world.snapshot.milliseconds - behind[host.name].since
    if quiet < PATIENCE_MILLISECONDS:
        return None
    why = f"it is charged on {host.name}, whose agent has not acknowledged that"
    return _Outlook(why, ANSWER_MILLISECONDS - quiet)


def _behind(world: World, before: Mapping[str, Behind]) -> dict[str, Behind]:
    """An agent that is behind and gets on is only slow: the time counts from the last that it said anew."""
    found = {}
    for host in world.hosts.values():
        if host.held is None or world.obeyed(host):
            continue
        status = host.held.status
        said = (status.boot_id, status.capped, status.observed_generation, status.applied)
        known = before.get(host.name)
        same = known is not None and known.said == said
        found[host.name] = known if known and same else Behind(said, world.snapshot.milliseconds)
    return found


def _patience(refusing_nodes: int) -> int:
    return min(PATIENCE_MILLISECONDS << min(refusing_nodes, 10), MOST_PATIENCE_MILLISECONDS)


def refused(replica: Replica) -> str | None:
    """Why an opened pod is not bound; None: it is, or has not been tried yet, or is on its way out."""
    if replica.gated or replica.node or replica.terminating or replica.finished:
        return None
    return next(
        (
            condition.message or condition.reason
            for condition in replica.pod.status.conditions
            if (condition.type, condition.status, condition.reason)
            == ("PodScheduled", "False", "Unschedulable")
        ),
        None,
    )


def _in_short(why: str) -> str:
    """Of `0/9 nodes are available: 1 node(s) had …, 8 node(s) didn't match … affinity/selector. preemption: …` the
    reason that is not the affinity by which we bound it to one node.
    """
    reasons = why.partition(" are available: ")[2].partition(". preemption:")[0] or why
    parts = [part for part in reasons.split(", ") if "affinity/selector" not in part]
    return ", ".join(parts).rstrip(".")[:200]
