"""A token bucket: a fault in our own logic must not become a fault of the API server.

What may never wait (a lower cap sheet, a Lease's renewal) does not pass here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class RateLimiter:
    """`burst` at once, then `per_second`, in the order of asking."""

    def __init__(self, per_second: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if per_second <= 0 or burst < 1:
            message = f"a rate limit needs per_second > 0 and burst >= 1, not {per_second} and {burst}"
            raise ValueError(message)
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._tokens = float(burst)
        self._at = clock()

    def reserve(self) -> float:
        """Take one place; the seconds until it comes. Places are given in the order of asking."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_second)
        self._at = now
        self._tokens -= 1
        return max(0.0, -self._tokens / self._per_second)

    async def wait(self) -> None:
        seconds = self.reserve()
        if seconds:
            await asyncio.sleep(seconds)
