"""Five chapters of a factory's life: what is changed in each, and what a fresh deploy of its end would be."""

from collections.abc import Awaitable, Callable
from typing import Any

from tests.cluster.scenarios.crashes import Mortal, outcome
from tests.cluster.scenarios.scene import Scene, model

CUT = "8.8kW"
"""Both models go on below it, at caps that a fresh deploy gets as well."""
Change = Callable[[Scene], Awaitable[None]]


async def applied(scene: Scene) -> None:
    await scene.apply(scene.factory(model("one", replicas=2), model("two", replicas=1, band=90)))


async def cut(scene: Scene) -> None:
    await scene.limit(CUT)


async def one_removed(scene: Scene) -> None:
    await scene.apply(scene.factory(model("one", replicas=2)))


async def restored(scene: Scene) -> None:
    await scene.limit("14kW")


async def deleted(scene: Scene) -> None:
    await scene.mine("delete", "tf", "--all", "--wait=false")


STORY: dict[str, tuple[Change, tuple[Change, ...]]] = {
    "apply": (applied, (restored, applied)),
    "cut": (cut, (cut, applied)),
    "model removed": (one_removed, (cut, one_removed)),
    "restore": (restored, (restored, one_removed)),
    "delete": (deleted, (restored,)),
}
"""Each chapter's change, and what a fresh deploy of what it ends with would be."""


async def emptied(scene: Scene) -> None:
    await deleted(scene)
    await scene.until("the site to be empty", scene.empty)
    await restored(scene)


async def fresh(scene: Scene, mortal: Mortal, steps: tuple[Change, ...]) -> dict[str, Any]:
    """What there is once that was deployed on an empty site and nothing is written any more."""
    await emptied(scene)
    for step in steps:
        await step(scene)
    await told(scene, mortal)
    return await outcome(scene)


async def told(scene: Scene, mortal: Mortal) -> None:
    """Until the operator has seen what there is now, and has nothing more to write about it."""

    async def seen() -> bool:
        found = [
            *(await scene.site.get("pd"))["items"],
            *(await scene.site.get("tf", namespace=scene.namespace))["items"],
        ]
        return all(
            each.get("status", {}).get("observedGeneration") == each["metadata"]["generation"]
            for each in found
        )

    await scene.until("the operator to have seen it all", seen)
    await mortal.quiet()
