"""Statistical oversubscription: how far charges may exceed a domain's limit because GPUs draw less than they may.

Opt-in, and it trusts that agents live: should every GPU rise to its cap at once, the sheet must cut them before the
breaker trips. So charges never exceed an overload that the breaker bears for longer than `hold` and the brake's
reaction; a node that is silent counts in full; and with few measurements there is no oversubscription at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Final

FEWEST_SAMPLES: Final = 1_000
REACTION_MILLISECONDS: Final = 5_000
BRAKE_PERMILLE: Final = 970
RELEASE_PERMILLE: Final = 900


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment of a domain: what its reporting nodes drew, and what they were charged then."""

    draw_milliwatts: int
    charge_milliwatts: int


@dataclass(frozen=True, slots=True)
class Breaker:
    """The domain's limit, and what its breaker bears: (percent of the limit, milliseconds)."""

    usable_milliwatts: int
    overload: tuple[tuple[int, int], ...]
    hold_milliseconds: int


def ceiling(
    breaker: Breaker, samples: Sequence[Sample], percentile: Decimal, *, silent_milliwatts: int, braking: bool
) -> int:
    """What the charges of this domain may add up to. Use it in place of the usable limit."""
    usable = breaker.usable_milliwatts
    share = draw_share(samples, percentile)
    if braking or share is None or share >= 1000:
        return usable
    bearable = [
        usable * percent // 100
        for percent, milliseconds in breaker.overload
        if milliseconds > breaker.hold_milliseconds + REACTION_MILLISECONDS
    ]
    # P4: what a silent node draws is not known, so it is not scaled down.
    silent = min(silent_milliwatts, usable)
    statistical = silent + (usable - silent) * 1000 // max(1, share)
    return max(usable, min(statistical, max(bearable, default=usable)))


def draw_share(samples: Sequence[Sample], percentile: Decimal) -> int | None:
    """The permille of their charge that nodes do not exceed in this share of moments; None: too little is known."""
    shares = sorted(
        -(-1000 * s.draw_milliwatts // s.charge_milliwatts) for s in samples if s.charge_milliwatts > 0
    )
    if len(shares) < FEWEST_SAMPLES:
        return None
    rank = int((percentile / 100 * len(shares)).to_integral_value(ROUND_CEILING))
    return shares[min(max(rank, 1), len(shares)) - 1]


def brakes(breaker: Breaker, *, draw_milliwatts: int, silent_milliwatts: int, braking: bool) -> bool:
    """Must charges fit the limit now? On near the limit, off only well below it, so that nothing flaps."""
    load = (draw_milliwatts + silent_milliwatts) * 1000
    return load >= breaker.usable_milliwatts * (RELEASE_PERMILLE if braking else BRAKE_PERMILLE)
