"""The layer that reports decisions to a listener."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ratelimit.core.commands import (
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    GiveBack,
    Reserve,
    Reserved,
    Settle,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.numbers import MAX, NEVER
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, VerboseResult
from ratelimit.engine.question import Layer, Question
from ratelimit.errors import ContentionError, CorruptStateError, RateLimitError, StoreError
from ratelimit.keys import Key
from ratelimit.runtime.steps import Steps

_logger = logging.getLogger("ratelimit")


class Decision(NamedTuple):
    """A decision that was made, or could not be made.

    Keys are user input, and there may be millions of them: good for a line in a log, and never for a label of a metric.

    :param verb: the name of the verb; ``consume`` is reported when its tokens are reserved, before it waits for them.
    :param tokens: what was asked for; for ``try_consume_as_much_as_possible`` the most that would be taken, for
        ``settle`` what was used.
    :param consumed: tokens that were consumed; of ``settle``, those beyond the reservation.
    :param remaining: tokens that are left, negative in debt; None where nobody knows.
    :param wait_nanos: until the tokens will be there: how long ``consume`` waits, or when to come back after a refusal;
        ``NEVER`` where they will not.
    :param duration_nanos: what the decision took, the waiting of ``consume`` not included.
    :param round_trips: how often the store was asked, on behalf of this call and of those that went along with it.
    :param degraded: whether the store has failed, and the ``OnError`` policy has decided.
    :param error: why there is no decision of the store; also where the policy has made one.
    :param asynchronous: whether asyncio code has asked.
    :param given_back: tokens of a reservation that ``settle`` has given back. A ``settle`` is never a refusal.
    :param refused_by: the keys of the buckets that have refused, where several were asked together; empty elsewhere.
    """

    key: Key
    verb: str
    tokens: int
    consumed: int
    remaining: int | None
    wait_nanos: int
    duration_nanos: int
    round_trips: int
    degraded: bool
    error: Exception | None
    asynchronous: bool
    given_back: int = 0
    refused_by: tuple[Key, ...] = ()


class Listener(Protocol):
    """Is notified of decisions, in the thread or task that asks for them.

    It is called for each decision and must be quick. What it raises is logged, and has no effect. Where there is a
    listener, each decision takes a little more computation, to show what is left.
    """

    def on_decision(self, decision: Decision) -> None:
        """Take note of a decision that was made, or has failed."""
        ...

    def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
        """Take note of a wait of ``consume`` that was cut short.

        Its tokens are given back, unless others wait behind it.
        """
        ...


def observing(inner: Layer, listener: Listener, monotonic: Callable[[], float], *, asynchronous: bool) -> Layer:
    """Return the layer that reports each decision of the layer below.

    :param asynchronous: whether callers are tasks of asyncio.
    """

    def decide(question: Question) -> Steps[Any]:
        ((_, _, command),) = question.parts
        if not command.is_decision:
            return (yield from inner(question))
        begun = monotonic()
        course = question.course
        try:
            answer = yield from inner(question.asking(_observed(command)))
        except RateLimitError as error:
            # Only failures of the store are reported. A wrong argument or a closed manager concerns the caller alone.
            failure = course.failure or error
            if isinstance(failure, StoreError | ContentionError | CorruptStateError):
                report(question, None, failure, monotonic() - begun)
            raise
        report(question, answer, course.failure, monotonic() - begun)
        return _unobserved(command, answer)

    def report(question: Question, answer: Any, error: Exception | None, seconds: float) -> None:
        ((target, _, asked),) = question.parts
        command: Command[Any] = asked.command if isinstance(asked, Verbose) else asked
        if command.verb is None:
            return
        tokens = _asked_for(command)
        consumed, remaining, wait = _seen(command, tokens, answer)
        is_settled = isinstance(command, Settle) and answer is not None and question.course.charged
        decision = Decision(
            key=target.key,
            verb=command.verb,
            tokens=tokens,
            consumed=consumed,
            # MAX is what remains for a key without a limit.
            remaining=None if remaining == MAX else remaining,
            wait_nanos=wait,
            duration_nanos=round(seconds * 1e9),
            round_trips=question.course.round_trips,
            degraded=question.course.degraded,
            error=error,
            asynchronous=asynchronous,
            given_back=command.rest if is_settled else 0,  # type: ignore[attr-defined]  # a Settle has it
        )
        report_decision(listener, decision)

    return decide


def report_decision(listener: Listener, decision: Decision) -> None:
    """Report a decision."""
    # The decision is made, and its tokens are taken: a listener that fails must not make an error of it.
    try:
        listener.on_decision(decision)
    except Exception:
        _logger.exception("a listener has failed")


def report_interruption(listener: Listener | None, key: Key, tokens: int, error: BaseException) -> None:
    """Report a wait that was cut short."""
    if listener is None:
        return
    try:
        listener.on_interrupted(key, tokens, error)
    except Exception:
        _logger.exception("a listener has failed")


def _observed(command: Command[Any]) -> Command[Any]:
    """Return a command that decides as the given one does, and shows what is left."""
    if type(command) is TryConsume:
        return TryConsumeAndReturnRemaining(command.tokens)
    if isinstance(command, Verbose | TryConsumeAndReturnRemaining | EstimateAbilityToConsume | GiveBack):
        return command
    return Verbose(command)


def _unobserved(command: Command[Any], answer: Any) -> Any:
    """Return the answer to the command itself."""
    if type(command) is TryConsume:
        return bool(answer)
    if isinstance(answer, VerboseResult) and not isinstance(command, Verbose):
        return answer.value
    return answer


def _asked_for(command: Command[Any]) -> int:
    """Return the number of tokens that a command is about."""
    if isinstance(command, ConsumeAsMuchAsPossible):
        return command.limit
    if isinstance(command, Settle):
        return command.used
    return command.tokens  # type: ignore[attr-defined, no-any-return]  # all other decisions have some


def _seen(command: Command[Any], tokens: int, answer: Any) -> tuple[int, int | None, int]:
    """Return the tokens consumed, the tokens left, and the wait."""
    remaining: int | None = None
    wait = 0
    if isinstance(answer, VerboseResult):
        remaining, answer = answer.available_tokens, answer.value
    if isinstance(answer, ConsumptionProbe | EstimationProbe):
        consumed = tokens if isinstance(answer, ConsumptionProbe) and answer.consumed else 0
        return consumed, answer.remaining_tokens, answer.nanos_to_wait_for_refill
    if answer is None:
        return 0, None, 0
    if isinstance(command, ConsumeAsMuchAsPossible):
        return answer, remaining, 0
    if isinstance(command, Settle):
        return (0 if answer == NEVER else command.excess), remaining, answer
    if isinstance(command, Reserve | ConsumeIgnoringRateLimits):
        wait = answer.wait if isinstance(answer, Reserved) else answer
        return (0 if wait == NEVER else tokens), remaining, wait
    return (tokens if answer else 0), remaining, wait
