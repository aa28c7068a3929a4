"""What happens after a request whose reply was lost: see rules 2 and 3 in the docstring of ``swapping``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ratelimit.core.algorithm import decode, encode
from ratelimit.core.commands import execute
from ratelimit.engine.last_seen import Sighting
from ratelimit.engine.script_arguments import PlainConsumption
from ratelimit.errors import StoreError, StoreUnavailableError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided, Lost

if TYPE_CHECKING:
    from ratelimit.engine.attempt import Attempt


def repeated(attempt: Attempt, failure: BaseException) -> Steps[Lost | None]:
    """Send a swap whose reply was lost once more; return None once one of the two is known to have been carried out.

    :param failure: the error that came in place of the reply.
    :raises StoreUnavailableError: where nobody can say whether the first swap was carried out.
    """
    question, requests = attempt.question, attempt.requests
    course, key = question.course, attempt.target.stored_key
    if not isinstance(failure, StoreError):
        # Sync code was interrupted, or the event loop is closing: no reply will come any more.
        course.interruption = failure
    course.round_trips += 1
    try:
        loss: Lost | None = yield requests.swap(
            key, attempt.before, attempt.new, attempt.ttl, deadline=question.deadline
        )
    except StoreError as error:
        error.in_doubt = True
        raise
    if loss is None:
        return None
    is_in_place = loss.state == attempt.new
    if is_in_place and requests.unique_readings:
        before, after = attempt.states()
        if after.shows(before, attempt.now):
            # No other writer can have written these bytes: the first swap was carried out.
            return None
    requests.remember(key, Sighting(loss.state))
    meanwhile = "while others were changing the bucket"
    if is_in_place:
        meanwhile = "and the state that it was to store is there, which another writer may have stored"
    raise StoreUnavailableError(
        attempt.target.key, f"a reply of the store was lost {meanwhile}", in_doubt=True
    ) from failure


class Seen(NamedTuple):
    """The answer of a decision whose effect was seen in the store, although its reply was lost."""

    answer: Any


def decided_again(
    attempt: Attempt, consumption: PlainConsumption, arguments: tuple[bytes, ...], failure: BaseException
) -> Steps[Decided | Seen]:
    """Ask the store once more for a decision whose reply was lost, with the very time of the first request.

    The request is strict. If the first one was carried out, the last refill is at this time, so that the second one is
    not run; and if the second one is run, the first one can never be any more.

    :param failure: the error that came in place of the reply.
    :raises StoreUnavailableError: where nobody can say whether the first request was carried out.
    """
    question, requests, target = attempt.question, attempt.requests, attempt.target
    course = question.course
    if not isinstance(failure, StoreError):
        # Sync code was interrupted, or the event loop is closing: no reply will come any more.
        course.interruption = failure
    course.round_trips += 1
    try:
        decided: Decided = yield requests.decide(target.stored_key, arguments, deadline=question.deadline)  # type: ignore[misc]
    except StoreError as error:
        error.in_doubt = True
        raise
    if decided.done:
        return decided
    if decided.before is None:
        if attempt.must_exist:
            # The first request may have been carried out before the bucket expired, or was removed.
            raise StoreUnavailableError(
                target.key, "a reply of the store was lost, and the bucket is not there any more", in_doubt=True
            ) from failure
        return decided
    state = decode(decided.before, target.key)
    if state.shows(None, attempt.now):
        # What the bucket held at this time, right before the tokens were taken.
        full = state.given_back(consumption.tokens * consumption.calls)
        after, answer = execute(attempt.command, attempt.terms, full, attempt.now)
        if after is not None and encode(after) == decided.before:
            attempt.remember(decided.before, after, 0)
            target.made = True
            return Seen(answer)
    if state.refilled(attempt.now).shows(state, attempt.now):
        # The last refill is earlier, so that neither request was run: they could be granted in part only.
        return decided
    attempt.remember(None, None, attempt.trust)
    raise StoreUnavailableError(
        target.key, "a reply of the store was lost while others were changing the bucket", in_doubt=True
    ) from failure
