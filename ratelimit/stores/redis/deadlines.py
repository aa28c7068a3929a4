"""Work that blocks, with an end to the wait for it, and out of the reach of signals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.threads import Job

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

    And what the work does is done to its end: the handler of a signal runs in the main thread, and an exception that is
    set on a thread needs its number, so that both interrupt the wait and never the work.

    :param deadline: None: wait for as long as it takes.
    :param late: gets what comes when nobody waits for it any more; what is raised then is dropped. A wait that is
        interrupted more than once may drop the result without calling it.
    :param at_end: does the work here, until the deadline, where no thread can be started any more, as the interpreter
        ends; None: it is not done then, if there is a deadline.
    :raises TimeoutError: where the work has not ended by then. It goes on.
    :raises ConnectionError: where it is not done.
    """
    job: Job[T] = Job(work, late, work if deadline is None else partial(at_end or _refuse, deadline))
    try:
        job.start()
        job.wait(None if deadline is None else max(0.0, deadline - monotonic()))
        return job.result()
    except BaseException:  # the time is over, or a signal came: also while the thread was started
        job.abandon()
        raise


def _refuse(_: float) -> Any:
    raise ConnectionError("the interpreter is about to end")
