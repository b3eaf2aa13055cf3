"""Statistical oversubscription: how far charges may exceed a domain's limit because GPUs draw less than they may.

Opt-in, and it trusts that agents live: should every GPU rise to its cap at once, the sheet must cut them before the
breaker trips. So charges never exceed an overload that the breaker bears for longer than `hold` and the brake's
reaction; a node that is silent counts in full; and with few measurements nothing more is charged than is charged now.

`watch` is asked once in each round, with what the domain draws; what it returns says what charges may add up to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, Decimal
from typing import Final

FEWEST_SAMPLES: Final = 1_000
SAMPLE_MILLISECONDS: Final = 5_000
WINDOW_SAMPLES: Final = 12 * 3600 * 1000 // SAMPLE_MILLISECONDS
"""Half of what is remembered: the last twelve to twenty-four hours."""
REPORT_MILLISECONDS: Final = 35_000
"""So long a report holds: an agent reports every half a minute, and who has not since is as good as silent."""
REACTION_MILLISECONDS: Final = REPORT_MILLISECONDS + 10_000
"""From a surge to lower limits: a report grows old, is missed at the next look (5 s), and the rest is for the cut."""
AIM_PERMILLE: Final = 930
"""Of the limit: where the draw of the percentile asked for may lie. The margin to the brake is for the rest."""
BRAKE_PERMILLE: Final = 970
RELEASE_PERMILLE: Final = 900


@dataclass(frozen=True, slots=True)
class Breaker:
    """The domain's limit, and what its breaker bears: (percent of the limit, milliseconds)."""

    usable_milliwatts: int
    overload: tuple[tuple[int, int], ...]
    hold_milliseconds: int

    @property
    def bearable_milliwatts(self) -> int:
        """What it bears until a sheet, or without one the end of hold, has brought the draw down."""
        enough = self.hold_milliseconds + REACTION_MILLISECONDS
        percents = [percent for percent, milliseconds in self.overload if milliseconds > enough]
        return self.usable_milliwatts * max(percents, default=100) // 100


@dataclass(frozen=True, slots=True)
class Load:
    """One moment of a domain: what its reporting nodes draw and are charged, and what the silent ones are charged."""

    draw_milliwatts: int
    charge_milliwatts: int
    silent_milliwatts: int = 0


@dataclass(frozen=True, slots=True)
class Watch:
    """What is remembered of one domain: how often which permille of the charge was drawn, and whether the brake is on."""

    counts: Mapping[int, int] = field(default_factory=dict)
    before: Mapping[int, int] = field(default_factory=dict)
    """The window before."""
    sampled_milliseconds: int | None = None
    braking: bool = False
    brakes: int = 0
    """How often the brake came on."""


@dataclass(frozen=True, slots=True)
class Margin:
    """What charges of a domain may add up to now. Use `ceiling` in place of the usable limit."""

    breaker: Breaker
    load: Load
    share_permille: int | None
    """What nodes draw of their charge at most, in the share of moments asked for; None: too little is known."""
    braking: bool

    @property
    def ceiling_milliwatts(self) -> int:
        usable = self.breaker.usable_milliwatts
        silent = min(self.load.silent_milliwatts, usable)
        if self.braking:
            return usable
        if self.share_permille is None:
            # After a restart what is charged stays: nothing rises by it, and the brake watches.
            statistical = self.load.charge_milliwatts + self.load.silent_milliwatts
        else:
            # P4: what a silent node draws is not known, so it is not scaled down.
            aim = usable * AIM_PERMILLE // 1000
            statistical = silent + max(0, aim - silent) * 1000 // max(1, self.share_permille)
        return max(usable, min(statistical, self.breaker.bearable_milliwatts))

    def under(self, usable_milliwatts: int) -> Margin:
        """The same measurements under another limit."""
        return replace(self, breaker=replace(self.breaker, usable_milliwatts=usable_milliwatts))


def watch(
    before: Watch, breaker: Breaker, percentile: Decimal, load: Load, now_milliseconds: int
) -> tuple[Watch, Margin]:
    """Notes the load, and says what charges may add up to. The clock is one that never goes back."""
    noted = _noted(before, load, now_milliseconds)
    braking = brakes(breaker, load, braking=before.braking)
    after = replace(noted, braking=braking, brakes=before.brakes + (braking and not before.braking))
    return after, Margin(breaker, load, draw_share(after, percentile), braking)


def draw_share(watched: Watch, percentile: Decimal) -> int | None:
    """The permille of their charge that nodes do not exceed in this share of moments; None: too little is known."""
    both = dict(watched.before)
    for share, count in watched.counts.items():
        both[share] = both.get(share, 0) + count
    samples = sum(both.values())
    if samples < FEWEST_SAMPLES:
        return None
    rank = max(1, int((percentile / 100 * samples).to_integral_value(ROUND_CEILING)))
    seen = 0
    for share in sorted(both):
        seen += both[share]
        if seen >= rank:
            break
    return share


def brakes(breaker: Breaker, load: Load, *, braking: bool) -> bool:
    """Must charges fit the limit now? On near the limit, off only well below it, so that nothing flaps."""
    total = (load.draw_milliwatts + load.silent_milliwatts) * 1000
    return total >= breaker.usable_milliwatts * (RELEASE_PERMILLE if braking else BRAKE_PERMILLE)


def _noted(watched: Watch, load: Load, now_milliseconds: int) -> Watch:
    """One sample in each period at most, or busy moments would count more than quiet ones."""
    last = watched.sampled_milliseconds
    if load.charge_milliwatts <= 0 or (last is not None and now_milliseconds - last < SAMPLE_MILLISECONDS):
        return watched
    share = -(-1000 * load.draw_milliwatts // load.charge_milliwatts)
    counts, before = watched.counts, watched.before
    if sum(counts.values()) >= WINDOW_SAMPLES:
        counts, before = {}, counts
    counts = {**counts, share: counts.get(share, 0) + 1}
    return replace(watched, counts=counts, before=before, sampled_milliseconds=now_milliseconds)
