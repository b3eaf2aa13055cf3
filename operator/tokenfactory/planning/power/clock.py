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

    def expected(self, milliseconds: int) -> datetime:
        """What the wall clock would show now if nobody had set it."""
        return self.wall + timedelta(milliseconds=milliseconds - self.milliseconds)


def look(clock: Clock | None, wall: datetime, milliseconds: int) -> tuple[Clock, datetime]:
    """The clock to remember, and the other time that counts: the same as `wall` while nothing is in doubt."""
    now = Clock(wall, milliseconds)
    if clock is None:
        return now, wall
    other = clock.expected(milliseconds)
    if abs((wall - other).total_seconds()) <= JUMP_SECONDS:
        return now, wall
    since = milliseconds if clock.doubted_since is None else clock.doubted_since
    if milliseconds - since >= BELIEVED_AFTER_MILLISECONDS:
        return now, wall
    return replace(clock, doubted_since=since), other
