"""Chapters of a factory's life, each with the way back: what is changed, and what a fresh deploy of its end would be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.scenarios.crashes import Mortal, decides, signs
from tests.cluster.scenarios.outcome import outcome
from tests.cluster.scenarios.scene import RACK, Scene, domain, hall, model, plan

from tokenfactory.twin.demo import storage
from tokenfactory.twin.faultproxy import Match, Seen, writes

CUT = "8.8kW"
"""Both models go on below it, at caps that a fresh deploy gets as well."""
Change = Callable[[Mortal], Awaitable[None]]
Looks = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Chapter:
    """What is changed, and which of the writes that it brings about are counted."""

    name: str
    change: Change
    fresh: tuple[Change, ...] | None = None
    """What somebody would deploy on an empty site who wants what this ends with. None where nobody can: a node is lost.
    Then it must end as it does when no operator dies."""
    counts: Match | None = decides
    """None: it only leads back, and nobody dies."""
    changed_first: bool = False
    """Only what is written after the change counts: it is an operator that is new."""
    over: Change | None = None
    """Waits until what takes others long is done: that nothing is written meanwhile is no end. Of chapters that are not
    `fresh`: what a fresh deploy would be is waited for anyway."""


@dataclass(frozen=True)
class Round:
    """Chapters that lead back to where they begin, so that they can be gone through again and again."""

    name: str
    begin: tuple[Change, ...]
    chapters: tuple[Chapter, ...]
    reset: tuple[Change, ...] = field(default=())
    """Before each further round, with an operator that lives: what remembers the last one is made anew."""


async def applied(mortal: Mortal) -> None:
    scene = mortal.scene
    await scene.apply(scene.factory(model("one", replicas=2), model("two", replicas=1, band=90)))


async def cut(mortal: Mortal) -> None:
    await mortal.scene.limit(CUT)


async def one_removed(mortal: Mortal) -> None:
    scene = mortal.scene
    await scene.apply(scene.factory(model("one", replicas=2)))


async def rolled(mortal: Mortal) -> None:
    """Another image for one model, another replica of the other."""
    scene = mortal.scene
    rolling = model("one", replicas=2, image="1.9.0", env="{name: NIM_LOG_LEVEL, value: DEBUG}")
    await scene.apply(scene.factory(rolling, model("two", replicas=2, band=90)))


async def restored(mortal: Mortal) -> None:
    await mortal.scene.limit("14kW")


async def deleted(mortal: Mortal) -> None:
    await mortal.scene.mine("delete", "tf", "--all", "--wait=false")


async def grouped(mortal: Mortal) -> None:
    """One replica that takes two whole nodes."""
    scene = mortal.scene
    await scene.apply(scene.factory(spanning(1)))


async def ungrouped(mortal: Mortal) -> None:
    """The same model, on one node."""
    scene = mortal.scene
    await scene.apply(scene.factory(model("huge", replicas=1)))


def spanning(replicas: int) -> str:
    """Two nodes each, whole ones."""
    return model("huge", replicas=replicas).replace(
        "gpusPerReplica: 2", "gpusPerReplica: 4\n    nodesPerReplica: 2"
    )


async def stored(mortal: Mortal) -> None:
    """Applied, with a cache that is kept."""
    scene = mortal.scene
    await scene.apply(storage(scene.site.fleet.claims, scene.namespace))
    await scene.apply(scene.factory(model("one", replicas=1) + "\n    checkpoint: {claim: model-cache}"))


async def empty_rack(mortal: Mortal) -> None:
    await mortal.scene.apply(domain("rack-3", "10kW", parent="hall", rack="r3"))


async def new_rack(mortal: Mortal) -> None:
    """A node moves to a rack that is new."""
    await empty_rack(mortal)
    await labelled(mortal.scene, "r3")


async def old_rack(mortal: Mortal) -> None:
    await labelled(mortal.scene, "r2")


async def no_rack(mortal: Mortal) -> None:
    await mortal.scene.kubectl("delete", "pd", "rack-3", "--wait=false")


async def labelled(scene: Scene, rack: str) -> None:
    if scene.site.fleet.nodes["gpu-4"].plan.labels[RACK] == rack:
        return
    await scene.kubectl("label", "node", "gpu-4", f"{RACK}={rack}", "--overwrite")
    scene.site.fleet.nodes["gpu-4"].plan.labels[RACK] = rack


async def edged(mortal: Mortal) -> None:
    """A factory for a room in which there is no node yet."""
    scene = mortal.scene
    await scene.apply(scene.factory(model("one", replicas=1)).replace("models:", "nodeSelector: {room: annex}\n  models:"))  # fmt: skip


async def joined(mortal: Mortal) -> None:
    fifth = plan(5, "r1")
    await mortal.scene.site.fleet.add(type(fifth)(fifth.name, {**fifth.labels, "room": "annex"}, gpus=4))


async def died(mortal: Mortal) -> None:
    """The node is gone at once, with all that it ran; a person says that it is off."""
    scene = mortal.scene
    boot = (await scene.site.get("gn", "gpu-5"))["status"]["bootID"]
    await scene.site.fleet.remove("gpu-5")
    word = {"method": "Person", "by": "test", "at": "2026-11-21T12:00:00Z", "bootID": boot}
    await scene.patch("gn", "gpu-5", {"spec": {"fence": word}}, namespaced=False)


async def missed(mortal: Mortal) -> None:
    """It takes a while until a silent node counts as lost."""
    scene = mortal.scene

    async def is_missed() -> bool:
        factories = (await scene.site.get("tf", namespace=scene.namespace))["items"]
        incidents = [it for each in factories for it in each.get("status", {}).get("incidents", [])]
        return [it["phase"] for it in incidents] == ["Routed"]

    await scene.until("what the node ran to be missed", is_missed)


async def carried_out(mortal: Mortal) -> None:
    """Its Node is deleted, and with it what ran there: only now can Kubernetes know that it will never come back."""
    await mortal.scene.kubectl("delete", "node", "gpu-5", "--ignore-not-found")


async def retired(mortal: Mortal) -> None:
    """Kubernetes takes up to a minute before it deletes the pods of a Node that is gone; then nothing is left of it."""
    await mortal.scene.until("the fifth node to be retired", lambda: _gone(mortal.scene, "gn", "gpu-5"))


async def unbindable(mortal: Mortal) -> None:
    """The nodes of one rack take no pod: kube-scheduler knows why, and the operator does not."""
    await _cores(mortal.scene, "1m")
    await one_removed(mortal)


async def bindable(mortal: Mortal) -> None:
    await _cores(mortal.scene, "64")
    await deleted(mortal)


async def _cores(scene: Scene, count: str) -> None:
    for name in ("gpu-1", "gpu-2"):
        change = f'{{"status":{{"allocatable":{{"cpu":"{count}"}}}}}}'
        await scene.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", change)


async def succeeded(mortal: Mortal) -> None:
    """Another operator takes over from one that is dead, and nothing else changes."""
    await mortal.replace()


def of_pods(seen: Seen) -> bool:
    """Gates and deletions."""
    return writes(seen) and "/pods/" in seen.path


def of_checkpoints(seen: Seen) -> bool:
    return writes(seen) and "/checkpoints" in seen.path


ROUNDS = {
    each.name: each
    for each in (
        Round("factory", (), (Chapter("apply", applied, (applied,)), Chapter("delete", deleted, ()))),
        Round(
            "group",
            (),
            (
                Chapter("apply a group", grouped, (grouped,)),
                Chapter("one node is enough", ungrouped, (ungrouped,)),
                Chapter("it is deleted", deleted, (), None),
            ),
        ),
        Round(
            "rollout",
            (applied,),
            (Chapter("rollout", rolled, (rolled,)), Chapter("roll back", applied, (applied,))),
        ),
        Round(
            "model",
            (applied,),
            (
                Chapter("model removed", one_removed, (one_removed,)),
                Chapter("model added", applied, (applied,)),
            ),
        ),
        Round(
            "limit",
            (applied,),
            (Chapter("cut", cut, (cut, applied)), Chapter("restore", restored, (applied,))),
        ),
        Round(
            "rack",
            (applied,),
            (
                Chapter("a node moves to a new rack", new_rack, (new_rack, applied)),
                Chapter("it moves back", old_rack, (empty_rack, applied)),
                Chapter("the rack is deleted", no_rack, (applied,)),
            ),
        ),
        Round(
            "node",
            (edged,),
            (
                Chapter("a node joins", joined, (joined, edged)),
                Chapter("a node dies", died, over=missed),
                Chapter("its Node is deleted", carried_out, over=retired),
            ),
            reset=(deleted, edged),
        ),
        Round(
            "refusal",
            (),
            (
                Chapter("kube-scheduler refuses", unbindable, (one_removed,), of_pods),
                Chapter("cores are back", bindable, (), None),
            ),
        ),
        Round(
            "checkpoint",
            (),
            (
                Chapter("a cache is saved", stored, (stored,), of_checkpoints),
                Chapter("nobody needs it", deleted, (), None),
            ),
        ),
        Round(
            "signs", (), (Chapter("apply, of signs", applied, (applied,), signs), Chapter("delete it", deleted, (), None))
        ),
        Round(
            "failover",
            (applied,),
            (Chapter("another operator", succeeded, (applied,), writes, changed_first=True),),
        ),
    )
}  # fmt: skip


async def emptied(mortal: Mortal) -> None:
    """No factory, and the site as it was at first."""
    scene = mortal.scene
    await deleted(mortal)
    await scene.until("the site to be empty", scene.empty)
    if "gpu-5" in scene.site.fleet.nodes:
        await died(mortal)
    await carried_out(mortal)
    await retired(mortal)
    await labelled(scene, "r2")
    await scene.until("the third rack to be deleted", lambda: _no_third_rack(scene))
    await scene.apply(hall())


async def _gone(scene: Scene, kind: str, name: str) -> bool:
    return name not in {each["metadata"]["name"] for each in (await scene.site.get(kind))["items"]}


async def _no_third_rack(scene: Scene) -> bool:
    """Its deletion is refused while a node is there."""
    if not await _gone(scene, "pd", "rack-3"):
        await scene.kubectl("delete", "pd", "rack-3", "--ignore-not-found", "--wait=false", check=False)
        return False
    return await _gone(scene, "sheet", "rack-3")


async def fresh(mortal: Mortal, steps: tuple[Change, ...]) -> dict[str, Any]:
    """What there is once that was deployed on an empty site and nothing is written any more."""
    await emptied(mortal)
    for step in steps:
        await step(mortal)
    await told(mortal)
    return await outcome(mortal.scene)


async def told(mortal: Mortal) -> None:
    """Until the operator has seen what there is now, what it started serves, and it has nothing more to write.

    On a busy machine a pod may be silent for long before it serves: that nothing is written then is no rest.
    """
    scene = mortal.scene

    async def seen() -> bool:
        found = [
            *(await scene.site.get("pd"))["items"],
            *(await scene.site.get("tf", namespace=scene.namespace))["items"],
        ]
        return all(
            each.get("status", {}).get("observedGeneration") == each["metadata"]["generation"]
            and "Starting" not in {it["reason"] for it in each["status"].get("conditions", ())}
            for each in found
        )

    await scene.until("the operator to have seen it all", seen)
    await mortal.quiet()
