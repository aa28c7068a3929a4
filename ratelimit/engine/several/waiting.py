"""Wait until several buckets have their tokens at the same time.

Tokens cannot be reserved in one bucket while another one has none: they would be gone by the time at which the other is
ready, and the limits would not hold. So nothing is taken while a caller waits. It sleeps for the longest wait, and then
tries again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, Duration
from ratelimit.core.results import CombinedProbe
from ratelimit.engine.cancellation import uninterrupted
from ratelimit.engine.observing import report_interruption
from ratelimit.engine.question import Course
from ratelimit.engine.several.parts import Courses
from ratelimit.engine.several.turns import Turn, Turns
from ratelimit.errors import RateLimitError, ReservationOverflowError
from ratelimit.runtime.steps import Steps

_logger = logging.getLogger("ratelimit")


class Waited(NamedTuple):
    """How a wait has ended.

    :param probe: the last answer.
    :param courses: what has happened on the way to it.
    """

    probe: CombinedProbe
    courses: Courses


def waited_for(buckets: Any, max_waits: Sequence[int], timeout: Duration | None) -> Steps[Waited | None]:
    """Consume the tokens of several buckets once they are there.

    :param buckets: a ``SeveralBuckets``.
    :param max_waits: for each bucket, the longest wait because of it that is accepted, in nanoseconds; ``NEVER``: as
        long as it takes.
    :returns: how that has ended; None where the longest wait was over before it was this caller's turn.
    :raises ReservationOverflowError: without a longest wait, where the tokens will never be there.
    """
    wait = _Wait(buckets, max_waits)
    try:
        while (yield from wait.is_its_turn()):
            probe, courses = yield from _try_or_undo(buckets, wait, timeout)
            if wait.is_over(probe):
                return Waited(wait.outcome(probe), courses)
            if wait.queues(probe):
                yield from wait.sleep(probe.nanos_to_wait_for_refill)
        return None
    finally:
        wait.end()


class _Wait:
    """A caller that waits.

    :ivar waited: for how long it has waited, in nanoseconds.
    """

    def __init__(self, buckets: Any, max_waits: Sequence[int]) -> None:
        self._buckets = buckets
        self._max_waits = max_waits
        self._turns: Turns = buckets.home.several.turns
        # A caller that does not wait for a bucket at all does not queue there either.
        waits_for = [key for key, longest in zip(buckets.keys, max_waits, strict=True) if longest]
        self._turn: Turn | None = self._turns.first_queue_of(waits_for)
        self.waited = 0

    def is_its_turn(self) -> Steps[bool]:
        """Wait until no other caller has to be served before; return False where that takes too long."""
        if self._turn is None or self._turns.is_first(self._turn):
            return True
        monotonic = self._buckets.home.monotonic
        begun = monotonic()
        longest = self._max_waits[self._buckets.keys.index(self._turn.key)]
        left = None if longest == NEVER else (longest - self.waited) / NANOS_PER_SECOND
        is_first = yield from self._turns.wait(self._turn, left)
        self.waited += round((monotonic() - begun) * NANOS_PER_SECOND)
        return is_first

    def is_over(self, probe: CombinedProbe) -> bool:
        """Return whether the caller has its tokens, or there is nothing to wait for, or not for so long."""
        if probe.consumed or probe.degraded or probe.nanos_to_wait_for_refill == NEVER:
            return True
        waits = [part.nanos_to_wait_for_refill for part in probe.parts]
        return any(wait and self.waited + wait > most for wait, most in zip(waits, self._max_waits, strict=True))

    def outcome(self, probe: CombinedProbe) -> CombinedProbe:
        """Return the last answer.

        :raises ReservationOverflowError: where the caller would wait for as long as it takes, and that is forever.
        """
        waits = zip(probe.parts, self._max_waits, strict=True)
        is_endless = any(part.nanos_to_wait_for_refill == longest == NEVER for part, longest in waits)
        if is_endless and not probe.consumed and not probe.degraded:
            raise ReservationOverflowError("so many tokens will never be there at the same time")
        return probe

    def queues(self, probe: CombinedProbe) -> bool:
        """Queue at the bucket with the longest wait; return whether no other caller was there before."""
        waits = [part.nanos_to_wait_for_refill for part in probe.parts]
        key = self._buckets.keys[waits.index(max(waits))]
        if self._turn is None or self._turn.key != key:
            self.end()
            self._turn = self._turns.join(key)
        return self._turns.is_first(self._turn)

    def sleep(self, nanos: int) -> Steps[None]:
        """Sleep, and report to the listeners where that is cut short."""
        try:
            yield self._buckets.home.sleep(nanos)
        except GeneratorExit:
            raise
        except BaseException as error:
            for proxy, tokens in self._buckets.shares:
                report_interruption(proxy.pipeline.listener, proxy.target.key, tokens, error)
            raise
        self.waited += nanos

    def end(self) -> None:
        """Leave the queue, if the caller is in one."""
        if self._turn is not None:
            self._turns.leave(self._turn)
            self._turn = None


def tried_to_the_end(steps: Steps[CombinedProbe], course: Course, courses: Courses) -> Steps[CombinedProbe]:
    """Try to consume, and end that whatever interrupts the caller; note the interruption in the course.

    :param courses: those of the steps, where an interruption is found that a request in flight has held back.
    """
    try:
        probe = yield from uninterrupted(steps, course)
    except RateLimitError as error:
        interruption = course.interruption or courses.whole.interruption
        if interruption is not None:
            raise interruption from error
        raise
    course.interruption = course.interruption or courses.whole.interruption
    return probe


def _try_or_undo(buckets: Any, wait: _Wait, timeout: Duration | None) -> Steps[Waited]:
    """Try to consume; where the caller is interrupted meanwhile, give back what it has taken."""
    course, courses = Course(), Courses.of(len(buckets.shares), holds=True)
    probe = yield from tried_to_the_end(buckets.try_for(wait, timeout, courses), course, courses)
    if course.interruption is None:
        return Waited(probe, courses)
    if probe.consumed and not probe.degraded:
        try:
            yield from uninterrupted(buckets.give_back(None), course)
        except RateLimitError as error:  # the interruption is what the caller must hear of
            _logger.warning("the tokens of a wait that was interrupted could not be given back: %s", error)
    raise course.interruption
