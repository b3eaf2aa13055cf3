"""Power, time, percent and decimals as people write them, and exactly as numbers.

Manifests hold text (`1.2MW`, `5m`, `3%`, `"3.5"`), because JSON numbers become floats on the way. Code holds
integers of the smallest unit that any part needs: milliwatts (what NVML speaks) and milliseconds. Parsing is
exact or an error: `0.0001W` is refused, not rounded.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Final, NewType

Milliwatts = NewType("Milliwatts", int)
Milliseconds = NewType("Milliseconds", int)

# Forms and sizes are bounded so that all values are exact in milliwatts and milliseconds, fit 64 bits, and mean the
# same to CEL: `duration()` reads a SHORT_DURATION, `quantity()` a power without its W.
_POWER_FORM: Final = (
    r"(0|[1-9][0-9]{0,8})(\.[0-9]{1,3})?W|(0|[1-9][0-9]{0,8})(\.[0-9]{1,6})?kW"
    r"|(0|[1-9][0-9]{0,5})(\.[0-9]{1,9})?MW|(0|[1-9][0-9]{0,2})(\.[0-9]{1,12})?GW"
)
_PERCENT_FORM: Final = r"(0|[1-9][0-9]{0,2})(\.[0-9]{1,3})?%"
POWER_PATTERN: Final = f"^({_POWER_FORM})$"
PERCENT_PATTERN: Final = f"^({_PERCENT_FORM})$"
POWER_OR_PERCENT_PATTERN: Final = f"^({_POWER_FORM}|{_PERCENT_FORM})$"
DURATION_PATTERN: Final = r"^([1-9][0-9]{0,6}(ms|s|m)|[1-9][0-9]{0,3}(h|d))+$"
SHORT_DURATION_PATTERN: Final = r"^([1-9][0-9]{0,6}(ms|s|m)|[1-9][0-9]{0,3}h)+$"
DECIMAL_PATTERN: Final = r"^(0|[1-9][0-9]{0,11})(\.[0-9]{1,9})?$"

_MILLIWATTS_PER: Final = {"W": 10**3, "kW": 10**6, "MW": 10**9, "GW": 10**12}
_MILLISECONDS_PER: Final = {"d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_POWER = re.compile(POWER_PATTERN)
_PERCENT = re.compile(PERCENT_PATTERN)
_DURATION = re.compile(DURATION_PATTERN)
_DURATION_PART = re.compile(r"([0-9]+)(ms|s|m|h|d)")
_DECIMAL = re.compile(DECIMAL_PATTERN)


class QuantityError(ValueError):
    """The text is no such quantity; the message says what to write instead."""


@lru_cache(maxsize=4096)
def parse_power(text: str) -> Milliwatts:
    if not _POWER.fullmatch(text):
        raise QuantityError(
            f"{text!r} is not a power: write a number and W, kW, MW or GW, such as 700W or 1.2MW"
        )
    number = text.rstrip("WkMG")
    value = Fraction(number) * _MILLIWATTS_PER[text[len(number) :]]
    if value.denominator != 1:
        raise QuantityError(
            f"{text!r} is finer than a milliwatt: round it to at most three decimals of a watt"
        )
    return Milliwatts(int(value))


@lru_cache(maxsize=4096)
def format_power(power: Milliwatts) -> str:
    """The exact text in the largest unit that leaves a whole part; parse_power gives the same value back."""
    for unit in ("GW", "MW", "kW"):
        if power >= _MILLIWATTS_PER[unit]:
            return _plain(Fraction(power, _MILLIWATTS_PER[unit])) + unit
    return _plain(Fraction(power, 1000)) + "W"


def is_percent(text: str) -> bool:
    return text.endswith("%")


@lru_cache(maxsize=4096)
def parse_percent(text: str) -> Fraction:
    """`75%` is 3/4."""
    if not _PERCENT.fullmatch(text):
        raise QuantityError(f"{text!r} is not a percentage: write for example 75% or 2.5%")
    return Fraction(text[:-1]) / 100


def parse_power_or_percent(text: str, whole: Milliwatts) -> Milliwatts:
    """A power as it stands, or that share of `whole`, rounded down: a limit is never more than was written."""
    if is_percent(text):
        return Milliwatts(int(parse_percent(text) * whole))
    return parse_power(text)


@lru_cache(maxsize=4096)
def parse_duration(text: str) -> Milliseconds:
    if not _DURATION.fullmatch(text):
        raise QuantityError(f"{text!r} is not a duration: write for example 500ms, 15s, 5m, 1h30m or 7d")
    return Milliseconds(sum(int(n) * _MILLISECONDS_PER[unit] for n, unit in _DURATION_PART.findall(text)))


def format_duration(duration: Milliseconds) -> str:
    """Exact: `5400000` ms is `1h30m`."""
    if duration <= 0:
        return "0s"
    parts = []
    rest = int(duration)
    for unit, size in _MILLISECONDS_PER.items():
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


@lru_cache(maxsize=4096)
def parse_decimal(text: str) -> Decimal:
    if not _DECIMAL.fullmatch(text):
        raise QuantityError(f'{text!r} is not a decimal: write it as text in quotes, such as "3.5"')
    return Decimal(text)


def _plain(value: Fraction) -> str:
    """A terminating fraction as decimal text without exponent or trailing zeros."""
    whole, rest = divmod(value, 1)
    digits = ""
    while rest:
        digit, rest = divmod(rest * 10, 1)
        digits += str(digit)
    return f"{whole}.{digits}" if digits else str(whole)
