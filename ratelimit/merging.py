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
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Generic, NamedTuple, TypeVar

from ratelimit import threads
from ratelimit.core.commands import Batch, Command, Plan
from ratelimit.drive import Steps, adrive
from ratelimit.errors import CorruptStateError, Key, StoreError, StoreTimeoutError
from ratelimit.exchange import Backend, Call, Target, exchange
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic

T = TypeVar("T")

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


def _count_together(queue: Sequence[_Queued[Any]] | deque[_Entry[Any]]) -> int:
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
        if command is not previous:  # commands that are asked for over and over are one object, and one step
            if room == 0:
                break
            room -= 1
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
        """As :func:`ratelimit.exchange.exchange`, or in the one that carries what has come meanwhile."""
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
        answers = await adrive(exchange(backend, target, plan, batch, call))
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

    :ivar queued: whether it is still in the queue.
    :ivar settled: whether it has got its answer, or its error.
    :ivar abandoned: whether nobody waits for its answer any more.
    :ivar led: whom it is to lead, itself the first.
    """

    __slots__ = (
        *("abandoned", "answer", "call", "command", "error", "led", "plan", "queued", "settled", "target", "woken"),
    )

    def __init__(self, target: Target, plan: Plan, command: Command[T], call: Call) -> None:
        self.target = target
        self.plan = plan
        self.command = command
        self.call = call
        self.woken = threading.Event()
        self.answer: T | None = None
        self.error: Exception | None = None
        self.queued = True
        self.settled = False
        self.abandoned = False
        self.led: list[_Entry[Any]] | None = None

    def settle(self) -> None:
        self.settled = True
        self.woken.set()


def _deadline(entry: _Entry[Any]) -> float:
    return math.inf if entry.call.deadline is None else entry.call.deadline


_NOBODY: Final[deque[_Entry[Any]]] = deque()
"""The queue of a place where one leads and nobody has come yet; it stays empty."""


class ThreadMerger:
    """The queues of a manager for threads."""

    def __init__(self) -> None:
        self._queues: dict[bytes, deque[_Entry[Any]]] = {}
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._begin_anew)

    def _begin_anew(self) -> None:
        """In a forked process: the threads that lead are missing there."""
        self._queues.clear()

    def exchange(self, backend: Backend, target: Target, plan: Plan, command: Command[T], call: Call) -> Steps[T]:
        """As :func:`ratelimit.exchange.exchange`, which carries the commands of others as well."""
        if command.only_reads:
            return (yield from exchange(backend, target, plan, command, call))
        place = target.stored_key
        entry: _Entry[T] | None = None
        leads = False
        try:  # already here, for an exception may come from a signal at any moment
            with self._lock:
                if place not in self._queues:
                    leads = True
                    self._queues[place] = _NOBODY
                elif not threads.block_greenlets():  # else nobody waits, and each does an exchange
                    entry = self._enqueued(place, _Entry(target, plan, command, call))
            if entry is None:
                return (yield from exchange(backend, target, plan, command, call))
        finally:
            if leads:
                self._leave(place)
        self._wait(place, entry)
        if entry.led is not None:
            yield from self._lead(place, backend, entry)
        if entry.error is not None:
            raise entry.error
        return entry.answer  # type: ignore[return-value]  # it has been settled

    def _leave(self, place: bytes) -> None:
        """Let the next one lead, if anybody has come."""
        with self._lock:
            if self._queues.get(place) is _NOBODY:
                del self._queues[place]
                return
        self._hand_over(place)

    def _enqueued(self, place: bytes, entry: _Entry[T]) -> _Entry[T]:
        queue = self._queues[place]
        if queue is _NOBODY:
            queue = self._queues[place] = deque()
        queue.append(entry)
        return entry

    def _wait(self, place: bytes, entry: _Entry[Any]) -> None:
        """Block until the entry is settled, or is to lead."""
        call = entry.call
        while True:
            try:
                if entry.woken.wait(None if call.deadline is None else max(0.0, call.deadline - monotonic())):
                    return
            except BaseException as error:
                with self._lock:
                    if entry.queued:
                        self._queues[place].remove(entry)
                    decided = entry.settled or (entry.led is None and not entry.queued)
                    stays = decided and call.holds
                    entry.abandoned = not stays
                if not stays:
                    if entry.led is not None:
                        self._hand_over(place, [other for other in entry.led if other is not entry])
                    raise
                call.interruption = error  # what becomes of the command must be known, and then undone
                if entry.settled:
                    return
                continue
            self._give_up(place, entry)
            return

    def _give_up(self, place: bytes, entry: _Entry[Any]) -> None:
        """Raise that the time is over, unless the entry has been settled, or is to lead, in the last moment."""
        with self._lock:
            if entry.settled or entry.led is not None:
                return
            queued = entry.queued
            if queued:
                self._queues[place].remove(entry)
            entry.abandoned = True
        if queued:  # who is in flight may be gone, if an exception hit it badly: others are not to wait in vain
            self._hand_over(place)
        raise _too_late(entry.target.key, in_doubt=not queued)

    def _lead(self, place: bytes, backend: Backend, leader: _Entry[Any]) -> Steps[None]:
        """Run one exchange for all that are led, and hand out the answers."""
        led = leader.led or []
        first, call = led[0], leader.call
        others = [entry for entry in led if entry is not leader]
        asking = call if call.holds else Call(call.deadline, holds=True)
        unsettled = others
        try:
            command = Batch(tuple(entry.command for entry in led))
            answers = yield from exchange(backend, first.target, first.plan, command, asking)
            for entry, answer in zip(led, answers, strict=True):
                entry.answer = answer
            unsettled = []
        except Exception as error:
            if not isinstance(error, StoreTimeoutError) or error.in_doubt:  # else they may have more time, and try
                for entry in others:
                    entry.error = _copied(error, entry.target.key)
                unsettled = []
            if asking is not call and asking.interruption is not None:
                raise asking.interruption from error
            raise
        finally:
            for entry in led:
                entry.call.round_trips = asking.round_trips
            if not unsettled:
                for entry in others:
                    entry.settle()
            self._hand_over(place, unsettled)
        if asking is not call and asking.interruption is not None:
            raise asking.interruption

    def _hand_over(self, place: bytes, returned: Sequence[_Entry[Any]] = ()) -> None:
        """Let the next one lead; those that are returned go first."""
        with self._lock:
            queue = self._queues.get(place)
            if queue is None and not returned:
                return
            if queue is None or (returned and queue is _NOBODY):
                queue = self._queues[place] = deque()
            for entry in reversed(returned):
                if not entry.abandoned:
                    entry.queued, entry.call.carried = True, False
                    queue.appendleft(entry)
            if not queue:
                del self._queues[place]
                return
            led = [queue.popleft() for _ in range(_count_together(queue))]
            for entry in led:
                entry.queued, entry.call.carried = False, True
            leader = max(led, key=_deadline)
            leader.led = led
        leader.woken.set()
