"""An operator that dies of its own writes, at any write one likes.

It talks to the API server through a proxy, which kills it at its n-th write: before anybody has seen that write, or
once it has been done and before the operator has heard of it. Nothing of this is in the product.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import yaml
from tests.cluster.scenarios.scene import Scene, watts

from tokenfactory.api.cap_sheet import renewal_name
from tokenfactory.twin.faultproxy import Crash, FaultProxy, Seen, nth, writes
from tokenfactory.twin.fleet import SYSTEM_NAMESPACE

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM_NAMESPACE}/leases/tokenfactory-operator"
QUIET_SECONDS = 1.5
PATIENCE_SECONDS = 180.0


def decides(seen: Seen) -> bool:
    """A write that a plan asked for: no sign of life, no Event and no question."""
    signs = "/leases" in seen.path or seen.path.endswith(renewal_name("hall"))
    words = seen.path.endswith("/events") or "/events/" in seen.path
    return writes(seen) and "dryRun" not in seen.query and not signs and not words


@dataclass(frozen=True)
class Point:
    """Where an operator dies: its n-th write, done or not."""

    number: int
    landed: bool

    def __str__(self) -> str:
        return f"{'after' if self.landed else 'before'} write {self.number}"


class Mortal:
    """The site's operator, behind a proxy that can kill it. Afterwards the site has its own again."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._site = scene.site
        self.proxy = FaultProxy(scene.site.cluster.kubeconfig)
        self.deaths: Counter[str] = Counter()
        """By what the write was that it died of."""

    async def __aenter__(self) -> Self:
        await self.proxy.__aenter__()
        identity = yaml.safe_load(self._site.operator_kubeconfig().read_text())["users"][0]["user"]
        token = self._site.folder / "mortal.token"
        token.write_text(identity["token"])
        self._kubeconfig = self.proxy.kubeconfig(self._site.folder, token_file=token)
        await asyncio.to_thread(self._site.stop_operator)
        self._site.start_operator(self._kubeconfig)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self._site.stop_operator, kill=True)
        await self._bury()
        await self.proxy.__aexit__(*exc)
        self._site.start_operator()

    def dies_at(self, point: Point) -> Crash:
        """The next operator that writes so often will die of it. `revive` it once that has happened."""
        crash = Crash(nth(point.number, decides), kill=self._site.kill_operator, landed=point.landed)
        return self.proxy.inject(crash)

    async def revive(self) -> None:
        """Another operator. That the first one is dead is known, so nobody need wait until its Lease has run out."""
        last = [seen for seen in self.proxy.requests if decides(seen)][-1]
        self.deaths[f"{last.method} {last.path.split('/')[-2 if last.method != 'POST' else -1]}"] += 1
        await asyncio.to_thread(self._site.stop_operator, kill=True)
        await self._bury()
        self.proxy.heal()
        self._site.start_operator(self._kubeconfig)

    async def _bury(self) -> None:
        await asyncio.to_thread(self._site.cluster.request, "DELETE", LEASE)

    def written(self) -> int:
        return sum(map(decides, self.proxy.requests))

    async def survived(self, crash: Crash) -> None:
        """It has died there, and another operator goes on."""
        await asyncio.wait_for(crash.happened.wait(), PATIENCE_SECONDS)
        await self.revive()

    async def writes_more(self, count: int) -> None:
        """Until it has written so often, or is dead, or has nothing more to write."""
        until = self.written() + count
        since, seen = asyncio.get_running_loop().time(), self.written()
        while self._site.operator_lives and self.written() < until:
            await asyncio.sleep(0.05)
            now = asyncio.get_running_loop().time()
            if self.written() != seen:
                since, seen = now, self.written()
            if now - since > QUIET_SECONDS:
                return

    async def quiet(self, seconds: float = 12.0) -> None:
        """Until nothing was written for so long: longer than a cap waits before it rises."""
        loop = asyncio.get_running_loop()
        written, since = self.written(), loop.time()
        deadline = since + PATIENCE_SECONDS
        while loop.time() - since < seconds:
            await asyncio.sleep(0.25)
            if self.written() != written:
                written, since = self.written(), loop.time()
            assert loop.time() < deadline, "the operator goes on writing"

    async def rested(
        self,
        expected: Any,
        crash: Crash | None = None,
        matters: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found,
    ) -> None:
        """Until all is as expected and nothing more is written; an operator that dies of `crash` is replaced."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_SECONDS
        written, since = self.written(), loop.time()
        found = None
        while found != expected or loop.time() - since < QUIET_SECONDS:
            await asyncio.sleep(0.25)
            if crash is not None and crash.happened.is_set():
                await self.revive()
                crash = None
            assert self._site.operator_lives, "the operator ended by itself"
            found = matters(await outcome(self._scene))
            if self.written() != written:
                written, since = self.written(), loop.time()
            assert loop.time() < deadline, f"it did not come to rest: {difference(found, expected)}"
        self.proxy.heal()


def difference(found: Any, expected: Any) -> str:
    lines = [
        f"{part}:\n  is   {json.dumps(found[part], default=str)}\n  not  {json.dumps(expected[part], default=str)}"
        for part in expected
        if found[part] != expected[part]
    ]
    return "\n".join(lines) or "it went on writing"


async def outcome(scene: Scene) -> dict[str, Any]:
    """What matters of the site: all but names, times and epochs, and which node a replica came to."""
    site, namespace = scene.site, scene.namespace
    factories = (await site.get("tf", namespace=namespace))["items"]
    hall = await site.status("pd", "hall")
    domains = (await site.get("pd"))["items"]
    sheets = {each["metadata"]["name"]: each["spec"] for each in (await site.get("sheet"))["items"]}
    nodes = (await site.get("gn"))["items"]
    deployments = (await site.get("deploy", namespace=namespace))["items"]
    services = (await site.get("svc", namespace=namespace))["items"]
    pods = (await site.get("pods", namespace=namespace))["items"]
    grants = [grant for node in nodes for grant in node["spec"].get("pods", [])]
    return {
        "factories": {each["metadata"]["name"]: _factory(each) for each in factories},
        "limit": hall.get("limit"),
        "charge": watts(hall.get("charge", "0W")),
        "domains": {each["metadata"]["name"]: _conditions(each["status"]) for each in domains if "status" in each},
        "sheet": sorted((cap["class"], cap["cap"]) for cap in sheets["hall"].get("caps", [])) if "hall" in sheets else [],
        "grants": sorted((grant["class"], grant.get("released", False)) for grant in grants),
        "deployments": sorted(_deployment(each) for each in deployments),
        "services": sorted(each["metadata"]["name"] for each in services),
        "pods": sorted(_pod(each) for each in pods),
        "caps": sorted(
            (gpu.get("class", ""), gpu["enforcedMilliwatts"]) for node in nodes for gpu in node["status"].get("gpus", [])
        ),
        "modes": sorted({node["status"].get("mode", "") for node in nodes}),
    }  # fmt: skip


def _factory(found: dict[str, Any]) -> Any:
    status = found.get("status", {})
    return {
        "seen": status.get("observedGeneration") == found["metadata"]["generation"],
        "ready": status.get("ready"),
        "charge": status.get("charge"),
        "budget": status.get("budget"),
        "conditions": _conditions(status),
        "models": [
            [each.get(part) for part in ("name", "ready", "desired", "cap", "charge")]
            for each in status.get("models", [])
        ],
        "waiting": sorted(each["reason"] for each in status.get("waiting", [])),
    }


def _conditions(status: dict[str, Any]) -> list[list[str]]:
    return sorted([each["type"], each["status"], each["reason"]] for each in status.get("conditions", []))


def _deployment(found: dict[str, Any]) -> list[Any]:
    image = found["spec"]["template"]["spec"]["containers"][0]["image"]
    return [found["metadata"]["name"], found["spec"]["replicas"], image]


def _pod(found: dict[str, Any]) -> list[Any]:
    labels = found["metadata"]["labels"]
    ready = any(
        each["type"] == "Ready" and each["status"] == "True" for each in found["status"].get("conditions", [])
    )
    return [labels.get("tokenfactory.dev/model", ""), ready, bool(found["spec"].get("schedulingGates"))]
