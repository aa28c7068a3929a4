"""Clocks: what a bucket's time is, and how a caller sleeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from ratelimit.core.duration import NANOS_PER_MILLISECOND, NANOS_PER_SECOND

_DAY_NANOS = 86_400 * NANOS_PER_SECOND


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
    """The seconds of each part of a sleep; a wait of centuries would not fit into the system's types at once."""
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
