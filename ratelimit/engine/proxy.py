"""A bucket in the store, as both faces use it: what its verbs ask, and what they do around that."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from ratelimit.checks import max_wait_nanos, timeout_seconds, token_count
from ratelimit.core.commands import Batch, Cancel, Command, Reserve, Reserved, TakeSnapshot, Terms, Verbose
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, Duration
from ratelimit.core.results import Snapshot, VerboseResult
from ratelimit.engine.cancellation import uninterrupted
from ratelimit.engine.cancelled_waits import Place
from ratelimit.engine.coalescing.tasks import TaskCoalescing
from ratelimit.engine.coalescing.threads import ThreadCoalescing
from ratelimit.engine.in_process import InProcess
from ratelimit.engine.observing import report_interruption
from ratelimit.engine.question import Course, Layer, Part, Question, Target, new_tuple
from ratelimit.engine.shield import Shield
from ratelimit.errors import BucketNotFoundError, RateLimitError, ReservationOverflowError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps, run

T = TypeVar("T")

_logger = logging.getLogger("ratelimit")


class Ask(Protocol):
    """Answers a command."""

    def __call__(self, command: Command[T], timeout: Duration | None, /) -> T: ...


class AsyncAsk(Protocol):
    """Returns an awaitable of the answer to a command."""

    def __call__(self, command: Command[T], timeout: Duration | None, /) -> Awaitable[T]: ...


@dataclass(slots=True)
class BucketProxy:
    """A bucket: where it is, what it is made from, and the layers that answer questions about it.

    :param pipeline: that of its manager.
    :param terms: what the bucket is made from; None where a layer looks them up.
    :param timeout: how long a question may take, in seconds.
    :param layer: answers questions.
    :param shielded: answers the reservations of waits in sync code.
    :param asking: makes ``ask``; one of the functions below.
    :param manner: what a question about several buckets has to know of this one; a ``several.parts.Manner``.
    :ivar ask: answers a command, within a timeout of its own or that of the bucket.
    :ivar aask: the function of ``ask``, as it is where the manager is asyncio's.
    """

    pipeline: Any
    target: Target
    terms: Terms | None
    timeout: float
    layer: Layer
    shielded: Layer
    asking: Callable[[BucketProxy], Any]
    manner: Any = None
    ask: Ask = field(init=False)
    aask: AsyncAsk = field(init=False)

    def __post_init__(self) -> None:
        self.ask = self.aask = self.asking(self)

    def question(self, command: Command[Any], timeout: Duration | None = None, *, holds: bool = False) -> Question:
        """Return a question that begins now, within its own timeout or that of the bucket."""
        seconds = self.timeout if timeout is None else timeout_seconds(timeout)
        return Question.of(self.target, self.terms, command, self.pipeline.deadline(seconds), holds=holds)  # type: ignore[arg-type]  # a layer looks the terms up

    def steps(self, command: Command[T], timeout: Duration | None = None) -> Steps[T]:
        """Return the steps to the answer to a command."""
        return self.layer(self.question(command, timeout))

    def consume(
        self, tokens: int, max_wait: Duration | None, timeout: Duration | None, course: Course | None = None
    ) -> Steps[bool]:
        """Reserve tokens and sleep until they are there; False where that would take longer than ``max_wait``.

        :param course: that of the question, where a shield has it as well.
        """
        reservation, course = _reservation(tokens, max_wait), course or Course()
        reserved: Reserved = yield from self._wait(reservation, reservation, timeout, course)
        return _is_taken(reservation, reserved, max_wait, course)

    def consume_verbosely(
        self, tokens: int, max_wait: Duration | None, timeout: Duration | None, course: Course | None = None
    ) -> Steps[VerboseResult[bool]]:
        """Do as :meth:`consume`, and show the bucket as it was after the reservation."""
        result: VerboseResult[Any] = yield from self.consume_and_show(tokens, max_wait, timeout, course)
        return replace(result, value=result.value.wait != NEVER)

    def consume_and_show(
        self, tokens: int, max_wait: Duration | None, timeout: Duration | None, course: Course | None = None
    ) -> Steps[VerboseResult[Reserved]]:
        """Do as :meth:`consume`, and show the reservation as well, or how long the wait would have been."""
        reservation, course = _reservation(tokens, max_wait), course or Course()
        result = yield from self._wait(reservation, Verbose(reservation), timeout, course)
        _is_taken(reservation, result.value, max_wait, course)
        return result  # type: ignore[no-any-return]  # that of a Verbose

    def under_shield(
        self,
        verb: Callable[..., Steps[T]],
        tokens: int,
        max_wait: Duration | None,
        timeout: Duration | None,
        course: Course | None = None,
    ) -> T:
        """Run one of these three in sync code; its tokens are given back wherever it is interrupted.

        :param course: that of the question, where the caller looks at it afterwards.
        """
        course = course or Course()
        shield = Shield(course, partial(self._cancel_late, tokens), self.timeout)
        try:
            return run(verb(tokens, max_wait, timeout, course))
        except BaseException:
            shield.undo()
            raise

    def _wait(
        self, reservation: Reserve, command: Command[Any], timeout: Duration | None, course: Course
    ) -> Steps[Any]:
        """Ask for a reservation, and sleep until its tokens are there.

        :param command: the reservation itself, or one that shows the bucket as well.
        """
        question = self.question(command, timeout, holds=True)._replace(course=course)
        layer = self.layer if course.shield is None else self.shielded
        try:
            answer = yield from layer(question)
        except RateLimitError as error:
            if course.interruption is not None:
                raise course.interruption from error
            raise
        reserved: Reserved = _value(answer)
        wait = reserved.wait
        if wait == NEVER and course.interruption is None:
            return answer
        # The place in the queue is over at this time of the clock of deadlines, whatever clock the buckets go by.
        until = self.pipeline.monotonic() + wait / NANOS_PER_SECOND
        if course.interruption is None and wait > 0:
            yield from self._sleep(wait, course)
        if course.interruption is not None:
            if reserved.noted is not None and course.charged:
                yield from self._interrupted(reservation.tokens, reserved, until, course)
            raise course.interruption
        return answer

    def _sleep(self, nanos: int, course: Course) -> Steps[None]:
        """Sleep; what cuts that short is left in the course, until the tokens are back."""
        try:
            yield self.pipeline.sleep(nanos)
        except GeneratorExit:
            # A generator that is being closed must not yield again, so that nothing could be asked of the store.
            raise
        except BaseException as error:  # noqa: BLE001
            course.interruption = error

    def _interrupted(self, tokens: int, reserved: Reserved, until: float, course: Course) -> Steps[None]:
        report_interruption(self.pipeline.listener, self.target.key, tokens, course.interruption)  # type: ignore[arg-type]  # there is one
        # In sync code the shield undoes it where the call ends.
        if course.shield is None:
            yield from uninterrupted(self._cancel(tokens, reserved, until, degraded=course.degraded), course)

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
        if degraded:
            self.pipeline.local_buckets.cancel(self.target, cancel)
            return
        try:
            yield from self._cancel_in_store(Place(cancel, until))
        except RateLimitError as error:  # the interruption is what the caller must hear of
            _logger.warning("%d tokens of a wait that was interrupted could not be given back: %s", tokens, error)

    def _cancel_in_store(self, place: Place) -> Steps[None]:
        """Undo a reservation, and then earlier cancelled ones that have become the last in the queue."""
        pipeline, key = self.pipeline, self.target.stored_key
        waits = pipeline.cancelled_waits
        places = [place]
        while places:
            # Read before the store is asked: a queue that another thread moves meanwhile is looked at again.
            begun, answers = waits.moved(), []
            try:
                command = Batch(tuple([place.cancel for place in places]))
                deadline = pipeline.own_deadline(self.timeout)
                answers = yield from self.layer(Question.of(self.target, self.terms, command, deadline))  # type: ignore[arg-type]  # as above
            finally:
                places = waits.end(key, begun, places, answers, pipeline.monotonic())

    def consume_into_debt(self, command: Command[T], timeout: Duration | None = None) -> Steps[T]:
        """Run a ``ConsumeIgnoringRateLimits``, plain or verbose."""
        answer = yield from self.steps(command, timeout)
        if _value(answer) == NEVER:
            raise ReservationOverflowError("so many tokens could never be paid back")
        return answer

    def sync(self) -> Steps[None]:
        """Report to the store what was handed out without asking it, and learn what it holds."""
        deadline = self.pipeline.deadline(self.timeout)
        return self.pipeline.local_decisions.sync(self.target.stored_key, deadline)  # type: ignore[no-any-return]

    def snapshot(self, timeout: Duration | None = None) -> Steps[Snapshot]:
        """Return the state at present."""
        snapshot = yield from self.steps(TakeSnapshot(), timeout)
        if snapshot is None:
            raise BucketNotFoundError(self.target.key)
        return snapshot

    def snapshot_verbosely(self, timeout: Duration | None = None) -> Steps[VerboseResult[Snapshot]]:
        """Return the state at present, twice."""
        result = yield from self.steps(Verbose(TakeSnapshot()), timeout)
        if result.value is None:
            raise BucketNotFoundError(self.target.key)
        return result  # type: ignore[return-value]  # the value is not None


# The three ways to answer a command about a bucket. Each is written out, because every decision passes through one.


def asking_in_steps(proxy: BucketProxy) -> Any:
    """Return what answers a command by the steps of a bucket's layers."""
    pipeline, target, terms, timeout = proxy.pipeline, proxy.target, proxy.terms, proxy.timeout
    layer, finish = proxy.layer, pipeline.face.finish

    def ask(command: Command[Any], own_timeout: Duration | None = None) -> Any:
        fork_safety.check()
        deadline = pipeline.begin() + (timeout if own_timeout is None else timeout_seconds(own_timeout))
        part = new_tuple(Part, (target, terms, command))
        return finish(layer(new_tuple(Question, ((part,), deadline, False, Course()))))

    return ask


def asking_together(coalescing: ThreadCoalescing | TaskCoalescing, proxy: BucketProxy) -> Any:
    """Return what answers a command, or returns an awaitable of the answer, where coalescing is the outermost layer."""
    pipeline, target, terms, timeout = proxy.pipeline, proxy.target, proxy.terms, proxy.timeout

    def ask(command: Command[Any], own_timeout: Duration | None = None) -> Any:
        fork_safety.check()
        deadline = pipeline.begin() + (timeout if own_timeout is None else timeout_seconds(own_timeout))
        part = new_tuple(Part, (target, terms, command))
        return coalescing.ask(new_tuple(Question, ((part,), deadline, False, Course())))

    return ask


def asking_in_process(in_process: InProcess, proxy: BucketProxy) -> Any:
    """Return what answers a command in sync code where there is no other layer: nothing there waits for a deadline."""
    target, terms = proxy.target, proxy.terms

    def ask(command: Command[Any], _: Duration | None = None) -> Any:
        in_process.check()
        return in_process.decided(target, terms, command)  # type: ignore[arg-type]  # a layer would look terms up

    return ask


def _reservation(tokens: int, max_wait: Duration | None) -> Reserve:
    return Reserve(token_count(tokens), NEVER if max_wait is None else max_wait_nanos(max_wait))


def _is_taken(reservation: Reserve, reserved: Reserved, max_wait: Duration | None, course: Course) -> bool:
    """Return whether the tokens were taken.

    :raises ReservationOverflowError: where they could never be, and the caller waits as long as it takes.
    """
    if reserved.wait != NEVER:
        return True
    if max_wait is None and not course.degraded:
        raise ReservationOverflowError(f"{reservation.tokens} tokens could never be paid back")
    return False


def _value(answer: Any) -> Any:
    return answer.value if isinstance(answer, VerboseResult) else answer
