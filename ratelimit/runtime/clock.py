"""The limiter's own clocks: deadlines, pauses and estimates are measured by them.

Tests freeze time by replacing ``time.monotonic``: freezegun in every module that holds it, some versions of
time-machine inside the interpreter. A deadline that is computed by one clock and compared with another passes at once,
or never. The clocks here are the machine's whatever tests do, also where this module is first imported while time is
frozen. They are partial objects and not functions, because a Python frame would double the cost of a reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

_CLOCK_IDS = {"clock_gettime(CLOCK_MONOTONIC)": "CLOCK_MONOTONIC", "mach_absolute_time()": "CLOCK_UPTIME_RAW"}
"""How the interpreter reads its monotonic clock, and what else gives the same reading."""


def _reader(by_id: Any, otherwise: Callable[[], Any]) -> Callable[[], Any]:
    clock_id = getattr(time, _CLOCK_IDS.get(time.get_clock_info("monotonic").implementation, ""), None)
    return partial(otherwise) if clock_id is None else partial(by_id, clock_id)


# Windows has no clock_gettime. A partial object of time.monotonic is not replaced there either, as long as this module
# was imported before time was frozen.
monotonic: Callable[[], float] = _reader(getattr(time, "clock_gettime", None), time.monotonic)
"""Return the seconds of the clock of ``time.monotonic``."""

monotonic_ns: Callable[[], int] = _reader(getattr(time, "clock_gettime_ns", None), time.monotonic_ns)
"""Return the nanoseconds of the clock of ``time.monotonic``."""


MONOTONIC_IS_FINE: Final = time.get_clock_info("monotonic").resolution < 1e-6
"""Whether two readings of this machine's monotonic clock differ, unless they are taken within less than a microsecond.

On Windows they are alike for 15.6 ms, up to Python 3.12.
"""


def _elapsed_ns() -> Callable[[], int]:
    try:
        time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        # This is not Linux, or a sandbox without that clock.
        return monotonic_ns
    return partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)


elapsed_ns: Final = _elapsed_ns()
"""Return the nanoseconds that have passed on this machine; on Linux also those in which it was suspended."""


def steady_clock() -> Callable[[], int]:
    """Return a clock of nanoseconds since the epoch that begins at the present wall time and is never set."""
    begin = time.time_ns() - monotonic_ns()
    return lambda: begin + monotonic_ns()
