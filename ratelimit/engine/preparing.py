"""What precedes a swap: reading the bucket and the time, or letting the store decide where a swap might be lost."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from ratelimit.core.algorithm import decode, encode
from ratelimit.core.commands import TryConsume, execute
from ratelimit.engine.attempt import Attempt
from ratelimit.engine.cancellation import seen_through
from ratelimit.engine.delegation import BUSY, busier
from ratelimit.engine.last_seen import UNKNOWN
from ratelimit.engine.lost_reply import Seen, decided_again
from ratelimit.engine.question import new_tuple
from ratelimit.engine.script_arguments import (
    COUNTING,
    MUST_EXIST,
    STRICT,
    Form,
    PeriodicForm,
    PlainConsumption,
    form_of,
    plain_consumption,
)
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import Decided

NOT_DECIDED: Final = object()
"""Stands for no answer: the store has changed nothing, and the decision is to be computed here."""


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
            attempt.is_ready = True
        elif (answer := (yield from _delegated(attempt))) is not NOT_DECIDED:
            return answer
    return NOT_DECIDED


class Asked(NamedTuple):
    """What the store is asked to decide.

    :param form: what all such requests have in common.
    :param consumption: what the command consumes, if it does nothing else; None for all other commands.
    :param flags: the flags of the request; ``STRICT`` among them where it can be sent again if its reply is lost.
    :param arguments: those of the script.
    """

    form: Form | PeriodicForm
    consumption: PlainConsumption | None
    flags: int
    arguments: tuple[bytes, ...]


def asked_of_store(attempt: Attempt) -> Asked | None:
    """Return what the store is to be asked to decide; None where it cannot for this command or bucket.

    A consumption is asked for strictly, if that may be, so that it can be asked for again.
    """
    command, target, seen, requests = attempt.command, attempt.target, attempt.seen, attempt.requests
    form = form_of(attempt.terms, target.expiration)
    if form is None:
        return None
    attempt.learns = attempt.swaps == 0 and requests.habit.wants_to_see(seen)
    consumption = plain_consumption(command)
    flags = MUST_EXIST if attempt.must_exist else 0
    if consumption is None:
        arguments = form.request(command, attempt.terms, attempt.now, flags)
    else:
        tokens, calls, is_shown = consumption
        if not (is_shown or attempt.learns or target.must_exist_once_made):
            flags |= COUNTING
        if (
            tokens * calls <= form.traceable_tokens
            and seen.behind < BUSY
            and requests.unique_readings
            # A strict request that is not run costs one more round trip, and a decision takes three at most.
            and attempt.question.course.round_trips <= 1
        ):
            flags |= STRICT
        arguments = form.request_to_consume(tokens, calls, attempt.terms, attempt.now, flags)
    return None if arguments is None else new_tuple(Asked, (form, consumption, flags, arguments))


def _delegated(attempt: Attempt) -> Steps[Any]:
    """Let the store decide, once in an attempt; return ``NOT_DECIDED`` where it cannot for this command or bucket."""
    attempt.should_delegate, attempt.has_delegated = False, True
    asked = asked_of_store(attempt) if attempt.asked is None else attempt.asked
    if asked is None:
        # The script does not know this command. The loop goes on with a swap.
        return NOT_DECIDED
    if asked.consumption is None:
        decided = yield from _decided(attempt, asked.arguments)
    else:
        decided = yield from _consumed(attempt, asked)
    if type(decided) is Decided and not decided.done:
        if attempt.question.course.interruption is not None:
            # The store has changed nothing, so that nothing has to be undone.
            raise attempt.question.course.interruption
        attempt.shown(decided.before)
        return NOT_DECIDED
    return answer_to(attempt, asked, decided)


def answer_to(attempt: Attempt, asked: Asked, decided: Any) -> Any:
    """Return the answer that belongs to what the store has said of a decision that it made."""
    if type(decided) is Decided:
        return _explained(attempt, decided.before)
    if type(decided) is Seen:
        return decided.answer
    return _counted(attempt, asked.consumption, decided)


def _decided(attempt: Attempt, arguments: tuple[bytes, ...]) -> Steps[Any]:
    question, requests, key = attempt.question, attempt.requests, attempt.target.stored_key
    question.course.round_trips += 1
    if attempt.usual is not None:
        reply = attempt.taken_reply()
        return (yield from requests.express.decided(key, arguments, question.deadline, reply))  # type: ignore[union-attr]
    if question.holds:
        deciding = requests.decide(key, arguments, deadline=question.deadline)  # type: ignore[misc]
        return (yield from seen_through(deciding, question.course))
    return (yield from requests.deciding(key, arguments, question.deadline))  # type: ignore[misc]


def _consumed(attempt: Attempt, asked: Asked) -> Steps[Any]:
    """Let the store consume tokens if they are there; return what the store says, or ``Seen``."""
    form, consumption, flags, arguments = asked
    tokens, calls, _ = consumption  # type: ignore[misc]  # callers have checked it
    terms, now = attempt.terms, attempt.now
    is_strict = flags & STRICT
    try:
        decided = yield from _decided(attempt, arguments)
    except BaseException as error:
        if not is_strict or not attempt.may_repeat(error):
            raise
        # As before, there is a request for these numbers.
        again: Any = form.request_to_consume(tokens, calls, terms, now, flags & ~COUNTING)
        decided = yield from decided_again(attempt, consumption, again, error)  # type: ignore[arg-type]  # it is there
    if is_strict and type(decided) is Decided and not decided.done:
        # Its time was not later than the last refill, or it could be granted in part only.
        attempt.behind = busier(attempt.seen)
        plain: Any = form.request_to_consume(tokens, calls, terms, now, flags & ~STRICT)
        decided = yield from _decided(attempt, plain)
    return decided


def _counted(attempt: Attempt, consumption: Any, consumed: int) -> Any:
    """Return the answer that belongs to a number of consumed tokens."""
    if attempt.trust != attempt.seen.trust or attempt.behind != attempt.seen.behind:
        attempt.remember(None, None, attempt.trust)
    if type(attempt.command) is TryConsume:
        return consumed > 0
    admitted = consumed // consumption.tokens
    return [True] * admitted + [False] * (consumption.calls - admitted)


def _explained(attempt: Attempt, before: bytes | None) -> Any:
    """Compute the answer that belongs to a decision of the store, whose reply holds only what was stored before.

    Also learn from it how much what is remembered of the bucket can be trusted.
    """
    seen, trust = attempt.seen, attempt.trust
    state = None if before is None else decode(before, attempt.target.key)
    # The script makes the same transition, to the byte. So the transition is computed here again, from the same bytes:
    # it gives the answer and what is stored now.
    after, answer = execute(attempt.command, attempt.terms, state, attempt.now)
    attempt.note_what_was_made(state, after)
    if attempt.behind == seen.behind and attempt.behind > 0:
        attempt.behind -= 1
    if attempt.learns:
        if seen.stored is not None:
            habit = attempt.requests.habit
            trust = habit.proved(seen) if seen.stored == before else habit.changed(seen)
        elif trust == UNKNOWN:
            trust = 0
    if attempt.learns and (trust >= 0 or seen.stored is None):
        attempt.remember(before if after is None else encode(after), after or state, trust)
    elif trust != seen.trust or attempt.behind != seen.behind or seen.stored is not None:
        attempt.remember(None, None, trust)
    return answer
