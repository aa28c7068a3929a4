"""Wait until a deadline for work that blocks, and keep signals from interrupting that work."""

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
    """Do some work in a thread of its own, wait for it until the deadline, and return its result.

    Nothing else can put an end to all that connecting may wait for. The system resolves names, without a timeout. The
    timeouts of a caller's own client are the caller's; they count for each of several steps, and all steps may repeat.

    Nothing interrupts the work itself. The handler of a signal runs in the main thread, and setting an exception on a
    thread takes the number of that thread, so that both can interrupt the wait only.

    :param deadline: on the clock of ``time.monotonic``; None: wait for as long as it takes.
    :param late: gets a result that comes when nobody waits for it any more; an error that comes then is dropped. A wait
        that is interrupted more than once may drop the result without calling this.
    :param at_end: does the work in the calling thread, until the deadline, where no thread can be started because the
        interpreter ends; None: work with a deadline is not done then.
    :raises TimeoutError: where the work has not ended by the deadline. It goes on.
    :raises ConnectionError: where the work is not done, because the interpreter ends.
    """
    job: Job[T] = Job(work, late, work if deadline is None else partial(at_end or _refuse, deadline))
    try:
        job.start()
        job.wait(None if deadline is None else max(0.0, deadline - monotonic()))
        return job.result()
    except BaseException:
        # The time is over, or a signal has come, perhaps while the thread was being started.
        job.abandon()
        raise


def _refuse(_: float) -> Any:
    raise ConnectionError("the interpreter is about to end")
