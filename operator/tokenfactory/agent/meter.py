"""Tokens and joules of the same window, for each pod: pure accounting, no I/O and no clock.

A window runs from one usable reading to the next, however long that takes: both the engine's counters and NVML's
energy counters are cumulative, so a scrape that failed loses nothing but resolution. Whatever is uncertain counts as
fewer tokens, never as more, and tokens per joule is always a ratio of two differences over one window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final

import msgspec

from tokenfactory.agent.exposition import Buckets, Reading
from tokenfactory.api.gpu_node import PodMeter

MOST_GENERATED_PER_GPU_SECOND: Final = 250_000
MOST_PROMPT_PER_GPU_SECOND: Final = 5_000_000
"""Several times what any engine has been seen to do (prompts served from a prefix cache count as well)."""
REBASE_AFTER: Final = 3
"""So many implausible readings in a row are believed as a new starting point, but never counted."""
MOST_SERIES: Final = 512
STALE_AFTER_SECONDS: Final = 60.0
QUANTILE: Final = 0.95


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """What one pod did between two readings."""

    seconds: float
    generated_tokens: int
    prompt_tokens: int
    millijoules: int
    time_to_first_token: float | None
    inter_token_latency: float | None

    @property
    def tokens_per_joule(self) -> float | None:
        return self.generated_tokens * 1000 / self.millijoules if self.millijoules > 0 else None


class EnergyBook:
    """Shares each GPU's energy out among the pods that hold it.

    A GPU's counter that cannot be read is caught up with at the next reading; one that went back (driver reloaded)
    breaks the window of its holders, since what was drawn before is not known.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self.millijoules: dict[str, float] = {}
        self.breaks: dict[str, int] = {}

    def attribute(
        self, counters: Mapping[str, int | None], holders: Mapping[str, Mapping[str, float]]
    ) -> None:
        """`counters`: GPU → millijoules since the driver loaded; `holders`: GPU → pod uid → share (sums to ≤ 1)."""
        for gpu, now in counters.items():
            if now is None:
                continue
            before = self._last.get(gpu)
            self._last[gpu] = now
            if before is None or now < before:
                for uid in holders.get(gpu, ()):
                    self.breaks[uid] = self.breaks.get(uid, 0) + 1
                continue
            for uid, share in holders.get(gpu, {}).items():
                self.millijoules[uid] = self.millijoules.get(uid, 0.0) + (now - before) * share

    def forget_all_but(self, uids: Iterable[str]) -> None:
        keep = set(uids)
        self.millijoules = {uid: value for uid, value in self.millijoules.items() if uid in keep}
        self.breaks = {uid: value for uid, value in self.breaks.items() if uid in keep}


class Counter:
    """One engine counter made of series that may restart, vanish, jump or lie."""

    def __init__(self, most_per_second: float) -> None:
        self._most_per_second = most_per_second
        self._base: dict[bytes, float] = {}
        self._suspicions = 0

    def begin(self, series: Mapping[bytes, float]) -> None:
        self._base = dict(series)
        self._suspicions = 0

    def advance(self, series: Mapping[bytes, float], seconds: float, *, same_process: bool) -> float | None:
        """What was counted since the base, or None where that cannot be true."""
        delta = 0.0
        lied = False
        for key, value in series.items():
            before = self._base.get(key, 0.0)
            if value >= before:
                delta += value - before
            elif same_process:
                lied = True  # a counter of a process that did not restart cannot fall
            else:
                delta += value
        if lied or delta > self._most_per_second * max(seconds, 1.0):
            self._suspicions += 1
            if self._suspicions >= REBASE_AFTER:
                self.begin(series)
            return None
        merged = {**self._base, **series}
        self.begin(merged if len(merged) <= MOST_SERIES else series)
        return delta


class PodAccount:
    """The counters of one pod that are reported; they only grow while `since` stays the same."""

    def __init__(self, *, pod: str, uid: str, gpus: int) -> None:
        self.pod = pod
        self.uid = uid
        self.since = ""
        self.engine = ""
        self.generated_tokens = 0.0
        self.prompt_tokens = 0.0
        self.millijoules = 0.0
        self.last_window: Window | None = None
        self.refused_windows = 0
        self._generated = Counter(MOST_GENERATED_PER_GPU_SECOND * max(gpus, 1))
        self._prompt = Counter(MOST_PROMPT_PER_GPU_SECOND * max(gpus, 1))
        self._reading: Reading | None = None
        self._at = 0.0
        self._read_at = -math.inf
        self._millijoules_at = 0.0
        self._breaks = 0

    def begin(self, reading: Reading, *, at: float, millijoules: float, breaks: int, since: str) -> None:
        """A new starting point: what went before can no longer be compared with what comes."""
        self.since = since
        self.engine = reading.engine
        self.generated_tokens = self.prompt_tokens = self.millijoules = 0.0
        self._generated.begin(reading.generated_tokens)
        self._prompt.begin(reading.prompt_tokens)
        self._close(reading, at, millijoules)
        self._breaks = breaks

    def update(
        self, reading: Reading, *, at: float, millijoules: float, breaks: int, wall: str
    ) -> Window | None:
        """Close a window with this reading, taken at `at` when the pod's share of energy stood at `millijoules`."""
        before = self._reading
        if before is None or breaks != self._breaks or reading.engine != self.engine:
            self.begin(reading, at=at, millijoules=millijoules, breaks=breaks, since=wall)
            return None
        seconds = at - self._at
        if seconds <= 0:
            return None
        self._read_at = at
        same = _same_process(before, reading)
        generated = self._generated.advance(reading.generated_tokens, seconds, same_process=same)
        if generated is None:
            self.refused_windows += 1
            return None  # the window stays open: its joules are charged to the tokens that come
        prompt = self._prompt.advance(reading.prompt_tokens, seconds, same_process=same)
        window = Window(
            seconds=seconds,
            generated_tokens=round(generated),
            prompt_tokens=round(prompt or 0.0),
            millijoules=max(0, round(millijoules - self._millijoules_at)),
            time_to_first_token=quantile(before.time_to_first_token, reading.time_to_first_token),
            inter_token_latency=quantile(before.inter_token_latency, reading.inter_token_latency),
        )
        self.generated_tokens += generated
        self.prompt_tokens += prompt or 0.0
        self.millijoules += max(0.0, millijoules - self._millijoules_at)
        self.last_window = window
        self._close(reading, at, millijoules)
        return window

    def _close(self, reading: Reading, at: float, millijoules: float) -> None:
        self._reading, self._at, self._read_at, self._millijoules_at = reading, at, at, millijoules

    def report(self, now: float) -> PodMeter:
        """What GPUNode.status says; what moves fast is 0 once nothing was heard for a minute."""
        fresh = now - self._read_at <= STALE_AFTER_SECONDS
        reading = self._reading if fresh else None
        window = self.last_window if fresh else None
        return PodMeter(
            pod=self.pod,
            uid=self.uid,
            since=self.since,
            generated_tokens=int(self.generated_tokens),
            prompt_tokens=int(self.prompt_tokens),
            millijoules=int(self.millijoules),
            running=_whole(reading.running if reading else None),
            queued=_whole(reading.queued if reading else None),
            cache_permille=min(1000, _whole((reading.cache or 0.0) * 1000 if reading else None)),
            time_to_first_token_ms=_whole((window.time_to_first_token or 0.0) * 1e3 if window else None),
            inter_token_latency_us=_whole((window.inter_token_latency or 0.0) * 1e6 if window else None),
            tokens_per_kilosecond=_whole(
                window.generated_tokens * 1000 / window.seconds if window and window.seconds > 0 else None
            ),
        )


def quantile(before: Buckets, after: Buckets, q: float = QUANTILE) -> float | None:
    """The q-quantile of what was observed between two states of a histogram, as Prometheus interpolates it.

    None when nothing was observed or when the difference is no histogram (restarted, other bounds, lying).
    """
    if before.keys() != after.keys() or not after:
        return None
    bounds = sorted(after)
    counts = [after[bound] - before[bound] for bound in bounds]
    total = counts[-1]
    if total <= 0 or counts[0] < 0 or any(a > b for a, b in pairwise(counts)):
        return None
    rank = q * total
    lower, below = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= rank:
            if math.isinf(bound):
                return lower
            return lower + (bound - lower) * (rank - below) / (count - below) if count > below else bound
        lower, below = bound, count
    return lower


def _same_process(before: Reading, after: Reading) -> bool:
    """Both say when the process began, and it is the same; where they do not say, it may have restarted."""
    if before.process_start is None or after.process_start is None:
        return False
    return abs(before.process_start - after.process_start) < 1.0


def _whole(value: float | None) -> int:
    return 0 if value is None else min(int(value), 10**12)
