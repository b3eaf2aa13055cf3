"""An operator that dies of its own writes, at any write one likes.

It talks to the API server through a proxy, which kills it at its n-th write: before anybody has seen that write, or
once it has been done and before the operator has heard of it. Nothing of this is in the product.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import yaml
from tests.cluster.scenarios.outcome import difference, outcome
from tests.cluster.scenarios.scene import Scene

from tokenfactory.api.cap_sheet import renewal_name
from tokenfactory.twin.faultproxy import Crash, FaultProxy, Match, Seen, nth, writes
from tokenfactory.twin.fleet import SYSTEM_NAMESPACE

LEASE = f"/apis/coordination.k8s.io/v1/namespaces/{SYSTEM_NAMESPACE}/leases/tokenfactory-operator"
ROOT = "hall"
QUIET_SECONDS = 1.5
GLANCE_SECONDS = 0.75
"""So long without a write, and without a look, before all of the site is looked at: that costs a dozen requests."""
PATIENCE_SECONDS = 180.0


def decides(seen: Seen) -> bool:
    """A write that a plan asked for: no sign of life, no Event and no question."""
    return writes(seen) and not signs(seen)


def signs(seen: Seen) -> bool:
    """All other writes: of its own Lease and of renewals, Events, and what is only asked (`dryRun`)."""
    lives = "/leases" in seen.path or seen.path.endswith(f"/{renewal_name(ROOT)}")
    tells = seen.path.endswith("/events") or "/events/" in seen.path
    return writes(seen) and (lives or tells or "dryRun" in seen.query)


@dataclass(frozen=True)
class Point:
    """Where an operator dies: its n-th write of those that count, done or not."""

    number: int
    landed: bool

    def __str__(self) -> str:
        return f"{'after' if self.landed else 'before'} write {self.number}"


class Mortal:
    """The site's operator, behind a proxy that can kill it. Afterwards the site has its own again."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self._site = scene.site
        self.proxy = FaultProxy(scene.site.cluster.kubeconfig)
        self.deaths: Counter[str] = Counter()
        """By what the write was that it died of."""
        self._looked_at = self._decided = 0

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

    def dies_at(self, point: Point, of: Match = decides) -> Crash:
        """The next operator that writes so often will die of it. `revive` it once that has happened."""

        def note(seen: Seen) -> bool:
            dies = counted(seen)
            if dies:
                self.deaths[kind_of(seen)] += 1
            return dies

        counted = nth(point.number, of)
        return self.proxy.inject(Crash(note, kill=self._site.kill_operator, landed=point.landed))

    async def revive(self) -> None:
        """Another operator. That the first one is dead is known, so nobody need wait until its Lease has run out."""
        await asyncio.to_thread(self._site.stop_operator, kill=True)
        await self._bury()
        self.proxy.heal()
        self._site.start_operator(self._kubeconfig)

    async def replace(self) -> None:
        """The operator dies of nothing that it did. What kills its successor stays as it is."""
        await asyncio.to_thread(self._site.stop_operator, kill=True)
        await self._bury()
        self._site.start_operator(self._kubeconfig)

    async def _bury(self) -> None:
        await asyncio.to_thread(self._site.cluster.request, "DELETE", LEASE)

    def written(self) -> int:
        """How many writes were asked for by plans so far."""
        self._decided += sum(map(decides, self.proxy.requests[self._looked_at :]))
        self._looked_at = len(self.proxy.requests)
        return self._decided

    def counted(self, of: Match, since: int) -> int:
        """Those among all requests from the `since`-th on."""
        return sum(map(of, self.proxy.requests[since:]))

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
        *,
        begun: bool = True,
    ) -> None:
        """Until all is as expected and nothing more is written; an operator that dies of `crash` is replaced.

        Unless it has `begun`, and after such a death in any case, an operator must first write something.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_SECONDS
        written, since, looked = self.written(), loop.time(), 0.0
        found = None
        while (
            not begun
            or found != expected
            or loop.time() - since < QUIET_SECONDS
            or self.written() != written
            or (
                crash is not None and crash.met
            )  # it dies, perhaps of a late status, while all is being looked at
        ):
            await asyncio.sleep(0.25)
            if crash is not None and crash.happened.is_set():
                await self.revive()
                crash, begun = None, False
            assert self._site.operator_lives, "the operator ended by itself"
            if self.written() != written:
                begun = True
                written, since, found = self.written(), loop.time(), None
            if loop.time() - max(since, looked) >= GLANCE_SECONDS or loop.time() >= deadline:
                found, looked = matters(await outcome(self.scene)), loop.time()
            assert loop.time() < deadline, (
                f"it did not come to rest: {difference(found, expected) or ('it goes on writing' if begun else 'it does nothing')}"
            )
        self.proxy.heal()


def kind_of(seen: Seen) -> str:
    """What a write was: its verb and what it was of, without names."""
    parts = seen.path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[0] == "namespaces" and len(parts) > 2:
        parts = parts[2:]
    what = "/".join([parts[0], *parts[2:]])
    if seen.path.endswith(f"/{renewal_name(ROOT)}"):
        what += " (renewal)"
    return f"{seen.method} {what}" + (" (asked)" if "dryRun" in seen.query else "")
