"""What keeps the tokens of a wait from being lost when a thread is interrupted.

In asyncio a cancellation comes at an ``await``, and a request can be seen through. In sync code the handler of a signal
may raise between any two steps, after the store has reserved tokens and before the caller has heard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from ratelimit.core.commands import Command, Plan
from ratelimit.engine.swapping import Backend, Call, Exchange, Target
from ratelimit.runtime.steps import Steps, run
from ratelimit.runtime.threads import Job, beside

T = TypeVar("T")


class Shield:
    """Runs the exchange of a reservation in a thread that nothing interrupts, and undoes it in another one.

    What calls out to the user's code, a listener perhaps, stays in the caller's thread. A clock or a store of the
    user's own does not, and sees the caller's context variables.

    :param give_back: gets the answer to the reservation when it is to be undone, and when the store has given it, by
        the clock of deadlines, or None where a local bucket has; whether there are tokens to give back is for it to
        see.
    :param patience: how long a caller who is interrupted waits at most for that, in seconds.
    :ivar local_answers: the answer of a local bucket, where that has decided in the place of the store.
    """

    def __init__(self, exchange: Exchange, give_back: Callable[[Any, float | None], None], patience: float) -> None:
        self._exchange = exchange
        self._give_back = give_back
        self._patience = patience
        self._job: Job[Any] | None = None
        self.local_answers: list[Any] = []

    def exchange(self, backend: Backend, target: Target, plan: Plan, command: Command[T], call: Call) -> Steps[T]:
        """Do the exchange; an interruption meanwhile is left in the call."""
        yield from ()
        steps = self._exchange(backend, target, plan, command, call)

        def work() -> tuple[T, float]:
            return run(steps), backend.monotonic()

        job: Job[tuple[T, float]] = Job(partial(copy_context().run, work), lambda answered: self._give_back(*answered))
        self._job = job
        job.start()
        while not job.ended:
            try:
                job.wait(None)
            except BaseException as error:  # noqa: BLE001  # raised once it is known what is to be undone
                call.interruption = error
        return job.result()[0]

    def undo(self) -> None:
        """Give back what was reserved, once that is known; nothing where there was no reservation."""
        job = self._job
        if self.local_answers or (job is not None and job.may_give):
            beside(self._undo, self._patience)

    def _undo(self) -> None:
        while self.local_answers:
            self._give_back(self.local_answers.pop(), None)
        if self._job is not None:
            self._job.abandon()
