"""Reading Prometheus text from a model server that we do not trust.

Fed in chunks as they arrive, so that a document is never held whole; a line, the number of series and every value
are bounded. Only lines whose name is in the engine table are looked at, which is also what makes it fast: a
general parser builds an object for each of the thousands of lines of which two dozen matter.
"""

from __future__ import annotations

import math
import re
from typing import Final

import msgspec

from tokenfactory.agent.engines import COUNTERS, GAUGES, HISTOGRAMS, PROCESS_START, EngineTable, Wanted

LONGEST_LINE: Final = 8192
MOST_SAMPLES: Final = 4096
LARGEST_COUNT: Final = float(2**53)
"""Above this a float no longer counts in ones."""

# Possessive, so that no text can make it take more than one pass.
_LABELS = re.compile(rb'\{(?:[^"{}]|"(?:[^"\\]|\\.)*+")*+\}')
_LE = re.compile(rb'[{,]\s*le="([^"]*)"')

Buckets = dict[float, float]
"""Upper bound (seconds) → observations at or below it."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What one scrape said. Counters by series, so that one of several that restarts is seen as that."""

    engine: str
    generated_tokens: dict[bytes, float]
    prompt_tokens: dict[bytes, float]
    running: float | None
    queued: float | None
    cache: float | None
    time_to_first_token: Buckets
    inter_token_latency: Buckets
    process_start: float | None = None
    refused: int = 0
    """Samples that no honest engine sends: not a number, negative, past counting."""


class ExpositionError(ValueError):
    """The document cannot be used; the message says why."""


class ExpositionReader:
    """Feed chunks, then ask for the reading."""

    def __init__(self, table: EngineTable) -> None:
        self._table = table
        self._wanted = table.wanted
        self._rest = b""
        self._skipping = False
        self._samples = 0
        self._refused = 0
        self._lines_seen = False
        self._process_start: float | None = None
        self._found: dict[tuple[int, str, int], dict[bytes, float]] = {}

    def feed(self, chunk: bytes) -> None:
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if self._skipping and lines:
            lines.pop(0)  # the tail of a line that was too long
            self._skipping = False
        if len(self._rest) > LONGEST_LINE:
            self._rest, self._skipping = b"", True
        wanted = self._wanted
        for line in lines:
            end = line.find(b"{")
            if end < 0:
                end = line.find(b" ")
            name = line[:end]
            entries = wanted.get(name)
            if entries is not None:
                self._sample(entries, line, end)
            elif name == PROCESS_START:
                self._process_start = _value(line[end:])

    def reading(self) -> Reading:
        if self._rest:
            self.feed(b"\n")
        engines = [number for number, field, _ in self._found if field == "generated_tokens"]
        if not engines:
            raise ExpositionError(
                "no token counter of a known engine: the endpoint serves another program's metrics, "
                "or the engine has a name that engines.toml lacks"
            )
        engine = min(engines)
        counters = {field: self._first(engine, field) for field in COUNTERS}
        gauges = {field: self._first(engine, field) for field in GAUGES}
        histograms = {
            field: {float(bound): count for bound, count in self._first(engine, field).items()}
            for field in HISTOGRAMS
        }
        return Reading(
            engine=self._table.engines[engine],
            generated_tokens=counters["generated_tokens"],
            prompt_tokens=counters["prompt_tokens"],
            running=_total(gauges["running"]),
            queued=_total(gauges["queued"]),
            cache=max(gauges["cache"].values(), default=None),
            time_to_first_token=histograms["time_to_first_token"],
            inter_token_latency=histograms["inter_token_latency"],
            process_start=self._process_start,
            refused=self._refused,
        )

    def _first(self, engine: int, field: str) -> dict[bytes, float]:
        ranks = [rank for number, name, rank in self._found if number == engine and name == field]
        return self._found[engine, field, min(ranks)] if ranks else {}

    def _sample(self, entries: tuple[Wanted, ...], line: bytes, end: int) -> None:
        if len(line) > LONGEST_LINE:
            self._refused += 1
            return
        self._samples += 1
        if self._samples > MOST_SAMPLES:
            raise ExpositionError(f"more than {MOST_SAMPLES} series of tokens, queue and latency")
        found = _LABELS.match(line, end)
        labels = found[0] if found else b""
        value = _value(line[end + len(labels) :])
        if value is None:
            self._refused += 1
            return
        for entry in entries:
            if entry.label and entry.label not in labels:
                continue
            series = self._found.setdefault((entry.engine, entry.field, entry.rank), {})
            if entry.bucket:
                self._bucket(series, labels, value, entry.scale)
            else:
                series[labels] = value

    def _bucket(self, series: dict[bytes, float], labels: bytes, value: float, scale: float) -> None:
        found = _LE.search(labels)
        try:
            bound = float(found[1]) * scale if found else math.nan
        except ValueError:
            bound = math.nan
        if math.isnan(bound) or bound < 0:
            self._refused += 1
            return
        key = repr(bound).encode()
        series[key] = series.get(key, 0.0) + value  # engines and models of one pod together


def _value(text: bytes) -> float | None:
    """The sample's value, or None where it is none that can be counted with."""
    parts = text.split(None, 1)
    if not parts or len(parts[0]) > 40:
        return None
    try:
        value = float(parts[0])
    except ValueError:
        return None
    return value if 0.0 <= value <= LARGEST_COUNT else None


def _total(series: dict[bytes, float]) -> float | None:
    return sum(series.values()) if series else None
