"""The fault search: random histories of a small site, with everything that can go wrong, checked after every step.

    python -m tests.fault.search --steps 1000000 --seed 1

Each episode has a site of its own. At its end the faults stop, and the site must come to rest at what was wanted.
Some have a domain that is oversubscribed: see `surges.py`.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence

from tests.fault import surges
from tests.fault.moves import FAULTS, MOVES, agent_starts, comes_on, sheet_deleted, wish_pod
from tests.fault.parts import Kit, Violation
from tests.fault.rest import Score, rest
from tests.fault.sites import make_site
from tests.fault.world import World

EPISODE_STEPS = 600
SHEETS_ARE_DELETED_EVERY = 5
"""In one history of so many, somebody deletes cap sheets too."""
STATISTICAL_EVERY = 16
"""One history of so many is of a site with a statistical domain."""


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
    if seed % SHEETS_ARE_DELETED_EVERY == 0:
        moves[sheet_deleted] = 0.3
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


def search(seed: int, steps: int, kit: Kit | None = None) -> Score:
    """Episodes until so many steps were taken."""
    score = Score()
    kit = kit or Kit()
    number = 0
    while score.steps < steps:
        if number % STATISTICAL_EVERY == STATISTICAL_EVERY - 1:
            surges.episode(seed * 1_000_003 + number, kit, score)
        else:
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
