"""What a bucket's verbs do, for both faces: steps that a face drives."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

from ratelimit.checks import duration_nanos, timeout_seconds, token_count
from ratelimit.core.commands import (
    Batch,
    Cancel,
    Command,
    HoldBack,
    Plan,
    ReplaceConfiguration,
    Reserve,
    Reserved,
    TakeSnapshot,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, Duration
from ratelimit.core.results import Snapshot, VerboseResult
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration, Limits
from ratelimit.core.token_bucket.inheritance import TokensInheritance
from ratelimit.engine.cancelled_waits import Place
from ratelimit.engine.coalescing import TaskMerger
from ratelimit.engine.guard import Guard, LocalBuckets
from ratelimit.engine.local_decisions import Optimizer
from ratelimit.engine.on_error import ErrorPolicy
from ratelimit.engine.question import errors_named
from ratelimit.engine.shield import Shield
from ratelimit.engine.swapping import (
    Backend,
    Call,
    Exchange,
    Target,
    asked,
    exchange_in_process,
    executed,
    uninterrupted,
)
from ratelimit.errors import BucketNotFoundError, InvalidArgumentError, RateLimitError, ReservationOverflowError
from ratelimit.keys import brief
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps, arun, run

T = TypeVar("T")

LimitsOfKey = Callable[[Any], Limits | None]
AsyncLimitsOfKey = Callable[[Any], Limits | Awaitable[Limits | None] | None]

_logger = logging.getLogger("ratelimit")


@dataclass(slots=True)
class Handle:
    """A bucket: where it is, and what it is made from.

    :param limits: the configuration, or a callable that is asked for it, by the key, at every verb.
    :param timeout: how long a call may take, in seconds, but for waiting for tokens.
    :param optimizer: knows what its manager has handed out without telling the store.
    :param guard: is around each exchange; None: nobody is told, and errors are raised.
    :param merger: whose exchange it is, if that is all there is to a call and it is asyncio's.
    """

    backend: Backend
    exchange: Exchange
    target: Target
    limits: BucketConfiguration | AsyncLimitsOfKey
    version: int | None
    inheritance: TokensInheritance
    timeout: float
    optimizer: Optimizer
    on_error: ErrorPolicy
    guard: Guard | None
    merger: TaskMerger | None
    plan: Plan | None = field(init=False)  # None: it depends on what the callable answers

    def __post_init__(self) -> None:
        self.plan = self._planned(self.limits) if isinstance(self.limits, BucketConfiguration) else None

    def _planned(self, limits: BucketConfiguration) -> Plan:
        return Plan(limits, self.version, self.inheritance)

    def run(self, command: Command[T], call: Call) -> Steps[T]:
        """Decide a command; a key without limits is answered without the store."""
        if self.plan is None:
            return self._run_planned(command, call)
        return self._exchanged(self.plan, command, call)

    def _run_planned(self, command: Command[T], call: Call) -> Steps[T]:
        begun = self.backend.monotonic()
        limits = yield self.limits(self.target.key)  # type: ignore[operator]  # there is a plan for all others
        if call.deadline is not None:  # that is the caller's own time
            call.deadline += self.backend.monotonic() - begun
        if limits is None:
            return command.answer_without_limit()
        plan = self._planned(BucketConfiguration.of(limits))
        return (yield from self._exchanged(plan, command, call))

    def _exchanged(self, plan: Plan, command: Command[T], call: Call) -> Steps[T]:
        exchange = self.exchange if call.shield is None else call.shield.exchange
        if self.guard is None:
            return exchange(self.backend, self.target, plan, command, call)
        return self.guard.run(self.on_error, exchange, self.backend, self.target, plan, command, call)

    def call(self, timeout: Duration | None = None, *, holds: bool = False) -> Call:
        """A call that begins now, with its own timeout or that of the bucket."""
        return self.backend.call(self.timeout if timeout is None else timeout_seconds(timeout), holds=holds)

    def answer(self, command: Command[T], timeout: Duration | None = None) -> T:
        """The same for sync code: driven, or without a step where there is nothing to wait for.

        What every decision passes through is written out here, as in :meth:`awaited`: a call less each.
        """
        fork_safety.check()
        plan = self.plan
        if plan is None or self.guard is not None:
            return run(self.run(command, self.call(timeout)))
        if self.exchange is exchange_in_process:
            return executed(self.backend.executing, self.target, plan, command)
        call = Call(self.backend.begin() + (self.timeout if timeout is None else timeout_seconds(timeout)))
        return run(self.exchange(self.backend, self.target, plan, command, call))  # type: ignore[no-any-return]

    def awaited(self, command: Command[T], timeout: Duration | None = None) -> Awaitable[T]:
        """The same for asyncio; who only waits for an exchange in flight awaits nothing but the answer."""
        fork_safety.check()
        call = Call(self.backend.begin() + (self.timeout if timeout is None else timeout_seconds(timeout)))
        plan, merger = self.plan, self.merger
        if merger is None or plan is None:
            return arun(self.run(command, call))
        answer = merger.join(self.target, plan, command, call)
        if answer is not None:
            return answer
        return arun(merger.lead(self.backend, self.target, plan, command, call))

    def consume(self, tokens: int, timeout: Duration | None, shield: Shield | None = None) -> Steps[bool]:
        """Reserve the tokens and sleep until they are there; False where that would take longer than the timeout."""
        reserved = yield from self._wait(tokens, timeout, _itself, shield)
        return reserved.wait != NEVER

    def consume_verbosely(
        self, tokens: int, timeout: Duration | None, shield: Shield | None = None
    ) -> Steps[VerboseResult[bool]]:
        """The same; the bucket is shown as it was after the reservation."""
        result = yield from self._wait(tokens, timeout, _verbosely, shield)
        consumed: Any = result.value.wait != NEVER
        return replace(result, value=consumed)  # type: ignore[return-value]  # whose value is a bool now

    def shielded(self, verb: Callable[[int, Duration | None, Shield], Steps[T]], tokens: int, timeout: Any) -> T:
        """Run one of these two in sync code; tokens are given back wherever it is interrupted."""
        shield = Shield(self.exchange, partial(self._cancel_late, tokens), self.timeout)
        try:
            return run(verb(tokens, timeout, shield))
        except BaseException:
            shield.undo()
            raise

    def _wait(
        self,
        tokens: int,
        timeout: Duration | None,
        wrap: Callable[[Command[Reserved]], Command[T]],
        shield: Shield | None,
    ) -> Steps[T]:
        reservation = Reserve(token_count(tokens), NEVER if timeout is None else duration_nanos(timeout, "timeout"))
        call = self.call(holds=True)
        call.shield = shield
        try:
            answer = yield from self.run(wrap(reservation), call)
        except RateLimitError as error:
            if call.interruption is not None:
                raise call.interruption from error
            raise
        reserved: Reserved = _value(answer)
        wait = reserved.wait
        if wait == NEVER and call.interruption is None:
            if timeout is None and not call.degraded:
                raise ReservationOverflowError(f"{tokens} tokens could never be paid back")
            return answer
        until = self.backend.monotonic() + wait / NANOS_PER_SECOND if wait > 0 else 0.0
        if call.interruption is None and wait > 0:
            try:
                yield self.backend.sleep(wait)
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001  # raised again below, once the tokens are back
                call.interruption = error
        if call.interruption is not None:
            if reserved.noted is not None and call.charged:
                yield from self._interrupted(tokens, reserved, until, call)
            raise call.interruption
        return answer

    def _interrupted(self, tokens: int, reserved: Reserved, until: float, call: Call) -> Steps[None]:
        if self.guard is not None:
            self.guard.interrupted(self.target.key, tokens, call.interruption)  # type: ignore[arg-type]  # there is one
        if call.shield is None:  # a shield undoes it where the call ends
            yield from uninterrupted(self._cancel(tokens, reserved, until, degraded=call.degraded), call)

    def _cancel_late(self, tokens: int, answer: Any, answered_at: float | None) -> None:
        """Undo what has reserved tokens, if it has.

        :param answered_at: when the store has answered so; None: a local bucket has.
        """
        reserved: Reserved = _value(answer)
        if reserved.noted is not None:
            until = (answered_at or 0.0) + reserved.wait / NANOS_PER_SECOND
            run(self._cancel(tokens, reserved, until, degraded=answered_at is None))

    def _cancel(self, tokens: int, reserved: Reserved, until: float, *, degraded: bool) -> Steps[None]:
        """Undo a reservation, unless others count on its place.

        :param degraded: whether it was made in a local bucket.
        """
        cancel = Cancel(tokens, reserved.noted, reserved.surplus)  # type: ignore[arg-type]  # it is noted
        if degraded and self.guard is not None:
            self.guard.cancel_locally(self.target, cancel)
            return
        place = Place(cancel, until)
        try:
            yield from self._cancelled(place)
        except RateLimitError as error:  # the interruption is what the caller must hear of
            _logger.warning("%d tokens of a wait that was interrupted could not be given back: %s", tokens, error)

    def _cancelled(self, place: Place) -> Steps[None]:
        """Undo a reservation, and then earlier cancelled ones that have become the last in the queue."""
        waits, key, monotonic = self.backend.cancelled, self.target.stored_key, self.backend.monotonic
        places = [place]
        while places:
            begun, answers = waits.moved(), []
            try:
                command = Batch(tuple([place.cancel for place in places]))
                answers = yield from self.run(command, self.backend.own_call(self.timeout))
            finally:
                places = waits.end(key, begun, places, answers, monotonic())

    def penalty(self, command: Command[T], timeout: Duration | None = None) -> Steps[T]:
        """Run a ConsumeIgnoringRateLimits, plain or verbose."""
        answer = yield from self.run(command, self.call(timeout))
        if _value(answer) == NEVER:
            raise ReservationOverflowError("so many tokens could never be paid back")
        return answer

    def sync(self) -> Steps[None]:
        """Tell the store what was handed out without asking it, and learn what it holds."""
        return self.optimizer.sync(self.backend, self.target.stored_key, self.call())

    def snapshot(self, timeout: Duration | None = None) -> Steps[Snapshot]:
        """The state at present."""
        snapshot = yield from self.run(TakeSnapshot(), self.call(timeout))
        if snapshot is None:
            raise BucketNotFoundError(self.target.key)
        return snapshot

    def snapshot_verbosely(self, timeout: Duration | None = None) -> Steps[VerboseResult[Snapshot]]:
        """The state at present, twice."""
        result = yield from self.run(Verbose(TakeSnapshot()), self.call(timeout))
        if result.value is None:
            raise BucketNotFoundError(self.target.key)
        return result  # type: ignore[return-value]  # the value is not None


def removed(backend: Backend, target: Target, optimizer: Optimizer, local: LocalBuckets | None = None) -> Steps[None]:
    """Forget a bucket."""
    with errors_named(target.key):
        yield asked(backend, backend.store.delete, backend.call(), target.stored_key)
    backend.remembered.forget(target.stored_key)
    backend.cancelled.forget(target.stored_key)
    optimizer.forget(target.stored_key)
    if local is not None:
        local.forget(target.stored_key)


def stored_configuration(backend: Backend, target: Target) -> Steps[BucketConfiguration | None]:
    """The configuration that is stored with a bucket."""
    with errors_named(target.key):
        state = yield asked(backend, backend.store.get, backend.call(), target.stored_key)
    return None if state is None else codec.decode(state, target.key).configuration


def try_consume(tokens: int) -> TryConsume:
    """Check a number of tokens, and make a command of it; one that is asked for over and over is kept."""
    return _try_consume(tokens) if type(tokens) is int else TryConsume(token_count(tokens))


def try_consume_and_return_remaining(tokens: int) -> TryConsumeAndReturnRemaining:
    """The same with a probe."""
    if type(tokens) is int:
        return _try_consume_and_return_remaining(tokens)
    return TryConsumeAndReturnRemaining(token_count(tokens))


@lru_cache(maxsize=1024)
def _try_consume(tokens: int) -> TryConsume:
    return TryConsume(token_count(tokens))


@lru_cache(maxsize=1024)
def _try_consume_and_return_remaining(tokens: int) -> TryConsumeAndReturnRemaining:
    return TryConsumeAndReturnRemaining(token_count(tokens))


def replacement(configuration: Limits, inheritance: TokensInheritance) -> ReplaceConfiguration:
    """Check what a configuration is to be replaced by."""
    return ReplaceConfiguration(BucketConfiguration.of(configuration), checked_inheritance(inheritance))


def hold_back(duration: Duration) -> HoldBack:
    """Check how long there are to be no tokens."""
    return HoldBack(duration_nanos(duration, "duration"))


def checked_inheritance(inheritance: TokensInheritance) -> TokensInheritance:
    """Check a way of inheriting."""
    if not isinstance(inheritance, TokensInheritance):
        raise InvalidArgumentError(f"inheritance must be a TokensInheritance, not {brief(inheritance)}")
    return inheritance


def _itself(command: Command[Reserved]) -> Command[Reserved]:
    return command


def _verbosely(command: Command[Reserved]) -> Command[VerboseResult[Reserved]]:
    return Verbose(command)


def _value(answer: Any) -> Any:
    return answer.value if isinstance(answer, VerboseResult) else answer
