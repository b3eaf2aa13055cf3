"""Amounts of what a node gives to its pods, as whole numbers and as people write them.

Processors are counted in thousandths, everything else in its own unit (bytes, pieces): so sums are exact.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Final

CPU: Final = "cpu"
MOST: Final = 1 << 56
"""More than any node has. What people write may be more than whole numbers of a machine hold, so no amount is."""
_BYTES: Final = ("memory", "ephemeral-storage", "hugepages-")
_BINARY: Final = {unit: 1 << 10 * power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)}
_DECIMAL: Final = {unit: Fraction(10) ** (3 * power) for power, unit in enumerate("num kMGTPE", -3)}
_QUANTITY: Final = re.compile(r"([+-]?[0-9]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)([numkMGTPE]|[KMGTPE]i)?")


@lru_cache(maxsize=1 << 14)
def parse_amount(resource: str, text: str) -> int:
    """A Kubernetes quantity, rounded up. The API server has checked it: what cannot be read here counts as nothing."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        return 0
    try:
        number = Fraction(found[1])
    except ValueError:
        return 0
    unit = found[2] or " "
    exact = number * (_BINARY[unit] if unit in _BINARY else _DECIMAL[unit]) * (1000 if resource == CPU else 1)
    return at_most(-(-exact.numerator // exact.denominator))


def at_most(amount: int) -> int:
    return max(-MOST, min(amount, MOST))


def format_amount(resource: str, amount: int) -> str:
    """`8`, `500m`, `63.5Gi`: rounded to what people look at."""
    if resource == CPU:
        return str(amount // 1000) if amount % 1000 == 0 else f"{amount}m"
    if resource.startswith(_BYTES):
        for unit, size in reversed(_BINARY.items()):
            if amount >= size:
                return f"{amount / size:.1f}".removesuffix(".0") + unit
    return str(amount)
