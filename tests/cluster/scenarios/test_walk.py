"""A short random walk of valid specs ends where a fresh deploy of the last ones does; `make crash` takes longer ones."""

import os

import pytest
from tests.cluster.scenarios.crashes import Mortal
from tests.cluster.scenarios.scene import Scene
from tests.cluster.scenarios.walk import Walker, walk_of

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
]
SEED = int(os.environ.get("SEED", "1"))


async def test_a_walk_of_valid_specs_ends_as_a_fresh_deploy_of_the_last(scene: Scene):
    steps = walk_of(SEED, 5)
    async with Mortal(scene) as mortal:
        await Walker(scene, mortal).follow(steps)
    assert mortal.deaths.total() >= 1
