"""Coalescing for tasks of asyncio; tasks of different event loops do not wait for each other."""

from __future__ import annotations

import asyncio
import math
from asyncio import AbstractEventLoop
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

from ratelimit.core.commands import Batch
from ratelimit.engine.coalescing.common import copied, count_together, too_late
from ratelimit.engine.question import Layer, Question, new_tuple
from ratelimit.runtime.steps import Steps, arun

_Where: TypeAlias = tuple[AbstractEventLoop, bytes]


class _Queued(NamedTuple):
    """A question that waits for its answer; the future is cancelled where nobody waits any more."""

    question: Question
    answer: asyncio.Future[Any]


@dataclass(slots=True, eq=False)
class _Place:
    """A bucket about which a question is in flight, and behind which others queue.

    :ivar queue: those that have come meanwhile.
    :ivar carried: those whose commands are in flight, but for a first one that carries its own.
    :ivar timer: for the first deadline of them all.
    """

    key: bytes
    loop: AbstractEventLoop
    monotonic: Callable[[], float]
    queue: list[_Queued] = field(default_factory=list)
    carried: list[_Queued] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    due: float = math.inf

    def watch(self, deadline: float) -> None:
        """Let nobody wait for longer than until this deadline, or the ones that are watched already."""
        if self.timer is not None:
            self.timer.cancel()
        self.due = deadline
        self.timer = self.loop.call_later(deadline - self.monotonic(), self._on_deadline)

    def _on_deadline(self) -> None:
        now, next_due = self.monotonic(), math.inf
        self.timer, self.due = None, math.inf
        # A command that is in flight may be carried out after its caller has given up; one that queues is not sent.
        for waiting, in_doubt in ((self.carried, True), (self.queue, False)):
            for question, answer in waiting:
                deadline = question.deadline
                if answer.done() or deadline is None:
                    continue
                if deadline <= now:
                    answer.set_exception(too_late(question.parts[0].target.key, in_doubt=in_doubt))
                else:
                    next_due = min(next_due, deadline)
        if next_due < math.inf:
            self.watch(next_due)

    def end(self) -> None:
        """Wake those that are left where nothing is in flight any more."""
        if self.timer is not None:
            self.timer.cancel()
        with suppress(RuntimeError):  # the loop is closed
            for queued in (*self.carried, *self.queue):  # some are left where the loop ends
                queued.answer.cancel()


class TaskCoalescing:
    """The queues of a manager for asyncio.

    :param inner: answers the questions that are let through.
    :param monotonic: the clock of deadlines, in seconds.
    """

    def __init__(self, inner: Layer, monotonic: Callable[[], float]) -> None:
        self._inner = inner
        self._monotonic = monotonic
        # None: a question is in flight, and no other has come yet.
        self._places: dict[_Where, _Place | None] = {}
        # An event loop refers weakly to its tasks: without this set they could be collected before they end.
        self._carriers: set[asyncio.Task[None]] = set()

    def decide(self, question: Question) -> Steps[Any]:
        """Answer a question, alone or together with others: the layer."""
        (part,) = question.parts
        if part.command.only_reads:
            return self._inner(question)
        where = asyncio.get_running_loop(), part.target.stored_key
        if where in self._places:
            return self._wait(question, self._queue(where, question))
        return self._lead(where, question)

    def ask(self, question: Question) -> Awaitable[Any]:
        """Answer a question for a caller that awaits it; one that queues awaits nothing but the answer."""
        (part,) = question.parts
        if part.command.only_reads:
            return arun(self._inner(question))
        where = asyncio.get_running_loop(), part.target.stored_key
        if where in self._places:
            return self._queue(where, question)
        return arun(self._lead(where, question))

    def _queue(self, where: _Where, question: Question) -> asyncio.Future[Any]:
        """Queue behind the question in flight, and return the answer to be."""
        place = self._places[where]
        if place is None:
            loop, key = where
            place = self._places[where] = _Place(key, loop, self._monotonic)
        answer: asyncio.Future[Any] = place.loop.create_future()
        place.queue.append(new_tuple(_Queued, (question, answer)))
        if question.deadline is not None and question.deadline < place.due:
            place.watch(question.deadline)
        return answer

    def _lead(self, where: _Where, question: Question) -> Steps[Any]:
        """Ask, so that others may queue behind; nothing is in flight about this bucket."""
        self._places[where] = None
        try:
            return (yield from self._inner(question))
        finally:
            place = self._places[where]
            if place is None:
                del self._places[where]
            else:
                self._hand_over(place)

    def _wait(self, question: Question, answer: asyncio.Future[Any]) -> Steps[Any]:
        """Wait for the answer.

        Once the command is on its way no cancellation ends that, if the question holds it back.
        """
        while question.holds:
            try:
                return (yield asyncio.shield(answer))
            except asyncio.CancelledError as error:
                place = self._places.get((answer.get_loop(), question.parts[0].target.stored_key))
                queued = place is not None and any(queued.answer is answer for queued in place.queue)
                if answer.cancelled() or queued:
                    answer.cancel()
                    raise
                # The outcome of the command must be known, and then undone.
                question.course.interruption = error
        return (yield answer)

    def _hand_over(self, place: _Place) -> None:
        """Let those that have come meanwhile go together."""
        if not place.queue:
            self._leave(place)
            return
        try:
            if place.loop is asyncio.get_running_loop():
                self._start_carrier(place)
                return
        except RuntimeError:  # no loop runs here: the question in flight has been collected
            pass
        try:
            place.loop.call_soon_threadsafe(self._start_carrier, place)
        except RuntimeError:  # it is closed, and nobody waits any more
            self._leave(place)

    def _leave(self, place: _Place) -> None:
        del self._places[place.loop, place.key]
        place.end()

    def _start_carrier(self, place: _Place) -> None:
        carrier = place.loop.create_task(self._carry(place))
        self._carriers.add(carrier)
        carrier.add_done_callback(partial(self._ended, place))

    def _ended(self, place: _Place, carrier: asyncio.Task[None]) -> None:
        self._carriers.discard(carrier)
        if self._places.get((place.loop, place.key)) is place:  # it was cancelled before it had begun
            self._leave(place)

    async def _carry(self, place: _Place) -> None:
        """Ask one question after the other until nobody waits."""
        try:
            while place.queue:
                place.carried = _next_of(place.queue)
                if place.carried:
                    await self._carry_together(place.carried)
                    place.carried = []
        finally:
            self._leave(place)

    async def _carry_together(self, together: list[_Queued]) -> None:
        """Ask one question for all of them, until the last of their deadlines, and hand out the answers."""
        ((target, terms, _),) = together[0].question.parts
        deadlines = [queued.question.deadline for queued in together]
        deadline = None if None in deadlines else max(deadlines)  # type: ignore[type-var]  # there is no None
        for queued in together:
            queued.question.course.carried = True
        batch = Batch(tuple([queued.question.parts[0].command for queued in together]))
        asked = Question.of(target, terms, batch, deadline)
        try:
            answers = await arun(self._inner(asked))
        except Exception as error:  # noqa: BLE001  # it is for those that wait
            for question, future in together:
                question.course.round_trips = asked.course.round_trips
                if not future.done():
                    future.set_exception(copied(error, question.parts[0].target.key))
        else:
            trips = asked.course.round_trips
            for (question, future), answer in zip(together, answers, strict=True):
                question.course.round_trips = trips
                if not future.done():
                    future.set_result(answer)


def _next_of(queue: list[_Queued]) -> list[_Queued]:
    """Take from a queue those that go together; a caller that was cancelled does not go."""
    count = count_together(queued.question.parts[0] for queued in queue)
    together = [queued for queued in queue[:count] if not queued.answer.done()]
    del queue[:count]
    return together
