"""The express way of a decision: one request that is made up at once, and whose reply is the answer.

Nearly every decision goes so: a swap that succeeds, or a decision of the store. The request is computed without steps,
in the caller's own frame. Whatever turns out otherwise goes on in the one loop (:mod:`.swapping`), which begins with
what has come of the request: it takes the attempt as if it had sent the request itself. So the rules of the loop hold
here as well, and stand there only.
"""

from __future__ import annotations

from typing import Any, Final

from ratelimit.core.commands import TryConsume
from ratelimit.engine.attempt import Attempt
from ratelimit.engine.preparing import answer_to, asked_of_store
from ratelimit.engine.question import Question
from ratelimit.engine.store_requests import Requests
from ratelimit.engine.swapping import Swapping
from ratelimit.errors import CorruptStateError, StoreError
from ratelimit.runtime.steps import run
from ratelimit.stores.protocol import Decided

UNUSUAL: Final = object()
"""Stands for no answer: the loop has to look at the reply."""


class Express:
    """The express way to a store.

    :param swapping: decides whatever turns out otherwise.
    :ivar go_on: returns the steps by which an attempt goes on.
    """

    def __init__(self, swapping: Swapping, requests: Requests) -> None:
        self.go_on: Final = swapping.go_on
        self.requests = requests
        self._store: Any = requests.express

    def begin(self, question: Question) -> Attempt:
        """Begin a decision; where it takes a usual request, that is the attempt's ``usual``, to be sent now."""
        attempt = Attempt(self.requests, question)
        if self._store is None or question.holds:
            return attempt
        try:
            if attempt.is_ready:
                is_changed, attempt.answer = attempt.compute()
                if is_changed:
                    key, ttl = attempt.target.stored_key, attempt.ttl
                    attempt.usual = self._store.usual_swap(key, attempt.before, attempt.new, ttl)
                else:
                    attempt.must_read_again()
            elif attempt.should_delegate and attempt.now is not None and not attempt.must_read:
                attempt.asked = asked = asked_of_store(attempt)
                if asked is not None:
                    attempt.usual = self._store.usual_decision(attempt.target.stored_key, asked.arguments)
        except (StoreError, CorruptStateError) as error:
            error.key = attempt.target.key
            raise
        return attempt

    def answer(self, attempt: Attempt, reply: Any) -> Any:
        """Return the answer that a reply means, or ``UNUSUAL``."""
        asked = attempt.asked
        if asked is None:
            if reply != attempt.usual.done:
                return UNUSUAL
            attempt.question.course.round_trips += 1
            return attempt.won(attempt.answer)
        kind = type(reply)
        if kind is int:
            attempt.question.course.round_trips += 1
            return reply > 0 if type(attempt.command) is TryConsume else answer_to(attempt, asked, reply)
        if kind is bytes or reply is None:
            attempt.question.course.round_trips += 1
            return answer_to(attempt, asked, Decided(True, reply))
        return UNUSUAL

    def post(self, attempt: Attempt, waiter: Any) -> bool:
        """Send the usual request of an attempt in asyncio code; see ``ExpressStore``."""
        return self._store.post_usual(  # type: ignore[no-any-return]
            attempt.target.stored_key, attempt.usual.command, waiter, attempt.question.deadline
        )

    def decide(self, question: Question) -> Any:
        """Decide in sync code."""
        attempt = self.begin(question)
        if attempt.usual is not None:
            key = attempt.target.stored_key
            try:
                reply = self._store.send_usual(key, attempt.usual.command, question.deadline)
            except StoreError as error:
                attempt.outcome = error
            else:
                answer = self.answer(attempt, reply)
                if answer is not UNUSUAL:
                    return answer
                attempt.outcome = reply
        return run(self.go_on(attempt))
