"""What can happen in the world at random, and how often: what is meant to happen, and the faults.

A move says whether there was anything to do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from tests.fault.parts import HOLD, Leader, Pod
from tests.fault.sites import change, class_of
from tests.fault.world import World

Move = Callable[[World, random.Random], bool]


def alive(world: World) -> list[str]:
    return [name for name, agent in world.agents.items() if agent.alive and world.machines[name].on]


def pick(rng: random.Random, things: Sequence):
    return things[rng.randrange(len(things))] if things else None


def befalls(rng: random.Random, names: Sequence[str], act: Callable[[str], object]) -> bool:
    """One of them, if there is any."""
    name = pick(rng, names)
    if name is None:
        return False
    act(name)
    return True


def machines(world: World, *, on: bool) -> list[str]:
    return [name for name, machine in world.machines.items() if machine.on == on]


def message(world: World, rng: random.Random, act: Callable[[int], object]) -> bool:
    """One of those under way."""
    if not world.inflight:
        return False
    act(rng.randrange(len(world.inflight)))
    return True


def deliver(world: World, rng: random.Random) -> bool:
    return message(world, rng, world.deliver)


def deliver_unanswered(world: World, rng: random.Random) -> bool:
    return message(world, rng, lambda at: world.deliver(at, answer=False))


def duplicate(world: World, rng: random.Random) -> bool:
    return message(world, rng, lambda at: world.deliver(at, keep=True, answer=rng.random() < 0.5))


def lose(world: World, rng: random.Random) -> bool:
    return message(world, rng, world.inflight.pop)


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
    def turn(name: str) -> None:
        world.govern(name)
        while world.agents[name].to_set:
            world.set_next(name)
        world.report(name)

    return befalls(rng, alive(world), turn)


def driver_fails(world: World, rng: random.Random) -> bool:
    setting = [name for name in alive(world) if world.agents[name].to_set]
    return befalls(rng, setting, lambda name: world.set_next(name, fails=True))


def agent_dies(world: World, rng: random.Random) -> bool:
    return befalls(rng, alive(world), world.kill_agent)


def agent_starts(world: World, rng: random.Random) -> bool:
    dead = [name for name, agent in world.agents.items() if not agent.alive and world.machines[name].on]
    return befalls(rng, dead, world.start_agent)


def watch_breaks(world: World, rng: random.Random) -> bool:
    name = pick(rng, alive(world))
    if name is None or not world.agents[name].listed:
        return False
    world.agents[name].broken = True
    return True


def sheet_deleted(world: World, rng: random.Random) -> bool:
    name = pick(rng, sorted(world.sheets))
    return name is not None and world.delete_sheet(name)


def reboots(world: World, rng: random.Random) -> bool:
    return befalls(rng, machines(world, on=True), lambda name: (world.power_off(name), world.power_on(name)))


def reloads_driver(world: World, rng: random.Random) -> bool:
    return befalls(rng, machines(world, on=True), world.reload_driver)


def goes_off(world: World, rng: random.Random) -> bool:
    return befalls(rng, machines(world, on=True), world.power_off)


def comes_on(world: World, rng: random.Random) -> bool:
    return befalls(rng, machines(world, on=False), world.power_on)


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
    if leader.sheet_queue:
        world.next_sheet_event(leader)
    elif leader.site_queue and rng.random() < 0.3:
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


def pods(world: World, *, deleted: bool) -> list[str]:
    return [u for u, pod in world.pods.items() if pod.ungated and pod.deleted == deleted]


def pod_binds(world: World, rng: random.Random) -> bool:
    uid = pick(rng, pods(world, deleted=False))
    return uid is not None and world.bind(uid)


def pod_starts(world: World, rng: random.Random) -> bool:
    uid = pick(rng, [u for u, pod in world.pods.items() if pod.ungated])
    return uid is not None and world.start(uid)


def pod_stops(world: World, rng: random.Random) -> bool:
    uid = pick(rng, pods(world, deleted=True))
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
