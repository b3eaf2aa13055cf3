"""Liveness that means progress: each loop says that it got round, and who stops saying so is dead.

Two readers. The kubelet's probe asks over HTTP. A thread of our own asks as well, because a blocked event loop
answers nobody: it writes down where the loop is stuck and ends the process; caps stay where they are, and a fresh
process reads them back.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from tokenfactory.agent.parts import Clock

log = logging.getLogger(__name__)

EXIT_STUCK: Final = 70


@dataclass
class Progress:
    """When each part of the agent last got round."""

    clock: Clock
    _at: dict[str, float] = field(default_factory=dict)
    _allowed: dict[str, float] = field(default_factory=dict)

    def expect(self, part: str, within_seconds: float) -> None:
        self._allowed[part] = within_seconds
        self._at[part] = self.clock.monotonic()

    def beat(self, part: str) -> None:
        self._at[part] = self.clock.monotonic()

    def late(self) -> dict[str, float]:
        """The parts that are overdue, and for how many seconds nothing was heard of them."""
        now = self.clock.monotonic()
        ages = {part: now - at for part, at in self._at.items()}
        return {part: age for part, age in ages.items() if age > self._allowed.get(part, float("inf"))}


class Watchdog:
    """Ends the process when its loops stand still."""

    def __init__(
        self,
        progress: Progress,
        *,
        every_seconds: float = 5.0,
        grace: float = 3.0,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._progress = progress
        self._every_seconds = every_seconds
        self._grace = grace
        self._end = end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> bool:
        """False, after ending the process, when something is late by more than the grace allows."""
        allowed = self._progress._allowed  # noqa: SLF001  # the same subject in two classes
        dead = {part: age for part, age in self._progress.late().items() if age > allowed[part] * self._grace}
        if not dead:
            return True
        log.critical("no progress, ending so that a fresh agent starts", extra={"late_seconds": dead})
        faulthandler.dump_traceback(all_threads=True)
        self._end(EXIT_STUCK)
        return False

    def _run(self) -> None:
        while not self._stop.wait(self._every_seconds):
            if not self.check():
                return
