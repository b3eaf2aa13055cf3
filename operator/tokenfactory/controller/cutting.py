"""The cut path: a lowered limit becomes lower sheets at once, whatever else the controller is busy with.

It looks at no node. The lower of the present sheet and what the market now wants is safe whoever obeys what, so all it
needs is the supply as the last round saw it, the domains as they are now and the sheets. The round that is under way
meanwhile was planned on the old limit: `generation` changes, and what of it would raise anything is dropped.
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


def cuts(last: Composed, domains: Domains, sheets: Sheets, wall: datetime) -> list[PublishSheet]:
    """Lower sheets for limits that are lower than in the last round. Empty when none is."""
    if last.books.cleared is None:
        return []
    usable = usable_now(domains.values(), wall)
    before = last.books.grid.domains
    lowered = {name: min(usable[name], before[name].usable_milliwatts) for name in before if name in usable}
    if all(milliwatts == before[name].usable_milliwatts for name, milliwatts in lowered.items()):
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
    """Waits for a change of a domain and publishes what it lowers."""

    def __init__(self, domains: Callable[[], Domains], sheets: Callable[[], Sheets], actor: Actor) -> None:
        self._domains = domains
        self._sheets = sheets
        self._actor = actor
        self._changed = asyncio.Event()
        self._last: Composed | None = None
        self._generation = 0
        self._changes = self._judged = 0
        self._usable: Mapping[str, int] = {}
        self.published = 0

    def domain_changed(self) -> None:
        self._changes += 1
        self._changed.set()

    def generation(self) -> int:
        """Another one whenever a limit has fallen since it was last asked for: also one that has risen in between."""
        if self._judged != self._changes:
            self._judged = self._changes
            usable = usable_now(self._domains().values(), datetime.now(UTC))
            if any(usable.get(name, 0) < before for name, before in self._usable.items()):
                self._generation += 1
            self._usable = usable
        return self._generation

    def planned(self, composed: Composed) -> None:
        """A round has ended its planning on these facts."""
        self._last = composed

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._last is None:
                continue
            actions = cuts(self._last, self._domains(), self._sheets(), datetime.now(UTC))
            if actions:
                self._generation += 1
                self.published += len(actions)
                await self._actor.execute(actions)
                log.info("limit lowered", extra={"sheets": len(actions)})
