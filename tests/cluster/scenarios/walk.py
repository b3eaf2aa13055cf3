"""Random histories of a site: factories and its hall with specs drawn from their CRDs' schemas, cordons, dying operators."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.cluster.scenarios.crashes import Mortal, Point
from tests.cluster.scenarios.outcome import outcome
from tests.cluster.scenarios.scene import hall
from tests.cluster.scenarios.story import emptied, told
from tests.unit.controller.specs import FACTORY, SPANNING, domain_specs, specs

from tokenfactory.twin.demo import storage
from tokenfactory.twin.faultproxy import Crash

AMPLE = "20kW"
MEASURED = {"EfficiencyMet", "SLOMet"}
"""What these say depends on what was metered lately, and so on when one looks."""
Step = tuple[Any, ...]

_names = st.sampled_from(["chat", "search"])


def walk_of(number: int, length: int, *, groups: bool = False) -> list[Step]:
    """The `number`-th walk: always the same. It begins with a factory, and an operator dies in it.

    `groups`: LeaderWorkerSets can be had.
    """
    factories = specs(values=SPANNING if groups else FACTORY)
    steps = st.one_of(
        st.tuples(st.just("apply"), _names, factories),
        st.tuples(st.just("apply"), _names, factories),
        st.tuples(st.just("delete"), _names),
        st.tuples(st.just("hall"), domain_specs()),
        st.tuples(st.just("cordon"), st.integers(1, 4), st.booleans()),
        st.tuples(st.just("crash"), st.integers(1, 12), st.booleans()),
        st.tuples(st.just("writes"), st.integers(1, 15)),
    )
    found: list[list[Step]] = []

    @seed(number)
    @settings(
        max_examples=12, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(
        st.tuples(_names, factories),
        st.tuples(st.integers(1, 12), st.booleans()),
        st.lists(steps, min_size=length, max_size=length),
    )
    def take(first: tuple[Any, ...], crash: tuple[Any, ...], more: list[Step]) -> None:
        found.append([("crash", *crash), ("apply", *first), *more])

    take()
    return [_with_steady_replicas(step) for step in found[-1]]  # the first ones are the simplest


def _with_steady_replicas(step: Step) -> Step:
    """How many there are between min and max is a matter of minutes of traffic. And nobody applies an empty map: once
    its last entry goes, the API server makes it null, which is no map."""
    if step[0] != "apply":
        return step
    spec = _without_empty_maps(json.loads(json.dumps(step[2])))
    for model in spec["models"]:
        least = model.get("replicas", {}).get("min", 1)
        model["replicas"] = {"min": least, "max": least}
    return ("apply", step[1], spec)


def _without_empty_maps(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_empty_maps(each) for each in value]
    if isinstance(value, dict):
        pruned = {name: _without_empty_maps(part) for name, part in value.items()}
        return {name: part for name, part in pruned.items() if part != {}}
    return value


def last_specs(steps: Iterable[Step]) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    for step in steps:
        match step:
            case ("apply", name, spec):
                wanted[name] = spec
            case ("delete", name):
                wanted.pop(name, None)
    return wanted


class Walker:
    def __init__(self, mortal: Mortal) -> None:
        self._scene = mortal.scene
        self._mortal = mortal
        self._crash: Crash | None = None

    async def follow(self, steps: list[Step]) -> None:
        """Then all is made ample again, and what there is must be what a fresh deploy of the last specs gives."""
        await self._scene.apply(storage(self._scene.site.fleet.claims, self._scene.namespace))
        expected = await self._fresh(last_specs(steps))
        await emptied(self._mortal)
        for step in steps:
            await self._take(step)
            await self._tend()
        for number in range(1, 5):
            await self._take(("cordon", number, False))
        await self._scene.apply(hall(AMPLE))
        await self._mortal.rested(expected, self._crash, lasting)
        assert self._scene.site.breaches == []

    async def _fresh(self, wanted: dict[str, Any]) -> dict[str, Any]:
        await self._scene.apply(hall(AMPLE))
        for name, spec in wanted.items():
            await self._take(("apply", name, spec))
        await told(self._mortal)
        return lasting(await outcome(self._scene))

    async def _take(self, step: Step) -> None:
        scene = self._scene
        match step:
            case ("apply", name, spec):
                meta = {"name": name, "namespace": scene.namespace}
                await scene.apply(manifest("TokenFactory", meta, spec))
            case ("delete", name):
                await scene.mine("delete", "tf", name, "--ignore-not-found", "--wait=false")
            case ("hall", spec):
                await scene.apply(manifest("PowerDomain", {"name": "hall"}, spec))
            case ("cordon", number, on):
                await scene.kubectl("cordon" if on else "uncordon", f"gpu-{number}")
            case ("crash", number, landed) if self._crash is None:
                self._crash = self._mortal.dies_at(Point(number, landed))
            case ("writes", count):
                await self._mortal.writes_more(count)

    async def _tend(self) -> None:
        if self._crash is not None and self._crash.happened.is_set():
            await self._mortal.revive()
            self._crash = None


def lasting(found: dict[str, Any]) -> dict[str, Any]:
    """An outcome without what was measured, and without what was saved on the way, which stays."""
    factories = {
        name: {**each, "conditions": [known for known in each["conditions"] if known[0] not in MEASURED]}
        for name, each in found["factories"].items()
    }
    kept = {part: each for part, each in found.items() if part != "checkpoints"}
    return {**kept, "factories": factories}


def manifest(kind: str, meta: dict[str, str], spec: dict[str, Any]) -> str:
    head = {"apiVersion": "tokenfactory.dev/v1alpha1", "kind": kind}
    return json.dumps({**head, "metadata": meta, "spec": spec})
