"""Numbers for contents. The exhaustive search works on numbers; the things themselves are looked up when needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.fault.parts import Agent, Gone, Leader, Machine, Message


@dataclass
class Codes:
    """Equal contents get equal numbers. What was numbered is kept and must not change."""

    by_content: dict[Any, int] = field(default_factory=dict)
    things: list[Any] = field(default_factory=list)

    def of(self, content: Any, thing: Any) -> int:
        code = self.by_content.setdefault(content, len(self.things))
        if code == len(self.things):
            self.things.append(thing)
        return code


@dataclass
class Frozen:
    """Numbers for things that never change once made, so that each is looked into only once."""

    content: Callable[[Any], Any]
    codes: Codes = field(default_factory=Codes)
    by_id: dict[int, int] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def of(self, thing: Any) -> int:
        if thing is None:
            return -1
        code = self.by_id.get(id(thing))
        if code is None:
            code = self.by_id[id(thing)] = self.codes.of(self.content(thing), thing)
            self.kept.append(thing)  # its id must stay its own
        return code

    def all(self, things: Any) -> tuple[int, ...]:
        return tuple(map(self.of, things))


def in_order(mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
    return tuple(sorted(mapping.items()))


def _object(thing: Any) -> Any:
    if isinstance(thing, Gone):
        return (thing.name, thing.revision)
    meta = thing.metadata
    return (meta.name, meta.resource_version, meta.generation, thing.spec, getattr(thing, "status", None))


def _memory(memory: Any) -> Any:
    return (
        memory.boot_id,
        memory.started_at,
        memory.found_own_caps,
        memory.capped,
        in_order(memory.floors),
        in_order(memory.acked),
        tuple((tree, it.sequence, it.at) for tree, it in sorted(memory.heard.items())),
        memory.settled,
    )


def _decision(decision: Any) -> Any:
    caps = tuple((uuid, order.cap_milliwatts) for uuid, order in sorted(decision.caps.items()))
    known = (in_order(decision.epochs), decision.generation, decision.complete, in_order(decision.startable))
    return ("decision", caps, *known)


class Contents:
    """What tells one state of each component from another."""

    def __init__(self) -> None:
        self.objects = Frozen(_object)
        self.memories = Frozen(_memory)
        self.decisions = Frozen(_decision)
        self.bodies = Frozen(lambda body: body)

    def of_spot(self, machine: Machine, agent: Agent) -> Any:
        return (
            machine.on,
            machine.boot,
            machine.gpus,
            agent.alive,
            self.memories.of(agent.memory),
            self.objects.of(agent.own),
            agent.listed,
            agent.broken,
            self.objects.all(agent.sheets[name] for name in sorted(agent.sheets)),
            self.objects.all(agent.node_queue),
            self.objects.all(agent.sheet_queue),
            self.decisions.of(agent.decision),
            agent.news,
            agent.renewed_at,
            agent.first_sequence,
            agent.last_sequence,
        )

    def visible(self, spot: Any) -> Any:
        """All but what its agent has merely heard of. What it has never read or listed before is more than hearsay."""
        agent = spot.agent
        return (
            spot.machine.boot,
            spot.machine.gpus,
            agent.alive,
            self.memories.of(agent.memory),
            agent.own is None,
            agent.listed,
            agent.broken,
            self.decisions.of(agent.decision),
        )

    def of_leader(self, leader: Leader) -> Any:
        return (
            leader.pid,
            leader.claim_from,
            leader.site.version,
            tuple(site.version for site in leader.site_queue),
            self.objects.all(leader.sheets[name] for name in sorted(leader.sheets)),
            self.objects.all(leader.nodes.values()),
            self.objects.all(leader.node_queue),
            self.objects.all(leader.sheet_queue),
            leader.revision,
            in_order(leader.outstanding),
            in_order(leader.unsettled),
            tuple(sorted(leader.heard)),
        )

    def of_message(self, message: Message) -> Any:
        what = (str(message.sender), message.kind, message.name, message.version, message.touch)
        return (*what, self.bodies.of(message.body), in_order(message.limits))
