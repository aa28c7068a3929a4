"""A fixed window as its definition has it, to hold the second algorithm of the tests against."""

from __future__ import annotations

from typing import NamedTuple

from tests.support.fixed_window import FixedWindow


class WindowLevel(NamedTuple):
    """What is left of a window: a level as that of a bandwidth.

    :param at: the latest time that the bucket was changed at.
    :param left: tokens; negative where those of later windows are promised already.
    """

    limit: FixedWindow
    at: int
    begin: int
    left: int

    @classmethod
    def initial(cls, limit: FixedWindow, now: int) -> WindowLevel:
        return cls(limit, now, now // limit.window_nanos * limit.window_nanos, limit.capacity)

    @property
    def tokens(self) -> int:
        return self.left

    def refilled(self, now: int) -> WindowLevel:
        limit, at, begin, left = self
        while begin + limit.window_nanos <= now:
            begin += limit.window_nanos
            left = min(left + limit.capacity, limit.capacity)
        return WindowLevel(limit, max(at, now), begin, left)

    def less(self, tokens: int) -> WindowLevel:
        return self._replace(left=self.left - tokens)

    def due_after(self, tokens: int, wait: int, now: int, *, alone: bool) -> WindowLevel:
        """The level from which no more is there at the end of the wait than a window holds that has lost the tokens."""
        windows = (now + wait - self.begin) // self.limit.window_nanos
        room = max(0, self.limit.capacity - tokens)
        return self._replace(left=min(self.left, room - windows * self.limit.capacity))

    def raised(self, tokens: int, most: int) -> WindowLevel:
        return self._replace(left=max(self.left, min(self.left + tokens, most)))

    def given_back(self, tokens: int, later: int = 0) -> WindowLevel:
        return self.raised(tokens, self.limit.capacity - later)

    def with_surplus(self, whole: int, unfinished: int) -> WindowLevel:
        assert unfinished == 0
        return self.raised(whole, self.limit.capacity)

    def added(self, tokens: int) -> WindowLevel:
        return self.raised(tokens, self.limit.capacity)

    def full(self) -> WindowLevel:
        return self._replace(left=self.limit.capacity)

    def most(self, nanos: int, ahead: int) -> int:
        """The most tokens that are admitted within so many nanoseconds of the beginning."""
        return (nanos // self.limit.window_nanos + 2) * self.limit.capacity + ahead

    def wait(self, tokens: int, now: int) -> int:
        windows = 0
        while self.left + windows * self.limit.capacity < tokens:
            windows += 1
        return self.begin + windows * self.limit.window_nanos - now if windows else 0
