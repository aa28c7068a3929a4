"""Clocks: what time it is for buckets, how callers sleep, and how the limiter itself measures time.

The limiter's own clocks measure deadlines, pauses and estimates. Tests freeze time by replacing ``time.monotonic``:
freezegun in every module that holds it, some versions of time-machine inside the interpreter. A deadline that is
computed by one clock and compared with another passes at once, or never. The clocks here are the machine's whatever
tests do, even if this module is first imported while time is frozen. They are partial objects and not functions,
because a Python frame would double the cost of a reading.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

from ratelimit.core.numbers import NANOS_PER_MILLISECOND, NANOS_PER_SECOND

_DAY_NANOS: Final = 86_400 * NANOS_PER_SECOND

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


@runtime_checkable
class Clock(Protocol):
    """The time of buckets, and sleeping by it; ``ratelimit.testing.ManualClock`` is one that tests move.

    A clock may have an attribute ``unique_readings``. True says that no two readings are alike, in whichever process
    that shares the buckets: those of a clock of nanoseconds that each process has for itself, for example. Then a write
    whose reply was lost can be recognised by the time that it holds. Without the attribute, or where it is False, such
    a write is in doubt (``StoreError.in_doubt``).
    """

    def now_nanos(self) -> int:
        """Nanoseconds since the Unix epoch."""
        ...

    def sleep(self, nanos: int) -> None:
        """Block the calling thread for this long."""
        ...

    async def asleep(self, nanos: int) -> None:
        """Suspend the calling task for this long."""
        ...


def has_unique_readings(clock: object) -> bool:
    """Return whether a clock, or a store whose time counts, says that no two of its readings are alike."""
    return bool(getattr(clock, "unique_readings", False))


class MonotonicSleep:
    """Sleeping by the machine's monotonic clock, which no setting of the time disturbs."""

    def sleep(self, nanos: int) -> None:
        """Block the calling thread for this long."""
        for seconds in _by_days(nanos):
            time.sleep(seconds)

    async def asleep(self, nanos: int) -> None:
        """Suspend the calling task for this long."""
        for seconds in _by_days(nanos):
            await asyncio.sleep(seconds)


def _by_days(nanos: int) -> Iterator[float]:
    """Yield the seconds of each part of a sleep: a wait of centuries would not fit into the system's types."""
    for begin in range(0, nanos, _DAY_NANOS):
        yield min(nanos - begin, _DAY_NANOS) / NANOS_PER_SECOND


class SystemClock(MonotonicSleep):
    """The wall clock of this machine at a resolution of a millisecond, as Bucket4j has it.

    Machines that share a bucket by their wall clocks must keep them together: one that is ahead by an hour takes an
    hour's tokens at once, and then nobody gets any until the others have reached its time.
    """

    def now_nanos(self) -> int:
        """Nanoseconds since the Unix epoch, in whole milliseconds."""
        return time.time_ns() // NANOS_PER_MILLISECOND * NANOS_PER_MILLISECOND
