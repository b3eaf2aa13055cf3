"""Random histories of a site with a statistical domain: loads that rise and fall, and what fails meanwhile.

What such a domain rests on holds here too: agents live, all but one at a time, and then the operator does; nobody is
out of reach of reports for long while the operator is gone.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.fault.parts import HIGH, LOW, OVERHEAD, Gpu, Kit, Machine, Pod, Site, Violation, W
from tests.fault.rest import Score
from tests.fault.sites import class_of
from tests.fault.statistical import HALL, REPORT_MILLISECONDS, SECOND, StatisticalWorld

from tokenfactory.planning.power.lines import Domain
from tokenfactory.planning.power.oversubscription import REACTION_MILLISECONDS, Watch

EPISODE_SECONDS = 300
WARM_UP_SECONDS = 15


def a_surge_that_nobody_tells(kit: Kit, look_second: int) -> None:
    """All have just reported; then no report arrives any more, and everybody asks for all at once."""
    rng = random.Random(7)
    world = _four_servers(kit, rng)
    for life in world.life.values():
        life.reported_at = world.now - REPORT_MILLISECONDS
    for _ in range(2):
        world.elapse(rng)
    for life in world.life.values():
        life.demand, life.mute_until = HIGH, world.now + 180 * SECOND
    world.planned_at[world.leaders[0].pid] -= look_second * SECOND
    if world.true_draw() <= world.hall_limit():
        raise AssertionError("nothing is oversubscribed here")
    for _ in range(90):
        world.elapse(rng)


def a_load_that_hides_from_reports(kit: Kit) -> None:
    """Each node asks for all at nearly all times, but for little just when its next report is due."""
    rng = random.Random(7)
    world = _four_servers(kit, rng)
    for at, life in enumerate(world.life.values()):
        life.reported_at = world.now - (1 + 7 * at) * SECOND
    for _ in range(150):
        for life in world.life.values():
            due = world.now + 2 * SECOND - life.reported_at >= REPORT_MILLISECONDS
            life.demand = 320 * W if due else HIGH
        world.elapse(rng)


def _four_servers(kit: Kit, rng: random.Random) -> StatisticalWorld:
    """At work, oversubscribed, and all asked for little."""
    hold = 3 * SECOND
    watts = 4 * OVERHEAD + 8 * HIGH
    domains = {"site": Domain("site", None, watts, hold), HALL: Domain(HALL, "site", watts * 7 // 8, hold)}
    machines = {f"n{i}": Machine(f"n{i}", guarded=True, gpus=(Gpu(), Gpu())) for i in range(4)}
    overload = ((130, hold + REACTION_MILLISECONDS + SECOND),)
    world = StatisticalWorld(
        Site(1, domains, dict.fromkeys(machines, ("site", HALL)), {}), machines, kit, overload
    )
    _fill(world)
    world.operator_starts({HALL: Watch(counts={600: 2_000})})
    for _ in range(40):
        world.elapse(rng)
    return world


def _fill(world: StatisticalWorld) -> None:
    for name, machine in world.machines.items():
        world.pods[f"p-{name}"] = Pod(f"p-{name}", name, class_of(name), len(machine.gpus))


def make(rng: random.Random, kit: Kit) -> StatisticalWorld:
    """Three or four servers in the hall, and at times one in a rack of its own that is not oversubscribed."""
    hold = rng.choice((3, 8, 20, 45)) * SECOND
    bears = hold + REACTION_MILLISECONDS + rng.choice((1, 1, 10, 60)) * SECOND
    overload = rng.choice((((130, bears),), ((115, 3 * bears), (130, bears)), ((140, bears), (160, 10_000))))
    if rng.random() < 0.35:
        overload = ((125, hold + 2 * SECOND),)  # not for long enough
    count = rng.randint(3, 4)
    machines = {
        f"n{i}": Machine(f"n{i}", guarded=True, gpus=(Gpu(),) * rng.randint(2, 4)) for i in range(count)
    }
    paths = dict.fromkeys(machines, ("site", HALL))
    if rng.random() < 0.4:
        machines["n9"] = Machine("n9", guarded=True, gpus=(Gpu(),))
        paths["n9"] = ("site", "r2")
    gpus = sum(len(machine.gpus) for n, machine in machines.items() if HALL in paths[n])
    full = OVERHEAD * count + HIGH * gpus
    floor = (OVERHEAD * count + LOW * gpus + 4 * (HIGH - LOW)) * 11 // 10
    hall = max(floor, full * rng.randint(60, 94) // 100)
    rest = OVERHEAD + rng.choice((LOW, 400 * W))
    domains = {
        "site": Domain("site", None, rest + rng.choice((hall, full, full)), hold),
        HALL: Domain(HALL, "site", hall, hold),
        "r2": Domain("r2", "site", rest, hold),
    }
    world = StatisticalWorld(Site(1, domains, paths, {}), machines, kit, overload)
    _fill(world)
    for name in machines:
        calm(world, name, rng)
    # Whatever was measured before, the limit holds.
    world.operator_starts({HALL: Watch(counts={rng.choice((300, 600, 700, 800)): 2_000})})
    return world


def calm(world: StatisticalWorld, name: str, rng: random.Random) -> None:
    world.life[name].demand = rng.randrange(LOW // 2, HIGH // 2)


def load_changes(world: StatisticalWorld, rng: random.Random) -> bool:
    name = rng.choice(list(world.life))
    world.life[name].demand = rng.choice((HIGH, rng.randrange(LOW // 2, HIGH)))
    return True


def surges(world: StatisticalWorld, rng: random.Random) -> bool:
    """Everybody asks at once."""
    for life in world.life.values():
        life.demand = HIGH
    return True


def calms(world: StatisticalWorld, rng: random.Random) -> bool:
    for name in world.life:
        calm(world, name, rng)
    return True


def roams(world: StatisticalWorld, rng: random.Random) -> bool:
    """Some nodes have much to do, some little, and that moves on faster than anybody reports."""
    busy = HIGH
    for life in world.life.values():
        life.demand = busy
        busy = rng.choice((HIGH, LOW // 2))
    world.roams = (world.now + rng.choice((40, 120)) * SECOND, rng.choice((3, 7, 11)))
    return True


def is_cut_off(world: StatisticalWorld, rng: random.Random) -> bool:
    """Nothing reaches its agent, nothing comes from it."""
    if _dead(world) or not world.leaders:
        return False
    world.life[rng.choice(list(world.life))].cut_off_until = world.now + rng.choice((5, 20, 90)) * SECOND
    return True


def falls_mute(world: StatisticalWorld, rng: random.Random) -> bool:
    """Its reports are lost, or everybody's; signs of life are not."""
    if not world.leaders:
        return False
    seconds = rng.choice((5, 40, 180, 180))
    for name in [rng.choice(list(world.life))] if rng.random() < 0.5 else world.life:
        world.life[name].mute_until = world.now + seconds * SECOND
    return True


def agent_dies(world: StatisticalWorld, rng: random.Random) -> bool:
    """Its GPUs work on, at the limits that they have. The others must be able to make room for them."""
    name = rng.choice(list(world.life))
    if not _all_reached(world) or not world.leaders:
        return False
    dead = {name, *_dead(world)}
    inside = [machine for n, machine in world.machines.items() if HALL in world.site.paths[n]]
    most = sum(OVERHEAD + (HIGH if m.name in dead else LOW) * len(m.gpus) for m in inside)
    if most > min(limit for _, limit in world.limits) * 19 // 20:
        return False
    world.kill_agent(name)
    return True


def agent_starts(world: StatisticalWorld, rng: random.Random) -> bool:
    if not world.leaders:
        return False
    for name in _dead(world):
        world.start_agent(name)
        return True
    return False


def operator_dies(world: StatisticalWorld, rng: random.Random) -> bool:
    """What it had sent may still arrive."""
    if _dead(world) or not _all_reached(world) or not world.leaders:
        return False
    if world.now < world.limits[-1][0] + 5 * SECOND:
        return False
    world.leaders.clear()
    return True


def operator_starts(world: StatisticalWorld, rng: random.Random) -> bool:
    if world.leaders:
        return False
    world.operator_starts()
    return True


def limit_changes(world: StatisticalWorld, rng: random.Random) -> bool:
    """A cut that no operator sees cuts nothing: fallbacks fit the limit that was known."""
    if not world.leaders:
        return False
    limits = [limit for _, limit in world.limits]
    world.cut_hall(rng.choice((max(limits), max(limits) * 19 // 20)))
    return True


def _dead(world: StatisticalWorld) -> list[str]:
    return [name for name, agent in world.agents.items() if not agent.alive]


def _all_reached(world: StatisticalWorld) -> bool:
    return all(
        world.now >= max(life.cut_off_until, life.mute_until) + 5 * SECOND for life in world.life.values()
    )


Move = Callable[[StatisticalWorld, random.Random], bool]
MOVES: dict[Move, float] = {
    load_changes: 4,
    surges: 5,
    calms: 5,
    roams: 4,
    agent_starts: 3,
    operator_starts: 4,
    limit_changes: 1,
}
FAULTS: dict[Move, float] = {is_cut_off: 2, falls_mute: 3, agent_dies: 4, operator_dies: 4}


def episode(seed: int, kit: Kit, score: Score, *, seconds: int = EPISODE_SECONDS) -> None:
    """One history. Raises Violation with its seed and its last moves."""
    rng = random.Random(seed)
    world = make(rng, kit)
    moves = {**MOVES, **{fault: weight * rng.choice((0, 1, 1, 2)) for fault, weight in FAULTS.items()}}
    names, weights = list(moves), list(moves.values())
    trail: list[str] = []
    try:
        for second in range(seconds):
            if second == WARM_UP_SECONDS:
                for life in world.life.values():
                    life.reported_at -= rng.randrange(REPORT_MILLISECONDS)
            if second >= WARM_UP_SECONDS and rng.random() < 0.2:
                move = rng.choices(names, weights)[0]
                if move(world, rng):
                    score.moves[move.__name__] += 1
                    trail.append(f"{second} s {move.__name__}")
            before = world.steps
            world.elapse(rng)
            score.steps += world.steps - before
    except Violation as error:
        raise Violation(f"{error} (statistical seed {seed}: … {', '.join(trail[-12:])})") from None
    score.episodes += 1
