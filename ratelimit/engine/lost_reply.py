"""What happens after a swap whose reply was lost: see rule 2 in the docstring of ``swapping``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ratelimit.core.algorithm import State
from ratelimit.engine.last_seen import Sighting
from ratelimit.errors import StoreError, StoreUnavailableError
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Lost

if TYPE_CHECKING:
    from ratelimit.engine.attempt import Attempt


def repeated(attempt: Attempt, after: State, failure: BaseException) -> Steps[Lost | None]:
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
    if is_in_place and requests.unique_readings and after.shows(attempt.state, attempt.now):
        # No other writer can have written these bytes: the first swap was carried out.
        return None
    requests.remember(key, Sighting(loss.state))
    meanwhile = "while others were changing the bucket"
    if is_in_place:
        meanwhile = "and the state that it was to store is there, which another writer may have stored"
    raise StoreUnavailableError(
        attempt.target.key, f"a reply of the store was lost {meanwhile}", in_doubt=True
    ) from failure
