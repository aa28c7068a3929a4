"""Buckets as the definitions of their algorithms have them: the simulation's own, to hold the library's against."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Cancel,
    Command,
    ConsumeAsMuchAsPossible,
    GetAvailableTokens,
    GiveBack,
    Reserve,
    Reset,
    Settle,
    Synchronize,
    TakeSnapshot,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.numbers import NEVER
from ratelimit.core.sliding_window.configuration import SlidingWindow, SlidingWindows
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from tests.promises.simulation.sliding import LogLevel
from tests.promises.simulation.window import WindowLevel
from tests.promises.simulation.world import MILLISECOND
from tests.support.fixed_window import FixedWindow

Limits: TypeAlias = BucketConfiguration | FixedWindow | SlidingWindow | SlidingWindows
"""The limits that a schedule may have."""


class Level(NamedTuple):
    """What one bandwidth holds, in tokens times its period, so that every number is whole."""

    limit: Bandwidth
    at: int
    amount: int

    @classmethod
    def initial(cls, limit: Bandwidth, now: int) -> Level:
        first = limit.first_refill_millis
        begin = now if first is None else first * MILLISECOND - limit.refill_period_nanos
        return cls(limit, begin, limit.initial_tokens * limit.refill_period_nanos)

    @property
    def tokens(self) -> int:
        return self.amount // self.limit.refill_period_nanos

    def refilled(self, now: int) -> Level:
        limit, at, amount = self
        period = limit.refill_period_nanos
        if limit.refill_intervally:
            now -= (now - at) % period
        if now <= at:
            return self
        if amount < limit.capacity * period:
            amount = min(amount + (now - at) * limit.refill_tokens, limit.capacity * period)
        return Level(limit, now, amount)

    def less(self, tokens: int) -> Level:
        return Level(self.limit, self.at, self.amount - tokens * self.limit.refill_period_nanos)

    def due_after(self, tokens: int, wait: int, now: int, *, alone: bool) -> Level:
        """The level from which no more is there at the end of the wait than a bucket holds that has lost the tokens.

        One that is alone stays as it is: it has those who wait to itself.
        """
        if alone:
            return self
        limit, at, amount = self
        elapsed = max(0, now + wait - (at if limit.refill_intervally else max(at, now)))
        if limit.refill_intervally:
            elapsed -= elapsed % limit.refill_period_nanos
        room = max(0, limit.capacity - tokens) * limit.refill_period_nanos
        return Level(limit, at, min(amount, room - elapsed * limit.refill_tokens))

    def raised(self, amount: int, most: int) -> Level:
        """The level with this amount put in, up to so many tokens."""
        most *= self.limit.refill_period_nanos
        return Level(self.limit, self.at, max(self.amount, min(self.amount + amount, most)))

    def given_back(self, tokens: int, later: int = 0) -> Level:
        """The level with tokens put in, up to what can be there beside those that were consumed later."""
        return self.raised(tokens * self.limit.refill_period_nanos, self.limit.capacity - later)

    def with_surplus(self, whole: int, unfinished: int) -> Level:
        """The level with what a reservation had taken beside its tokens put in."""
        return self.raised(whole * self.limit.refill_period_nanos + unfinished, self.limit.capacity)

    def added(self, tokens: int) -> Level:
        period = self.limit.refill_period_nanos
        return Level(self.limit, self.at, min(self.amount + tokens * period, self.limit.capacity * period))

    def full(self) -> Level:
        return self._replace(amount=self.limit.capacity * self.limit.refill_period_nanos)

    def most(self, nanos: int, ahead: int) -> int:
        """The most tokens that are admitted within so many nanoseconds of the beginning.

        :param ahead: those that may be admitted in debt at any time.
        """
        limit = self.limit
        steps = nanos // limit.refill_period_nanos + 1 if limit.refill_intervally else 0
        come = steps * limit.refill_tokens or nanos * limit.refill_tokens // limit.refill_period_nanos
        return max(limit.capacity, limit.initial_tokens) + come + ahead

    def wait(self, tokens: int, now: int) -> int:
        """How long until so many tokens are there, in nanoseconds, rounded down."""
        period, rate = self.limit.refill_period_nanos, self.limit.refill_tokens
        missing = tokens * period - self.amount
        if self.tokens >= tokens:
            return 0
        if not self.limit.refill_intervally:
            return missing // rate
        return self.at + -(-missing // (rate * period)) * period - now


class Outcome(NamedTuple):
    """What a command does to a bucket: the bucket after it, what it charges, the answer, and whether it is stored."""

    bucket: Bucket
    charge: int
    answer: Any
    stored: bool


class Bucket(NamedTuple):
    """All the limits of a bucket, and what it has counted as consumed."""

    levels: tuple[Level | WindowLevel | LogLevel, ...]
    counted: int = 0

    @classmethod
    def initial(cls, limits: Limits, now: int) -> Bucket:
        if isinstance(limits, FixedWindow):
            return cls((WindowLevel.initial(limits, now),))
        if isinstance(limits, SlidingWindow | SlidingWindows):
            return cls(tuple([LogLevel.initial(limit, now) for limit in limits]))
        return cls(tuple([Level.initial(limit, now) for limit in limits.bandwidths]))

    @property
    def tokens(self) -> int:
        return min([level.tokens for level in self.levels])

    def refilled(self, now: int) -> Bucket:
        return self._replace(levels=tuple([level.refilled(now) for level in self.levels]))

    def missing(self) -> int:
        """Tokens to the capacity, of the limit that misses most."""
        return max([level.limit.capacity - level.tokens for level in self.levels])

    def after(self, command: Command[Any], now: int) -> Outcome:
        """Refill, and do a command."""
        return self.refilled(now)._after(command, now)

    def _after(self, command: Command[Any], now: int) -> Outcome:  # noqa: C901, PLR0912  # a table of the commands
        available = self.tokens
        match command:
            case TryConsume(tokens):
                return self._consumed(tokens, True) if tokens <= available else Outcome(self, 0, False, False)
            case TryConsumeAndReturnRemaining(tokens):
                consumed = tokens <= available
                left = available - tokens if consumed else available
                return self._consumed(tokens * consumed, (consumed, max(0, left)))
            case ConsumeAsMuchAsPossible(limit):
                tokens = max(0, min(limit, available))
                return self._consumed(tokens, tokens)
            case Reserve(tokens, longest_wait):
                wait = max([level.wait(tokens, now) for level in self.levels])
                return self._reserved(tokens, wait, now) if wait <= longest_wait else Outcome(self, 0, NEVER, False)
            case Cancel(tokens, noted, surplus):
                return self._cancelled(tokens, noted, surplus)
            case GiveBack(tokens):
                levels = tuple([level.given_back(tokens) for level in self.levels])
                return Outcome(Bucket(levels, self.counted - tokens), -tokens, None, True)
            case Settle():
                return self._settled(command, now)
            case AddTokens(tokens):
                levels = tuple([level.added(tokens) for level in self.levels])
                return Outcome(self._replace(levels=levels), 0, None, True)
            case Reset():
                full = tuple([level.full() for level in self.levels])
                return Outcome(self._replace(levels=full), 0, None, True)
            case GetAvailableTokens():
                return Outcome(self, 0, available, False)
            case TakeSnapshot():
                return Outcome(self, 0, None, False)
            case Verbose():
                return self._after(command.command, now)
            case Synchronize():
                booked = self._consumed(command.tokens, None)
                bucket, charge, answer, stored = booked.bucket._after(command.command, now)
                if not command.booking:
                    return Outcome(self, 0, answer, False)
                return Outcome(bucket, booked.charge + charge, answer, booked.stored or stored)
            case Batch(commands):
                whole = Outcome(self, 0, [], False)
                for part in commands:
                    bucket, charge, answer, stored = whole.bucket._after(part, now)
                    whole = Outcome(bucket, whole.charge + charge, [*whole.answer, answer], whole.stored or stored)
                return whole
        raise NotImplementedError(command)

    def _consumed(self, tokens: int, answer: Any) -> Outcome:
        if not tokens:
            return Outcome(self, 0, answer, False)
        levels = tuple([level.less(tokens) for level in self.levels])
        return Outcome(Bucket(levels, self.counted + tokens), tokens, answer, True)

    def _settled(self, command: Settle, now: int) -> Outcome:
        if command.excess:
            return self._consumed(command.excess, max([level.wait(command.excess, now) for level in self.levels]))
        return self._after(GiveBack(command.rest), now)._replace(answer=0)

    def _reserved(self, tokens: int, wait: int, now: int) -> Outcome:
        outcome = self._consumed(tokens, wait)
        if not wait:
            return outcome
        alone = len(self.levels) == 1
        levels = tuple([level.due_after(tokens, wait, now, alone=alone) for level in outcome.bucket.levels])
        return outcome._replace(bucket=outcome.bucket._replace(levels=levels))

    def _cancelled(self, tokens: int, noted: int, surplus: tuple[tuple[int, int], ...]) -> Outcome:
        if isinstance(self.levels[0], LogLevel):
            ((due, _),) = surplus
            cancelled = tuple([level.cancelled(tokens, due) for level in self.levels if isinstance(level, LogLevel)])
            return Outcome(Bucket(cancelled, self.counted - tokens), -tokens, True, True)
        later = max(0, self.counted - noted)
        if later and self.tokens < 0:
            return Outcome(self, 0, False, False)
        levels = [level.given_back(tokens, later) for level in self.levels]
        if surplus and not later:
            levels = [
                level.with_surplus(whole, unfinished)
                for level, (whole, unfinished) in zip(levels, surplus, strict=True)
            ]
        return Outcome(Bucket(tuple(levels), self.counted - tokens), -tokens, True, True)
