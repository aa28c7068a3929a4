"""Estimate the time of a server by a local clock that is never set.

A reply that carries the server's time T, asked for at local time a and received at b, says that the server is between
T - b and T - a ahead of the local clock. What is known is that interval. Every reply cuts it down, and it grows with
time by what two clocks may drift apart. The estimate is its lower end, which is not ahead of the server, so that no
token comes before its time. Nothing here reads the wall clock, so that setting the wall clock changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

_DRIFT_PER_MILLION = 1_000
"""How far two clocks are assumed to drift apart at most: each kernel corrects its own by up to 500.

Programs that set clocks may correct more: chrony slews a large offset away at up to 83,333. The estimate may then be
ahead.
"""

STALE_NANOS = 1_000_000_000
"""An estimate this old is renewed where that costs no round trip of its own."""

FIRST_REPLIES = 4
"""How many replies are asked for in a row: the first may have been slow, and one quick reply makes up for that."""

UNUSABLE_NANOS = 60_000_000_000
"""An estimate this old is renewed before a decision; by then the assumed drift has put it back by 60 ms."""

_LONG_AGO = -(2**63)
_NEVER = 2**63
# The server sends whole microseconds, rounded down.
_RESOLUTION_NANOS = 1_000


class _Interval(NamedTuple):
    low: int
    high: int
    at: int  # local time when it was known


class ServerTime:
    """What is known of one server's clock. All times are in nanoseconds; local ones are monotonic.

    :ivar stale_at: from this local time on, the server's time should be asked for along with something else. That is
        never the case until :meth:`estimate` is first called: a manager with a clock of its own does not need the
        server's time, and some proxies refuse ``TIME``.
    """

    __slots__ = ("_interval", "_replies", "stale_at")

    def __init__(self) -> None:
        self.stale_at = _NEVER
        self._replies = 0
        # It is replaced as a whole, so that threads need no lock.
        self._interval: _Interval | None = None

    def observe(self, server: int, sent: int, received: int) -> None:
        """Learn from a reply: the server's time in it, and the local times before and after it."""
        while_under_way = _drift(received - sent)
        low, high = server - received - while_under_way, server + _RESOLUTION_NANOS - sent + while_under_way
        known = self._interval
        if known is not None:
            drift = _drift(received - known.at)
            common_low, common_high = max(low, known.low - drift), min(high, known.high + drift)
            if common_low <= common_high:
                low, high = common_low, common_high
            else:
                # The server's clock was set, or this is another server: believe the reply.
                self._replies = 0
        self._replies += 1
        self._interval = _Interval(low, high, received)
        self.stale_at = received + STALE_NANOS if self._replies >= FIRST_REPLIES else _LONG_AGO

    def estimate(self, local: int) -> int | None:
        """Return the earliest time that the server may have at this local time.

        None before the first reply, and where the last one is so old that the time has to be asked for again.
        """
        known = self._interval
        if known is None:
            self.stale_at = _LONG_AGO
            return None
        low, _, at = known
        age = local - at
        return None if age >= UNUSABLE_NANOS else local + low + (-age * _DRIFT_PER_MILLION // 1_000_000)

    def error_bound(self, local: int) -> int | None:
        """Return how far the estimate may be behind; None before the first reply."""
        known = self._interval
        return None if known is None else known.high - known.low + 2 * _drift(local - known.at)


def _drift(nanos: int) -> int:
    return -(-nanos * _DRIFT_PER_MILLION // 1_000_000)
