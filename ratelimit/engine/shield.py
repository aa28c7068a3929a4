"""What keeps the tokens of a wait from being lost when a thread is interrupted.

In asyncio a cancellation comes at an ``await``, and a request can be seen through. In sync code the handler of a signal
may raise between any two steps, after the store has reserved tokens and before the caller has heard of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any
from weakref import ref

from ratelimit.engine.question import Course, Layer, Question
from ratelimit.runtime.steps import Steps, run
from ratelimit.runtime.threads import Job, beside


class Shield:
    """Asks for a reservation in a thread that nothing interrupts, and undoes the reservation in another one.

    What calls out to the user's code, a listener perhaps, stays in the caller's thread. A clock or a store of the
    user's own does not, and sees the caller's context variables.

    :param give_back: undoes a reservation, if it has taken tokens. It gets the answer, and when the store has given it,
        by the clock of deadlines; None where a local bucket has given it.
    :param patience: how long a caller that is interrupted waits at most for that, in seconds.
    """

    def __init__(self, course: Course, give_back: Callable[[Any, float | None], None], patience: float) -> None:
        self._course = course
        self._give_back = give_back
        self._patience = patience
        self._job: Job[Any] | None = None
        # This is a weak reference, and the job below does not refer to the shield: a circle would keep a manager alive
        # that was dropped.
        course.shield = ref(self)

    def ask(self, inner: Layer, question: Question, monotonic: Callable[[], float]) -> Any:
        """Ask, and leave an interruption that comes meanwhile in the course."""
        steps, give_back = inner(question), self._give_back

        def work() -> tuple[Any, float]:
            return run(steps), monotonic()

        job: Job[tuple[Any, float]] = Job(partial(copy_context().run, work), lambda answered: give_back(*answered))
        self._job = job
        job.start()
        # A second interruption must not leave the job behind either, so that the wait begins again after each.
        while not job.ended:
            try:
                job.wait(None)
            except BaseException as error:  # noqa: BLE001  # it is raised once it is known what is to be undone
                self._course.interruption = error
        return job.result()[0]

    def undo(self) -> None:
        """Give back what was reserved, once that is known; nothing where there was no reservation."""
        job = self._job
        if self._course.local_answer is not None or (job is not None and job.may_give):
            beside(self._undo, self._patience)

    def _undo(self) -> None:
        answer, self._course.local_answer = self._course.local_answer, None
        if answer is not None:
            self._give_back(answer, None)
        if self._job is not None:
            self._job.abandon()


def shielding(inner: Layer, monotonic: Callable[[], float]) -> Layer:
    """Return the layer that asks under the shield of a question's course."""

    def decide(question: Question) -> Steps[Any]:
        # This makes a generator of the function, as every layer is.
        yield from ()
        shield = question.course.shield()
        return shield.ask(inner, question, monotonic)

    return decide
