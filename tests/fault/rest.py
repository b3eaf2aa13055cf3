"""The faults stop: everybody is heard, everything arrives, and what was wanted must come about."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.fault.moves import pods
from tests.fault.parts import LOW, Violation
from tests.fault.world import World

REST_ROUNDS = 60


@dataclass
class Score:
    steps: int = 0
    rest_steps: int = 0
    episodes: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)


def rest(world: World, score: Score, root: str = "site") -> None:
    """Machines come on, strangers leave, one leader leads."""
    for name, machine in world.machines.items():
        if not machine.on:
            world.power_on(name)
    for leader in world.leaders[:-1]:
        world.leaders.remove(leader)
    if not world.leaders or world.leaders[-1].term != world.term:
        world.leaders.clear()
        world.elect(clean=False)
    for index, gpus in ((n, m.gpus) for n, m in world.machines.items()):
        for i, gpu in enumerate(gpus):
            if gpu.pod.startswith("foreign"):
                world.set_gpu(index, i, pod="", running=False)
    quiet = 0
    for _ in range(REST_ROUNDS):
        quiet = 0 if _round(world, score, root) else quiet + 1
        if quiet > 1:
            break
    else:
        raise Violation(f"rest: still moving after {REST_ROUNDS} rounds")
    _check_rest(world)


def _state(world: World):
    return tuple(world.sheets.values()), tuple(world.nodes.values()), world.draws()


def _round(world: World, score: Score, root: str) -> bool:
    """Everyone does everything once; says whether anything was still moving."""
    if not world.leaders:
        world.elect(clean=False)
    leader = world.leaders[-1]
    before = _state(world)
    world.give_up(leader)
    leader.heard = frozenset(world.machines)
    while leader.site_queue:
        world.next_site_event(leader)
    while leader.sheet_queue:
        world.next_sheet_event(leader)
    while leader.node_queue:
        world.next_node_event(leader)
    world.lead_sheets(leader)
    world.lead_nodes(leader)
    world.lead_renewal(leader, root)
    _drain(world, score)
    world.lead_ungate(leader)
    world.now += 1_000
    for uid in pods(world, deleted=True):
        world.stop(uid)
    for uid in pods(world, deleted=False):
        world.bind(uid)
    for name, agent in list(world.agents.items()):
        if not agent.alive:
            world.start_agent(name)
        world.read_own(name)
        world.list_sheets(name)
        world.govern(name)
        while world.agents[name].to_set:
            world.set_next(name)
            _step(world, score)
        world.report(name)
        _drain(world, score)
    for uid in pods(world, deleted=False):
        world.start(uid)
        _step(world, score)
    after = _state(world)
    return before != after


def _drain(world: World, score: Score) -> None:
    while world.inflight:
        world.deliver(0)
        _step(world, score)


def _step(world: World, score: Score) -> None:
    world.check()
    score.rest_steps += 1


def _check_rest(world: World) -> None:
    for domain, target in world.site.targets.items():
        caps = {cap.class_name: cap.cap for cap in world.sheets[domain].spec.caps}
        wanted = {name: allowance.cap for name, allowance in target.items()}
        if caps != wanted:
            raise Violation(f"rest: {domain} stays at {caps}, wanted {wanted}")
    for pod in world.pods.values():
        if pod.deleted:
            continue
        held = [gpu for gpu in world.machines[pod.node].gpus if gpu.pod == pod.uid]
        cap = min(world.site.targets[d][pod.class_name].cap for d in world.site.paths[pod.node])
        if not held or any(not gpu.running or gpu.limit != max(LOW, cap) for gpu in held):
            raise Violation(f"rest: {pod} does not run at {cap}: {held}")
    for name, node in world.nodes.items():
        if node.spec.former_paths or node.spec.path != world.site.paths[name] or node.spec.fence:
            raise Violation(f"rest: {name} has not settled: {node.spec}")
