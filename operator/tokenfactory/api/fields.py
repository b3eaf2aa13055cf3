"""Field types that several kinds share, each with its pattern, bound and words for `kubectl explain`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from tokenfactory.api.quantities import (
    DECIMAL_PATTERN,
    DURATION_PATTERN,
    PERCENT_PATTERN,
    POWER_OR_PERCENT_PATTERN,
    POWER_PATTERN,
)

PowerText = Annotated[
    str, Meta(pattern=POWER_PATTERN, max_length=24, description="A power, such as 700W, 850kW or 1.2MW.")
]
PercentText = Annotated[
    str, Meta(pattern=PERCENT_PATTERN, max_length=8, description="A percentage, such as 75% or 2.5%.")
]
PowerOrPercentText = Annotated[
    str,
    Meta(
        pattern=POWER_OR_PERCENT_PATTERN,
        max_length=24,
        description="A power or a percentage, such as 1.2MW or 75%.",
    ),
]
DurationText = Annotated[
    str,
    Meta(pattern=DURATION_PATTERN, max_length=24, description="A duration, such as 500ms, 15s, 5m or 1h30m."),
]
DecimalText = Annotated[
    str,
    Meta(pattern=DECIMAL_PATTERN, max_length=24, description='A decimal number in quotes, such as "3.5".'),
]
DomainName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        max_length=63,
        description="The name of a PowerDomain: lower-case letters, digits and dashes.",
    ),
]
ClassName = Annotated[
    str,
    Meta(
        max_length=253,
        min_length=1,
        description="All GPUs that behave alike: <namespace>/<factory>/<model>@<gpu product>, or idle@<gpu product>.",
    ),
]
MilliwattsField = Annotated[int, Meta(ge=0, le=10**15, description="Milliwatts, the unit of NVML.")]
Timestamp = Annotated[str, Meta(max_length=40, description="A time in RFC 3339.")]
