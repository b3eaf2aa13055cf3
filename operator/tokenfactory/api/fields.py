"""Field types that several kinds share, each with its form, bound and words for `kubectl explain`."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from tokenfactory.api.quantities import (
    DECIMAL_PATTERN,
    DURATION_PATTERN,
    PERCENT_PATTERN,
    POWER_OR_PERCENT_PATTERN,
    POWER_PATTERN,
    SHORT_DURATION_PATTERN,
)
from tokenfactory.api.rules import Rule, matches, rules, text

_ZERO: Final = r"^0(\.0+)?(W|kW|MW|GW|%)?$"
_OVER_100: Final = r"^((10[1-9]|1[1-9][0-9]|[2-9][0-9]{2})(\.[0-9]+)?|100\.0*[1-9][0-9]*)%$"

_NOT_ZERO: Final = Rule(
    rule="!" + matches(_ZERO),
    message="must not be 0: write at least the smallest value that means something",
    advice="self + ' allows nothing to run: write more than 0, or delete what should not draw'",
)
_AT_MOST_100: Final = Rule(
    rule="!" + matches(_OVER_100),
    message="a share is at most 100%",
    advice="self + ' is more than the whole: write at most 100%, or a power such as 1.2MW'",
)

PowerText = Annotated[
    str,
    text(
        POWER_PATTERN,
        what="a power",
        write="a number and W, kW, MW or GW, such as 700W, 850kW or 1.2MW",
        max_length=24,
        description="A power, such as 700W, 850kW or 1.2MW.",
    ),
]
PositivePowerText = Annotated[
    str,
    text(
        POWER_PATTERN,
        what="a power",
        write="a number and W, kW, MW or GW, such as 700W, 850kW or 1.2MW",
        max_length=24,
        description="A power, such as 700W, 850kW or 1.2MW.",
        also=(_NOT_ZERO,),
    ),
]
ReserveText = Annotated[
    str,
    text(
        PERCENT_PATTERN,
        what="a percentage",
        write="for example 3% or 2.5%",
        max_length=8,
        description="A percentage, such as 3% or 2.5%.",
        also=(
            Rule(
                rule="!" + matches(r"^[1-9][0-9]{2}(\.[0-9]+)?%$"),
                message="must be less than 100%",
                advice="'a reserve of ' + self + ' leaves nothing to hand out: write less than 100%, such as 3%'",
            ),
        ),
    ),
]
LimitText = Annotated[
    str,
    text(
        POWER_OR_PERCENT_PATTERN,
        what="a power or a percentage",
        write="a number and W, kW, MW, GW or %, such as 1.2MW or 75%",
        max_length=24,
        description="A power or a percentage, such as 1.2MW or 75%.",
        also=(_NOT_ZERO, _AT_MOST_100),
    ),
]
DurationText = Annotated[
    str,
    text(
        DURATION_PATTERN,
        what="a duration",
        write="for example 500ms, 15s, 5m, 1h30m or 7d",
        max_length=24,
        description="A duration, such as 500ms, 15s, 5m, 1h30m or 7d.",
    ),
]


def bounded_duration(least: str, most: str) -> Meta:
    """A duration that CEL can compute with: `duration()` knows no days, so the text has none."""
    fits = f"duration(self) >= duration('{least}') && duration(self) <= duration('{most}')"
    return text(
        SHORT_DURATION_PATTERN,
        what="a duration",
        write="for example 500ms, 15s, 5m or 1h30m",
        max_length=24,
        description=f"A duration from {least} to {most}, such as 500ms, 15s, 5m or 1h30m.",
        also=(
            Rule(
                rule=f"!{matches(SHORT_DURATION_PATTERN)} || ({fits})",
                message=f"must be from {least} to {most}",
                advice=f"self + ' is out of range: write {least} to {most}'",
            ),
        ),
    )


LatencyText = Annotated[str, bounded_duration("1ms", "10m")]
DecimalText = Annotated[
    str,
    text(
        DECIMAL_PATTERN,
        what="a decimal number",
        write='digits in quotes, such as "3.5"',
        max_length=24,
        description='A decimal number in quotes, such as "3.5".',
    ),
]
PositiveDecimalText = Annotated[
    str,
    text(
        DECIMAL_PATTERN,
        what="a decimal number",
        write='digits in quotes, such as "3.5"',
        max_length=24,
        description='A decimal number in quotes, more than 0, such as "3.5".',
        also=(
            Rule(
                rule="!" + matches(_ZERO),
                message="must be more than 0",
                advice="'must be more than 0, not ' + self + ': write for example \"0.5\"'",
            ),
        ),
    ),
]
DomainName = Annotated[
    str,
    text(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        what="the name of a PowerDomain",
        write="lower-case letters, digits and dashes, no dots, such as rack-a07",
        max_length=63,
        description="The name of a PowerDomain: lower-case letters, digits and dashes.",
    ),
]
ObjectName = Annotated[
    str,
    text(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        what="the name of an object",
        write="lower-case letters, digits, dashes and dots, such as model-cache",
        max_length=253,
        description="The name of an object.",
    ),
]
ModelName = Annotated[
    str,
    text(
        r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
        what="the name of a model",
        write="lower-case letters, digits and dashes, such as llama-70b",
        max_length=40,
        description="The name of a model within its factory.",
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
LABEL_KEY_PATTERN: Final = (
    r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
)
LabelKey = Annotated[
    str,
    text(
        LABEL_KEY_PATTERN,
        what="a label's key",
        write="[prefix/]name, such as topology.tokenfactory.dev/rack",
        max_length=317,
        description="Label key.",
    ),
]
LABEL_VALUE_PATTERN: Final = r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$"
LabelValue = Annotated[
    str,
    text(
        LABEL_VALUE_PATTERN,
        what="a label's value",
        write="at most 63 letters, digits, dashes, dots and underscores",
        max_length=63,
        description="Label value.",
    ),
]
LabelMap = Annotated[
    dict[LabelKey, LabelValue],
    Meta(
        max_length=32,
        description="Labels that must all be there with these values.",
        extra_json_schema=rules(
            Rule(
                rule=f"self.all(key, {matches(LABEL_KEY_PATTERN, 'key')} && size(key) <= 317)",
                message="not a label's key: write [prefix/]name, such as topology.tokenfactory.dev/rack",
            )
        ),
    ),
]
MilliwattsField = Annotated[int, Meta(ge=0, le=10**15, description="Milliwatts, the unit of NVML.")]
Timestamp = Annotated[str, Meta(max_length=40, description="A time in RFC 3339.")]
StatedTime = Annotated[
    str,
    text(
        r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})$",
        what="a time",
        write="it in RFC 3339, such as 2026-11-21T09:30:00Z",
        max_length=40,
        description="A time in RFC 3339.",
    ),
]
