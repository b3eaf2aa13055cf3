"""Two clocks for timetables: the one on the wall, and one that cannot jump.

A wall clock that is set forward would end a window of a timetable early, one that is set back would put off its
beginning: both hand out watts that are not there. So after a jump the time at which the wall clock would be without it
counts as well, and the lower limit of both holds, until the new time has stood for so long that it was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

JUMP_SECONDS: Final = 5.0
"""More than this between two looks is no correction of a clock that runs, but another time."""
BELIEVED_AFTER_MILLISECONDS: Final = 600_000


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the wall clock stood at one moment of the clock that cannot jump."""

    wall: datetime
    milliseconds: int
    doubted_since: int | None = None
    doubted_seconds: float = 0.0
    """By how much the wall clock was off since then: another jump is another doubt."""

    def expected(self, milliseconds: int) -> datetime:
        """What the wall clock would show now if nobody had set it."""
        return self.wall + timedelta(milliseconds=milliseconds - self.milliseconds)


def look(clock: Clock | None, wall: datetime, milliseconds: int) -> tuple[Clock, datetime]:
    """The clock to remember, and the other time that counts: the same as `wall` while nothing is in doubt."""
    now = Clock(wall, milliseconds)
    if clock is None:
        return now, wall
    other = clock.expected(milliseconds)
    off = (wall - other).total_seconds()
    if abs(off) <= JUMP_SECONDS:
        return now, wall
    if clock.doubted_since is None or abs(off - clock.doubted_seconds) > JUMP_SECONDS:
        return replace(clock, doubted_since=milliseconds, doubted_seconds=off), other
    if milliseconds - clock.doubted_since >= BELIEVED_AFTER_MILLISECONDS:
        return now, wall
    return clock, other
