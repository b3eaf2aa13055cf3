"""Conditions and figures as a status tells them: rounded to the safe side, and told anew only when they say something new."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Final

import msgspec

from tokenfactory.api.meta import Condition, ConditionStatus
from tokenfactory.api.quantities import Milliwatts, format_power
from tokenfactory.kube.times import rfc3339

Verdict = tuple[bool | None, str, str]
"""(holds? None: cannot be told; reason; message)."""

STEADY: Final = 0.05
"""Of a measured figure: changes up to this share are noise."""
MEASURED: Final = frozenset({"EfficiencyMet", "SLOMet"})
"""Conditions whose messages tell measured figures."""
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?")


def conditions(
    before: Sequence[Condition], verdicts: Mapping[str, Verdict], generation: int, wall: datetime
) -> tuple[Condition, ...]:
    """The time of a transition changes only when the status does."""
    known = {condition.type: condition for condition in before}
    now = rfc3339(wall)
    made = []
    for kind, (holds, reason, words) in verdicts.items():
        status: ConditionStatus = "Unknown" if holds is None else "True" if holds else "False"
        old = known.get(kind)
        since = old.last_transition_time if old is not None and old.status == status else now
        said_before = old is not None and (old.status, old.reason) == (status, reason)
        message = steady(old.message, words) if old and said_before and kind in MEASURED else words
        made.append(
            Condition(
                type=kind,
                status=status,
                reason=reason,
                message=message[:4096],
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return tuple(made)


def turned(before: Sequence[Condition], after: Sequence[Condition]) -> bool:
    """Did a condition change its status or reason? Then people should hear of it at once."""
    return {(c.type, c.status, c.reason) for c in before} != {(c.type, c.status, c.reason) for c in after}


def watts(milliwatts: int) -> str:
    """For people: three to four digits, whole watts below a kilowatt. A charge is rounded up, never down."""
    rounded = -(-milliwatts // 1000) * 1000
    for unit in (10**12, 10**9, 10**6):
        if rounded >= unit:
            step = unit // 1000
            return format_power(Milliwatts(-(-milliwatts // step) * step))
    return format_power(Milliwatts(max(0, rounded)))


def at_most(milliwatts: int) -> str:
    """For people, rounded down: headroom and limits are never overstated."""
    for unit in (10**12, 10**9, 10**6):
        if milliwatts >= unit:
            step = unit // 1000
            return format_power(Milliwatts(milliwatts // step * step))
    return format_power(Milliwatts(max(0, milliwatts // 1000 * 1000)))


def decimal(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def cap_range(milliwatts: Iterable[int]) -> str:
    """`450W`, or `300W-450W` where domains differ."""
    caps = sorted(set(milliwatts))
    if not caps:
        return ""
    low, high = (f"{cap / 1000:.0f}W" for cap in (caps[0], caps[-1]))
    return low if low == high else f"{low}-{high}"


def steady(before: str, after: str) -> str:
    """Measured figures that have hardly moved are told as before: noise is nothing new, and no reason for a write."""
    if _NUMBER.sub("#", before) != _NUMBER.sub("#", after):
        return after
    pairs = zip(map(float, _NUMBER.findall(before)), map(float, _NUMBER.findall(after)), strict=True)
    return before if all(abs(new - old) <= STEADY * max(old, new) for old, new in pairs) else after


def same(one: msgspec.Struct, other: msgspec.Struct) -> bool:
    return bool(msgspec.to_builtins(one) == msgspec.to_builtins(other))
