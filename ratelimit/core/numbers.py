"""The numbers of buckets: signed 64-bit integers, and durations in nanoseconds.

Python's integers are unbounded, those of the stored format are not: sums and products wrap, quotients truncate toward
zero, and a product that does not fit is MAX where the format says so. All of this matters only at the edges, because
everyday numbers pass through unchanged.
"""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Final

from ratelimit.keys import brief

MAX: Final = 2**63 - 1
MIN: Final = -(2**63)

NEVER: Final = MAX
"""A wait, in nanoseconds, that does not end."""


def wrap(x: int) -> int:
    """Return ``x`` as a signed 64-bit integer, the excess cut off."""
    return x if MIN <= x <= MAX else ((x - MIN) & (2**64 - 1)) + MIN


def quotient(a: int, b: int) -> int:
    """Return ``a / b`` truncated toward zero; Python's ``//`` would round down."""
    return wrap(a // b if (a >= 0) == (b > 0) else -(-a // b))


def remainder(a: int, b: int) -> int:
    """Return what ``quotient`` leaves; it has the sign of ``a``."""
    return a - b * quotient(a, b) if b != -1 else 0


def saturating_product(x: int, y: int) -> int:
    """Return ``x * y``, or MAX where that does not fit, also when it is too small."""
    product = x * y
    return product if MIN <= product <= MAX else MAX


def truncated(x: float) -> int:
    """Return ``x`` without its fraction, held within 64 bits; not-a-number is 0."""
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return MAX if x > 0 else MIN
    return max(MIN, min(MAX, int(x)))


NANOS_PER_SECOND: Final = 1_000_000_000
NANOS_PER_MILLISECOND: Final = 1_000_000

Duration = timedelta | float | Fraction | Decimal
"""A ``timedelta``, or a number of seconds; fractions of a nanosecond are rounded to the nearest."""


def to_nanos(duration: Duration) -> int:
    """Return the duration in whole nanoseconds, at most MAX, which stands for "never ends".

    :raises TypeError: for a value that is not a duration.
    :raises ValueError: for not-a-number.
    """
    if isinstance(duration, timedelta):
        microseconds = (duration.days * 86_400 + duration.seconds) * 1_000_000 + duration.microseconds
        return min(microseconds * 1_000, MAX)
    if isinstance(duration, bool) or not isinstance(duration, int | float | Fraction | Decimal):
        raise TypeError(f"must be a timedelta or a number of seconds; got {brief(duration)}")
    if not _is_finite(duration):
        if duration > 0:
            return MAX
        raise ValueError(f"must be a timedelta or a number of seconds; got {brief(duration)}")
    return min(round(Fraction(duration) * NANOS_PER_SECOND), MAX)


def _is_finite(duration: float | Fraction | Decimal) -> bool:
    try:
        return math.isfinite(duration)
    except OverflowError:
        # It is finite, but beyond what a float can hold.
        return True


def to_seconds(nanos: int) -> float | None:
    """Return a wait in seconds, rounded up to a microsecond, the resolution of a server's clock; None for never."""
    return None if nanos == NEVER else -(-nanos // 1_000) / 1_000_000
