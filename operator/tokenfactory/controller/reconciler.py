"""The one loop: something changed → observe → plan → act.

Any number of changes between two rounds become one. A short pause lets a burst (a hundred agents acknowledging one
sheet) gather; a lowered limit does not wait for it. Figures that are only measured anew gather longer: of 5,000 nodes
some report at every moment, and a round for each would be a core that never rests. `progress` says when a round last
ended, which is what liveness means here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial

from tokenfactory.controller.actions import Plan
from tokenfactory.controller.actor import Actor
from tokenfactory.controller.snapshot import Snapshot

log = logging.getLogger(__name__)


async def _at_once() -> bool:
    return True


class Reconciler:
    """Plans over the whole snapshot each time; `generation` changes when a cut has made running plans too generous.

    Level-triggered, so a lost event costs a delay and nothing else.
    """

    def __init__(
        self,
        observe: Callable[[], Snapshot],
        plan: Callable[[Snapshot], Plan],
        actor: Actor,
        *,
        generation: Callable[[], int] = lambda: 0,
        caught_up: Callable[[], Awaitable[bool]] = _at_once,
        gather_seconds: float = 0.05,
        report_seconds: float = 1.0,
        retry_seconds: float = 1.0,
    ) -> None:
        self._observe = observe
        self._plan = plan
        self._actor = actor
        self._generation = generation
        self._caught_up = caught_up
        self._gather = gather_seconds
        self._report = report_seconds
        self._reports: asyncio.TimerHandle | None = None
        self._retry = retry_seconds
        self._dirty = asyncio.Event()
        self.rounds = 0
        self.last_round_at = time.monotonic()
        self.last_seconds = 0.0

    def changed(self) -> None:
        self._dirty.set()

    def reported(self) -> None:
        """Figures were measured anew: soon enough, and with the others of their kind."""
        if self._reports is None:
            self._reports = asyncio.get_running_loop().call_later(self._report, self._dirty.set)

    async def run(self) -> None:
        self._dirty.set()
        wait = math.inf
        while True:
            try:
                await asyncio.wait_for(self._dirty.wait(), wait)
            except TimeoutError:
                pass
            else:
                await asyncio.sleep(self._gather)
            self._dirty.clear()
            if self._reports is not None:
                self._reports.cancel()
                self._reports = None
            started = time.monotonic()
            # A raise that one cache does not show yet would leave its watts free for a grant, and the reverse.
            caught_up = await self._caught_up()
            generation = self._generation()
            # Pure and immutable, so it may take its time beside the loop, which goes on taking in events and cuts.
            plan = await asyncio.to_thread(self._plan, self._observe())
            if not self.rounds:
                seconds = round(time.monotonic() - started, 3)
                log.info("first plan made", extra={"actions": len(plan.actions), "seconds": seconds})
            self._actor.begin_round()
            complete = await self._actor.execute(plan.actions, partial(self._is, generation, caught_up))
            self.rounds += 1
            self.last_round_at = time.monotonic()
            self.last_seconds = self.last_round_at - started
            again = min(plan.again_after_seconds, self._actor.seconds_to_status)
            wait = again if complete else min(self._retry, again)

    def _is(self, generation: int, caught_up: bool) -> bool:
        return caught_up and self._generation() == generation

    def liveness(self, longest_seconds: float = 180.0) -> str:
        """Raises once no round has ended for too long."""
        silent = time.monotonic() - self.last_round_at
        if silent > longest_seconds:
            raise RuntimeError(f"no reconcile round has ended for {silent:.0f} s")
        return f"round {self.rounds}, {silent:.0f} s ago"
