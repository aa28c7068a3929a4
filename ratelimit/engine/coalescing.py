"""One exchange in flight for each key of a manager: what arrives meanwhile goes together in the next.

Callers of one process that want the same bucket at once would only lose swaps to each other, more of them the more they
are. Here the first runs its exchange. Those who come meanwhile queue; when it is done, all that wait are decided by one
command, in order, and each gets its answer. Nobody waits for more than the exchange in flight and the one that carries
its own command, unless hundreds of different commands wait, which are carried in parts. Every answer is the one that
the caller would have had in that order, one by one.

Of threads, the one that can wait longest leads the others: it runs the exchange of all. For tasks, one of the merger's
own does that, so that a caller is woken once, by its answer, and nobody's cancellation touches the others.

An exchange that fails shares its error, for they had all asked for the same. Who is cancelled in the queue is not
charged; once the swap is sent it is seen through. Nobody waits beyond a deadline of his own.
"""

from __future__ import annotations

import asyncio
import copy
import math
from asyncio import AbstractEventLoop
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, NamedTuple, TypeVar
from weakref import ref

from ratelimit.core.commands import Batch, Command, Plan
from ratelimit.engine.swapping import Backend, Call, Target, exchange
from ratelimit.errors import CorruptStateError, RateLimitError, StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.keys import Key
from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import Steps, arun

T = TypeVar("T")

_LONGEST_SLEEP: Final = 0.05  # seconds, after which a thread looks whether the one that leads is still there
_MOST_STEPS: Final = 256
"""Different commands in a row, times bandwidths, that one exchange carries: a server that decides them is busy with
them for about a millisecond, or for ten if all of them hold back. Not less than the most bandwidths of a
configuration."""


def _go_together(one: _Queued[Any] | _Entry[Any], other: _Queued[Any] | _Entry[Any]) -> bool:
    """Whether one exchange may carry the commands of both."""
    mine, its = one.target, other.target
    return mine is its or (
        one.plan == other.plan
        and mine.expiration == its.expiration
        and (mine.must_exist_once_made and mine.made) == (its.must_exist_once_made and its.made)
    )


def _count_together(queue: Sequence[_Queued[Any]] | Sequence[_Entry[Any]]) -> int:
    """Return how many from the head of a queue one exchange is to carry, which is one at least."""
    first = queue[0]
    target = first.target
    room = _MOST_STEPS // len(first.plan.configuration.bandwidths)
    previous: Command[Any] | None = None
    count = 0
    for queued in queue:
        if queued.target is not target and not _go_together(queued, first):
            break
        command = queued.command
        # Commands that are asked for over and over are one object, and one step.
        if command is not previous:
            steps = len(command.commands) if type(command) is Batch else 1
            if count and room < steps:
                break
            room -= steps
            previous = command
        count += 1
    return count


def _copied(error: Exception, key: Key) -> Exception:
    """The same error for another caller, who adds a traceback to it; it names the key as that caller gave it."""
    try:
        copied = copy.copy(error)
    except Exception:  # noqa: BLE001  # an exception of the caller's clock or store, made in a way of its own
        return error
    copied.__cause__ = error.__cause__
    if isinstance(copied, (StoreError, CorruptStateError)):
        copied.key = key
    return copied


class _Queued(NamedTuple, Generic[T]):
    """A command that waits for its answer; the future is cancelled where nobody waits any more."""

    target: Target
    plan: Plan
    command: Command[T]
    call: Call
    answer: asyncio.Future[T]


@dataclass(slots=True, eq=False)
class _Place:
    """Where an exchange is in flight, and others queue.

    :ivar queue: who has come meanwhile.
    :ivar carried: those whose commands the exchange carries, but for a first one that carries its own.
    :ivar timer: for the first deadline of them all.
    """

    key: bytes
    loop: AbstractEventLoop
    queue: list[_Queued[Any]] = field(default_factory=list)
    carried: list[_Queued[Any]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    due: float = math.inf

    def watch(self, deadline: float) -> None:
        """Let nobody wait for longer than until this deadline, or the ones that are watched already."""
        if self.timer is not None:
            self.timer.cancel()
        self.due = deadline
        self.timer = self.loop.call_later(deadline - monotonic(), self._on_deadline)

    def _on_deadline(self) -> None:
        now, next_due = monotonic(), math.inf
        self.timer, self.due = None, math.inf
        for waiting, in_doubt in ((self.carried, True), (self.queue, False)):
            for target, _, _, call, answer in waiting:
                if answer.done() or call.deadline is None:
                    continue
                if call.deadline <= now:
                    answer.set_exception(_too_late(target.key, in_doubt=in_doubt))
                else:
                    next_due = min(next_due, call.deadline)
        if next_due < math.inf:
            self.watch(next_due)

    def end(self) -> None:
        """Nobody is in flight any more."""
        if self.timer is not None:
            self.timer.cancel()
        with suppress(RuntimeError):  # the loop is closed
            for queued in (*self.carried, *self.queue):  # some are left where the loop ends
                queued.answer.cancel()


def _too_late(key: Key, *, in_doubt: bool) -> StoreTimeoutError:
    waited_for = "an answer" if in_doubt else "those who came before"
    return StoreTimeoutError(key, f"there was no time left to wait for {waited_for}", in_doubt)


class TaskMerger:
    """The queues of a manager for asyncio; tasks of different event loops do not wait for each other."""

    def __init__(self) -> None:
        self._places: dict[tuple[AbstractEventLoop, bytes], _Place | None] = {}  # None: nobody has come yet
        self._carriers: set[asyncio.Task[None]] = set()  # the loop itself does not keep them alive

    def exchange(self, backend: Backend, target: Target, plan: Plan, command: Command[T], call: Call) -> Steps[T]:
        """As :func:`ratelimit.engine.swapping.exchange`, or in the one that carries what has come meanwhile."""
        answer = self.join(target, plan, command, call)
        if answer is None:
            return self.lead(backend, target, plan, command, call)
        return self._wait(target, answer, call)

    def join(self, target: Target, plan: Plan, command: Command[T], call: Call) -> asyncio.Future[T] | None:
        """Queue behind the exchange in flight: the answer to be. None where there is none in flight, and for reads."""
        loop = asyncio.get_running_loop()
        where = loop, target.stored_key
        if where not in self._places or command.only_reads:
            return None
        place = self._places[where]
        if place is None:
            place = self._places[where] = _Place(target.stored_key, loop)
        answer: asyncio.Future[T] = loop.create_future()
        place.queue.append(_new(_Queued, (target, plan, command, call, answer)))
        if call.deadline is not None and call.deadline < place.due:
            place.watch(call.deadline)
        return answer

    def lead(self, backend: Backend, target: Target, plan: Plan, command: Command[T], call: Call) -> Steps[T]:
        """Run an exchange that others may queue behind, where :meth:`join` has just found none in flight."""
        if command.only_reads:
            return (yield from exchange(backend, target, plan, command, call))
        where = asyncio.get_running_loop(), target.stored_key
        self._places[where] = None
        try:
            return (yield from exchange(backend, target, plan, command, call))
        finally:
            place = self._places[where]
            if place is None:
                del self._places[where]
            else:
                self._hand_over(place, backend)

    def _wait(self, target: Target, answer: asyncio.Future[T], call: Call) -> Steps[T]:
        """Until there is the answer; once the command is on its way no cancellation ends that, if the call holds it."""
        while call.holds:
            try:
                return (yield asyncio.shield(answer))  # type: ignore[no-any-return]
            except asyncio.CancelledError as error:
                place = self._places.get((answer.get_loop(), target.stored_key))
                queued = place is not None and any(queued.answer is answer for queued in place.queue)
                if answer.cancelled() or queued:
                    answer.cancel()
                    raise
                call.interruption = error  # what becomes of the command must be known, and then undone
        return (yield answer)  # type: ignore[no-any-return]

    def _hand_over(self, place: _Place, backend: Backend) -> None:
        """Let those who have come meanwhile go together."""
        if not place.queue:
            self._leave(place)
            return
        try:
            if place.loop is asyncio.get_running_loop():
                self._start_carrier(place, backend)
                return
        except RuntimeError:  # no loop runs here: who was in flight has been collected
            pass
        try:
            place.loop.call_soon_threadsafe(self._start_carrier, place, backend)
        except RuntimeError:  # it is closed, and nobody waits any more
            self._leave(place)

    def _leave(self, place: _Place) -> None:
        del self._places[place.loop, place.key]
        place.end()

    def _start_carrier(self, place: _Place, backend: Backend) -> None:
        carrier = place.loop.create_task(self._carry(place, backend))
        self._carriers.add(carrier)
        carrier.add_done_callback(partial(self._ended, place))

    def _ended(self, place: _Place, carrier: asyncio.Task[None]) -> None:
        self._carriers.discard(carrier)
        if self._places.get((place.loop, place.key)) is place:  # it was cancelled before it had begun
            self._leave(place)

    async def _carry(self, place: _Place, backend: Backend) -> None:
        """Run one exchange after the other until nobody waits."""
        try:
            while place.queue:
                place.carried = _next_of(place.queue)
                if place.carried:
                    await _carry_together(backend, place.carried)
                    place.carried = []
        finally:
            self._leave(place)


_new = tuple.__new__  # of a named tuple: without the function that would only name its fields


def _next_of(queue: list[_Queued[Any]]) -> list[_Queued[Any]]:
    """Take from a queue who goes together; who was cancelled does not go."""
    count = _count_together(queue)
    together = [queued for queued in queue[:count] if not queued.answer.done()]
    del queue[:count]
    return together


async def _carry_together(backend: Backend, together: list[_Queued[Any]]) -> None:
    """Run one exchange for all of them, until the last of their deadlines, and hand out the answers."""
    target, plan = together[0].target, together[0].plan
    deadlines = [queued.call.deadline for queued in together]
    call = Call(None if None in deadlines else max(deadlines))  # type: ignore[type-var]  # there is no None
    for queued in together:
        queued.call.carried = True
    try:
        batch = Batch(tuple([queued.command for queued in together]))
        answers = await arun(exchange(backend, target, plan, batch, call))
    except Exception as error:  # noqa: BLE001  # it is for those who wait
        for queued in together:
            queued.call.round_trips = call.round_trips
            if not queued.answer.done():
                queued.answer.set_exception(_copied(error, queued.target.key))
    else:
        trips = call.round_trips
        for (_, _, _, carried, future), answer in zip(together, answers, strict=True):
            carried.round_trips = trips
            if not future.done():
                future.set_result(answer)


class _Entry(Generic[T]):
    """A command of a thread that waits for its turn.

    :ivar caller: refers to the call for as long as its thread has not left it, whichever way.
    :ivar flight: the exchange that carries the command; None where it queues.
    :ivar left: whether nobody waits for the answer any more.
    """

    __slots__ = ("caller", "command", "deadline", "flight", "left", "plan", "target", "woken")

    def __init__(self, target: Target, plan: Plan, command: Command[T], call: Call, caller: ref[Call]) -> None:
        self.target = target
        self.plan = plan
        self.command = command
        self.deadline = math.inf if call.deadline is None else call.deadline
        self.caller = caller
        self.woken = threads.event()
        self.flight: _Flight | None = None
        self.left = False

    def waits(self) -> bool:
        """Whether it is to be carried by the next exchange."""
        flight = self.flight
        return not self.left and self.caller() is not None and (flight is None or flight.is_void())


class _Flight:
    """An exchange that a thread runs for several.

    :ivar leader: refers to the call of that thread, as in an entry.
    :ivar asking: the call of the exchange.
    :ivar led: the entries whose commands it carries, and the places of their answers.
    :ivar error: what it has failed with, where that concerns them all.
    :ivar over: whether it has ended, also by an interruption.
    :ivar refused: whether it has ended without having consumed anything, and others may try again.
    """

    __slots__ = ("answers", "asking", "error", "leader", "led", "over", "refused")

    def __init__(self, leader: ref[Call], asking: Call) -> None:
        self.leader = leader
        self.asking = asking
        self.led: dict[_Entry[Any], int] = {}
        self.answers: Sequence[Any] | None = None
        self.error: Exception | None = None
        self.over = False
        self.refused = False

    def is_over(self) -> bool:
        return self.over or self.leader() is None

    def is_void(self) -> bool:
        """Whether it has ended, and has surely changed nothing."""
        undecided = self.answers is None and self.error is None
        return self.is_over() and undecided and (self.refused or not self.asking.round_trips)


class ThreadMerger:
    """The queues of a manager for threads.

    An exception may come to a thread between any two of its steps, from the handler of a signal or from another thread,
    also in a ``finally``. Therefore nobody is handed anything that could be lost on the way. What is stored is true
    wherever its writer stops, and each thread that waits looks for what it needs, once woken and a few times a second:

    - A key is taken while ``_leaders`` refers to a call that a thread is in. A thread that leaves takes it out, in one
      step that comes first; where even that was skipped, the reference ends with the call.
    - An entry stays in its queue until it has left, or its flight has an answer for it. The leader publishes all
      answers in one step. What a flight without any has done is unknown, unless it never sent anything.
    - Where nobody leads, any thread that notices appoints the next leader. To do that twice does no harm, and neither
      would two leaders: swaps decide.
    """

    def __init__(self) -> None:
        self._leaders: dict[bytes, ref[Call]] = {}
        self._queues: dict[bytes, list[_Entry[Any]]] = {}
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        """In a forked process: the threads that lead are missing there."""
        self._leaders.clear()
        self._queues.clear()

    def exchange(self, backend: Backend, target: Target, plan: Plan, command: Command[T], call: Call) -> Steps[T]:
        """As :func:`ratelimit.engine.swapping.exchange`, which carries the commands of others as well."""
        if command.only_reads:
            return (yield from exchange(backend, target, plan, command, call))
        place, me = target.stored_key, ref(call)
        if place not in self._queues:
            try:
                if self._leaders.setdefault(place, me) is me:
                    return (yield from exchange(backend, target, plan, command, call))
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
            # No greenlet waits for another: each does an exchange.
            return (yield from exchange(backend, target, plan, command, call))
        return (yield from self._merged(place, backend, _Entry(target, plan, command, call, me), call))

    def _merged(self, place: bytes, backend: Backend, entry: _Entry[T], call: Call) -> Steps[T]:
        """Queue, and wait for the answer or lead others."""
        me = entry.caller
        try:
            with self._lock:
                self._queues.setdefault(place, []).append(entry)
            if self._wait(place, entry, call):
                yield from self._lead(place, backend, entry, call)
        finally:
            entry.left = True
            try:
                if self._leaders[place] is me:
                    del self._leaders[place]
            except KeyError:
                pass
            with self._lock:  # or it could be taken along at this moment
                flight = entry.flight
                call.carried = flight is not None
            self._appoint(place)
        return self._answer(entry, flight, call)  # type: ignore[no-any-return]  # that of the command

    def _answer(self, entry: _Entry[Any], flight: Any, call: Call) -> Any:
        call.round_trips = flight.asking.round_trips
        if flight.error is not None and flight.leader is not entry.caller:
            raise _copied(flight.error, entry.target.key)
        if flight.answers is None:
            raise StoreUnavailableError(
                entry.target.key, "the thread that asked for several was interrupted", in_doubt=True
            )
        return flight.answers[flight.led[entry]]

    def _appoint(self, place: bytes) -> None:
        """Let one of those who wait lead, unless somebody does, and forget those who have left."""
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
            chosen = max(_together(waiting), key=lambda entry: entry.deadline)
            self._leaders[place] = chosen.caller
        chosen.woken.set()

    def _wait(self, place: bytes, entry: _Entry[Any], call: Call) -> bool:
        """Block until the entry is decided, or is to lead; whether it is to lead."""
        while True:
            flight = entry.flight
            if flight is None or flight.is_void():
                self._appoint(place)
                if self._leaders.get(place) is entry.caller:
                    return True
            elif flight.is_over():
                return False
            left = entry.deadline - monotonic()
            if left <= 0:
                self._give_up(entry)
            try:
                entry.woken.wait(min(left, _LONGEST_SLEEP))
            except BaseException as error:
                if not call.holds or entry.flight is None:
                    raise
                call.interruption = error  # what becomes of the command must be known, and then undone

    def _give_up(self, entry: _Entry[Any]) -> None:
        with self._lock:
            entry.left = True
            flight = entry.flight
        raise _too_late(entry.target.key, in_doubt=not (flight is None or flight.is_void()))

    def _lead(self, place: bytes, backend: Backend, leader: _Entry[Any], call: Call) -> Steps[None]:
        """Run one exchange for all that go together, and publish the answers."""
        asking = call if call.holds else Call(call.deadline, holds=True)
        flight = _Flight(leader.caller, asking)
        try:
            self._board(place, leader, flight)
            command = Batch(tuple([entry.command for entry in flight.led]))
            first = next(iter(flight.led))
            flight.answers = yield from exchange(backend, first.target, first.plan, command, asking)
        except RateLimitError as error:
            if isinstance(error, StoreTimeoutError) and not error.in_doubt:  # others may have more time
                flight.refused = True
            else:
                flight.error = error
            if asking is not call and asking.interruption is not None:
                raise asking.interruption from error
            raise
        finally:
            flight.over = True
            call.round_trips = asking.round_trips
            for entry in flight.led:
                entry.woken.set()
        if asking is not call and asking.interruption is not None:
            raise asking.interruption

    def _board(self, place: bytes, leader: _Entry[Any], flight: _Flight) -> None:
        """Take along who waits, and goes together with the first."""
        with self._lock:
            led = _together([entry for entry in self._queues.get(place, ()) if entry.waits()])
            if leader not in led:
                led = [leader]
            flight.led = {entry: number for number, entry in enumerate(led)}
            for entry in led:
                entry.flight = flight


def _together(waiting: list[_Entry[Any]]) -> list[_Entry[Any]]:
    """The first, and those behind it that one exchange may carry with it."""
    return waiting[: _count_together(waiting)]
