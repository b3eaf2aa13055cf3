import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenfactory.planning.placement.amounts import format_amount, parse_amount


@pytest.mark.parametrize(
    ("resource", "text", "amount"),
    [
        ("cpu", "8", 8_000),
        ("cpu", "250m", 250),
        ("cpu", "0.1", 100),
        ("cpu", "1u", 1),
        ("cpu", "2k", 2_000_000),
        ("memory", "64Gi", 64 << 30),
        ("memory", "1.5Gi", 3 << 29),
        ("memory", "128974848", 128974848),
        ("memory", "129e6", 129_000_000),
        ("memory", "129M", 129_000_000),
        ("memory", "1500m", 2),
        ("hugepages-2Mi", "4Mi", 4 << 20),
        ("pods", "110", 110),
        ("example.com/nic", "2", 2),
        ("cpu", "9223372036854775807", 1 << 56),
        ("memory", "8Ei", 1 << 56),
        ("memory", "-8Ei", -(1 << 56)),
        ("memory", "plenty", 0),
        ("memory", "", 0),
    ],
)
def test_a_quantity_is_read_as_kubernetes_means_it(resource: str, text: str, amount: int):
    assert parse_amount(resource, text) == amount


@pytest.mark.parametrize(
    ("resource", "amount", "text"),
    [
        ("cpu", 8_000, "8"),
        ("cpu", 1_250, "1250m"),
        ("memory", 64 << 30, "64Gi"),
        ("ephemeral-storage", 3 << 29, "1.5Gi"),
        ("memory", 512, "512"),
        ("example.com/nic", 2, "2"),
    ],
)
def test_it_is_written_for_people(resource: str, amount: int, text: str):
    assert format_amount(resource, amount) == text


@given(st.integers(0, 1 << 50), st.sampled_from(["cpu", "memory", "pods"]))
def test_what_is_written_exactly_reads_the_same(amount: int, resource: str):
    text = f"{amount}m" if resource == "cpu" else str(amount)
    assert parse_amount(resource, text) == amount
