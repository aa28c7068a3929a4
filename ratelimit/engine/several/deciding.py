"""Decide about several buckets by compare-and-swap, in a loop with the four rules of ``engine.swapping``.

A call computes from what is remembered of its buckets, and swaps all of them at once. Buckets that it does not change
are compared in the same request. So an answer is always that of one moment, at which all of the buckets were as it
says: a refusal, too, and what it shows of those that have not refused. Where any bucket is not likely to be as it is
remembered, or the swap was lost, the store decides by itself, if it can; ``engine.delegation`` has the reasons. So no
decision takes more than three round trips.

A swap whose reply was lost is sent again as it was. If it is not carried out then, what it shows may still settle the
matter, because the first swap has changed all of its buckets or none:

- One bucket holds bytes that only this swap can have written: it was carried out.
- One bucket that was to change holds what it held before, and would not if the swap had been carried out: it was not.
  It cannot be carried out later either if another bucket has been written since, and cannot be as before again.

Neither can be seen of a bucket whose bytes do not hold the reading of a clock, or hold one that others may have read as
well. Where no bucket settles it, the error says that the decision is in doubt, as it does for a decision of the store's
own whose reply was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ratelimit.core.algorithm import decode
from ratelimit.engine.question import Course, Question
from ratelimit.engine.several.attempt import Attempt, Held
from ratelimit.engine.several.parts import Call
from ratelimit.engine.several.script_arguments import request_for
from ratelimit.engine.store_requests import Requests
from ratelimit.errors import (
    BucketNotFoundError,
    CorruptStateError,
    RateLimitError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import DecidedAll, Lost

Answers = list[Any]
"""An answer for each part of a call."""

_OF_ONE_BUCKET: Final = (CorruptStateError, BucketNotFoundError, StoreError)
"""What may be wrong with one bucket, and says nothing of calls that are about others."""


class Deciding:
    """Decides calls, one or several together."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def decide(self, _place: bytes, question: Question) -> Steps[Answers]:
        """Answer one question, wherever it could meet others."""
        return self.alone(question)

    def alone(self, question: Question) -> Steps[Answers]:
        """Answer one question."""
        calls, deadline, course = (question.parts,), question.deadline, question.course
        (answers,) = yield from self._decided(calls, deadline, course, holds=question.holds)
        return answers

    def together(
        self, calls: Sequence[Call], deadline: float | None, course: Course, *, holds: bool
    ) -> Steps[list[Answers | RateLimitError]]:
        """Answer several calls in their order; the answer is an error where only that call has failed.

        :param course: what happens on the way is noted here.
        """
        try:
            return list((yield from self._decided(calls, deadline, course, holds=holds)))
        except _OF_ONE_BUCKET as error:
            if len(calls) == 1 or not _may_be_of_one_bucket(error):
                raise
        answers: list[Answers | RateLimitError] = []
        for call in calls:
            try:
                answers += yield from self._decided((call,), deadline, course, holds=holds)
            except RateLimitError as error:
                answers.append(error)
        return answers

    def _decided(
        self, calls: Sequence[Call], deadline: float | None, course: Course, *, holds: bool
    ) -> Steps[list[Answers]]:
        attempt = Attempt(self._requests, calls, deadline, course, holds=holds)
        try:
            while True:
                if attempt.must_look:
                    yield from _looking(attempt)
                if attempt.now is None:
                    yield from attempt.read_clock()
                if attempt.should_delegate:
                    decided = yield from _delegated(attempt)
                    if decided is not None:
                        return decided
                    continue
                answers = attempt.compute()
                if attempt.is_changed or not attempt.is_fresh:
                    losses = yield from _swapped(attempt)
                    if losses is not None:
                        yield from attempt.lost(losses)
                        continue
                attempt.won()
                return answers
        except (StoreError, CorruptStateError) as error:
            held = attempt.held.get(error.key) if isinstance(error.key, bytes) else None
            if held is not None:
                error.key = held.target.key
            raise


def _may_be_of_one_bucket(error: RateLimitError) -> bool:
    is_the_servers = isinstance(error, StoreUnavailableError | StoreTimeoutError) or getattr(error, "in_doubt", False)
    return not is_the_servers


def _looking(attempt: Attempt) -> Steps[None]:
    try:
        yield from attempt.look()
    except StoreError as error:
        # Nothing was to be changed.
        error.in_doubt = False
        raise


def _swapped(attempt: Attempt) -> Steps[Sequence[Lost | None] | None]:
    try:
        return (yield attempt.ask())  # type: ignore[no-any-return]
    except BaseException as error:
        if not attempt.may_repeat(error):
            raise
        return (yield from _repeated(attempt, error))


def _repeated(attempt: Attempt, failure: BaseException) -> Steps[Sequence[Lost | None] | None]:
    """Send a swap whose reply was lost once more; return what it has lost to, or None if one of the two has won.

    :raises StoreUnavailableError: where nobody can say whether the first swap was carried out.
    """
    if not isinstance(failure, StoreError):
        # Sync code was interrupted, or the event loop is closing: no reply will come any more.
        attempt.course.interruption = failure
    try:
        losses: Sequence[Lost | None] | None = yield attempt.ask()
    except StoreError as error:
        error.in_doubt = True
        raise
    if losses is None:
        return None
    if attempt.requests.unique_readings:
        found = list(zip(attempt.held.values(), losses, strict=True))
        if any(_holds_our_bytes(held, loss, attempt.now) for held, loss in found):
            return None
        if any(_was_not_changed(held, loss, attempt.now) for held, loss in found) and any(
            _cannot_be_as_before(held, loss, attempt.now) for held, loss in found
        ):
            return losses
    attempt.forget()
    key = attempt.held[attempt.keys[0]].target.key
    raise StoreUnavailableError(
        key, "a reply of the store was lost while others were changing the buckets", in_doubt=True
    ) from failure


def _shows_the_reading(held: Held, now: int) -> bool:
    """Return whether the new bytes hold this reading of the clock, which is later than the last refill before."""
    return held.after is not None and held.after.shows(held.state, now)


def _holds_our_bytes(held: Held, loss: Lost | None, now: int) -> bool:
    return loss is not None and loss.state == held.new and _shows_the_reading(held, now)


def _was_not_changed(held: Held, loss: Lost | None, now: int) -> bool:
    # A bucket that was missing may have been made, and be missing again.
    return loss is None and held.before is not None and _shows_the_reading(held, now)


def _cannot_be_as_before(held: Held, loss: Lost | None, now: int) -> bool:
    """Return whether the last refill is later than that of the bytes that were expected: no refill ever goes back."""
    if loss is None or loss.state is None or held.before is None or not _shows_the_reading(held, now):
        return False
    try:
        there = decode(loss.state, held.target.key)
    except CorruptStateError:
        return False
    return there.configuration == held.state.configuration and not there.refilled(now).shows(there, now)


def _delegated(attempt: Attempt) -> Steps[list[Answers] | None]:
    """Let the store decide, once in an attempt; return None where it cannot for these calls or buckets."""
    attempt.should_delegate, attempt.has_delegated = False, True
    arguments = request_for(attempt.calls, attempt.held, attempt.now)
    if arguments is None:
        return None
    attempt.course.round_trips += 1
    decided: DecidedAll = yield attempt.requests.decide_all(attempt.keys, arguments, deadline=attempt.deadline)  # type: ignore[misc]  # it is there
    if decided.done:
        return attempt.explained(decided.before)
    if attempt.course.interruption is not None:
        # The store has changed nothing, so that nothing has to be undone.
        raise attempt.course.interruption
    attempt.shown_undecided(decided.before)
    return None
