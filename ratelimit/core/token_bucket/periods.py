"""Days, weeks, months and years in a time zone: when each of them begins and ends.

A period begins at the first moment whose local date belongs to it. That is midnight, except where clocks are put
forward over it. Where clocks are put back over midnight, the same date comes twice, and the first time counts.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

UNITS: Final = ("day", "week", "month", "year")

LONGEST_DAYS: Final = {"day": 1, "week": 7, "month": 31, "year": 366}
"""How many days each unit has at most."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)


class Period(NamedTuple):
    """One day, week, month or year.

    :param begin: in seconds since the epoch.
    :param end: where the next one begins, in seconds since the epoch.
    :param name: the form of ISO 8601: ``2026-11-27``, ``2026-W48``, ``2026-11`` or ``2026``.
    """

    begin: int
    end: int
    name: str


@lru_cache(maxsize=256)
def zone_of(name: str) -> tzinfo:
    """Return the time zone of this name; UTC needs no database.

    :raises InvalidConfigurationError: for a name that the time zone database does not have, or without a database.
    """
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    # Which error a name raises that is a directory, or leads out of the database, depends on the system.
    except (KeyError, ValueError, OSError):
        pass
    if available_timezones():
        raise InvalidConfigurationError(
            f"tz must be a name of the time zone database, such as Europe/Berlin; got {brief(name)}", "tz"
        )
    raise InvalidConfigurationError(
        f"tz must be UTC where there is no time zone database; got {brief(name)}: install the package tzdata", "tz"
    )


def period_at(unit: str, tz: str, seconds: int) -> Period:
    """Return the period that lasts at this time.

    :param unit: one of ``UNITS``.
    :param tz: the name of the time zone.
    :param seconds: since the epoch.
    """
    zone = zone_of(tz)
    first = _first_day(unit, datetime.fromtimestamp(seconds, zone).date())
    following = _first_day_of_next(unit, first)
    # Where clocks were put back over midnight, the old date comes again after the new period has begun.
    while seconds >= (end := _begin_of(following, zone)):
        first, following = following, _first_day_of_next(unit, following)
    return Period(_begin_of(first, zone), end, _name(unit, first))


def _first_day(unit: str, day: date) -> date:
    if unit == "day":
        return day
    if unit == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if unit == "month" else day.replace(month=1, day=1)


def _first_day_of_next(unit: str, first: date) -> date:
    return _first_day(unit, first + timedelta(days=LONGEST_DAYS[unit]))


def _name(unit: str, first: date) -> str:
    if unit == "week":
        year, week, _ = first.isocalendar()
        return f"{year:04}-W{week:02}"
    return first.isoformat()[: {"day": 10, "month": 7, "year": 4}[unit]]


def _begin_of(day: date, zone: tzinfo) -> int:
    """Return when a day begins, in seconds since the epoch."""
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    # Of a midnight that comes twice, these are the two. Where it does not come at all, they lie on both sides of the
    # moment in which the clocks are put forward, in reverse.
    begin, other = (midnight - _EPOCH) // _SECOND, (midnight.replace(fold=1) - _EPOCH) // _SECOND
    if other >= begin:
        return begin
    while begin - other > 1:
        middle = (begin + other) // 2
        if datetime.fromtimestamp(middle, zone).date() >= day:
            begin = middle
        else:
            other = middle
    return begin
