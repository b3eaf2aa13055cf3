"""The local guard: a GPU that draws more than its cap allows gets a lower cap at once, whatever its sheets say.

A cap that was read back can still fail to bind: firmware that ignores it, a power profile that raises the floor, a
sensor that was believed. The guard looks at what is measured, takes the overshoot off the cap, and gives it back in
small steps only after a long time without one. It never raises a cap above what the sheets allow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

TOLERANCE_PERMILLE: Final = 60
"""Board sensors are off by up to 5 %; the averaged reading adds a little."""
SLACK_MILLIWATTS: Final = 10_000
SETTLE_SECONDS: Final = 3.0
"""A reading is an average over a second, and firmware takes some time: judged only after this."""
STRIKES: Final = 2
"""One reading above is a transient; two in a row are not."""
RELEASE_AFTER_SECONDS: Final = 300.0
RELEASE_STEP_MILLIWATTS: Final = 25_000


@dataclass(frozen=True, slots=True)
class Watched:
    """One GPU as the guard remembers it."""

    withheld_milliwatts: int = 0
    strikes: int = 0
    quiet_since: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One GPU now: what it draws, what was read back as its limit, and since when."""

    draw_milliwatts: int
    enforced_milliwatts: int
    min_milliwatts: int
    since: float


Guard = Mapping[str, Watched]


def watch(guard: Guard, measured: Mapping[str, Measured], now: float) -> dict[str, Watched]:
    """The guard's new state: what it withholds from each GPU's cap."""
    return {
        gpu: _watch_one(guard.get(gpu, Watched(quiet_since=now)), seen, now) for gpu, seen in measured.items()
    }


def _watch_one(before: Watched, seen: Measured, now: float) -> Watched:
    if now - seen.since < SETTLE_SECONDS:
        return before
    allowed = seen.enforced_milliwatts * (1000 + TOLERANCE_PERMILLE) // 1000 + SLACK_MILLIWATTS
    if seen.draw_milliwatts > allowed:
        if before.strikes + 1 < STRIKES:
            return replace(before, strikes=before.strikes + 1, quiet_since=now)
        if seen.enforced_milliwatts <= seen.min_milliwatts:
            return replace(before, strikes=0, quiet_since=now)  # there is nothing left to take
        overshoot = seen.draw_milliwatts - seen.enforced_milliwatts
        return Watched(before.withheld_milliwatts + overshoot, 0, now)
    if before.withheld_milliwatts and now - before.quiet_since >= RELEASE_AFTER_SECONDS:
        return Watched(max(0, before.withheld_milliwatts - RELEASE_STEP_MILLIWATTS), 0, now)
    return replace(before, strikes=0) if before.strikes else before


def guarded(guard: Guard, gpu: str, cap_milliwatts: int) -> int:
    """The cap with what is withheld taken off; NVML's minimum is applied where it is set."""
    watched = guard.get(gpu)
    return cap_milliwatts if watched is None else max(0, cap_milliwatts - watched.withheld_milliwatts)
