"""The signed 64-bit arithmetic of the stored format, over Python's unbounded integers.

Sums and products wrap, quotients truncate toward zero, and a product that does not fit is MAX where the format says
so. All of it matters only at the edges: everyday numbers pass through unchanged.
"""

from __future__ import annotations

import math
from typing import Final

MAX: Final = 2**63 - 1
MIN: Final = -(2**63)

NEVER: Final = MAX
"""A wait, in nanoseconds, that does not end."""


def wrap(x: int) -> int:
    """``x`` as a signed 64-bit integer, the excess cut off."""
    return x if MIN <= x <= MAX else ((x - MIN) & (2**64 - 1)) + MIN


def quotient(a: int, b: int) -> int:
    """``a / b`` truncated toward zero; Python's ``//`` would round down."""
    return wrap(a // b if (a >= 0) == (b > 0) else -(-a // b))


def remainder(a: int, b: int) -> int:
    """What ``quotient`` leaves; it has the sign of ``a``."""
    return a - b * quotient(a, b) if b != -1 else 0


def saturating_product(x: int, y: int) -> int:
    """``x * y``, or MAX where that does not fit, also when it is too small."""
    product = x * y
    return product if MIN <= product <= MAX else MAX


def truncated(x: float) -> int:
    """``x`` without its fraction, held within 64 bits; not-a-number is 0."""
    if math.isnan(x):
        return 0
    if math.isinf(x):
        return MAX if x > 0 else MIN
    return max(MIN, min(MAX, int(x)))
