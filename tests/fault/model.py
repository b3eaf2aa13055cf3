"""Every history of a small site, with the ledger and the governor that ship.

    python -m tests.fault.model [--faults 1] [--states 150000] [--scene NAME] [--bug NAME]

Breadth first, so that the trace of a violation is a shortest one. Each scene begins at rest, with models running at
their caps; then people move watts from one class to another: one cut and one raise. After that everything may happen
in every order: each message late, lost or twice, agents and leaders dying between any two of their steps, reboots,
calls to the driver that fail, watches that break, hold running out. The number of faults in one history is bounded,
nothing else is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.fault.bugs import BUGS
from tests.fault.search import CLASSES, Score, rest
from tests.fault.world import (
    HIGH,
    HOLD,
    LOW,
    OVERHEAD,
    Agent,
    Gpu,
    Kit,
    Leader,
    Machine,
    Pod,
    Site,
    Violation,
    W,
    World,
)

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.lines import Domain

X, Y = CLASSES
Step = tuple[str, int, Callable[[World], Any]]
"""What happens, how many faults it costs, and how."""


@dataclass(frozen=True)
class Scene:
    """A site before and after people changed their mind, and which faults may befall it."""

    name: str
    before: Mapping[str, Mapping[str, int]]
    after: Mapping[str, Mapping[str, int]]
    limit: int
    paths: Mapping[str, tuple[str, ...]]
    faults: frozenset[str]
    back: bool = False
    """People change their mind once more, at any moment."""


def _caps(caps: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Allowance]]:
    return {d: {c: Allowance(w * W, LOW) for c, w in of.items()} for d, of in caps.items()}


SHIFT = {
    "before": {"hall": {X: 500, Y: 700}, "rack": {Y: 300}},
    "after": {"hall": {X: 300, Y: 700}, "rack": {Y: 500}},
    "limit": 2 * OVERHEAD + 800 * W,
    "paths": {"n0": ("hall",), "n1": ("hall", "rack")},
}
NETWORK = frozenset({"lose", "twice", "unanswered", "watch breaks"})
NODES = frozenset({"agent dies", "driver fails", "reboot", "hold runs out", "silence"})
LEADERS = frozenset({"deposed", "leader dies", "lose", "unanswered"})
SCENES = {
    "network": Scene("network", **SHIFT, faults=NETWORK),
    "nodes": Scene("nodes", **SHIFT, faults=NODES),
    "leaders": Scene("leaders", **SHIFT, faults=LEADERS, back=True),
    "epochs": Scene("epochs", **SHIFT, faults=frozenset({"agent dies", "hold runs out"}), back=True),
}


def begin(scene: Scene, kit: Kit) -> World:
    """At rest under the old wishes, and people have just changed their mind."""
    domains = {
        "hall": Domain("hall", None, scene.limit, HOLD),
        "rack": Domain("rack", "hall", OVERHEAD + HIGH, HOLD),
    }
    site = Site(1, domains, scene.paths, _caps(scene.before))
    world = World(site, {n: Machine(n, guarded=True, gpus=(Gpu(),)) for n in scene.paths}, Kit())
    for name, class_name in zip(scene.paths, (X, Y, Y), strict=False):
        world.pods[f"p-{name}"] = Pod(f"p-{name}", name, class_name, 1)
    world.elect(clean=False)
    rest(world, Score(), root="hall")
    world.kit = kit
    world.leaders[-1].claim_from = world.claim_from if kit.claims else 0
    world.change_site(replace(site, version=2, targets=_caps(scene.after)))
    return world


# -- what can happen -------------------------------------------------------------------------------------------------


def steps(world: World, scene: Scene) -> Iterator[Step]:
    faults = scene.faults
    if scene.back and world.site.version == 2:
        again = replace(world.site, version=3, targets=_caps(scene.before))
        yield "people change their mind again", 0, lambda w: w.change_site(again)
    yield from _network(world, faults)
    for name, agent in world.agents.items():
        yield from _agent(world, name, agent, faults)
    for leader in world.leaders:
        yield from _leader(world, leader, faults)
    for uid in world.pods:
        yield f"{uid} starts", 0, lambda w, uid=uid: w.start(uid)


def _network(world: World, faults: frozenset[str]) -> Iterator[Step]:
    for index, message in enumerate(world.inflight):
        what = f"{message.sender}'s {message.kind} {message.name}"
        yield f"{what} arrives", 0, lambda w, i=index: w.deliver(i)
        if "lose" in faults:
            yield f"{what} is lost", 1, lambda w, i=index: w.inflight.pop(i)
        if "twice" in faults:
            yield f"{what} arrives, and again later", 1, lambda w, i=index: w.deliver(i, keep=True)
        if "unanswered" in faults:
            yield f"{what} arrives, its answer does not", 1, lambda w, i=index: w.deliver(i, answer=False)


def _agent(world: World, name: str, agent: Agent, faults: frozenset[str]) -> Iterator[Step]:
    if not agent.alive:
        yield f"agent {name} starts", 0, lambda w: w.start_agent(name)
        return
    if agent.own is None:
        yield f"agent {name} reads its node", 0, lambda w: w.read_own(name)
    elif agent.node_queue:
        yield f"agent {name} hears of its node", 0, lambda w: w.next_own(name)
    if not agent.listed or agent.broken:
        yield f"agent {name} lists sheets", 0, lambda w: w.list_sheets(name)
    elif agent.sheet_queue:
        yield f"agent {name} hears of a sheet", 0, lambda w: w.next_sheet(name)
    yield f"agent {name} acts", 0, lambda w: _act(w, name)
    yield f"agent {name} reports", 0, lambda w: w.report(name)
    if "driver fails" in faults:
        yield f"agent {name} acts, its driver fails", 1, lambda w: _act(w, name, fails=True)
    if "agent dies" in faults:
        yield f"agent {name} dies", 1, lambda w: w.kill_agent(name)
    if "reboot" in faults:
        yield f"{name} reboots", 1, lambda w: (w.power_off(name), w.power_on(name))
    if "watch breaks" in faults and agent.listed and not agent.broken:
        yield f"agent {name}'s watch breaks", 1, lambda w: setattr(w.agents[name], "broken", True)
    if "hold runs out" in faults:
        yield f"hold runs out at {name}", 1, lambda w: setattr(w.agents[name], "skipped", HOLD)


def _act(world: World, name: str, *, fails: bool = False) -> None:
    world.govern(name)
    while world.agents[name].to_set:
        world.set_next(name, fails=fails)


def _leader(world: World, leader: Leader, faults: frozenset[str]) -> Iterator[Step]:
    at, who = world.leaders.index(leader), f"leader {leader.pid}"

    def on(act: Callable[[World, Leader], Any]) -> Callable[[World], Any]:
        return lambda w: act(w, w.leaders[at])

    if leader.site_queue:
        yield f"{who} hears what people want", 0, on(World.next_site_event)
    if leader.node_queue:
        yield f"{who} hears of a node", 0, on(World.next_node_event)
    yield f"{who} plans sheets", 0, on(World.lead_sheets)
    yield f"{who} plans nodes", 0, on(World.lead_nodes)
    if leader.outstanding and {"lose", "unanswered"} & faults:
        waits = any(
            (m.sender, m.kind, m.name) == (leader.pid, *key)
            for m in world.inflight
            for key in leader.outstanding
        )
        yield f"{who} gives up waiting", int(waits), on(World.give_up)
    if "silence" in faults:
        for name in leader.heard:
            yield f"{who} misses {name}", 1, lambda w, n=name: _miss(w.leaders[at], n)
    if leader is world.leaders[-1]:
        if "deposed" in faults:
            yield "another leads, the old one lives on", 1, lambda w: w.elect(clean=False)
        if "leader dies" in faults:
            yield "the leader dies, another leads", 1, lambda w: (w.leaders.pop(at), w.elect(clean=False))


def _miss(leader: Leader, name: str) -> None:
    leader.heard -= {name}


# -- states ----------------------------------------------------------------------------------------------------------


@dataclass
class Codes:
    """Numbers for contents, so that a state is a short tuple. What was seen is kept, so that ids stay theirs."""

    by_id: dict[int, int] = field(default_factory=dict)
    by_content: dict[Any, int] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    def of(self, thing: Any, content: Callable[[Any], Any]) -> int:
        if thing is None:
            return -1
        code = self.by_id.get(id(thing))
        if code is None:
            code = self.by_content.setdefault(content(thing), len(self.by_content))
            self.by_id[id(thing)] = code
            self.kept.append(thing)
        return code


def _sorted(mapping: Mapping[Any, Any]) -> tuple[Any, ...]:
    return tuple(sorted(mapping.items()))


def _object(thing: Any) -> Any:
    meta = thing.metadata
    return (meta.name, meta.resource_version, meta.generation, thing.spec, getattr(thing, "status", None))


def _memory(memory: Any) -> Any:
    heard = tuple((tree, it.sequence, it.at) for tree, it in sorted(memory.heard.items()))
    return (
        memory.boot_id,
        memory.started_at,
        memory.found_own_caps,
        memory.capped,
        _sorted(memory.floors),
        _sorted(memory.acked),
        heard,
        memory.settled,
    )


def _decision(decision: Any) -> Any:
    caps = tuple((uuid, order.cap_milliwatts) for uuid, order in sorted(decision.caps.items()))
    return (
        "decision",
        caps,
        _sorted(decision.epochs),
        decision.generation,
        decision.complete,
        _sorted(decision.startable),
    )


def state_of(world: World, codes: Codes) -> tuple[Any, ...]:
    def objects(things: Any) -> tuple[int, ...]:
        return tuple(codes.of(thing, _object) for thing in things)

    agents = tuple(
        (
            agent.alive,
            codes.of(agent.memory, _memory),
            codes.of(agent.own, _object),
            agent.listed,
            agent.broken,
            objects(agent.sheets[name] for name in sorted(agent.sheets)),
            objects(agent.node_queue),
            objects(agent.sheet_queue),
            codes.of(agent.decision, _decision),
            agent.skipped,
            agent.news,
            agent.renewed_at,
        )
        for agent in world.agents.values()
    )
    leaders = tuple(
        (
            leader.pid,
            leader.site.version,
            tuple(site.version for site in leader.site_queue),
            objects(leader.sheets[name] for name in sorted(leader.sheets)),
            objects(leader.nodes.values()),
            objects(leader.node_queue),
            _sorted(leader.outstanding),
            _sorted(leader.unsettled),
            tuple(sorted(leader.heard)),
        )
        for leader in world.leaders
    )
    messages = sorted(
        (str(m.sender), m.kind, m.name, m.version, m.touch, codes.of(m.body, lambda body: body))
        for m in world.inflight
    )
    return (
        world.site.version,
        tuple((m.boot, m.gpus) for m in world.machines.values()),
        objects(world.sheets.values()),
        objects(world.nodes.values()),
        agents,
        leaders,
        tuple(messages),
        world.term,
        world.claim_from,
        _sorted(world.peaks),
    )


@dataclass
class Result:
    states: int
    depth: int
    complete: bool
    violation: str = ""
    trace: tuple[str, ...] = ()


def explore(scene: Scene, kit: Kit, *, faults: int, most_states: int = 10**9) -> Result:
    """All states that can be reached, breadth first; stops at the first violation."""
    codes = Codes()
    first = begin(scene, kit)
    seen: dict[Any, tuple[Any, str]] = {(state_of(first, codes), faults): (None, "")}
    frontier = [(first, faults, next(iter(seen)))]
    depth = 0
    while frontier:
        following = []
        for world, left, key in frontier:
            for name, cost, act in steps(world, scene):
                if cost > left:
                    continue
                twin = world.clone()
                try:
                    act(twin)
                    twin.check()
                except Violation as error:
                    return Result(len(seen), depth + 1, False, str(error), (*_trace(seen, key), name))
                _drop_copies(twin)
                state = (state_of(twin, codes), left - cost)
                if state not in seen:
                    seen[state] = (key, name)
                    following.append((twin, left - cost, state))
            if len(seen) > most_states:
                return Result(len(seen), depth, False)
        frontier = following
        depth += bool(frontier)
    return Result(len(seen), depth, True)


def _drop_copies(world: World) -> None:
    """The same message twice on its way is the fault that is counted, not an agent that reports twice."""
    kept = []
    for message in world.inflight:
        if message not in kept:
            kept.append(message)
    world.inflight = kept


def _trace(seen: Mapping[Any, tuple[Any, str]], key: Any) -> tuple[str, ...]:
    names = []
    while key is not None:
        key, name = seen[key]
        if name:
            names.append(name)
    return tuple(reversed(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1)
    parser.add_argument("--bug", default="")
    parser.add_argument("--scene", default="")
    parser.add_argument("--states", type=int, default=150_000)
    options = parser.parse_args()
    bad = 0
    for scene in SCENES.values():
        if options.bug or (options.scene and options.scene != scene.name):
            continue
        began = time.monotonic()
        result = explore(scene, Kit(), faults=options.faults, most_states=options.states)
        kind = "all" if result.complete else "the first"
        print(
            f"{scene.name}, up to {options.faults} faults: {kind} {result.states:,} states, depth {result.depth},"
            f" {int(bool(result.violation))} violations ({time.monotonic() - began:.0f} s) {result.violation}",
            flush=True,
        )
        for line in result.trace:
            print(f"    {line}")
        bad += bool(result.violation)
    for name, kit in BUGS.items():
        if options.scene or (options.bug and options.bug != name):
            continue
        bad += _find(name, kit, options)
    return 1 if bad else 0


def _find(name: str, kit: Kit, options: argparse.Namespace) -> int:
    if name not in WHERE:
        return 0
    scene, faults = WHERE[name]
    result = explore(SCENES[scene], kit, faults=faults, most_states=options.states)
    if not result.violation:
        print(f"{name}: not found in {scene} ({result.states:,} states)", flush=True)
        return 1
    print(
        f"{name}: found in {len(result.trace)} steps ({result.states:,} states): {result.violation}",
        flush=True,
    )
    for line in result.trace:
        print(f"    {line}")
    return 0


WHERE = {
    "skip read-back": ("nodes", 2),
    "drop fencing": ("nodes", 1),
    "ignore hold": ("nodes", 1),
    "reuse an epoch": ("epochs", 1),
    "credit an expired hold": ("nodes", 1),
    "raise before lower": ("network", 1),
    "trust a cap across a reboot": ("nodes", 2),
    "skip the claim": ("leaders", 1),
}
"""The scene that brings each bug to light, and how many faults that takes."""

if __name__ == "__main__":
    sys.exit(main())
