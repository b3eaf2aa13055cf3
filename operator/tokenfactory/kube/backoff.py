"""How long to wait before trying again.

After an API server restarts, thousands of agents come back at once: each waits a random part of a growing time
("full jitter"), so that they do not arrive together.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Backoff:
    """Grows with every wait, starts over once something worked."""

    first_seconds: float = 0.1
    longest_seconds: float = 10.0
    factor: float = 2.0
    draw: Callable[[], float] = random.random
    _ceiling_seconds: float = field(default=0.0, init=False)

    def next(self) -> float:
        """The seconds to wait now: never zero, never above `longest_seconds`."""
        grown = self._ceiling_seconds * self.factor or self.first_seconds
        self._ceiling_seconds = min(grown, self.longest_seconds)
        return self._ceiling_seconds * (0.1 + 0.9 * self.draw())

    def reset(self) -> None:
        self._ceiling_seconds = 0.0
