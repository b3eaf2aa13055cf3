"""Renewals: the leader tells every tree, a few times per shortest hold, that it is alive.

Apart from the planning loop, so that a long round cannot let the agents' trust run out. A renewal is an object of the
same kind under the same label as the sheets, so an agent that has seen it has seen every sheet before it.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from tokenfactory.api.cap_sheet import CapSheet, labels_of, renewal_name
from tokenfactory.controller.observer import Observer
from tokenfactory.controller.snapshot import Leadership
from tokenfactory.kube.apply import Refused, Writer
from tokenfactory.kube.client import Client, Guard
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.planning.power.sheets import renewed

log = logging.getLogger(__name__)
_PER_HOLD = 4
_SHORTEST_SECONDS = 1.0
_LONGEST_SECONDS = 60.0


class Renewer:
    """One small write per tree and quarter of its shortest hold."""

    def __init__(self, client: Client, observer: Observer, leadership: Leadership, guard: Guard) -> None:
        self._writer = Writer(client, guard=guard)
        self._observer = observer
        self._leadership = leadership
        self._due: dict[str, float] = {}
        self.renewals = 0

    async def run(self) -> None:
        while True:
            now = time.monotonic()
            for tree, hold_seconds in self._trees().items():
                if self._due.get(tree, 0.0) <= now and await self._renew(tree):
                    self._due[tree] = now + min(
                        _LONGEST_SECONDS, max(_SHORTEST_SECONDS, hold_seconds / _PER_HOLD)
                    )
            await asyncio.sleep(0.5)

    def _trees(self) -> dict[str, float]:
        """Shortest hold by tree, from the sheets that agents obey."""
        holds: dict[str, float] = {}
        for sheet in self._observer.sheets:
            if sheet.spec.renewal is None:
                hold = sheet.spec.hold_milliseconds / 1000
                holds[sheet.spec.tree] = min(hold, holds.get(sheet.spec.tree, hold))
        return holds

    async def _renew(self, tree: str) -> bool:
        name = renewal_name(tree)
        held = self._observer.sheets.get(name)
        spec = renewed(
            held.spec if held else None, tree, term=self._leadership.term, wall_ms=time.time_ns() // 1_000_000
        )
        try:
            if held is None:
                answer = await self._writer.create(
                    CapSheet, ("", name), {"spec": spec}, labels=labels_of(spec), urgent=True
                )
            else:
                answer = await self._writer.replace(msgspec.structs.replace(held, spec=spec), urgent=True)
        except (ApiError, UnreachableError) as error:
            log.warning("renewal failed", extra={"tree": tree, "error": str(error)})
            return False
        if isinstance(answer, Refused):
            log.info("renewal refused", extra={"tree": tree, "why": answer.message})
            return False
        self.renewals += 1
        return True
