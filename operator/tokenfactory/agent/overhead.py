"""What a node draws besides its GPUs, learned from its meter, as a maximum that no quiet hour lowers.

A meter and NVML average over different times, so a single difference of the two may be off by as much as the GPUs' load
just moved, either way. The median over some minutes is not: a lag makes as many too high as too low, and one wild
reading is none of them. The highest median ever seen, with a margin, is what is reported; the operator charges it
(`controller/plan/domains.py`), at once where it is more than is charged now, and as a saving only once the node
has been measured for an hour under load, because a quiet node's fans say nothing of a busy one's.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Final

SAMPLES: Final = 30
"""One median, over five minutes at the usual pace."""
SEASONED: Final = 12
"""Medians under load before a figure may lower what is charged: an hour."""
LOADED_PERMILLE: Final = 500
"""Of what the GPUs may draw at most."""
MARGIN_PERMILLE: Final = 100
MARGIN_MILLIWATTS: Final = 50_000
STEP_MILLIWATTS: Final = 25_000
"""Reported in steps, so that noise is no news."""
PLAUSIBLE_PERMILLE: Final = 900
"""A node draws at least what its GPUs do, but for the sensors' errors."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: the node's meter, and what all its GPUs drew just before and after it was read."""

    node_milliwatts: int
    gpu_milliwatts: int
    most_gpu_milliwatts: int
    """Of all GPUs at their highest limits."""

    @property
    def plausible(self) -> bool:
        return self.node_milliwatts * 1000 >= self.gpu_milliwatts * PLAUSIBLE_PERMILLE

    @property
    def rest(self) -> int:
        return max(0, self.node_milliwatts - self.gpu_milliwatts)

    @property
    def loaded(self) -> bool:
        return self.gpu_milliwatts * 1000 >= self.most_gpu_milliwatts * LOADED_PERMILLE


@dataclass(frozen=True, slots=True)
class Learned:
    """What is known so far; `reported_milliwatts` never falls."""

    highest_milliwatts: int = 0
    """The highest median, with its margin, in steps."""
    seasons: int = 0
    reported_milliwatts: int = 0
    window: tuple[Sample, ...] = ()

    @property
    def proven(self) -> bool:
        """What is reported may save something: a figure told early, because more was drawn than charged, may not."""
        return self.seasons >= SEASONED


def resume(reported_milliwatts: int, *, proven: bool) -> Learned:
    """After a restart: the own status of before is the memory."""
    return Learned(reported_milliwatts, SEASONED if proven else 0, reported_milliwatts)


def learn(before: Learned, sample: Sample, charged_milliwatts: int) -> Learned:
    """With one more plausible sample, while the node is charged so much besides its GPUs."""
    window = (*before.window, sample)
    if len(window) < SAMPLES:
        return replace(before, window=window)
    median = int(statistics.median(it.rest for it in window))
    busy = sum(it.loaded for it in window) * 2 > len(window)
    highest = max(before.highest_milliwatts, with_margin(median))
    seasons = before.seasons + busy
    told = before.reported_milliwatts
    if told or seasons >= SEASONED or highest > charged_milliwatts:
        told = max(told, highest)
    return Learned(highest, seasons, told)


def with_margin(milliwatts: int) -> int:
    more = milliwatts * (1000 + MARGIN_PERMILLE) // 1000 + MARGIN_MILLIWATTS
    return -(-more // STEP_MILLIWATTS) * STEP_MILLIWATTS
