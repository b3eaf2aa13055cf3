"""What people are told, and when it is worth a write."""

import pytest

from tokenfactory.controller.plan.status import steady


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("8001", "7998", "8001"),
        ("6.255kW", "6.1kW", "6.255kW"),
        ("6.255kW", "5.2kW", "5.2kW"),
        ("999W", "1.001kW", "1.001kW"),
        ("", "12", "12"),
        ("12", "", ""),
        ("0", "0", "0"),
        ("0", "3", "3"),
        ("1.29 tokens/J of 3.5", "1.31 tokens/J of 3.5", "1.29 tokens/J of 3.5"),
        ("1.29 tokens/J of 3.5", "1.29 tokens/J of 4.5", "1.29 tokens/J of 4.5"),
        ("slow: 90ms", "fast: 90ms", "fast: 90ms"),
    ],
)
def test_a_measured_figure_is_told_again_only_when_it_has_moved(before: str, after: str, told: str):
    assert steady(before, after) == told
