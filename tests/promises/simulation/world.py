from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from random import Random
from typing import Any, Final

EPOCH: Final = 1_700_000_000 * 10**9
"""The server's time when a schedule begins."""

MILLISECOND: Final = 10**6
SECOND: Final = 10**9

APART: Final = 64
"""Events are at least so many nanoseconds apart, so that each process can have readings of the clock of its own."""

_MOST_EVENTS: Final = 20_000


class ViolationError(AssertionError):
    """A rule that the ledger keeps was broken.

    :ivar lines: the trace, where there is one.
    """

    lines: list[str]


class World:
    """Virtual time in nanoseconds since the schedule began, and what is to happen in it.

    :param tracing: take note of all that happens.
    :ivar broken: whether a rule was broken, so that nothing counts any more.
    """

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.random = Random(seed)
        self.now = 0
        self.lines: list[str] = []
        self.tracing = tracing
        self.broken = False
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0

    @property
    def server_time(self) -> int:
        return EPOCH + self.now

    def monotonic(self) -> float:
        """The clock of deadlines, in seconds."""
        return self.now / SECOND

    def after(self, nanos: int, action: Callable[..., None], *arguments: Any) -> None:
        """Let something happen so much later; of what is due at the same time, first what was scheduled first."""
        self._scheduled += 1
        heappush(self._events, (self.now + nanos, self._scheduled, action, arguments))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            due, number, action, arguments = heappop(self._events)
            if number > _MOST_EVENTS:
                raise ViolationError("the schedule does not end")
            self.now = max(due, self.now + APART)
            action(*arguments)

    def note(self, line: str) -> None:
        """For the trace; to be called only when ``tracing``, as most lines take longer than what they tell of."""
        self.lines.append(f"{self.now / MILLISECOND:12.6f} ms  {line}")
