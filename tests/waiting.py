"""Waiting for a condition, never for a time."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
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


async def until(
    holds: Callable[[], T | Awaitable[T]],
    what: str = "it to come true",
    seconds: float = 120,
    *,
    every: float = 0.02,
) -> T:
    """As `wait_for`, for tests in an event loop; a question that takes for ever is cut off as well."""
    answer = None
    try:
        async with asyncio.timeout(seconds):
            while True:
                asked = holds()
                answer = await asked if inspect.isawaitable(asked) else asked
                if answer:
                    return answer
                await asyncio.sleep(every)
    except TimeoutError:
        raise AssertionError(f"after {seconds} s still not: {what} (last answer: {answer!r})") from None
