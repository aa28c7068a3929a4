"""Coalescing for tasks of asyncio; tasks of different event loops do not wait for each other.

The first decision about a key goes the express way, without a task or a step: its request is sent at once, and the
connection gives the reply to a :class:`_Flight`, as it would give it to a future. Decisions about the same key that
come meanwhile queue. When the flight has ended they are decided together, in one flight. What turns out unusual goes on
in a task, and keeps its key for that time.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import AbstractEventLoop, Future
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

from ratelimit.core.commands import Batch
from ratelimit.engine.attempt import Attempt
from ratelimit.engine.coalescing.common import copied, count_together, latest_deadline, too_late
from ratelimit.engine.express import UNUSUAL, Express
from ratelimit.engine.question import Question, new_tuple
from ratelimit.errors import StoreError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps, arun

_NOBODY: Final = object()
"""Stands for no queue: nothing is in flight about a key."""


class _Queued(NamedTuple):
    """A question that waits for its answer; the future is cancelled where nobody waits any more."""

    question: Question
    answer: Future[Any]


class _Line:
    """What is in flight, and what waits, in one event loop.

    :ivar queues: for each key about which a question is in flight, those that have come meanwhile; None: none has.
    :ivar carrying: the flights that carry several questions.
    """

    def __init__(self, loop: AbstractEventLoop | None, monotonic: Callable[[], float]) -> None:
        self.loop: Any = loop
        self.queues: dict[bytes, list[_Queued] | None] = {}
        self.carrying: set[_Flight] = set()
        self._monotonic = monotonic
        # For the first deadline of all that are queued or carried.
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    def queue(self, key: bytes, question: Question) -> Future[Any]:
        """Queue behind the question in flight, and return the answer to be."""
        answer: Future[Any] = self.loop.create_future()
        queued = new_tuple(_Queued, (question, answer))
        queue = self.queues[key]
        if queue is None:
            self.queues[key] = [queued]
        else:
            queue.append(queued)
        deadline = question.deadline
        if deadline is not None and deadline < self._due:
            self._watch(deadline)
        return answer

    def _watch(self, deadline: float) -> None:
        """Let nobody wait for longer than until this deadline, or the one that is watched already."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = deadline
        self._timer = self.loop.call_later(deadline - self._monotonic(), self._on_deadline)

    def _on_deadline(self) -> None:
        now, next_due = self._monotonic(), math.inf
        self._timer, self._due = None, math.inf
        # A command that is in flight may be carried out after its caller has given up; one that queues is not sent.
        carried = [(flight.carried, True) for flight in self.carrying]
        for waiting, in_doubt in (*carried, *((queue or (), False) for queue in self.queues.values())):
            for question, answer in waiting:
                deadline = question.deadline
                if answer.done() or deadline is None:
                    continue
                if deadline <= now:
                    answer.set_exception(too_late(question.parts[0].target.key, in_doubt=in_doubt))
                else:
                    next_due = min(next_due, deadline)
        if next_due < math.inf:
            self._watch(next_due)


class _Flight:
    """A question on its way: that of one caller, or one that carries the questions of several.

    It stands in for a future where the shared connection gives out replies.

    :ivar future: the answer to the one caller.
    :ivar carried: the questions that it carries; empty where there is one caller.
    """

    __slots__ = ("_coalescing", "_is_answered", "_line", "attempt", "carried", "future")

    def __init__(
        self,
        coalescing: TaskCoalescing,
        line: _Line,
        attempt: Attempt,
        future: Future[Any],
        carried: tuple[_Queued, ...] | list[_Queued] = (),
    ) -> None:
        self._coalescing = coalescing
        self._line = line
        self.attempt = attempt
        self.future = future
        self.carried = carried
        self._is_answered = False

    def done(self) -> bool:
        """Return whether the reply has come, or an error in its place: then a late reply is not for this flight.

        Until then it is wanted also where no caller waits any more, because it shows what is stored.
        """
        return self._is_answered

    def set_result(self, replies: list[Any]) -> None:
        """Take the reply to the request."""
        self._is_answered = True
        (reply,) = replies
        attempt = self.attempt
        try:
            answer = self._coalescing.express.answer(attempt, reply)
        except Exception as error:  # noqa: BLE001  # it is for the callers
            self._fail(error)
            return
        if answer is UNUSUAL:
            attempt.outcome = reply
            self.go_on()
        else:
            self._end(answer)

    def set_exception(self, error: BaseException) -> None:
        """Take the error in place of the reply."""
        self._is_answered = True
        self.attempt.outcome = error
        # What goes on may send another request, and the connection is busy with all that waited for replies.
        self._line.loop.call_soon(self.go_on)

    def go_on(self) -> None:
        """Go on in the loop of ``swapping``, as a task, unless no caller waits any more."""
        if self.future.done() and all(answer.done() for _, answer in self.carried):
            self._leave()
            return
        coalescing, attempt = self._coalescing, self.attempt
        task = self._line.loop.create_task(arun(coalescing.express.go_on(attempt)))
        coalescing.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._coalescing.tasks.discard(task)
        if task.cancelled():
            for future in (self.future, *(answer for _, answer in self.carried)):
                future.cancel()
            self._leave()
        elif (error := task.exception()) is not None:
            self._fail(error)
        else:
            self._end(task.result())

    def _end(self, answer: Any) -> None:
        if not self.carried:
            if not self.future.done():
                self.future.set_result(answer)
        else:
            trips = self.attempt.question.course.round_trips
            for (question, future), each in zip(self.carried, answer, strict=True):
                question.course.round_trips = trips
                if not future.done():
                    future.set_result(each)
        self._leave()

    def _fail(self, error: Any) -> None:
        if not self.carried:
            if not self.future.done():
                self.future.set_exception(error)
        else:
            trips = self.attempt.question.course.round_trips
            for question, future in self.carried:
                question.course.round_trips = trips
                if not future.done():
                    future.set_exception(copied(error, question.parts[0].target.key))
        self._leave()

    def _leave(self) -> None:
        line = self._line
        if self.carried:
            line.carrying.discard(self)
        self._coalescing.leave(line, self.attempt.target.stored_key)


class TaskCoalescing:
    """The lines of a manager for asyncio.

    :param express: answers the questions that are let through.
    :param monotonic: the clock of deadlines, in seconds.
    :ivar tasks: what goes on in tasks. An event loop refers weakly to its tasks: without this set they could be
        collected before they end.
    """

    def __init__(self, express: Express, monotonic: Callable[[], float]) -> None:
        self.express = express
        self.tasks: set[asyncio.Task[Any]] = set()
        self._monotonic = monotonic
        self._lines: dict[AbstractEventLoop, _Line] = {}
        # The line that was used last, which is mostly the only one.
        self._line = _Line(None, monotonic)
        fork_safety.call_in_child(self._forget)

    def _forget(self) -> None:
        """Begin without anything in flight in a forked process: the replies go to the parent."""
        self._lines = {}
        self._line = _Line(None, self._monotonic)

    def decide(self, question: Question) -> Steps[Any]:
        """Answer a question, alone or together with others: the layer."""
        if not question.holds:
            return (yield self.ask(question))
        return (yield from self._lead(self._line_here(), self.express.begin(question)))

    def ask(self, question: Question) -> Awaitable[Any]:
        """Send the request for a question, if it is a usual one, and return what is to be awaited for the answer."""
        ((target, _, command),) = question.parts
        if command.only_reads:
            return arun(self.express.go_on(self.express.begin(question)))
        line, key = self._line_here(), target.stored_key
        if line.queues.get(key, _NOBODY) is not _NOBODY:
            return line.queue(key, question)
        attempt = self.express.begin(question)
        if attempt.usual is not None:
            flight = _Flight(self, line, attempt, line.loop.create_future())
            if self._is_sent(flight):
                line.queues[key] = None
                return flight.future
        return arun(self._lead(line, attempt))

    def _line_here(self) -> _Line:
        """Return the line of the running loop."""
        loop = asyncio.get_running_loop()
        line = self._line
        if line.loop is not loop:
            for known in list(self._lines):
                if known.is_closed():
                    self._lines.pop(known, None)
            line = self._line = self._lines.setdefault(loop, _Line(loop, self._monotonic))
        return line

    def _is_sent(self, flight: _Flight) -> bool:
        """Send the usual request of a flight; return False where its attempt has to go on in the loop instead."""
        attempt = flight.attempt
        try:
            if self.express.post(attempt, flight):
                return True
            attempt.usual = None
        except StoreError as error:
            attempt.outcome = error
        return False

    def _lead(self, line: _Line, attempt: Attempt) -> Steps[Any]:
        """Ask in steps, so that others may queue behind, or queue where another question is in flight."""
        key = attempt.target.stored_key
        if key in line.queues:
            return (yield from self._wait(line, key, attempt.question))
        line.queues[key] = None
        try:
            return (yield from self.express.go_on(attempt))
        finally:
            self.leave(line, key)

    def _wait(self, line: _Line, key: bytes, question: Question) -> Steps[Any]:
        """Queue, and wait for the answer.

        Once the command is on its way no cancellation ends that, if the question holds it back.
        """
        answer = line.queue(key, question)
        while question.holds:
            try:
                return (yield asyncio.shield(answer))
            except asyncio.CancelledError as error:
                if answer.cancelled() or any(queued.answer is answer for queued in line.queues.get(key) or ()):
                    answer.cancel()
                    raise
                # The outcome of the command must be known, and then undone.
                question.course.interruption = error
        return (yield answer)

    def leave(self, line: _Line, key: bytes) -> None:
        """Let those that have come meanwhile go together; nothing is in flight about this bucket any more."""
        queue = line.queues[key]
        if queue is None:
            del line.queues[key]
            return
        # Those that were answered in this turn of the loop may ask again before the next ones go.
        try:
            if _is_running(line.loop):
                line.loop.call_soon(self._take_off, line, key)
            else:
                # The question in flight has been collected, elsewhere.
                line.loop.call_soon_threadsafe(self._take_off, line, key)
        except RuntimeError:  # the loop is closed, and nobody waits any more
            del line.queues[key]
            with suppress(RuntimeError):
                for _, answer in queue:
                    answer.cancel()

    def _take_off(self, line: _Line, key: bytes) -> None:
        """Let the first ones in a queue go, as many as go together."""
        queue = line.queues[key] or []
        together: list[_Queued] = []
        while queue and not together:
            together = _next_of(queue)
        if not together:
            del line.queues[key]
            return
        line.queues[key] = queue or None
        question, future = together[0]
        carried: list[_Queued] = []
        if len(together) > 1:
            carried, question = together, _carrying(together)
        try:
            attempt = self.express.begin(question)
        except Exception as error:  # noqa: BLE001  # it is for those that wait
            for waiting, answer in together:
                answer.set_exception(copied(error, waiting.parts[0].target.key))
            self.leave(line, key)
            return
        flight = _Flight(self, line, attempt, future, carried)
        if carried:
            line.carrying.add(flight)
        if attempt.usual is None or not self._is_sent(flight):
            flight.go_on()


def _is_running(loop: AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _carrying(together: list[_Queued]) -> Question:
    """Return one question for all of them, which lasts until the last of their deadlines."""
    ((target, terms, _),) = together[0].question.parts
    deadline = latest_deadline(question for question, _ in together)
    for question, _ in together:
        question.course.carried = True
    return Question.of(target, terms, Batch(tuple([question.parts[0].command for question, _ in together])), deadline)


def _next_of(queue: list[_Queued]) -> list[_Queued]:
    """Take from a queue those that go together; a caller that was cancelled does not go."""
    count = count_together(queued.question.parts[0] for queued in queue)
    together = [queued for queued in queue[:count] if not queued.answer.done()]
    del queue[:count]
    return together
