"""Durations as people give them, and as the arithmetic needs them."""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

from ratelimit.core.int64 import MAX, NEVER
from ratelimit.errors import brief

NANOS_PER_SECOND = 1_000_000_000
NANOS_PER_MILLISECOND = 1_000_000

Duration = timedelta | float | Fraction | Decimal
"""A ``timedelta``, or a number of seconds; fractions of a nanosecond are rounded to the nearest."""


def to_nanos(duration: Duration) -> int:
    """The duration in whole nanoseconds, at most MAX, which stands for "never ends".

    Raises ``TypeError`` for what is no duration, ``ValueError`` for not-a-number.
    """
    if isinstance(duration, timedelta):
        microseconds = (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds
        return min(microseconds * 1_000, MAX)
    if isinstance(duration, bool) or not isinstance(duration, int | float | Fraction | Decimal):
        raise TypeError(f"must be a timedelta or a number of seconds, not {brief(duration)}")
    if not _is_finite(duration):
        if duration > 0:
            return MAX
        raise ValueError(f"must be a number of seconds, not {brief(duration)}")
    return min(round(Fraction(duration) * NANOS_PER_SECOND), MAX)


def _is_finite(duration: float | Fraction | Decimal) -> bool:
    try:
        return math.isfinite(duration)
    except OverflowError:  # it is, but beyond what a float can hold
        return True


def to_seconds(nanos: int) -> float | None:
    """A wait in seconds, rounded up to a whole microsecond, the resolution of a server's clock; None for never."""
    return None if nanos == NEVER else -(-nanos // 1_000) / 1_000_000
