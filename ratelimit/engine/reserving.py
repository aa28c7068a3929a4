"""Reservations that settle: what takes their tokens, and what puts those that were used in the place of these.

Nothing is kept beside the bucket. A reservation is an ordinary consumption, and settling it is one more swap, which
gives back the rest or takes the excess. What a process that dies has reserved comes back by the refill.

A reservation that a local bucket has granted, where the store had failed, is settled in that bucket. One that was
granted without charge is not settled at all.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Final, NamedTuple

from ratelimit.core.algorithm import Configuration
from ratelimit.core.commands import Settle, TryConsumeAndReturnRemaining, Verbose
from ratelimit.core.numbers import NEVER, Duration
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.engine.cancellation import uninterrupted
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Course, Question
from ratelimit.errors import RateLimitError, ReservationOverflowError
from ratelimit.runtime.steps import Steps, run

_logger = logging.getLogger("ratelimit")

LEAST_TIMEOUT: Final = 0.001
"""Seconds that a wait is asked for at least, where the first question has taken all of its time."""


class Taken(NamedTuple):
    """What was taken for a reservation, or refused.

    :param tokens: those that were asked for, but no more than the bucket can hold.
    :param result: the answer of the bucket.
    :param is_charged: whether the tokens were taken from a bucket, and can be settled there.
    :param is_local: whether that was a local bucket in place of the shared one.
    """

    tokens: int
    result: VerboseResult[ConsumptionProbe]
    is_charged: bool
    is_local: bool

    @classmethod
    def of(cls, tokens: int, result: VerboseResult[ConsumptionProbe], course: Course) -> Taken:
        """Return what an answer means, by what has happened on the way to it."""
        # A key that is not limited has no limits, and nobody was charged.
        is_charged = result.value.consumed and course.charged and result.configuration is not None
        return cls(tokens, result, is_charged, course.degraded)


def take(
    proxy: BucketProxy, tokens: int, max_wait: Duration | None, longest_wait: int, timeout: Duration | None
) -> Taken:
    """Take the tokens of a reservation in sync code.

    :param max_wait: the longest wait that is accepted; None: as long as it takes.
    :param longest_wait: the same in nanoseconds.
    """
    question = proxy.question(_consumption(tokens), timeout, holds=True)
    taken = run(_tried(proxy, question, tokens))
    if not _is_worth_waiting(taken, longest_wait):
        return taken
    course = Course()
    left = _time_left(proxy, question)
    result = proxy.under_shield(proxy.consume_and_show, taken.tokens, max_wait, left, course)
    return _waited(taken, result, course)


def taking(
    proxy: BucketProxy, tokens: int, max_wait: Duration | None, longest_wait: int, timeout: Duration | None
) -> Steps[Taken]:
    """Take the tokens of a reservation in asyncio; the arguments are those of :func:`take`."""
    question = proxy.question(_consumption(tokens), timeout, holds=True)
    taken = yield from _tried(proxy, question, tokens)
    if not _is_worth_waiting(taken, longest_wait):
        return taken
    course = Course()
    result = yield from proxy.consume_and_show(taken.tokens, max_wait, _time_left(proxy, question), course)
    return _waited(taken, result, course)


def _consumption(tokens: int) -> Verbose[ConsumptionProbe]:
    return Verbose(TryConsumeAndReturnRemaining(tokens))


def _tried(proxy: BucketProxy, question: Question, tokens: int) -> Steps[Taken]:
    """Take the tokens if they are there; of more than the bucket can hold, as many as it can hold.

    What the bucket can hold is known from its answer only, since stored limits may be others than those of the manager.
    """
    while True:
        course = Course()
        result = yield from _asked(proxy, question.asking(_consumption(tokens))._replace(course=course))
        taken = Taken.of(tokens, result, course)
        if course.interruption is not None:
            # The tokens were taken for a caller that is cancelled, and never enters its block.
            if taken.is_charged:
                yield from uninterrupted(_released(proxy, taken), course)
            raise course.interruption
        most = _capacity(result.configuration)
        if taken.result.value.consumed or most is None or tokens <= most:
            return taken
        tokens = most


def _released(proxy: BucketProxy, taken: Taken) -> Steps[None]:
    """Give back all that was taken."""
    try:
        yield from settling(proxy, Settle(taken.tokens, 0), None, is_local=taken.is_local)
    except RateLimitError as error:  # the interruption is what the caller must hear of
        _logger.warning(
            "%d tokens of a reservation that was interrupted could not be given back: %s", taken.tokens, error
        )


def _asked(proxy: BucketProxy, question: Question) -> Steps[Any]:
    """Ask a question to whose end the store is asked, whatever cancels the caller."""
    try:
        return (yield from proxy.layer(question))
    except RateLimitError as error:
        if question.course.interruption is not None:
            raise question.course.interruption from error
        raise


def _capacity(configuration: Configuration | None) -> int | None:
    return None if configuration is None else min(limit.capacity for limit in configuration)


def _is_worth_waiting(taken: Taken, longest_wait: int) -> bool:
    probe = taken.result.value
    return not probe.consumed and longest_wait > 0 and probe.nanos_to_wait_for_refill <= longest_wait


def _time_left(proxy: BucketProxy, question: Question) -> float:
    # A question of a proxy has a deadline.
    left: float = question.deadline - proxy.pipeline.monotonic()
    return max(LEAST_TIMEOUT, left)


def _waited(taken: Taken, result: VerboseResult[Any], course: Course) -> Taken:
    """Return what was taken by a wait."""
    is_taken = result.value.wait != NEVER
    probe = probe_of(result, 0 if is_taken else result.value.refused_wait, consumed=is_taken)
    return Taken.of(taken.tokens, replace(result, value=probe), course)


def probe_of(result: VerboseResult[Any], wait: int, *, consumed: bool) -> ConsumptionProbe:
    """Return the answer of a reservation as a probe.

    :param wait: how long the refused wait would have been, in nanoseconds.
    """
    remaining, full = max(0, result.available_tokens), result.full_refilling_time_nanos
    return ConsumptionProbe(consumed, remaining, wait, full, result.degraded)


def settling(
    proxy: BucketProxy, command: Settle, timeout: Duration | None, *, is_local: bool = False
) -> Steps[VerboseResult[int] | None]:
    """Settle a reservation, and return the bucket after it; None where the shared bucket was not asked.

    A request that is under way is seen through, whatever interrupts or cancels the caller.

    :param is_local: whether a local bucket has granted it.
    :raises ReservationOverflowError: where the debt does not fit into 64 bits; the reservation stays as it was.
    """
    if not (command.rest or command.excess):
        return None
    if is_local:
        check_is_payable(proxy.pipeline.local_buckets.settle_reservation(proxy.target, command))
        return None
    question = proxy.question(Verbose(command), timeout, holds=True)
    result: VerboseResult[int] = yield from _asked(proxy, question)
    if question.course.interruption is not None:
        raise question.course.interruption
    check_is_payable(result.value)
    return result


def check_is_payable(wait: int) -> None:
    """Check what the settlement of an excess has answered.

    :raises ReservationOverflowError: where the debt does not fit into 64 bits.
    """
    if wait == NEVER:
        raise ReservationOverflowError("so many tokens could never be paid back")
