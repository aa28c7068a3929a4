"""Let one question at a time through for each place, and carry those that arrive meanwhile together.

Many users share the bucket of their tenant. Each of their calls changes it, so that calls of one process that were sent
side by side would lose their swaps to each other. Here the first of them goes on, and those that come meanwhile queue.
Then all that wait are decided in order, by one swap of all of their buckets. What is wrong with one of the buckets is
an error for those alone that ask for it.
"""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple

from ratelimit.engine.coalescing.common import copied, latest_deadline, too_late
from ratelimit.engine.coalescing.threads import Entry, ThreadCoalescing
from ratelimit.engine.question import Course, Part, Question
from ratelimit.engine.several.deciding import Answers, Deciding
from ratelimit.engine.several.parts import Call
from ratelimit.engine.several.script_arguments import MOST_BUCKETS
from ratelimit.runtime.steps import Steps, arun, run

_MOST_CALLS: Final = 64
"""Calls that go together, each of which is computed here and takes a few microseconds of the server's time."""


def count_together(calls: Iterable[Call]) -> int:
    """Return how many from the head of a queue go together, which is one at least."""
    union: dict[bytes, Part] = {}
    size = count = 0
    for call in calls:
        added = [part for part in call if part.target.stored_key not in union]
        size += sum(len(part.terms.configuration) for part in added)
        if count and (count >= _MOST_CALLS or size > MOST_BUCKETS or not _agrees(call, union)):
            break
        union.update((part.target.stored_key, part) for part in added)
        count += 1
    return count


def _agrees(call: Call, union: dict[bytes, Part]) -> bool:
    """Return whether a call means the same by each bucket as those before it."""
    for part in call:
        other = union.get(part.target.stored_key)
        if other is None or other.target is part.target:
            continue
        mine, its = part.target, other.target
        if (
            part.terms != other.terms
            or mine.expiration != its.expiration
            or (mine.must_exist_once_made and mine.made) != (its.must_exist_once_made and its.made)
        ):
            return False
    return True


def only_reads(question: Question) -> bool:
    """Return whether a question changes nothing, so that it has not to wait for others."""
    return all(part.command.only_reads for part in question.parts)


class ThreadsTogether(ThreadCoalescing):
    """The queues of threads."""

    def __init__(self, deciding: Deciding, monotonic: Callable[[], float]) -> None:
        super().__init__(lambda question: run(deciding.alone(question)), monotonic)
        self._deciding = deciding

    def decide_at(self, place: bytes, question: Question) -> Steps[Answers]:
        """Answer a question, alone or together with others of its place."""
        if only_reads(question):
            return (yield from self._deciding.alone(question))
        answers = self._decide_at(place, question)
        if isinstance(answers, Exception):
            raise copied(answers, getattr(answers, "key", b""))
        return answers  # type: ignore[no-any-return]  # of each part

    def _ask_for(self, led: list[Entry], deadline: float | None, course: Course) -> Sequence[Any]:
        return run(self._deciding.together([entry.parts for entry in led], deadline, course, holds=True))

    def _together(self, waiting: list[Entry]) -> list[Entry]:
        return waiting[: count_together(entry.parts for entry in waiting)]


class _Queued(NamedTuple):
    """A question that waits for its answers; the future is cancelled where nobody waits any more."""

    question: Question
    answers: asyncio.Future[Answers]


_Where = tuple[AbstractEventLoop, bytes]


class TasksTogether:
    """The queues of tasks; those of different event loops do not wait for each other."""

    def __init__(self, deciding: Deciding, monotonic: Callable[[], float]) -> None:
        self._deciding = deciding
        self._monotonic = monotonic
        # A place is here while a question about it is in flight.
        self._queues: dict[_Where, list[_Queued]] = {}
        # An event loop refers weakly to its tasks: without this set they could be collected before they end.
        self._carriers: set[asyncio.Task[None]] = set()

    def decide_at(self, place: bytes, question: Question) -> Steps[Answers]:
        """Answer a question, alone or together with others of its place."""
        if only_reads(question):
            return (yield from self._deciding.alone(question))
        loop = asyncio.get_running_loop()
        where = loop, place
        queue = self._queues.get(where)
        if queue is not None:
            return (yield from self._wait(loop, queue, question))
        self._queues[where] = []
        try:
            return (yield from self._deciding.alone(question))
        finally:
            self._hand_over(where)

    def _wait(self, loop: AbstractEventLoop, queue: list[_Queued], question: Question) -> Steps[Answers]:
        queued = _Queued(question, loop.create_future())
        queue.append(queued)
        timer = None
        if question.deadline is not None:
            timer = loop.call_later(question.deadline - self._monotonic(), _give_up, queued)
        try:
            return (yield queued.answers)  # type: ignore[no-any-return]
        finally:
            if timer is not None:
                timer.cancel()

    def _hand_over(self, where: _Where) -> None:
        """Let those that have come meanwhile go together."""
        if not self._queues[where]:
            del self._queues[where]
            return
        loop, _ = where
        try:
            if asyncio.get_running_loop() is loop:
                self._start_carrier(where)
                return
        except RuntimeError:
            # No loop runs here: the question in flight has been collected.
            pass
        try:
            loop.call_soon_threadsafe(self._start_carrier, where)
        except RuntimeError:
            # The loop is closed, and nobody waits any more.
            self._leave(where)

    def _start_carrier(self, where: _Where) -> None:
        queue = self._queues[where]
        carrier = where[0].create_task(self._carry(where, queue))
        self._carriers.add(carrier)
        carrier.add_done_callback(partial(self._ended, where, queue))

    def _ended(self, where: _Where, queue: list[_Queued], carrier: asyncio.Task[None]) -> None:
        self._carriers.discard(carrier)
        if self._queues.get(where) is queue:  # it was cancelled before it had begun
            self._leave(where)

    def _leave(self, where: _Where) -> None:
        """Wake those that are left where nothing is in flight any more."""
        for queued in self._queues.pop(where, ()):
            with suppress(RuntimeError):  # the loop is closed
                queued.answers.cancel()

    async def _carry(self, where: _Where, queue: list[_Queued]) -> None:
        """Ask one question after the other until nobody waits."""
        try:
            while queue:
                count = count_together(queued.question.parts for queued in queue)
                together = [queued for queued in queue[:count] if not queued.answers.done()]
                del queue[:count]
                if together:
                    await self._carry_together(together)
        finally:
            # At once, so that nobody queues where nothing is in flight any more.
            self._leave(where)

    async def _carry_together(self, together: list[_Queued]) -> None:
        """Ask one question for all of them, until the last of their deadlines, and hand out the answers."""
        deadline = latest_deadline(question for question, _ in together)
        course = Course()
        calls = [question.parts for question, _ in together]
        for question, _ in together:
            question.course.carried = True
        found: Sequence[Answers | Exception]
        try:
            found = await arun(self._deciding.together(calls, deadline, course, holds=False))
        except Exception as error:  # noqa: BLE001  # it is for those that wait
            found = [error] * len(together)
        except BaseException:
            for _, future in together:
                future.cancel()
            raise
        for (question, future), answers in zip(together, found, strict=True):
            question.course.round_trips = course.round_trips
            if future.done():
                continue
            if isinstance(answers, Exception):
                future.set_exception(copied(answers, getattr(answers, "key", b"")))
            else:
                future.set_result(answers)


def _give_up(queued: _Queued) -> None:
    if not queued.answers.done():
        # A question that is in flight may be carried out after its caller has given up; one that queues is not sent.
        in_doubt = queued.question.course.carried
        queued.answers.set_exception(too_late(queued.question.parts[0].target.key, in_doubt=in_doubt))
