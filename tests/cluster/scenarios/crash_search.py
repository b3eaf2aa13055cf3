"""Every write of every chapter is one that an operator dies of, before it is done and after; then long random walks.

The story is gone through again and again. In its n-th round each chapter's operator dies at its n-th write, until a
chapter has fewer writes than that. Each chapter must end exactly as a fresh deploy of what it asks for, and the
budget is checked from the simulated GPUs' true limits all the while.
"""

import itertools
import os

import pytest
from tests.cluster.scenarios.crashes import Mortal, Point
from tests.cluster.scenarios.scene import Scene
from tests.cluster.scenarios.story import STORY, emptied, fresh
from tests.cluster.scenarios.walk import Walker, walk_of

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(0),
    pytest.mark.asyncio(loop_scope="module"),
]
SEED = int(os.environ.get("SEED", "1"))
WALKS = int(os.environ.get("WALKS", "8"))
STEPS = int(os.environ.get("STEPS", "16"))


async def test_killed_at_every_write_of_every_chapter(scene: Scene):
    left = set(STORY)
    async with Mortal(scene) as mortal:
        expected = {name: await fresh(scene, mortal, steps) for name, (_, steps) in STORY.items()}
        await emptied(scene)
        for number in itertools.count(1):
            died: set[str] = set()
            # Nothing but the first chapter and the last can follow each other without those between them.
            chapters = ("apply", "delete") if left <= {"apply", "delete"} else tuple(STORY)
            for landed, name in itertools.product((False, True), chapters):
                point = Point(number, landed)
                crash = mortal.dies_at(point) if name in left else None
                await STORY[name][0](scene)
                await mortal.rested(expected[name], crash)
                assert scene.site.breaches == []
                if crash is not None and crash.happened.is_set():
                    died.add(name)
                    say(f"{mortal.deaths.total()}: {name}, killed {point}")
            left = died
            if not left:
                break
    say(f"{mortal.deaths.total()} deaths, {scene.site.samples} samples, no divergence: {dict(mortal.deaths)}")


@pytest.mark.parametrize("number", range(SEED, SEED + WALKS))
async def test_a_long_walk_of_valid_specs_ends_as_a_fresh_deploy_of_the_last(scene: Scene, number: int):
    steps = walk_of(number, STEPS)
    async with Mortal(scene) as mortal:
        await Walker(scene, mortal).follow(steps)
    say(
        f"walk {number}: {len(steps)} steps, {mortal.deaths.total()} deaths, {mortal.written()} writes, no divergence"
    )


def say(what: str) -> None:
    """To whoever watches `make crash`."""
    print(what, flush=True)  # noqa: T201
