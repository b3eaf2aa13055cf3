"""Which metric of which serving engine says what: the table in engines.toml, ready for the parser."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Final

import msgspec

COUNTERS: Final = ("generated_tokens", "prompt_tokens")
GAUGES: Final = ("running", "queued", "cache")
HISTOGRAMS: Final = ("time_to_first_token", "inter_token_latency")
PROCESS_START: Final = b"process_start_time_seconds"

_SELECTED = re.compile(r'^(?P<name>[^{]+)(?:\{(?P<label>[^=]+="[^"]*")\})?$')


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One metric name of the table: what it means, for which engine, and how much it is preferred."""

    engine: int
    field: str
    rank: int
    label: bytes = b""
    """`name="value"` that a series must carry to count."""
    scale: float = 1.0
    bucket: bool = False


class EngineTable(msgspec.Struct, frozen=True, kw_only=True):
    engines: tuple[str, ...]
    wanted: dict[bytes, tuple[Wanted, ...]]


@cache
def engine_table() -> EngineTable:
    text = resources.files("tokenfactory.agent").joinpath("engines.toml").read_text(encoding="utf-8")
    return parse_table(text)


def parse_table(text: str) -> EngineTable:
    entries = tomllib.loads(text)["engine"]
    wanted: dict[bytes, list[Wanted]] = {}
    for number, entry in enumerate(entries):
        for key, names in entry.items():
            if key == "name":
                continue
            field, scale = (key.removesuffix("_ms"), 0.001) if key.endswith("_ms") else (key, 1.0)
            if field not in (*COUNTERS, *GAUGES, *HISTOGRAMS):
                raise ValueError(f"engine {entry['name']!r}: {key!r} is nothing that the agent counts")
            for rank, name in enumerate(names):
                found = _SELECTED.match(name)
                if found is None:
                    raise ValueError(f"engine {entry['name']!r}: {name!r} is no metric name")
                bucket = field in HISTOGRAMS
                metric = found["name"] + ("_bucket" if bucket else "")
                wanted.setdefault(metric.encode(), []).append(
                    Wanted(
                        engine=number,
                        field=field,
                        rank=rank,
                        label=(found["label"] or "").encode(),
                        scale=scale,
                        bucket=bucket,
                    )
                )
    return EngineTable(
        engines=tuple(entry["name"] for entry in entries),
        wanted={name: tuple(entries) for name, entries in wanted.items()},
    )
