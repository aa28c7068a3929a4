"""Coalescing for threads, which may be interrupted between any two of their steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final
from weakref import ref

from ratelimit.core.commands import Batch
from ratelimit.engine.coalescing.common import copied, count_together, too_late
from ratelimit.engine.question import Course, Question
from ratelimit.errors import RateLimitError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.steps import Steps

# Seconds, after which a waiting thread looks whether its leader is still there: an exception may have ended the leader
# before it could wake anybody.
_LONGEST_SLEEP: Final = 0.05


class Entry:
    """What a thread asks of a bucket while it waits for its turn.

    :ivar caller: refers to the question's course for as long as its thread has not left it, whichever way.
    :ivar flight: what carries the command; None where it queues.
    :ivar left: whether nobody waits for the answer any more.
    """

    __slots__ = ("caller", "deadline", "flight", "left", "parts", "woken")

    def __init__(self, question: Question, caller: ref[Course]) -> None:
        # Of the question without its course, which would live on as long as this entry does.
        self.parts = question.parts
        self.deadline = math.inf if question.deadline is None else question.deadline
        self.caller = caller
        self.woken = threads.event()
        self.flight: _Flight | None = None
        self.left = False

    def waits(self) -> bool:
        """Return whether it is to be carried by the next flight."""
        flight = self.flight
        return not self.left and self.caller() is not None and (flight is None or flight.is_void())


class _Flight:
    """A question that a thread asks for several.

    :ivar leader: refers to the course of that thread's own question, as in an entry.
    :ivar course: that of the question for all.
    :ivar led: the entries whose commands it carries, and the places of their answers.
    :ivar error: what it has failed with, where that concerns them all.
    :ivar over: whether it has ended, also by an interruption.
    :ivar refused: whether it has ended without having consumed anything, and others may try again.
    """

    __slots__ = ("answers", "course", "error", "leader", "led", "over", "refused")

    def __init__(self, leader: ref[Course], course: Course) -> None:
        self.leader = leader
        self.course = course
        self.led: dict[Entry, int] = {}
        self.answers: Sequence[Any] | None = None
        self.error: Exception | None = None
        self.over = False
        self.refused = False

    def is_over(self) -> bool:
        """Return whether no more will come of it."""
        return self.over or self.leader() is None

    def is_void(self) -> bool:
        """Return whether it has ended, and has surely changed nothing."""
        undecided = self.answers is None and self.error is None
        return self.is_over() and undecided and (self.refused or not self.course.round_trips)


class ThreadCoalescing:
    """The queues of a manager for threads.

    An exception may come to a thread between any two of its steps, from the handler of a signal or from another thread,
    also in a ``finally``. Therefore nobody is handed anything that could be lost on the way. What is stored is true
    wherever its writer stops, and each thread that waits looks for what it needs, once woken and a few times a second:

    - A key is taken while ``_leaders`` refers to the course of a question that a thread is in. A thread that leaves
      takes it out, in one step that comes first; where even that was skipped, the reference ends with the course.
    - An entry stays in its queue until it has left, or its flight has an answer for it. The leader publishes all
      answers in one step. What a flight without any has done is unknown, unless it never sent anything.
    - Where nobody leads, any thread that notices appoints the next leader. To do that twice does no harm, and neither
      would two leaders: swaps decide.

    :param decide: answers the questions that are let through.
    :param monotonic: the clock of deadlines, in seconds.
    """

    def __init__(self, decide: Callable[[Question], Any], monotonic: Callable[[], float]) -> None:
        self._decide = decide
        self._monotonic = monotonic
        self._leaders: dict[bytes, ref[Course]] = {}
        self._queues: dict[bytes, list[Entry]] = {}
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._forget)

    def _forget(self) -> None:
        """Begin without queues in a forked process, where the threads that lead are missing."""
        self._leaders.clear()
        self._queues.clear()

    def decide(self, question: Question) -> Steps[Any]:
        """Answer a question, alone or together with others: the layer, whose steps wait where they stand."""
        yield from ()
        return self.ask(question)

    def ask(self, question: Question) -> Any:
        """Answer a question, alone or together with others."""
        (part,) = question.parts
        if part.command.only_reads:
            return self._decide(question)
        return self._decide_at(part.target.stored_key, question)

    def _decide_at(self, place: bytes, question: Question) -> Any:
        """Answer a question that goes together with others of the same place."""
        me = ref(question.course)
        if place not in self._queues:
            try:
                if self._leaders.setdefault(place, me) is me:
                    return self._decide(question)
            finally:
                # Before any call: the interpreter lets signals in at calls and loops, not in between.
                try:
                    if self._leaders[place] is me:
                        del self._leaders[place]
                except KeyError:
                    pass
                if place in self._queues:
                    self._appoint(place)
        if threads.block_greenlets():
            # No greenlet waits for another: each asks by itself.
            return self._decide(question)
        return self._carried(place, question, Entry(question, me))

    def _carried(self, place: bytes, question: Question, entry: Entry) -> Any:
        """Queue, and wait for the answer or lead others."""
        me, course = entry.caller, question.course
        try:
            with self._lock:
                self._queues.setdefault(place, []).append(entry)
            if self._wait(place, entry, question):
                self._lead(place, entry, question)
        finally:
            entry.left = True
            try:
                if self._leaders[place] is me:
                    del self._leaders[place]
            except KeyError:
                pass
            # Under the lock, because another leader could take the entry along at this moment.
            with self._lock:
                flight = entry.flight
                course.carried = flight is not None
            self._appoint(place)
        return self._answer(entry, flight, course)

    def _answer(self, entry: Entry, flight: Any, course: Course) -> Any:
        course.round_trips = flight.course.round_trips
        key = entry.parts[0].target.key
        if flight.error is not None and flight.leader is not entry.caller:
            raise copied(flight.error, key)
        if flight.answers is None:
            raise StoreUnavailableError(key, "the thread that asked for several was interrupted", in_doubt=True)
        return flight.answers[flight.led[entry]]

    def _appoint(self, place: bytes) -> None:
        """Let one of those that wait lead, unless somebody does, and forget those that have left."""
        with self._lock:
            leader = self._leaders.get(place)
            if leader is not None and leader() is not None:
                return
            waiting = [entry for entry in self._queues.get(place, ()) if entry.waits()]
            if not waiting:
                self._queues.pop(place, None)
                if leader is not None and self._leaders.get(place) is leader:
                    del self._leaders[place]
                return
            self._queues[place] = waiting
            # The one with the latest deadline leads, so that the question for all does not end before theirs.
            chosen = max(self._together(waiting), key=lambda entry: entry.deadline)
            self._leaders[place] = chosen.caller
        chosen.woken.set()

    def _wait(self, place: bytes, entry: Entry, question: Question) -> bool:
        """Block until the entry is decided, or is to lead; return whether it is to lead."""
        while True:
            flight = entry.flight
            if flight is None or flight.is_void():
                self._appoint(place)
                if self._leaders.get(place) is entry.caller:
                    return True
            elif flight.is_over():
                return False
            left = entry.deadline - self._monotonic()
            if left <= 0:
                self._give_up(entry)
            try:
                entry.woken.wait(min(left, _LONGEST_SLEEP))
            except BaseException as error:
                if not question.holds or entry.flight is None:
                    raise
                # The outcome of the command must be known, and then undone.
                question.course.interruption = error

    def _give_up(self, entry: Entry) -> None:
        with self._lock:
            entry.left = True
            flight = entry.flight
        raise too_late(entry.parts[0].target.key, in_doubt=not (flight is None or flight.is_void()))

    def _lead(self, place: bytes, leader: Entry, question: Question) -> None:
        """Ask one question for all that go together, and publish the answers."""
        course = question.course
        asking = course if question.holds else Course()
        flight = _Flight(leader.caller, asking)
        try:
            self._board(place, leader, flight)
            flight.answers = self._ask_for(list(flight.led), question.deadline, asking)
        except RateLimitError as error:
            if isinstance(error, StoreTimeoutError) and not error.in_doubt:
                # Only the leader had no time left; the others may have some.
                flight.refused = True
            else:
                flight.error = error
            if asking is not course and asking.interruption is not None:
                raise asking.interruption from error
            raise
        finally:
            flight.over = True
            course.round_trips = asking.round_trips
            for entry in flight.led:
                entry.woken.set()
        if asking is not course and asking.interruption is not None:
            raise asking.interruption

    def _board(self, place: bytes, leader: Entry, flight: _Flight) -> None:
        """Take along those that wait and go together with the first."""
        with self._lock:
            led = self._together([entry for entry in self._queues.get(place, ()) if entry.waits()])
            if leader not in led:
                led = [leader]
            flight.led = {entry: number for number, entry in enumerate(led)}
            for entry in led:
                entry.flight = flight

    def _ask_for(self, led: list[Entry], deadline: float | None, course: Course) -> Sequence[Any]:
        """Ask one question for all of these, and return their answers in order."""
        command = Batch(tuple([entry.parts[0].command for entry in led]))
        target, terms, _ = led[0].parts[0]
        return self._decide(Question.of(target, terms, command, deadline, holds=True, course=course))  # type: ignore[no-any-return]

    def _together(self, waiting: list[Entry]) -> list[Entry]:
        """Return the first, and those behind it that can be carried with it."""
        return waiting[: count_together(entry.parts[0] for entry in waiting)]
