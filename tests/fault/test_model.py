"""The smaller scenes to their end, the way of exploring them against a plain one, and every deliberate bug's trace."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.fault.bugs import BUGS
from tests.fault.codes import Contents
from tests.fault.explore import Search, explore
from tests.fault.model import WHERE
from tests.fault.parts import Kit
from tests.fault.scenes import AFTER, ALIKE, BEFORE, ONE, SCENES, TWO, Scene, act, begin
from tests.fault.world import World

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("scene", "states"), [("network", 10_000), ("nodes", 20_000)])
def test_a_scene_is_explored_to_its_end_and_keeps_the_limit(scene: str, states: int) -> None:
    result = explore(SCENES[scene], Kit(), faults=SCENES[scene].most_faults)
    assert result.complete
    assert result.violation == ""
    assert result.states > states


@pytest.mark.parametrize("scene", SCENES)
def test_without_faults_every_order_of_events_keeps_the_limit(scene: str) -> None:
    result = explore(SCENES[scene], Kit(), faults=0)
    assert result.complete
    assert result.violation == ""
    assert result.states > 10


LONG = {"skip read-back", "trust a cap across a reboot"}


@pytest.mark.parametrize("bug", [bug for bug in WHERE if bug not in LONG])
def test_a_deliberate_bug_is_found_with_its_shortest_trace(bug: str) -> None:
    """All but those that take many seconds: these are left to `make model`."""
    scene, faults = WHERE[bug]
    result = explore(SCENES[scene], BUGS[bug], faults=faults)
    assert result.violation
    assert 2 <= len(result.trace) <= 23


PLAIN = (
    Scene("losses", (BEFORE, AFTER), frozenset({"lose"}), TWO),
    # Here agents must be able to hear of sheets without the specs written before them: a new leader writes both.
    Scene("succession of a node's two watches", ALIKE, frozenset({"leader dies"}), ONE, gpus=2),
)


@pytest.mark.parametrize("scene", PLAIN, ids=lambda scene: scene.name)
def test_nothing_visible_is_missed_by_hearing_late_and_by_forgetting_what_no_longer_matters(
    scene: Scene,
) -> None:
    """What the API server and the machines can be, with every piece of news heard at every moment of its own."""
    contents = Contents()
    seen = {_visible(world, contents) for world in _plainly(scene, contents)}
    search = Search(scene, Kit(), 1)
    assert search.run(10**6).complete
    reached = np.concatenate([level.rows for level in search.levels])
    assert len(seen) > 40
    assert {_visible(search.model.whole(state), contents) for state in reached} == seen


def _plainly(scene: Scene, contents: Contents) -> Iterator[World]:
    """All worlds that can be reached with at most one fault, each step taken in a copy of the whole."""
    first = begin(scene, Kit())
    seen = {(_all_of(first, contents), 1)}
    frontier = [(first, 1)]
    while frontier:
        world, left = frontier.pop()
        yield world
        for cost, step in _plain_steps(world, scene):
            if cost > left:
                continue
            twin = world.clone()
            step(twin)
            twin.check()
            twin.inflight = [m for at, m in enumerate(twin.inflight) if m not in twin.inflight[:at]]
            key = (_all_of(twin, contents), left - cost)
            if key not in seen:
                seen.add(key)
                frontier.append((twin, left - cost))


def _plain_steps(world: World, scene: Scene) -> Iterator[tuple[int, object]]:
    for at in range(len(world.inflight)):
        yield 0, lambda w, at=at: w.deliver(at)
        if "lose" in scene.faults:
            yield 1, lambda w, at=at: w.inflight.pop(at)
    if "leader dies" in scene.faults:
        yield 1, lambda w: (w.leaders.pop(), w.elect(clean=False))
    for uid in world.pods:
        yield 0, lambda w, uid=uid: w.start(uid)
    for name, agent in world.agents.items():
        if agent.node_queue:
            yield 0, lambda w, name=name: w.next_own(name)
        if agent.sheet_queue:
            yield 0, lambda w, name=name: w.next_sheet(name)
        yield 0, lambda w, name=name: act(w, name)
        yield 0, lambda w, name=name: w.report(name)
    leader = world.leaders[0]
    if leader.site_queue:
        yield 0, lambda w: w.next_site_event(w.leaders[0])
    if leader.node_queue:
        yield 0, lambda w: w.next_node_event(w.leaders[0])
    yield 0, lambda w: w.lead_sheets(w.leaders[0])
    yield 0, lambda w: w.lead_nodes(w.leaders[0])
    if leader.outstanding and "lose" in scene.faults:
        under_way = {(m.sender, m.kind, m.name) for m in world.inflight}
        waits = any((leader.pid, *key) in under_way for key in leader.outstanding)
        yield int(waits), lambda w: w.give_up(w.leaders[0])


def _all_of(world: World, contents: Contents) -> object:
    return (
        _visible(world, contents),
        tuple(contents.of_spot(world.machines[name], world.agents[name]) for name in world.machines),
        tuple(map(contents.of_leader, world.leaders)),
        tuple(sorted(map(contents.of_message, world.inflight), key=repr)),
    )


def _visible(world: World, contents: Contents) -> object:
    """The objects in the API server, every limit with what runs under it, and what agents hold themselves to."""
    return (
        contents.objects.all(world.sheets[name] for name in sorted(world.sheets)),
        contents.objects.all(world.nodes.values()),
        tuple((machine.boot, machine.gpus) for machine in world.machines.values()),
        tuple(contents.memories.of(agent.memory) for agent in world.agents.values()),
    )
