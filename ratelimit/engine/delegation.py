"""What precedes a swap: reading the bucket and the time, or letting the store decide where swaps would be lost."""

from __future__ import annotations

from typing import Any, Final

from ratelimit.core.algorithm import decode, encode
from ratelimit.core.commands import execute
from ratelimit.engine.attempt import Attempt
from ratelimit.engine.cancellation import seen_through
from ratelimit.engine.last_seen import Sighting
from ratelimit.engine.script_arguments import request
from ratelimit.runtime.steps import Steps

NOT_DECIDED: Final = object()
"""Stands for no answer: the store has changed nothing, and the decision is to be computed here."""

_UNDISTURBED_BEFORE_SWAPS: Final = 16
"""After so many decisions of the store without another writer in between, this process swaps again."""


def prepared(attempt: Attempt) -> Steps[Any]:
    """Make an attempt ready to be computed: learn what is stored and what time it is, or let the store decide.

    :returns: the answer of the store, or ``NOT_DECIDED``.
    """
    while not attempt.is_ready:
        if attempt.must_read:
            yield from attempt.read()
        if attempt.now is None:
            yield from attempt.read_clock()
        if not attempt.should_delegate:
            attempt.decode()
        elif (answer := (yield from _delegated(attempt))) is not NOT_DECIDED:
            return answer
    return NOT_DECIDED


def _delegated(attempt: Attempt) -> Steps[Any]:
    """Let the store decide, once in an attempt; return ``NOT_DECIDED`` where it cannot for this command or bucket."""
    attempt.should_delegate, attempt.has_delegated = False, True
    question, requests = attempt.question, attempt.requests
    now: int = attempt.now
    target, course = attempt.target, question.course
    arguments = request(
        attempt.command,
        attempt.terms,
        target.expiration,
        now,
        must_exist=attempt.must_exist,
    )
    if arguments is None:
        # The script does not know this command. The loop goes on with a swap.
        return NOT_DECIDED
    course.round_trips += 1
    if question.holds:
        deciding = requests.decide(target.stored_key, arguments, deadline=question.deadline)  # type: ignore[misc]
        done, before = yield from seen_through(deciding, course)
    else:
        done, before = yield from requests.deciding(target.stored_key, arguments, question.deadline)  # type: ignore[misc]
    if done:
        return _explained(attempt, before, now)
    if course.interruption is not None:
        # The store has changed nothing, so that nothing has to be undone.
        raise course.interruption
    attempt.shown(before)
    return NOT_DECIDED


def _explained(attempt: Attempt, before: bytes | None, now: int) -> Any:
    """Compute the answer that belongs to a decision of the store, whose reply holds only what was stored before.

    Also remember what is stored now, and whether the store is to decide the next time.
    """
    target, seen = attempt.target, attempt.seen
    state = None if before is None else decode(before, target.key)
    # The script makes the same transition, to the byte. So the transition is computed here again, from the same bytes:
    # it gives the answer and what is stored now.
    after, answer = execute(attempt.command, attempt.terms, state, now)
    stored = before if after is None else encode(after)
    # If the store had what this process has last seen, no other writer came in between.
    undisturbed = seen.undisturbed + 1 if before == seen.stored else 0
    losses = 0 if undisturbed >= _UNDISTURBED_BEFORE_SWAPS else attempt.requests.tuning.losses_before_delegation
    attempt.requests.remember(target.stored_key, Sighting(stored, after or state, losses, undisturbed))
    if state is None or (after is not None and state.configuration_version != after.configuration_version):
        target.made = True
    return answer
