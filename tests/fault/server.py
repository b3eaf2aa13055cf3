"""The API server: it accepts a write or refuses it, tells those who watch, and answers the sender.

The three are apart, so that the exhaustive search can look at each by itself.
"""

from __future__ import annotations

import msgspec
from tests.fault.agents import fold_own
from tests.fault.leaders import fold_node, fold_sheet
from tests.fault.parts import Agent, AnyObject, Gone, Leader, Message, Parts, version_of, with_version

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import ObjectMeta

LONGEST_QUEUE = 40


class Server(Parts):
    def deliver(self, index: int, *, keep: bool = False, answer: bool = True) -> None:
        """One write arrives: `keep` leaves a copy on the way, without `answer` its sender learns nothing."""
        message = self.inflight[index] if keep else self.inflight.pop(index)
        accepted, stored = self.accept(message)
        if stored is not None:
            for agent in self.agents.values():
                agent_sees(agent, stored)
            for leader in self.leaders:
                leader_sees(leader, stored)
        if not answer:
            return
        present = self.present(message)
        if message.kind == "status":
            answer_agent(self.agents[message.name], present)
            return
        for leader in list(self.leaders):
            if leader.pid == message.sender and not answer_leader(
                leader, message, present, accepted=accepted
            ):
                self.leaders.remove(leader)

    def present(self, message: Message) -> AnyObject | None:
        """The object that was to be written, as it is now."""
        if message.kind == "renew":
            return self.renewals.get(message.name)
        return self.sheets.get(message.name) if message.kind == "sheet" else self.nodes[message.name]

    def accept(self, message: Message) -> tuple[bool, AnyObject | None]:
        """Was it accepted, and what is stored anew."""
        if message.kind in {"sheet", "renew"}:
            return self._write_sheet(message)
        return self._write_spec(message) if message.kind == "node" else self._write_status(message)

    def delete_sheet(self, name: str) -> bool:
        """Somebody deletes it. Not while a write that would create it is still under way: see docs/power-safety.md."""
        creates = any((m.kind, m.name, m.version) == ("sheet", name, 0) for m in self.inflight)
        if name not in self.sheets or creates:
            return False
        self.deleted[name] = version_of(self.sheets.pop(name))
        self.revision += 1
        gone = Gone(name, self.revision)
        for agent in self.agents.values():
            agent_sees(agent, gone)
        for leader in self.leaders:
            leader_sees(leader, gone)
        return True

    def _write_sheet(self, message: Message) -> tuple[bool, AnyObject | None]:
        store = self.renewals if message.kind == "renew" else self.sheets
        present = store.get(message.name)
        spec = message.body
        if version_of(present) != message.version:
            return False, None
        if present is not None:
            old = present.spec
            same = spec.caps == old.caps and spec.hold_milliseconds == old.hold_milliseconds
            grows = spec.epoch > old.epoch or (spec.epoch == old.epoch and same)
            if spec.term < old.term or (not grows and self.kit.epoch_rule):
                return False, None
            if spec == old and not message.touch:
                return True, None
        version = max(message.version, self.deleted.get(message.name, 0) if present is None else 0) + 1
        sheet = CapSheet(metadata=ObjectMeta(name=message.name, resource_version=str(version)), spec=spec)
        store[message.name] = sheet
        self.revision += message.kind == "sheet"
        return True, sheet

    def _write_spec(self, message: Message) -> tuple[bool, AnyObject | None]:
        present = self.nodes[message.name]
        if version_of(present) != message.version or message.body.term < present.spec.term:
            return False, None
        if message.body == present.spec and not message.touch:
            return True, None
        generation = present.metadata.generation + (message.body != present.spec)
        spec = msgspec.structs.replace(present, spec=message.body)
        stored = self.nodes[message.name] = with_version(spec, message.version + 1, generation)
        for domain in set(message.body.path) - set(present.spec.path):
            # People put a machine here: it draws here whether it fits or not, and only decreases may follow.
            self.peaks[domain] = max(self.peaks.get(domain, 0), self.charge(domain))
        return True, stored

    def _write_status(self, message: Message) -> tuple[bool, AnyObject | None]:
        present = self.nodes[message.name]
        if version_of(present) != message.version:
            return False, None
        if message.body == present.status:
            return True, None
        for entry in message.body.applied:
            key = (message.name, entry.domain)
            self.acked[key] = max(self.acked.get(key, 0), entry.epoch)
        status = msgspec.structs.replace(present, status=message.body)
        generation = present.metadata.generation
        stored = self.nodes[message.name] = with_version(status, message.version + 1, generation)
        return True, stored


def agent_sees(agent: Agent, thing: AnyObject | Gone) -> None:
    """What its watches bring, if it has begun them."""
    if isinstance(thing, GPUNode):
        if agent.alive and agent.own is not None and agent.node == thing.metadata.name:
            agent.node_queue.append(thing)
    elif agent.alive and agent.listed and not agent.broken:
        agent.sheet_queue.append(thing)
        agent.broken = len(agent.sheet_queue) > LONGEST_QUEUE


def leader_sees(leader: Leader, thing: AnyObject | Gone) -> None:
    """Sheets it learns from the answers to its own writes: nobody else but another leader writes them."""
    if isinstance(thing, GPUNode):
        leader.node_queue.append(thing)
    elif isinstance(thing, Gone):
        leader.sheet_queue.append(thing)


def answer_agent(agent: Agent, present: AnyObject | None) -> None:
    if agent.alive and agent.own is not None and isinstance(present, GPUNode):
        fold_own(agent, present)


def answer_leader(leader: Leader, message: Message, present: AnyObject | None, *, accepted: bool) -> bool:
    """False: refused because somebody leads in a newer term. It was deposed, and now it knows."""
    key = (message.kind, message.name)
    if leader.outstanding.get(key) == message.version:
        del leader.outstanding[key]
    if isinstance(present, GPUNode):
        fold_node(leader, present)
    elif message.kind == "sheet" and present is not None:
        fold_sheet(leader, present)
    newer = present is not None and present.spec.term > leader.term
    return accepted or message.kind == "renew" or not newer
