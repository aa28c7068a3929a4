"""A sliding window as its definition has it, to hold the library's against: a list of all uses that still count."""

from __future__ import annotations

from typing import NamedTuple

from ratelimit import NEVER, SlidingWindow
from ratelimit.core.sliding_window.configuration import EXACT_CAPACITY, GRID


class LogLevel(NamedTuple):
    """The uses of a window: a level as that of a bandwidth.

    :param at: the latest time that the bucket was changed at.
    :param uses: from when how many tokens count, in the order in which they were taken.
    """

    limit: SlidingWindow
    at: int
    uses: tuple[tuple[int, int], ...]

    @classmethod
    def initial(cls, limit: SlidingWindow, now: int) -> LogLevel:
        return cls(limit, now, ())

    @property
    def tokens(self) -> int:
        return self.limit.capacity - sum(tokens for _, tokens in self.uses)

    def refilled(self, now: int) -> LogLevel:
        at = max(self.at, now)
        return self._replace(at=at, uses=tuple(use for use in self.uses if use[0] + self.limit.window_nanos > at))

    def less(self, tokens: int) -> LogLevel:
        return self._replace(uses=(*self.uses, (self._noted(self.at), tokens)))

    def due_after(self, tokens: int, wait: int, now: int, *, alone: bool) -> LogLevel:
        """The level in which the tokens that were just taken count from the end of the wait."""
        assert self.uses[-1][1] == tokens
        return self._replace(uses=(*self.uses[:-1], (self._noted(max(self.at, now + wait)), tokens)))

    def given_back(self, tokens: int, later: int = 0) -> LogLevel:
        return self._without(tokens, sorted({time for time, _ in self.uses if time <= self._noted(self.at)})[::-1])

    def added(self, tokens: int) -> LogLevel:
        past = sorted({time for time, _ in self.uses if time <= self._noted(self.at)})[::-1]
        return self._without(tokens, [*past, *sorted({time for time, _ in self.uses} - set(past))])

    def cancelled(self, tokens: int, due: int) -> LogLevel:
        if due + self.limit.window_nanos <= self.at:
            return self
        following = sorted(time for time, _ in self.uses if time >= self._noted(due))
        return self._without(tokens, following[:1])

    def with_surplus(self, whole: int, unfinished: int) -> LogLevel:
        raise NotImplementedError

    def full(self) -> LogLevel:
        return self._replace(uses=())

    def most(self, nanos: int, ahead: int) -> int:
        """The most tokens that are admitted within so many nanoseconds: what is taken in debt is not paid back."""
        return (nanos // self.limit.window_nanos + 2) * (self.limit.capacity + ahead)

    def wait(self, tokens: int, now: int) -> int:
        if tokens > self.limit.capacity:
            return NEVER
        level, wait = self, 0
        for time in sorted(time for time, _ in self.uses):
            if level.tokens >= tokens:
                break
            level, wait = level.refilled(time + self.limit.window_nanos), time + self.limit.window_nanos - now
        return wait

    def _noted(self, time: int) -> int:
        """The time from which a use at this one counts."""
        grain = 1 if self.limit.capacity <= EXACT_CAPACITY else -(-self.limit.window_nanos // GRID)
        return time + -time % grain

    def _without(self, tokens: int, times: list[int]) -> LogLevel:
        left, uses = tokens, list(self.uses)
        for time in times:
            for place, (used_at, used) in enumerate(uses):
                if used_at == time:
                    uses[place] = (used_at, used - min(used, left))
                    left -= min(used, left)
        return self._replace(uses=tuple(use for use in uses if use[1]))
