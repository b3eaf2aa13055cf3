"""Wall-clock times as the API writes them, and a clock that also runs while the machine sleeps."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Final

_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def boot_seconds() -> float:
    """Never set back, and never stopped by a suspended machine: what trust over time must be measured with."""
    return time.clock_gettime(_CLOCK)


def rfc3339(at: datetime) -> str:
    """A Time, to the second."""
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_time() -> str:
    """Now, as a MicroTime. For people to read; nothing here decides on another machine's wall clock."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
