"""What of time and of renewals tells one state from another: little, so that there may be any number of both.

An agent asks whether its hold has run out, and whether a renewal is newer than the last it heard. So times are either
fresh or long ago, and of sequences only the order counts: the API server's is always `NEWEST`, and what an agent knows
lies just below it. Of renewals that wait in one agent's watch with nothing between them only the last is kept: what the
first would give it, trust from now on, the last gives too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import msgspec
from tests.fault.parts import HOLD, Agent, Gone, Parts, with_version

from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec, Renewal
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.planning.power.governor import PATIENCE_MILLISECONDS

NEWEST = 1_000
LONG_AGO = PATIENCE_MILLISECONDS


def is_renewal(thing: object) -> bool:
    return isinstance(thing, CapSheet) and thing.spec.renewal is not None


@cache
def heard_renewal(name: str, tree: str, sequence: int) -> CapSheet:
    """As agents know it: they look at nothing else of it."""
    spec = CapSheetSpec(domain=tree, tree=tree, term=1, epoch=1, renewal=Renewal(sequence=sequence))
    return CapSheet(metadata=ObjectMeta(name=name, resource_version="1"), spec=spec)


def plain_renewals(world: Parts) -> None:
    """The API server's are the newest there are. Their terms decide whose writes it takes."""
    for name, renewal in world.renewals.items():
        spec = msgspec.structs.replace(renewal.spec, epoch=1, renewal=Renewal(sequence=NEWEST))
        world.renewals[name] = with_version(msgspec.structs.replace(renewal, spec=spec), 1)


def plain_trust(agent: Agent, now: int, newest: int = NEWEST) -> None:
    """The agent as if it had always been so: `newest` is the API server's sequence that becomes `NEWEST`."""
    clock = now + agent.skipped

    def when(at: int | None) -> int | None:
        return None if at is None else now - (LONG_AGO if clock - at >= HOLD else 0)

    rank = _ranks(agent, newest)
    agent.skipped = 0
    agent.renewed_at = when(agent.renewed_at)
    heard = {
        t: replace(it, sequence=rank[it.sequence], at=when(it.at)) for t, it in agent.memory.heard.items()
    }
    agent.memory = replace(agent.memory, started_at=when(agent.memory.started_at), heard=heard)
    agent.sheets = {name: _ranked(sheet, rank) for name, sheet in agent.sheets.items()}
    queue = [_ranked(thing, rank) for thing in agent.sheet_queue]
    agent.sheet_queue = [
        thing
        for thing, after in zip(queue, (*queue[1:], None), strict=False)
        if not (is_renewal(thing) and is_renewal(after))
    ]
    if agent.first_sequence is not None:
        agent.first_sequence, agent.last_sequence = 0, rank[agent.last_sequence]


def _ranks(agent: Agent, newest: int) -> dict[int, int]:
    known = {it.sequence for it in agent.memory.heard.values()}
    known |= {
        thing.spec.renewal.sequence
        for thing in (*agent.sheets.values(), *agent.sheet_queue)
        if is_renewal(thing)
    }
    known |= {agent.last_sequence} if agent.first_sequence is not None else set()
    below = sorted(known - {newest}, reverse=True)
    return {newest: NEWEST} | {sequence: NEWEST - at for at, sequence in enumerate(below, 1)}


def _ranked(thing: CapSheet | Gone, rank: dict[int, int]) -> CapSheet | Gone:
    if not is_renewal(thing):
        return thing
    return heard_renewal(thing.metadata.name, thing.spec.tree, rank[thing.spec.renewal.sequence])
