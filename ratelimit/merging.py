"""One exchange in flight for each key of a manager: what arrives meanwhile goes together in the next.

Callers of one process that want the same bucket at once would only lose swaps to each other, more of them the more they
are. Here the first leads: it runs its exchange. Those who come meanwhile queue; when it is done the first of them leads
all that wait, by one command that decides theirs in order, and hands each its answer. Nobody waits for more than the
exchange in flight and the one that carries its own command, and every answer is the one that the caller would have had
in that order, one by one.

A leader that fails shares its error, for they had all asked for the same. A leader that is cancelled before its swap is
sent leaves the others where they were, and the next one leads; once the swap is sent it is seen through.
"""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

from ratelimit.core.commands import Batch, Command, Plan
from ratelimit.drive import Steps
from ratelimit.errors import errors_named
from ratelimit.exchange import Backend, Interruption, Target, exchange

T = TypeVar("T")


class Waiter(Protocol):
    """A place to wait in, once."""

    def wait(self) -> Any:
        """Wait until woken: by blocking, or by giving something to await."""
        ...

    def wake(self) -> None:
        """Let it go on."""
        ...


class ThreadWaiter:
    """Blocks a thread; a forked process, in which the thread that leads is missing, waits for itself alone."""

    def __init__(self, _scope: object) -> None:
        self._event = threading.Event()

    @staticmethod
    def scope() -> object:
        """Those who can wait for each other."""
        return _process

    def wait(self) -> None:
        """Block until woken."""
        self._event.wait()

    def wake(self) -> None:
        """Let the thread go on."""
        self._event.set()


_process = object()
"""Stands for this process; another one after a fork."""


def _become_another_process() -> None:
    global _process  # noqa: PLW0603  # there is one process
    _process = object()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_become_another_process)


class TaskWaiter:
    """Suspends a task; wakes only tasks of the same loop."""

    __slots__ = ("_future", "_loop", "_woken")

    def __init__(self, scope: asyncio.AbstractEventLoop) -> None:
        self._loop = scope
        self._future: asyncio.Future[None] = scope.create_future()
        self._woken = False

    @staticmethod
    def scope() -> asyncio.AbstractEventLoop:
        """Those who can wait for each other."""
        return asyncio.get_running_loop()

    def wait(self) -> asyncio.Future[None]:
        """Something to await; that it is cancelled does not hurt the place."""
        if self._future.cancelled():
            self._future = self._loop.create_future()
            if self._woken:
                self._future.set_result(None)
        return self._future

    def wake(self) -> None:
        """Let the task go on."""
        self._woken = True
        if not self._future.done():
            try:  # noqa: SIM105  # which takes a fraction of the time of what stands for it
                self._future.set_result(None)
            except RuntimeError:  # its loop has been closed: nobody is there any more
                pass


class _Entry(Generic[T]):
    """A command that waits for its turn.

    :ivar queued: whether it is still in the queue.
    :ivar settled: whether it has got its answer, or its error.
    :ivar abandoned: whether nobody waits for its answer any more.
    :ivar led: whom it is to lead, itself the first.
    """

    __slots__ = ("abandoned", "answer", "command", "error", "led", "plan", "queued", "settled", "target", "waiter")

    def __init__(self, target: Target, plan: Plan, command: Command[T], waiter: Waiter) -> None:
        self.target = target
        self.plan = plan
        self.command = command
        self.waiter = waiter
        self.answer: T | None = None
        self.error: Exception | None = None
        self.queued = True
        self.settled = False
        self.abandoned = False
        self.led: list[_Entry[Any]] | None = None

    def goes_with(self, other: _Entry[Any]) -> bool:
        """Whether one exchange may carry both."""
        mine, its = self.target, other.target
        return mine is its or (
            self.plan == other.plan
            and mine.expiration == its.expiration
            and (mine.must_exist_once_made and mine.made) == (its.must_exist_once_made and its.made)
        )

    def settle(self) -> None:
        self.settled = True
        self.waiter.wake()


_NOBODY: Final[deque[_Entry[Any]]] = deque()
"""The queue of a place where one leads and nobody has come yet; it stays empty."""


class Merger:
    """The queues of a manager.

    :param waiter: makes a place to wait in; those of different ``scope`` do not wait for each other.
    """

    def __init__(self, waiter: type[ThreadWaiter | TaskWaiter]) -> None:
        self._waiter = waiter
        self._queues: dict[Hashable, deque[_Entry[Any]]] = {}
        self._lock = threading.Lock()

    def exchange(
        self,
        backend: Backend,
        target: Target,
        plan: Plan,
        command: Command[T],
        interruption: Interruption | None = None,
    ) -> Steps[T]:
        """As :func:`ratelimit.exchange.exchange`, which carries the commands of others as well."""
        if command.only_reads:
            return (yield from exchange(backend, target, plan, command, interruption))
        scope: Any = self._waiter.scope()
        place = (scope, target.stored_key)
        entry: _Entry[T] | None = None
        with self._lock:
            if place in self._queues:
                entry = self._enqueued(place, _Entry(target, plan, command, self._waiter(scope)))
            else:
                self._queues[place] = _NOBODY
        if entry is None:
            try:
                return (yield from exchange(backend, target, plan, command, interruption))
            finally:
                self._hand_over(place)
        yield from self._wait(place, entry, interruption)
        if entry.led is not None:
            yield from self._lead(place, backend, entry.led, interruption)
        if entry.error is not None:
            with errors_named(target.key):
                raise entry.error
        return entry.answer  # type: ignore[return-value]  # it has been settled

    def _enqueued(self, place: Hashable, entry: _Entry[T]) -> _Entry[T]:
        queue = self._queues[place]
        if queue is _NOBODY:
            queue = self._queues[place] = deque()
        queue.append(entry)
        return entry

    def _wait(self, place: Hashable, entry: _Entry[Any], interruption: Interruption | None) -> Steps[None]:
        """Until the entry is settled, or is to lead."""
        while True:
            try:
                yield entry.waiter.wait()
            except BaseException as error:
                with self._lock:
                    if entry.queued:
                        self._queues[place].remove(entry)
                    decided = entry.settled or (entry.led is None and not entry.queued)
                    stays = decided and interruption is not None and not isinstance(error, GeneratorExit)
                    entry.abandoned = not stays
                if interruption is None or not stays:
                    if entry.led is not None:
                        self._hand_over(place, entry.led[1:])
                    raise
                interruption.error = error  # what becomes of the command must be known, and then undone
                if not entry.settled:
                    continue
            return

    def _lead(
        self, place: Hashable, backend: Backend, led: list[_Entry[Any]], interruption: Interruption | None
    ) -> Steps[None]:
        """Run one exchange for all that are led, and hand out the answers."""
        first, others = led[0], led[1:]
        held = interruption or Interruption()
        unsettled = others
        try:
            command = Batch(tuple(entry.command for entry in led))
            answers = yield from exchange(backend, first.target, first.plan, command, held)
            for entry, answer in zip(led, answers, strict=True):
                entry.answer = answer
            unsettled = []
        except Exception as error:
            for entry in others:
                entry.error = _copied(error)
            unsettled = []
            if interruption is None and held.error is not None:
                raise held.error from error
            raise
        finally:
            if not unsettled:
                for entry in others:
                    entry.settle()
            self._hand_over(place, unsettled)
        if interruption is None and held.error is not None:
            raise held.error

    def _hand_over(self, place: Hashable, returned: Sequence[_Entry[Any]] = ()) -> None:
        """Let the next one lead; those that are returned go first."""
        with self._lock:
            queue = self._queues[place]
            for entry in reversed(returned):
                if not entry.abandoned:
                    entry.queued = True
                    queue.appendleft(entry)
            if not queue:
                del self._queues[place]
                return
            led = [queue.popleft()]
            while queue and queue[0].goes_with(led[0]):
                led.append(queue.popleft())
            for entry in led:
                entry.queued = False
            led[0].led = led
        led[0].waiter.wake()


def _copied(error: Exception) -> Exception:
    """The same error for another caller, who adds to it a traceback and a key of his own."""
    try:
        copied = copy.copy(error)
    except Exception:  # noqa: BLE001  # an exception of the caller's clock or store, made in a way of its own
        return error
    copied.__cause__ = error.__cause__
    return copied
