"""An operator killed at its writes, before they are done or after, ends where a fresh deploy of the last spec does.

A factory is applied, the budget is cut, one of its models is removed: each of these loses its operator once, at a
write that the seed chooses; and a short random walk of valid specs. `make crash` (crash_search.py) goes on until
operators have died at every write there is, and takes longer walks.
"""

import os
import random

import pytest
from tests.cluster.scenarios.crashes import Mortal, Point
from tests.cluster.scenarios.scene import Scene
from tests.cluster.scenarios.story import applied, cut, emptied, fresh, one_removed
from tests.cluster.scenarios.walk import Walker, walk_of

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]
SEED = int(os.environ.get("SEED", "1"))
CHAPTERS = {applied: 8, cut: 3, one_removed: 6}
"""And how many writes each has at the very least: a cut is a sheet for each domain."""


async def test_killed_at_a_write_of_each_chapter_the_end_is_that_of_a_fresh_deploy(scene: Scene):
    chosen = random.Random(SEED)
    async with Mortal(scene) as mortal:
        expected = await fresh(mortal, (cut, one_removed))
        await emptied(mortal)
        for change, writes in CHAPTERS.items():
            crash = mortal.dies_at(Point(chosen.randint(1, writes), landed=chosen.random() < 0.5))
            await change(mortal)
            await mortal.survived(crash)
            await scene.ready()
        await mortal.rested(expected)
    assert sum(mortal.deaths.values()) == 3


async def test_a_walk_of_valid_specs_ends_as_a_fresh_deploy_of_the_last(scene: Scene):
    steps = walk_of(SEED, 5)
    async with Mortal(scene) as mortal:
        await Walker(mortal).follow(steps)
    assert mortal.deaths.total() >= 1
