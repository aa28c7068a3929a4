"""Work that blocks, with an end to the wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ratelimit import threads
from ratelimit.runtime.clock import monotonic

T = TypeVar("T")


def within(
    deadline: float | None,
    work: Callable[[], T],
    late: Callable[[T], Any] = lambda _: None,
    at_end: Callable[[float], T] | None = None,
) -> T:
    """Do some work in a thread of its own, and wait for it until the deadline, on the clock of ``time.monotonic``.

    There is no other way to put an end to all that connecting may wait for: names are resolved by the system, and
    timeouts of a caller's own client are the caller's, for each of several steps, and for repetitions of them all.

    :param deadline: None: do it here, however long it takes.
    :param late: gets what comes when nobody waits for it any more; what is raised then is dropped.
    :param at_end: does the work here, until the deadline, where no thread can be started any more, as the interpreter
        ends; None: it is not done then.
    :raises TimeoutError: where the work has not ended by then. It goes on.
    :raises ConnectionError: where it is not done.
    """
    if deadline is None:
        return work()
    job = _Job(work, late)
    try:
        try:
            threads.start(job.run, "ratelimit-connect")
        except threads.EndingError:
            if at_end is None:
                raise ConnectionError("the interpreter is about to end") from None
            return at_end(deadline)
        except RuntimeError:  # there are too many
            return work()
        return job.result(deadline)
    except BaseException:  # the time is over, or a signal came: also while the thread was started
        job.abandon()
        raise


class _Job(Generic[T]):
    def __init__(self, work: Callable[[], T], late: Callable[[T], Any]) -> None:
        self._work = work
        self._late = late
        self._lock = threading.Lock()
        self._ended = threads.event()
        self._abandoned = False
        self._result: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001  # it is for who waits
            self._error = error
        with self._lock:
            self._ended.set()
            abandoned = self._abandoned
        if abandoned and self._result:
            self._late(self._result[0])

    def result(self, deadline: float) -> T:
        if not self._ended.wait(max(0.0, deadline - monotonic())):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result[0]

    def abandon(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._abandoned = True
            ended = self._ended.is_set()
        if ended and self._result:
            self._late(self._result[0])
