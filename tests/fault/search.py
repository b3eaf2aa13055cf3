"""The fault search: random histories of a small site, with everything that can go wrong, checked after every step.

    python -m tests.fault.search --steps 1000000 --seed 1

Each episode has a site of its own. At its end the faults stop, and the site must come to rest at what was wanted.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tests.fault.world import (
    DEFAULT,
    HIGH,
    HOLD,
    LOW,
    OVERHEAD,
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

CLASSES = ("ns/f/x@H100", "ns/f/y@H100")
EPISODE_STEPS = 600
REST_ROUNDS = 60

Move = Callable[[World, random.Random], bool]


@dataclass
class Score:
    steps: int = 0
    rest_steps: int = 0
    episodes: int = 0
    moves: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)


# -- sites -------------------------------------------------------------------------------------------------------


def make_site(rng: random.Random) -> tuple[Site, dict[str, Machine]]:
    racks = rng.choice((("r1",), ("r1", "r2"), ("r1", "r2")))
    parents: dict[str, str | None] = {"site": None}
    parents.update(dict.fromkeys(racks, "site"))
    machines, paths = {}, {}
    for i in range(rng.randint(2, 4)):
        name = f"n{i}"
        guarded = rng.random() < 0.85
        machines[name] = Machine(name, guarded, gpus=tuple(Gpu() for _ in range(rng.randint(1, 2))))
        rack = rng.choice(racks)
        paths[name] = ("site",) if rng.random() < 0.2 else ("site", rack)
    site = Site(1, {d: Domain(d, p, 0, HOLD) for d, p in parents.items()}, paths, {})
    return change(site, machines, rng, limits=True), machines


def change(
    site: Site, machines: dict[str, Machine], rng: random.Random, *, limits: bool = False, move: bool = False
) -> Site:
    """Other wishes within the limits, at times other limits. What is wanted always fits, and mostly just so."""
    paths = dict(site.paths)
    racks = [name for name, domain in site.domains.items() if domain.parent]
    if move:
        paths[rng.choice(list(paths))] = rng.choice([("site",), *(("site", rack) for rack in racks)])
    room = {name: domain.usable_milliwatts for name, domain in site.domains.items()}
    for name in site.domains:
        inside = [machine for n, machine in machines.items() if name in paths[n]]
        gpus = sum(len(machine.gpus) for machine in inside)
        foreign = sum(len(machine.gpus) for machine in inside if not machine.guarded)
        floor = OVERHEAD * len(inside) + LOW * gpus + (DEFAULT - LOW) * foreign
        if limits or room[name] < floor:
            room[name] = floor + rng.choice((0, 100 * W, 250 * W, 250 * W, 500 * W, 1000 * W))
    domains = {n: replace(domain, usable_milliwatts=room[n]) for n, domain in site.domains.items()}
    caps = _fill(room, paths, machines, racks, rng)
    targets = {
        name: {c: Allowance(caps[name, c], rng.choice((LOW, caps[name, c]))) for c in CLASSES}
        for name in site.domains
    }
    return Site(site.version + 1, domains, paths, targets)


def class_of(node: str) -> str:
    """Every pod of a node is of the same class, so that what is wanted can be made to fit exactly."""
    return CLASSES[int(node[1:]) % len(CLASSES)]


def _fill(room, paths, machines, racks, rng: random.Random) -> dict[tuple[str, str], int]:
    """Caps that fill the limits in a random order."""
    caps = {(name, c): LOW for name in racks for c in CLASSES} | {("site", c): HIGH for c in CLASSES}
    direct = {class_of(n) for n, path in paths.items() if path == ("site",)}
    for c in CLASSES:
        if c in direct or rng.random() < 0.3:
            caps["site", c] = LOW

    def fits() -> bool:
        load = dict.fromkeys(room, 0)
        for name, path in paths.items():
            machine = machines[name]
            cap = max(LOW, min(caps[d, class_of(name)] for d in path), 0 if machine.guarded else DEFAULT)
            for domain in path:
                load[domain] += OVERHEAD + cap * len(machine.gpus)
        return all(load[name] <= room[name] for name in room)

    order = list(caps)
    rng.shuffle(order)
    for key in order:
        wanted = rng.choice((HIGH, HIGH, rng.randrange(LOW, HIGH, 10 * W)))
        while wanted > caps[key]:
            before, caps[key] = caps[key], wanted
            if fits():
                break
            caps[key] = before
            wanted -= 50 * W
    return caps


# -- what can happen -------------------------------------------------------------------------------------------------


def alive(world: World) -> list[str]:
    return [name for name, agent in world.agents.items() if agent.alive and world.machines[name].on]


def pick(rng: random.Random, things: Sequence):
    return things[rng.randrange(len(things))] if things else None


def deliver(world: World, rng: random.Random) -> bool:
    if not world.inflight:
        return False
    world.deliver(rng.randrange(len(world.inflight)))
    return True


def deliver_unanswered(world: World, rng: random.Random) -> bool:
    if not world.inflight:
        return False
    world.deliver(rng.randrange(len(world.inflight)), answer=False)
    return True


def duplicate(world: World, rng: random.Random) -> bool:
    if not world.inflight:
        return False
    world.deliver(rng.randrange(len(world.inflight)), keep=True, answer=rng.random() < 0.5)
    return True


def lose(world: World, rng: random.Random) -> bool:
    if not world.inflight:
        return False
    world.inflight.pop(rng.randrange(len(world.inflight)))
    return True


def agent_hears(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None:
        return False
    agent = world.agents[name]
    choices = []
    if agent.own is None:
        choices.append(world.read_own)
    elif agent.node_queue:
        choices.append(world.next_own)
    if not agent.listed or agent.broken:
        choices.append(world.list_sheets)
    elif agent.sheet_queue:
        choices += [world.next_sheet, world.next_sheet]
    act = pick(rng, choices)
    if act is None:
        return False
    act(name)
    return True


def agent_acts(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None:
        return False
    agent = world.agents[name]
    if agent.to_set and rng.random() < 0.8:
        world.set_next(name)
        return True
    if agent.decision is not None and rng.random() < 0.5 and world.report(name):
        return True
    world.govern(name)
    return True


def agent_whole_turn(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None:
        return False
    world.govern(name)
    while world.agents[name].to_set:
        world.set_next(name)
    world.report(name)
    return True


def driver_fails(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n in alive(world) if world.agents[n].to_set])
    if name is None:
        return False
    world.set_next(name, fails=True)
    return True


def agent_dies(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None:
        return False
    world.kill_agent(name)
    return True


def agent_starts(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n, a in world.agents.items() if not a.alive and world.machines[n].on])
    if name is None:
        return False
    world.start_agent(name)
    return True


def watch_breaks(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None or not world.agents[name].listed:
        return False
    world.agents[name].broken = True
    return True


def reboots(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n, m in world.machines.items() if m.on])
    if name is None:
        return False
    world.power_off(name)
    world.power_on(name)
    return True


def reloads_driver(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n, m in world.machines.items() if m.on])
    if name is None:
        return False
    world.reload_driver(name)
    return True


def goes_off(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n, m in world.machines.items() if m.on])
    if name is None:
        return False
    world.power_off(name)
    return True


def comes_on(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n, m in world.machines.items() if not m.on])
    if name is None:
        return False
    world.power_on(name)
    return True


def time_passes(world: World, rng: random.Random) -> bool:
    world.now += rng.choice((100, 1_000, 5_000, HOLD // 2, HOLD))
    return True


def suspends(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None:
        return False
    world.agents[name].skipped += rng.choice((1_000, HOLD))
    return True


def one_leader(world: World, rng: random.Random) -> Leader | None:
    """Mostly the one who leads; at times one that does not know that it was deposed."""
    if not world.leaders:
        return None
    return world.leaders[-1] if rng.random() < 0.7 else pick(rng, world.leaders)


def leader_hears(world: World, rng: random.Random) -> bool:
    leader = one_leader(world, rng)
    if leader is None:
        return False
    if leader.site_queue and rng.random() < 0.3:
        world.next_site_event(leader)
    elif leader.node_queue:
        for _ in range(rng.randint(1, min(4, len(leader.node_queue)))):
            world.next_node_event(leader)
    else:
        return False
    return True


def leader_writes_sheets(world: World, rng: random.Random) -> bool:
    leader = one_leader(world, rng)
    return leader is not None and world.lead_sheets(leader)


def leader_writes_nodes(world: World, rng: random.Random) -> bool:
    leader = one_leader(world, rng)
    return leader is not None and world.lead_nodes(leader)


def leader_renews(world: World, rng: random.Random) -> bool:
    leader = one_leader(world, rng)
    if leader is None:
        return False
    world.lead_renewal(leader, "site")
    return True


def leader_ungates(world: World, rng: random.Random) -> bool:
    leader = one_leader(world, rng)
    return leader is not None and world.lead_ungate(leader)


def leader_gives_up(world: World, rng: random.Random) -> bool:
    leader = one_leader(world, rng)
    if leader is None or not leader.outstanding:
        return False
    world.give_up(leader)
    return True


def heartbeat(world: World, rng: random.Random) -> bool:
    leader, name = one_leader(world, rng), pick(rng, list(world.machines))
    if leader is None or name is None:
        return False
    if world.agents[name].alive and world.machines[name].on and rng.random() < 0.7:
        leader.heard |= {name}
    else:
        leader.heard -= {name}
    return True


def new_leader(world: World, rng: random.Random) -> bool:
    """The old one is dead, or lives on without knowing."""
    if len(world.leaders) > 2 or (world.leaders and rng.random() < 0.5):
        world.leaders.pop(0 if rng.random() < 0.5 else -1)
    world.elect(clean=False)
    return True


def clean_handover(world: World, rng: random.Random) -> bool:
    if not world.leaders:
        return False
    leader = world.leaders[-1]
    mine = any(message.sender == leader.pid for message in world.inflight)
    if leader.term != world.term or leader.outstanding or leader.unsettled or mine:
        return False
    world.leaders.remove(leader)
    world.elect(clean=True)
    return True


def people_change(world: World, rng: random.Random) -> bool:
    limits, move = rng.random() < 0.1, rng.random() < 0.15
    world.change_site(change(world.site, world.machines, rng, limits=limits, move=move))
    return True


def wish_pod(world: World, rng: random.Random) -> bool:
    name = pick(rng, list(world.machines))
    size = len(world.machines[name].gpus)
    gpus = rng.randint(1, size)
    if sum(pod.gpus for pod in world.pods.values() if pod.node == name and not pod.deleted) + gpus > size:
        return False
    uid = f"p{len(world.pods)}"
    world.pods[uid] = Pod(uid, name, class_of(name), gpus)
    return True


def delete_pod(world: World, rng: random.Random) -> bool:
    uid = pick(rng, [uid for uid, pod in world.pods.items() if not pod.deleted])
    if uid is None:
        return False
    world.pods[uid] = replace(world.pods[uid], deleted=True)
    return True


def _pods(world: World, *, deleted: bool) -> list[str]:
    return [u for u, pod in world.pods.items() if pod.ungated and pod.deleted == deleted]


def pod_binds(world: World, rng: random.Random) -> bool:
    uid = pick(rng, _pods(world, deleted=False))
    return uid is not None and world.bind(uid)


def pod_starts(world: World, rng: random.Random) -> bool:
    uid = pick(rng, [u for u, pod in world.pods.items() if pod.ungated])
    return uid is not None and world.start(uid)


def pod_stops(world: World, rng: random.Random) -> bool:
    uid = pick(rng, _pods(world, deleted=True))
    if uid is None:
        return False
    world.stop(uid)
    return True


def foreign_pod(world: World, rng: random.Random) -> bool:
    name = pick(rng, [n for n, m in world.machines.items() if not m.guarded and m.on])
    if name is None:
        return False
    for index, gpu in enumerate(world.machines[name].gpus):
        if not gpu.pod:
            world.set_gpu(name, index, pod=f"foreign-{name}", running=True)
            return True
        if gpu.pod.startswith("foreign"):
            world.set_gpu(name, index, pod="", running=False)
            return True
    return False


MOVES: dict[Move, float] = {
    deliver: 16,
    agent_hears: 14,
    agent_acts: 12,
    agent_whole_turn: 10,
    leader_hears: 10,
    leader_writes_sheets: 4,
    leader_writes_nodes: 3,
    leader_renews: 1,
    leader_ungates: 1.5,
    heartbeat: 2,
    pod_binds: 2,
    pod_starts: 4,
    pod_stops: 1.5,
    wish_pod: 1.0,
    time_passes: 0.5,
    people_change: 1.0,
    delete_pod: 0.25,
}
FAULTS: dict[Move, float] = {
    deliver_unanswered: 0.6,
    duplicate: 0.6,
    lose: 0.6,
    driver_fails: 1.5,
    agent_dies: 0.3,
    agent_starts: 1.0,
    watch_breaks: 0.3,
    reboots: 0.2,
    reloads_driver: 0.15,
    goes_off: 0.15,
    comes_on: 0.4,
    suspends: 0.1,
    leader_gives_up: 0.3,
    new_leader: 0.25,
    clean_handover: 0.15,
    foreign_pod: 0.3,
}


# -- running -----------------------------------------------------------------------------------------------------


def episode(seed: int, kit: Kit, score: Score, *, steps: int = EPISODE_STEPS, to_rest: bool = True) -> None:
    """One history. Raises Violation with its seed and its last moves."""
    rng = random.Random(seed)
    site, machines = make_site(rng)
    world = World(site, machines, kit)
    for agent in world.agents.values():
        agent.drift = rng.choice((0, 0, -20, 20))
    for _ in range(6):
        wish_pod(world, rng)
    world.elect(clean=False)
    # Some episodes are mostly calm, some are storms, and each leans on other faults.
    storm = rng.choice((0.0, 0.5, 1.0, 1.0, 3.0))
    moves = {**MOVES, **{fault: weight * storm * rng.choice((0, 1, 2)) for fault, weight in FAULTS.items()}}
    moves[agent_starts] += 0.5
    moves[comes_on] += 0.2
    names, cumulative = list(moves), []
    total = 0.0
    for weight in moves.values():
        total += weight
        cumulative.append(total)
    trail: list[str] = []
    try:
        for move in rng.choices(names, cum_weights=cumulative, k=steps):
            if move(world, rng):
                score.moves[move.__name__] += 1
            trail.append(move.__name__)
            world.check()
            score.steps += 1
        if to_rest:
            rest(world, score)
    except Violation as error:
        raise Violation(
            f"{error} (episode seed {seed}, step {len(trail)}: … {', '.join(trail[-12:])})"
        ) from None
    score.episodes += 1


def rest(world: World, score: Score, root: str = "site") -> None:
    """The faults stop. Everybody is heard, everything arrives, and what was wanted must come about."""
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
    while leader.node_queue:
        world.next_node_event(leader)
    world.lead_sheets(leader)
    world.lead_nodes(leader)
    world.lead_renewal(leader, root)
    _drain(world, score)
    world.lead_ungate(leader)
    world.now += 1_000
    for uid in _pods(world, deleted=True):
        world.stop(uid)
    for uid in _pods(world, deleted=False):
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
    for uid in _pods(world, deleted=False):
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


def search(seed: int, steps: int, kit: Kit | None = None) -> Score:
    """Episodes until so many steps were taken."""
    score = Score()
    kit = kit or Kit()
    number = 0
    while score.steps < steps:
        episode(seed * 1_000_003 + number, kit, score)
        number += 1
    return score


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    try:
        score = search(options.seed, options.steps)
    except Violation as error:
        print(f"violation: {error}")
        return 1
    seconds = time.monotonic() - began
    print(
        f"{score.steps:,} steps and {score.rest_steps:,} more at rest in {score.episodes:,} episodes, seed {options.seed}:"
        f" 0 violations of P1 to P6, every episode came to rest ({seconds:.0f} s, {score.steps / seconds:,.0f} steps/s)"
    )
    for name, count in score.moves.most_common():
        print(f"  {name:<22}{count:>10,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
