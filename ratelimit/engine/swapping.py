"""The layer that decides by compare-and-swap, in the only loop that does.

It computes from what the manager remembers, and swaps. Where that is not likely to be current, or another writer got
there first, the store is asked to decide by itself, if it can: ``delegation`` has the reasons. So, with a store that
can decide, no decision takes more than three round trips: one read or swap, the store's own decision, and its
repetition where the first one was not run or its reply was lost.

The loop is about contention; the one failure that it repairs is a reply that was lost. Four rules hold it together:

1. What is remembered never decides alone. An admission is decided by the swap; a rejection is computed again from a
   fresh read, or from bytes that this very decision was shown by a swap that lost.
2. A swap whose reply was lost is sent again as it was. If it finds its own bytes in place it has succeeded, provided
   that no other writer can have written the same bytes: they must hold this decision's own reading of a clock that no
   other writer reads alike. Otherwise nobody can say whether the swap was carried out, and the error says that it is in
   doubt. The bytes hold no such reading where tokens come back by whole periods, where the clock is coarse, or where it
   is behind the last refill.
3. A decision of the store whose reply was lost is asked for again where the request was strict: it is run only at a
   time later than the last refill, which then is that time. So it is run once, whichever of the two arrives, and the
   state shows whether it was. Other decisions are not repeated, because a second one would consume the tokens twice.
   The error says that they are in doubt.
4. Where a store cannot decide, a pause between attempts is followed by a fresh read. A client that swaps from bytes
   older than its pause loses to those that did not pause, again and again.
"""

from __future__ import annotations

from typing import Any

from ratelimit.engine.attempt import Attempt
from ratelimit.engine.lost_reply import repeated
from ratelimit.engine.preparing import NOT_DECIDED, prepared
from ratelimit.engine.question import Question
from ratelimit.engine.store_requests import Requests
from ratelimit.errors import CorruptStateError, StoreError
from ratelimit.runtime.steps import Steps


class Swapping:
    """The layer that decides a command for a bucket, and stores what it changes."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests

    def decide(self, question: Question) -> Steps[Any]:
        """Answer a question."""
        return self.go_on(Attempt(self._requests, question))

    def go_on(self, attempt: Attempt) -> Steps[Any]:
        """Answer the question of an attempt, which may have begun outside of this loop: see ``express``."""
        try:
            while True:
                if not attempt.is_ready:
                    answer = yield from prepared(attempt)
                    if answer is not NOT_DECIDED:
                        return answer
                is_changed, answer = attempt.compute()
                # A command that only reads, or that is refused, stores nothing.
                if not is_changed:
                    if attempt.is_fresh:
                        return attempt.remembered(answer)
                    attempt.must_read_again()
                    continue
                swap = attempt.swap()
                try:
                    loss = yield from swap
                except BaseException as error:
                    if not attempt.may_repeat(error):
                        raise
                    loss = yield from repeated(attempt, error)
                if loss is None:
                    return attempt.won(answer)
                yield from attempt.lost(loss)
        except (StoreError, CorruptStateError) as error:
            error.key = attempt.target.key
            raise
