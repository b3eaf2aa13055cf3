"""Waiting for a condition, never for a time."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(condition: Callable[[], T], what: str, seconds: float = 120) -> T:
    """The first true answer of `condition`; fails with `what` was waited for when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {seconds} s still not: {what} (last answer: {answer!r})")
        time.sleep(0.02)
    return answer
