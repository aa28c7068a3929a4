"""Reservations of several buckets: what takes their tokens in one decision, and what settles them in another one.

Settling changes all of the buckets, or none, by one swap: it gives back to some, and takes from others. It is refused
only where a debt could never be paid. Buckets that are spread are settled one after the other, each as it is by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ratelimit.core.commands import Settle
from ratelimit.core.numbers import MAX, NEVER, Duration
from ratelimit.core.results import CombinedProbe
from ratelimit.engine.cancellation import uninterrupted
from ratelimit.engine.question import Course
from ratelimit.engine.reserving import LEAST_TIMEOUT, check_is_payable, settling
from ratelimit.engine.several.buckets import SeveralBuckets
from ratelimit.engine.several.parts import Courses
from ratelimit.engine.several.waiting import tried_to_the_end, waited_for
from ratelimit.errors import RateLimitError
from ratelimit.runtime.steps import Steps

_logger = logging.getLogger("ratelimit")

_VERB: Final = "try_consume_and_return_remaining"


@dataclass(slots=True)
class TakenTogether:
    """What was taken for a reservation of several buckets, or refused.

    :param buckets: the buckets, and the tokens of each: those that were asked for, but no more than it can hold.
    :param probe: the answer of the buckets.
    :param courses: what has happened on the way to it.
    :ivar unsettled: the places of the buckets that were charged, and that are not settled yet.
    """

    buckets: SeveralBuckets
    probe: CombinedProbe
    courses: Courses
    unsettled: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.unsettled = [
            place
            for place, (part, own) in enumerate(zip(self.probe.parts, self.courses.parts, strict=True))
            # MAX is what remains for a key without a limit, where nobody was charged.
            if self.probe.consumed and own.charged and part.remaining_tokens != MAX
        ]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens of each bucket."""
        return tuple([tokens for _, tokens in self.buckets.shares])

    @property
    def refused(self) -> Any:
        """The key of the bucket that makes the caller wait the longest."""
        waits = [part.nanos_to_wait_for_refill for part in self.probe.parts]
        return self.buckets.shares[waits.index(max(waits))][0].target.key


def taking_together(buckets: SeveralBuckets, longest_wait: int, timeout: Duration | None) -> Steps[TakenTogether]:
    """Take the tokens of a reservation from all buckets, or from none.

    :param longest_wait: the longest wait that is accepted, in nanoseconds; ``NEVER``: as long as it takes.
    """
    end: float = buckets.home.monotonic() + buckets.seconds(timeout)

    def left() -> float:
        seconds: float = end - buckets.home.monotonic()
        return max(LEAST_TIMEOUT, seconds)

    taken = yield from _tried(buckets, timeout)
    while (cut := (yield from _cut(taken, left()))) is not None:
        taken = yield from _tried(cut, left())
    wait = taken.probe.nanos_to_wait_for_refill
    if taken.probe.consumed or not longest_wait or wait > longest_wait:
        return taken
    waited = yield from waited_for(taken.buckets, [longest_wait] * len(taken.buckets.shares), left())
    return taken if waited is None else TakenTogether(taken.buckets, *waited)


def _tried(buckets: SeveralBuckets, timeout: Duration | None) -> Steps[TakenTogether]:
    """Take the tokens if all of them are there; where the caller is interrupted meanwhile, give them back."""
    course, courses = Course(), Courses.of(len(buckets.shares), holds=True)
    probe = yield from tried_to_the_end(buckets.try_consume(_VERB, timeout, courses), course, courses)
    taken = TakenTogether(buckets, probe, courses)
    interruption = course.interruption
    if interruption is not None:
        # The tokens were taken for a caller that never enters its block.
        if taken.unsettled:
            yield from uninterrupted(_released(taken), course)
        raise interruption
    return taken


def _released(taken: TakenTogether) -> Steps[None]:
    """Give back all that was taken."""
    try:
        yield from _settled(taken, [0] * len(taken.tokens), None)
    except RateLimitError as error:  # the interruption is what the caller must hear of
        _logger.warning("the tokens of a reservation that was interrupted could not be given back: %s", error)


def _cut(taken: TakenTogether, timeout: Duration | None) -> Steps[SeveralBuckets | None]:
    """Return the buckets with no more tokens than each can hold; None where that is not why they were refused.

    What a bucket can hold is asked, because its stored limits may be others than those of its manager.
    """
    waits = [part.nanos_to_wait_for_refill for part in taken.probe.parts]
    if taken.probe.consumed or NEVER not in waits:
        return None
    states = yield from taken.buckets.states(timeout)
    shares = []
    for (proxy, tokens), state in zip(taken.buckets.shares, states, strict=True):
        most = tokens if state is None else min(limit.capacity for limit in state.configuration)
        shares.append((proxy, min(tokens, most)))
    return None if tuple(shares) == taken.buckets.shares else replace(taken.buckets, shares=tuple(shares))


def settling_together(taken: TakenTogether, used: Sequence[int], timeout: Duration | None) -> Steps[None]:
    """Put what was used in the place of what was taken, in all buckets that are not settled yet.

    Requests that are under way are seen through, whatever interrupts or cancels the caller.

    :raises ReservationOverflowError: where a debt does not fit into 64 bits. Unless the buckets are spread, the
        reservation stays as it was.
    """
    course = Course()
    try:
        yield from uninterrupted(_settled(taken, used, timeout), course)
    except RateLimitError as error:
        if course.interruption is not None:
            raise course.interruption from error
        raise
    if course.interruption is not None:
        raise course.interruption


def _settled(taken: TakenTogether, used: Sequence[int], timeout: Duration | None) -> Steps[None]:
    settlements = {place: Settle(taken.tokens[place], used[place]) for place in taken.unsettled}
    shared: list[int] = []
    for place, settlement in settlements.items():
        if settlement.rest or settlement.excess:
            proxy, _ = taken.buckets.shares[place]
            if not taken.courses.parts[place].degraded:
                shared.append(place)
                continue
            check_is_payable(proxy.pipeline.local_buckets.settle_reservation(proxy.target, settlement))
        taken.unsettled.remove(place)
    if not shared:
        return
    if taken.buckets.spread:
        yield from _settled_one_by_one(taken, {place: settlements[place] for place in shared}, timeout)
    else:
        yield from _settled_in_one(taken, {place: settlements[place] for place in shared}, timeout)


def _settled_in_one(taken: TakenTogether, settlements: dict[int, Settle], timeout: Duration | None) -> Steps[None]:
    courses = Courses.of(len(settlements), holds=True)
    try:
        is_payable = yield from taken.buckets.only(settlements).settle([*settlements.values()], timeout, courses)
    except RateLimitError as error:
        if courses.whole.interruption is not None:
            raise courses.whole.interruption from error
        raise
    if courses.whole.interruption is not None:
        raise courses.whole.interruption
    check_is_payable(0 if is_payable else NEVER)


def _settled_one_by_one(taken: TakenTogether, settlements: dict[int, Settle], timeout: Duration | None) -> Steps[None]:
    """Settle one bucket after the other; where one fails, the others are settled all the same."""
    failures: list[RateLimitError] = []
    for place, settlement in settlements.items():
        try:
            yield from settling(taken.buckets.shares[place][0], settlement, timeout)
        except RateLimitError as error:
            failures.append(error)
        else:
            taken.unsettled.remove(place)
    if failures:
        # A reservation that is in doubt must not be settled again.
        raise next((error for error in failures if getattr(error, "in_doubt", False)), failures[0])
