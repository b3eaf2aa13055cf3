"""Calls into C that may never come back, each bounded by a deadline.

A GPU in trouble can hold an NVML call for minutes, or for ever. Each GPU therefore has a lane: one daemon
thread, one call at a time. When a call misses its deadline the lane is stuck and refuses further calls at
once, so that nothing piles up behind it; it opens again when the call comes back. A call that was still
waiting at its deadline never runs: an old cap must not be set late.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class OverdueError(Exception):
    """The call did not come back in time; it may still come back."""


class StuckError(Exception):
    """An earlier call has not come back; this one was not made."""


class _Call:
    __slots__ = ("abandoned", "function", "future", "loop", "running")

    def __init__(
        self, function: Callable[[], Any], loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any]
    ) -> None:
        self.function = function
        self.loop = loop
        self.future = future
        self.running = False
        self.abandoned = False


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


class Lane:
    """One thread for one GPU's calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.late = 0
        """How many calls came back after their deadline: each may have changed something late."""
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._stuck = False
        self._thread: threading.Thread | None = None

    @property
    def stuck(self) -> bool:
        return self._stuck

    async def run(self, function: Callable[[], T], deadline_seconds: float) -> T:
        if self._stuck:
            raise StuckError(self.name)
        if self._thread is None:
            # Daemon: a call that never returns must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, name=f"nvml {self.name}", daemon=True)
            self._thread.start()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        call = _Call(function, loop, future)
        self._queue.put(call)
        try:
            async with asyncio.timeout(deadline_seconds):
                return await future
        except TimeoutError:
            raise OverdueError(self.name) from None
        finally:
            if not future.done() or future.cancelled():
                self._abandon(call)

    def stop(self) -> None:
        """Lets the thread end once it is free; a stuck one ends with the process."""
        self._queue.put(None)
        self._thread = None

    def _abandon(self, call: _Call) -> None:
        with self._lock:
            call.abandoned = True
            self._stuck = self._stuck or call.running

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            with self._lock:
                if call.abandoned:
                    continue
                call.running = True
            result: Any = None
            error: BaseException | None = None
            try:
                result = call.function()
            except BaseException as caught:  # the waiting coroutine gets it
                error = caught
            with self._lock:
                call.running = False
                if call.abandoned:
                    self._stuck = False
                    self.late += 1
                    continue
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                call.loop.call_soon_threadsafe(_settle, call.future, result, error)
