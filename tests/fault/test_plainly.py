"""The model's way of exploring against a plain one, which takes every step in a copy of the whole world.

The model hears news only just before it matters, forgets what no longer does, takes a step once for all states in which
its surroundings look alike, and has any number of renewals. None of this may hide anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tests.fault.codes import Contents
from tests.fault.explore import Search
from tests.fault.parts import OVERHEAD, Kit, Leader, W
from tests.fault.scenes import AFTER, ALIKE, BEFORE, ONE, ROOT, TWO, Scene, Wish, X, act, begin
from tests.fault.trust import LONG_AGO, plain_trust
from tests.fault.world import World

pytestmark = pytest.mark.slow

CUT = tuple(Wish({"hall": {X: watts}}, OVERHEAD + 500 * W) for watts in (500, 300))
LIMITS = tuple(
    Wish({"hall": {X: watts}}, OVERHEAD + limit * W) for watts, limit in ((500, 500), (300, 300), (500, 500))
)
PLAIN = {
    scene.name: scene
    for scene in (
        Scene("losses", (BEFORE, AFTER), frozenset({"lose"}), TWO),
        # Here agents must be able to hear of sheets without the specs written before them: a new leader writes both.
        Scene("succession of a node's two watches", ALIKE, frozenset({"leader dies"}), ONE, gpus=2),
        Scene("restart", CUT, frozenset({"agent dies"}), ONE),
        Scene("expiry and renewal", ALIKE, frozenset({"hold runs out"}), ONE, gpus=2, renews=True),
        Scene("a broken watch", ALIKE, frozenset({"watch breaks"}), ONE, gpus=2),
        Scene("a limit cut and raised", LIMITS, frozenset({"twice"}), ONE),
        Scene("a sheet deleted", CUT, frozenset({"sheet deleted"}), ONE),
        Scene("silence", ALIKE, frozenset({"silence", "driver fails"}), ONE, gpus=2),
    )
}
RENEWALS = 1
"""So many renewals are sent in a plain history at most: it does not forget how many there were."""


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_visible_is_missed_and_nothing_is_made_up(name: str) -> None:
    """What the API server and the machines can be, with every piece of news heard at every moment of its own."""
    scene, contents = PLAIN[name], Contents()
    seen = {_visible(world, contents) for world in plainly(scene, contents)}
    search = Search(scene, Kit(), 1)
    assert search.run(10**6).complete
    rows = np.unique(np.concatenate([level.rows for level in search.levels]), axis=0)
    reached = {_visible(search.model.whole(row), contents) for row in rows}
    assert len(seen) > 8
    assert seen <= reached
    if not scene.renews:
        assert seen == reached


@dataclass(frozen=True)
class Plain:
    """One world, and how many faults and renewals are left in its history."""

    world: World
    faults: int
    renewals: int


Step = tuple[int, Callable[[World], Any]]


def plainly(scene: Scene, contents: Contents) -> Iterator[World]:
    """All worlds that can be reached with at most one fault."""
    frontier = [Plain(begin(scene, Kit()), 1, RENEWALS if scene.renews else 0)]
    seen = {_all_of(frontier[0], contents)}
    while frontier:
        present = frontier.pop()
        yield present.world
        steps = [(present.renewals, *step) for step in plain_steps(present.world, scene)]
        if present.renewals:
            steps += [(present.renewals - 1, 0, _renews(leader.pid)) for leader in present.world.leaders]
        for renewals, cost, step in steps:
            if cost > present.faults:
                continue
            world = present.world.clone()
            step(world)
            world.check()
            world.inflight = [m for at, m in enumerate(world.inflight) if m not in world.inflight[:at]]
            after = Plain(world, present.faults - cost, renewals)
            key = _all_of(after, contents)
            if key not in seen:
                seen.add(key)
                frontier.append(after)


def _renews(pid: int) -> Callable[[World], Any]:
    return lambda world: world.lead_renewal(_leader(world, pid), ROOT)


def _leader(world: World, pid: int) -> Leader:
    return next(leader for leader in world.leaders if leader.pid == pid)


def plain_steps(world: World, scene: Scene) -> Iterator[Step]:
    """How many faults, and what happens."""
    faults = scene.faults
    for at in range(len(world.inflight)):
        yield 0, lambda w, at=at: w.deliver(at)
        if "lose" in faults:
            yield 1, lambda w, at=at: w.inflight.pop(at)
        if "twice" in faults:
            yield 1, lambda w, at=at: w.deliver(at, keep=True)
    if "leader dies" in faults:
        yield 1, lambda w: (w.leaders.pop(), w.elect(clean=False))
    if "sheet deleted" in faults:
        for name in sorted(world.sheets):
            yield 1, lambda w, name=name: w.delete_sheet(name)
    wish = scene.next_wish(world.site)
    if wish is not None:
        yield 0, lambda w: w.change_site(wish)
    for uid in world.pods:
        yield 0, lambda w, uid=uid: w.start(uid)
    for name in world.agents:
        yield from _agents_steps(world, scene, name)
    for leader in world.leaders:
        yield from _leaders_steps(world, scene, leader)


def _agents_steps(world: World, scene: Scene, name: str) -> Iterator[Step]:
    agent, faults = world.agents[name], scene.faults
    if not agent.alive:
        yield 0, lambda w: w.start_agent(name)
        return
    if agent.own is None:
        yield 0, lambda w: w.read_own(name)
    elif agent.node_queue:
        yield 0, lambda w: w.next_own(name)
    if not agent.listed or agent.broken:
        yield 0, lambda w: w.list_sheets(name)
    elif agent.sheet_queue:
        yield 0, lambda w: w.next_sheet(name)
    yield 0, lambda w: act(w, name)
    yield 0, lambda w: w.report(name)
    if "driver fails" in faults:
        yield 1, lambda w: act(w, name, fails=True)
    if "agent dies" in faults:
        yield 1, lambda w: w.kill_agent(name)
    if "hold runs out" in faults:
        yield 1, lambda w: setattr(w.agents[name], "skipped", LONG_AGO)
    if "watch breaks" in faults and agent.listed:
        yield 1, lambda w: setattr(w.agents[name], "broken", True)


def _leaders_steps(world: World, scene: Scene, leader: Leader) -> Iterator[Step]:
    pid = leader.pid
    if leader.site_queue:
        yield 0, lambda w: w.next_site_event(_leader(w, pid))
    if leader.sheet_queue:
        yield 0, lambda w: w.next_sheet_event(_leader(w, pid))
    if leader.node_queue:
        yield 0, lambda w: w.next_node_event(_leader(w, pid))
    yield 0, lambda w: w.lead_sheets(_leader(w, pid))
    yield 0, lambda w: w.lead_nodes(_leader(w, pid))
    if "silence" in scene.faults:
        for name in sorted(leader.heard):
            yield 1, lambda w, name=name: setattr(_leader(w, pid), "heard", _leader(w, pid).heard - {name})
    if leader.outstanding and "lose" in scene.faults:
        under_way = {(m.sender, m.kind, m.name) for m in world.inflight}
        waits = any((pid, *key) in under_way for key in leader.outstanding)
        yield int(waits), lambda w: w.give_up(_leader(w, pid))


def _all_of(plain: Plain, contents: Contents) -> object:
    """As it is: nothing that the model leaves out is left out here."""
    world = plain.world
    agents = tuple(
        (contents.of_spot(world.machines[name], agent), agent.skipped) for name, agent in world.agents.items()
    )
    return (
        plain.faults,
        plain.renewals,
        contents.objects.all(world.sheets[name] for name in sorted(world.sheets)),
        contents.objects.all(world.renewals[name] for name in sorted(world.renewals)),
        contents.objects.all(world.nodes.values()),
        agents,
        tuple(map(contents.of_leader, world.leaders)),
        tuple(sorted(map(contents.of_message, world.inflight), key=repr)),
    )


def _visible(world: World, contents: Contents) -> object:
    """The objects in the API server, every limit with what runs under it, and what agents hold themselves to."""
    twin = world.clone()
    newest = twin.renewals[f"{ROOT}.renewal"].spec.renewal
    assert newest is not None
    for agent in twin.agents.values():
        plain_trust(agent, twin.now, newest.sequence)
    return (
        contents.objects.all(world.sheets[name] for name in sorted(world.sheets)),
        contents.objects.all(world.nodes.values()),
        tuple((machine.boot, machine.gpus) for machine in world.machines.values()),
        tuple(contents.memories.of(agent.memory) for agent in twin.agents.values()),
    )
