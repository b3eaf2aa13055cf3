"""Power, time, percent and decimals: text and number are two writings of exactly the same value."""

import os
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenfactory.api.quantities import (
    DECIMAL_PATTERN,
    DURATION_PATTERN,
    PERCENT_PATTERN,
    POWER_PATTERN,
    SHORT_DURATION_PATTERN,
    Milliseconds,
    Milliwatts,
    QuantityError,
    format_duration,
    format_power,
    parse_decimal,
    parse_duration,
    parse_percent,
    parse_power,
    parse_power_or_percent,
)

EXAMPLES = settings(max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "60")), deadline=None)
TERAWATT = 10**15
PER_UNIT = {"W": 10**3, "kW": 10**6, "MW": 10**9, "GW": 10**12}


def texts(pattern: str) -> st.SearchStrategy[str]:
    return st.from_regex(pattern.replace("$", r"\Z"), fullmatch=True)


@EXAMPLES
@given(st.integers(0, TERAWATT - 1))
def test_every_power_is_written_so_that_it_reads_back_the_same(milliwatts: int):
    assert parse_power(format_power(Milliwatts(milliwatts))) == milliwatts


@EXAMPLES
@given(texts(POWER_PATTERN))
def test_every_power_that_the_api_server_accepts_is_exact_in_milliwatts(text: str):
    unit = text.lstrip("0123456789.")
    exact = Decimal(text.removesuffix(unit)) * PER_UNIT[unit]

    milliwatts = parse_power(text)

    assert Decimal(milliwatts) == exact
    assert 0 <= milliwatts <= TERAWATT
    assert parse_power(format_power(milliwatts)) == milliwatts


@EXAMPLES
@given(st.integers(1, 9999 * 86_400_000))
def test_every_duration_is_written_so_that_it_reads_back_the_same(milliseconds: int):
    assert parse_duration(format_duration(Milliseconds(milliseconds))) == milliseconds


@EXAMPLES
@given(texts(DURATION_PATTERN))
def test_every_duration_that_the_api_server_accepts_reads_as_itself(text: str):
    milliseconds = parse_duration(text)

    assert milliseconds > 0
    assume(milliseconds < 10_000 * 86_400_000)
    assert parse_duration(format_duration(milliseconds)) == milliseconds


@EXAMPLES
@given(texts(SHORT_DURATION_PATTERN).filter(lambda text: len(text) <= 24))
def test_a_duration_without_days_fits_what_cel_can_hold(text: str):
    assert parse_duration(text) * 1_000_000 < 2**63, "duration() counts nanoseconds in 64 bits"


@EXAMPLES
@given(texts(PERCENT_PATTERN), st.integers(0, TERAWATT))
def test_a_share_is_rounded_down_and_by_less_than_a_milliwatt(text: str, whole: int):
    share = parse_power_or_percent(text, Milliwatts(whole))

    exact = Fraction(text.removesuffix("%")) * whole / 100
    assert share <= exact < share + 1


@EXAMPLES
@given(texts(DECIMAL_PATTERN))
def test_every_decimal_that_the_api_server_accepts_keeps_all_its_digits(text: str):
    assert format(parse_decimal(text), "f") == text


@pytest.mark.parametrize(
    ("text", "milliwatts"),
    [
        ("0W", 0),
        ("700W", 700_000),
        ("0.001W", 1),
        ("1.2MW", 1_200_000_000),
        ("850kW", 850_000_000),
        ("1GW", 10**12),
    ],
)
def test_power_means_what_people_mean(text: str, milliwatts: int):
    assert parse_power(text) == milliwatts
    assert format_power(Milliwatts(milliwatts)) == text


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("500ms", 500), ("15s", 15_000), ("5m", 300_000), ("1h30m", 5_400_000), ("7d", 604_800_000)],
)
def test_a_duration_means_what_people_mean(text: str, milliseconds: int):
    assert parse_duration(text) == milliseconds
    assert format_duration(Milliseconds(milliseconds)) == text


def test_percent_is_exact():
    assert parse_percent("2.5%") == Fraction(1, 40)


@pytest.mark.parametrize(
    ("parse", "text", "instead"),
    [
        (parse_power, "12", "700W or 1.2MW"),
        (parse_power, "12 kW", "700W or 1.2MW"),
        (parse_power, "12kw", "700W or 1.2MW"),
        (parse_power, "-5W", "700W or 1.2MW"),
        (parse_power, "1e3W", "700W or 1.2MW"),
        (parse_power, "01W", "700W or 1.2MW"),
        (parse_power, "1W\n", "700W or 1.2MW"),
        (parse_power, "1000GW", "700W or 1.2MW"),
        (parse_power, "0.0001W", "700W or 1.2MW"),
        (parse_percent, "75", "75% or 2.5%"),
        (parse_percent, "75%\n", "75% or 2.5%"),
        (parse_duration, "5", "500ms, 15s, 5m"),
        (parse_duration, "0s", "500ms, 15s, 5m"),
        (parse_duration, "5 m", "500ms, 15s, 5m"),
        (parse_duration, "5us", "500ms, 15s, 5m"),
        (parse_decimal, "3,5", "in quotes"),
        (parse_decimal, "1e3", "in quotes"),
        (parse_decimal, "-1", "in quotes"),
    ],
)
def test_what_is_no_quantity_is_refused_with_what_to_write(parse, text: str, instead: str):
    with pytest.raises(QuantityError) as refused:
        parse(text)

    assert repr(text) in str(refused.value)
    assert instead in str(refused.value)
