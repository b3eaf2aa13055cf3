"""The cut path: a lowered limit becomes lower sheets at once, whatever else the controller is busy with.

It looks at no node. The lower of the present sheet and what the market now wants is safe whoever obeys what, so all it
needs is the supply as the last round saw it, the domains as they are now and the sheets. The round that is under way
meanwhile was planned on the old limit: `generation` changes, and what of it would raise anything is dropped.

A cut that did not land (somebody wrote that sheet first, or the API server did not answer) is tried again over the
sheets as they are then, until there is nothing left to lower. A limit that falls before the first plan is cut as soon as
that plan is made, before any of its writes could take its time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller.actions import PublishSheet
from tokenfactory.controller.actor import Actor
from tokenfactory.controller.compose import Composed
from tokenfactory.controller.plan.bidding import recut
from tokenfactory.controller.plan.domains import usable_now
from tokenfactory.kube.resources import Key
from tokenfactory.planning.power.publish import plan_cuts

log = logging.getLogger(__name__)

Domains = Mapping[Key, PowerDomain]
Sheets = Mapping[Key, CapSheet]
_RETRY_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""After a refusal the newer sheet is usually seen sooner than this; the last is kept to."""


def cuts(
    last: Composed, domains: Domains, sheets: Sheets, wall: datetime, *, owed: bool = False
) -> list[PublishSheet]:
    """Lower sheets for limits that are lower than in the last round. Empty when none is.

    `owed`: an earlier cut may not have landed, so the limits of the last round itself count as lowered.
    """
    if last.books.cleared is None:
        return []
    usable = usable_now(domains.values(), wall)
    before = last.books.grid.domains
    margins = last.books.grid.margins
    usable |= {
        name: margin.under(usable[name]).ceiling_milliwatts
        for name, margin in margins.items()
        if name in usable
    }
    lowered = {name: min(usable[name], before[name].usable_milliwatts) for name in before if name in usable}
    if not owed and all(milliwatts == before[name].usable_milliwatts for name, milliwatts in lowered.items()):
        return []
    targets = recut(last.books.cleared, lowered)
    current = {name: sheet for (_, name), sheet in sheets.items() if sheet.spec.renewal is None}
    writes = plan_cuts(last.books.ledger.with_sheets(current), targets)
    # The root first: its sheet alone lowers everything below it.
    ordered = sorted(writes, key=lambda write: len(last.books.ledger.path(write.spec.domain)))
    return [
        PublishSheet(current[write.spec.domain], write.spec, f"cut: epoch {write.spec.epoch}", lowers=True)
        for write in ordered
    ]


class Cutter:
    """Waits for a change of a domain and publishes what it lowers, until it has landed."""

    def __init__(
        self,
        domains: Callable[[], Domains],
        sheets: Callable[[], Sheets],
        actor: Actor,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._domains = domains
        self._sheets = sheets
        self._actor = actor
        self._clock = clock
        self._changed = asyncio.Event()
        self._last: Composed | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turned: Composed | None = None
        """The plan whose next turn of a timetable is behind us."""
        self._generation = 0
        self._changes = self._judged = 0
        self._usable: Mapping[str, int] = {}
        self._failures = 0
        """How often the cut that is owed has not landed."""
        self.published = 0

    def domain_changed(self) -> None:
        self._changes += 1
        self._changed.set()

    def sheet_changed(self) -> None:
        """What refused a cut may be seen now."""
        if self._failures:
            self._changed.set()

    def generation(self) -> int:
        """Another one whenever a limit has fallen since it was last asked for: also one that has risen in between."""
        if self._judged != self._changes:
            self._judged = self._changes
            usable = usable_now(self._domains().values(), self._clock())
            if any(usable.get(name, 0) < before for name, before in self._usable.items()):
                self._generation += 1
            self._usable = usable
        return self._generation

    def planned(self, composed: Composed) -> None:
        """A round has ended its planning on these facts; a limit may have fallen while it did. From any thread."""
        self._last = composed
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        while True:
            last = self._last
            try:
                await asyncio.wait_for(self._changed.wait(), self._patience(last))
            except TimeoutError:
                if not self._failures:
                    self._turned = last
                    self._changes += 1
            self._changed.clear()
            await self._cut()

    def _patience(self, last: Composed | None) -> float | None:
        """Until a cut is due that no event will announce: one that is owed, or a timetable's."""
        if self._failures:
            return _RETRY_SECONDS[min(self._failures, len(_RETRY_SECONDS)) - 1]
        if last is None or last is self._turned or last.books.grid.seconds_to_change is None:
            return None
        seen = last.books.world.snapshot.wall
        return max(0.05, last.books.grid.seconds_to_change - (self._clock() - seen).total_seconds())

    async def _cut(self) -> None:
        if self._last is None:
            return
        owed = self._failures > 0
        actions = cuts(self._last, self._domains(), self._sheets(), self._clock(), owed=owed)
        if not actions:
            self._failures = 0
            return
        if not owed:
            self._generation += 1
        self.published += len(actions)
        landed = await self._actor.execute(actions)
        self._failures = 0 if landed else self._failures + 1
        log.info("limit lowered", extra={"sheets": len(actions), "landed": landed})
