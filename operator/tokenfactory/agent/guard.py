"""The local guard: who draws more than its caps allow gets lower caps at once, whatever its sheets say.

A cap that was read back can still fail to bind: firmware that ignores it, a power profile that raises the floor, a
sensor that was believed. The guard looks at what is measured, takes the overshoot off the cap, and gives it back in
small steps only after a long time without one. It never raises a cap above what the sheets allow.

The same for the whole node, where a meter measures it: if it draws more than its GPUs' caps and the overhead that it
is charged, something besides the GPUs draws too much, and only the GPUs can give it back.
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
NODE_TOLERANCE_PERMILLE: Final = 30
"""Meters of power supplies are better than those of boards."""
NODE_SLACK_MILLIWATTS: Final = 50_000
NODE_SETTLE_SECONDS: Final = 15.0
"""BMCs average over several seconds and answer late."""
NODE_PATIENCE_SECONDS: Final = 60.0
"""Limits that change all the time never settle: judged then all the same."""
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


def watch(
    guard: Guard, measured: Mapping[str, Measured], now: float, *, release: bool = True
) -> dict[str, Watched]:
    """The guard's new state: what it withholds from each GPU's cap. A GPU that tells nothing gets nothing back."""
    seen_now = {
        gpu: _watch_one(guard.get(gpu, Watched(quiet_since=now)), seen, now, release=release)
        for gpu, seen in measured.items()
    }
    return {**guard, **seen_now}


def _watch_one(before: Watched, seen: Measured, now: float, *, release: bool) -> Watched:
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
    if release and before.withheld_milliwatts and now - before.quiet_since >= RELEASE_AFTER_SECONDS:
        return Watched(max(0, before.withheld_milliwatts - RELEASE_STEP_MILLIWATTS), 0, now)
    return replace(before, strikes=0) if before.strikes else before


def guarded(guard: Guard, gpu: str, cap_milliwatts: int) -> int:
    """The cap with what is withheld taken off; NVML's minimum is applied where it is set."""
    watched = guard.get(gpu)
    return cap_milliwatts if watched is None else max(0, cap_milliwatts - watched.withheld_milliwatts)


@dataclass(frozen=True, slots=True)
class NodeMeasured:
    """The whole node now: what its meter says, and what its caps and its charged overhead allow."""

    draw_milliwatts: int
    allowed_milliwatts: int
    since: float
    """When a limit last changed."""


@dataclass(frozen=True, slots=True)
class Share:
    """One GPU that can give power back: the cap that its sheets allow, its draw, and the lowest limit there is."""

    cap_milliwatts: int
    draw_milliwatts: int
    min_milliwatts: int


def is_above(seen: NodeMeasured) -> bool:
    return (
        seen.draw_milliwatts
        > seen.allowed_milliwatts * (1000 + NODE_TOLERANCE_PERMILLE) // 1000 + NODE_SLACK_MILLIWATTS
    )


def watch_node(strikes: int, seen: NodeMeasured, now: float) -> tuple[int, int]:
    """(strikes from now on, milliwatts to be taken back at once)."""
    if now - seen.since < NODE_SETTLE_SECONDS:
        return strikes, 0
    if not is_above(seen):
        return 0, 0
    if strikes + 1 < STRIKES:
        return strikes + 1, 0
    return 0, seen.draw_milliwatts - seen.allowed_milliwatts


def take_back(guard: Guard, shares: Mapping[str, Share], excess: int, now: float) -> dict[str, Watched]:
    """The guard after so much was taken off what these GPUs draw, of each by the room above its minimum.

    From what it draws, not from its cap: a cap that does not bind gives nothing back.
    """
    binding = {
        gpu: max(it.min_milliwatts, min(guarded(guard, gpu, it.cap_milliwatts), it.draw_milliwatts))
        for gpu, it in shares.items()
    }
    room = {gpu: binding[gpu] - it.min_milliwatts for gpu, it in shares.items()}
    total = sum(room.values())
    after = dict(guard)
    for gpu, it in shares.items():
        cut = min(room[gpu], -(-excess * room[gpu] // total)) if total else 0
        before = guard.get(gpu, Watched(quiet_since=now))
        withheld = max(before.withheld_milliwatts, it.cap_milliwatts - (binding[gpu] - cut))
        after[gpu] = replace(before, withheld_milliwatts=withheld, quiet_since=now)
    return after
