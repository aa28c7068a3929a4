"""Work in the background, and waiting for it, by threads or by greenlets, whatever interrupts the caller.

The handler of a signal, or another thread, may raise an exception in a thread between any two of its steps. So starting
and waiting are single calls here into the interpreter's own code, within which no exception can come.
(``threading.Thread.start`` and ``threading.Event`` are Python, and keep their locks when they are interrupted.) No such
exception reaches the library's own threads: they finish what must not be left half done.

gevent and eventlet replace the sockets of the standard library, and by default its threads, locks and events as well,
so that all of them are greenlets' own. A program may let them replace the sockets alone. There a thread cannot use the
sockets that another one has made, and a thread that waits for an event stops all of its greenlets, perhaps also the
one that it waits for.
"""

from __future__ import annotations

import _thread
import math
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, Generic, Protocol, TypeVar

from ratelimit.runtime.clock import monotonic

T = TypeVar("T")

_PAUSE: Final = 0.005  # seconds
# Seconds after which a thread that has not begun is taken for lost, and another one is started.
_LONGEST_START: Final = 0.1
_EVENTS: Final = {"gevent": "gevent.event", "eventlet": "eventlet.green.threading"}
"""Modules that have events which stop no greenlets, whatever was replaced."""


class EndingError(RuntimeError):
    """The interpreter is about to end, and runs no other thread any more."""


class Event(Protocol):
    """An event that a caller waits for."""

    def set(self) -> object: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class _Event:
    """An event for a single thread that waits; it can be waited for once."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        # Where greenlets have replaced the locks, this is one of theirs.
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        try:
            self._lock.release()
        except RuntimeError as error:
            # "release unlocked lock" means that the event was set before. The handler of a signal may raise a
            # RuntimeError of its own here, which must go on.
            if "release" not in str(error):
                raise

    def wait(self, timeout: float | None = None) -> bool:
        return self._lock.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))


def block_greenlets() -> bool:
    """Return whether a thread that waits for an event stops greenlets, which share its sockets."""
    return _library() is not None


def start(work: Callable[[], Any]) -> None:
    """Run some work in the background.

    :raises EndingError: where the interpreter is about to end.
    :raises RuntimeError: where there are too many threads.
    """
    if sys.is_finalizing():
        # Python 3.11 would start a thread that never runs, and wait for it without an end.
        raise EndingError
    library = _library()
    if library == "gevent":
        import_module("gevent").spawn(work)
    elif library == "eventlet":
        import_module("eventlet").spawn_n(work)
    else:
        try:
            _thread.start_new_thread(work, ())
        except RuntimeError as error:
            if "interpreter shutdown" in str(error):
                raise EndingError from error
            raise


def event() -> Event:
    """Return an event for what :func:`start` runs."""
    library = _library()
    made: Event = _Event() if library is None else import_module(_EVENTS[library]).Event()
    return made


def beside(work: Callable[[], Any], longest_wait: float = 0.0) -> None:
    """Do some work in a thread of its own; wait for it up to ``longest_wait`` seconds, and raise what it raises."""
    job = Job(work, lambda _: None)
    job.start()
    if longest_wait > 0 and job.wait(longest_wait):
        job.result()


class Job(Generic[T]):
    """Work in another thread, or in a greenlet.

    :param late: is called with the result of an abandoned job, once there is one.
    :param at_end: what the caller does in place of the work if the interpreter is about to end; None: the work itself.
    """

    def __init__(self, work: Callable[[], T], late: Callable[[T], Any], at_end: Callable[[], T] | None = None) -> None:
        self._work = work
        self._late = late
        self._at_end = at_end or work
        self._over = event()
        self._to_do = [None]  # whichever thread takes it out does the work
        self.ended = False
        self._abandoned = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin; or do the work here and now, if there are too many threads or the interpreter is about to end."""
        try:
            start(self._run)
        except EndingError:
            self._work = self._at_end
            self._run()
        except RuntimeError as error:
            # CPython says "can't start new thread". Any other RuntimeError comes from the handler of a signal, when the
            # thread has been started.
            if not str(error).startswith("can't"):
                raise
            self._run()

    def _run(self) -> None:
        try:
            self._to_do.pop()
        except IndexError:  # another thread has begun
            return
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001  # the waiting thread raises it
            self._error = error
        self.ended = True
        self._over.set()
        # This side stores the result and then looks at the flag; abandon() sets the flag and then looks for the result.
        # So one of the two sees both, and only one can take the result out.
        if self._abandoned:
            self._give_late()

    def wait(self, seconds: float | None) -> bool:
        """Return whether the work ends within this time; None: no bound. An interrupted wait may be repeated."""
        deadline = math.inf if seconds is None else monotonic() + seconds
        while self._to_do and not self.ended:
            # CPython 3.11 may raise an exception that is meant for this thread in the one that it is just starting.
            # That ends the new thread, and another one has to be started.
            if self._over.wait(max(0.0, min(_LONGEST_START, deadline - monotonic()))):
                return True
            if monotonic() >= deadline:
                return self.ended
            self.start()
        left = None if deadline == math.inf else max(0.0, deadline - monotonic())
        return self.ended or self._over.wait(left)

    @property
    def may_give(self) -> bool:
        """Whether there is a result, or may be one yet, and it was not abandoned."""
        return bool(self._result) or not self.ended

    def result(self) -> T:
        """Return the result of the work, or raise its error; ``TimeoutError`` if it has not ended."""
        if not self.ended:
            raise TimeoutError
        if self._error is None:
            return self._result[0]
        try:
            raise self._error
        finally:
            # The traceback of the error refers to this job: the two would keep each other alive.
            self._error = None

    def abandon(self) -> None:
        """Give the job up: nobody wants the result any more."""
        self._abandoned = True
        self._give_late()

    def _give_late(self) -> None:
        try:
            result = self._result.pop()
        except IndexError:
            return
        self._late(result)


def sleep(seconds: float) -> None:
    """Let other threads or greenlets run for this long."""
    event().wait(seconds)


def pause() -> None:
    """Let other threads or greenlets run, before the caller looks again for something that has no event."""
    sleep(_PAUSE)


@contextmanager
def taken(lock: threading.Lock) -> Generator[None]:
    """Hold a lock. Greenlets run while it is waited for, even if it was made before they replaced the locks."""
    while not lock.acquire(blocking=False):
        pause()
    try:
        yield
    finally:
        lock.release()


def _library() -> str | None:
    """Return the library that has replaced the sockets and not the threads.

    None where there is none, as in most processes.
    """
    # Only modules that the program has imported are looked at, so that nothing is imported here.
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("socket") and not monkey.is_module_patched("threading"):
        return "gevent"
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("socket") and not patcher.is_monkey_patched("thread"):
        return "eventlet"
    return None
