"""Which windows of a domain's timetable hold at a given instant, and when that next changes.

A window is two wall-clock times in a time zone. It is turned into instants day by day, so that daylight saving is
right: where the clock repeats an hour, a window begins with the first and ends with the second; where it leaves one
out, a window that begins or ends in that hour lasts up to an hour longer, and is never lost.
"""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from tokenfactory.api.power_domain import TimetableEntry

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def zone_of(entry: TimetableEntry) -> ZoneInfo | None:
    """None where no such zone is known."""
    try:
        return ZoneInfo(entry.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def holds(entry: TimetableEntry, now: datetime) -> bool:
    """Whether the window is open. One whose zone is unknown always is: the lower limit is the safe one."""
    windows = _windows_around(entry, now)
    return windows is None or any(start <= now < end for start, end in windows)


def next_change(entries: tuple[TimetableEntry, ...], now: datetime) -> datetime | None:
    """The next instant at which some window opens or closes."""
    edges = [edge for e in entries for window in _windows_around(e, now) or () for edge in window]
    return min((e for e in edges if e > now), default=None)


def _windows_around(entry: TimetableEntry, now: datetime) -> list[tuple[datetime, datetime]] | None:
    zone = zone_of(entry)
    if zone is None:
        return None
    today = now.astimezone(zone).date()
    # A window that opened yesterday may still be open; a week ahead holds the next one, whatever its days.
    days = [today + timedelta(days=offset) for offset in range(-1, 9)]
    return [
        _instants(entry, zone, day) for day in days if not entry.days or _DAYS[day.weekday()] in entry.days
    ]


def _instants(entry: TimetableEntry, zone: ZoneInfo, day: date) -> tuple[datetime, datetime]:
    start, end = time.fromisoformat(entry.start), time.fromisoformat(entry.end)
    last_day = day + timedelta(days=1) if end <= start else day
    return min(_readings(day, start, zone)), max(_readings(last_day, end, zone))


def _readings(day: date, at: time, zone: ZoneInfo) -> tuple[datetime, datetime]:
    """The instants that a wall-clock time can mean: two where the clock repeats or leaves out an hour."""
    first, second = (datetime.combine(day, at.replace(fold=fold), zone).astimezone(UTC) for fold in (0, 1))
    return first, second
