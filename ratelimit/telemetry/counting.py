"""Counts of decisions, as Bucket4j keeps them."""

from __future__ import annotations

from ratelimit.engine.observing import Decision
from ratelimit.keys import Key
from ratelimit.runtime import fork_safety
from ratelimit.runtime.copies import OfThisProcess

_NEVER_REFUSED = ("estimate_ability_to_consume", "settle", "try_consume_as_much_as_possible")


class CountingListener(OfThisProcess):
    """Counts, as Bucket4j's ``SimpleBucketListener`` does; safe for threads. One listener can serve several managers.

    :ivar consumed: tokens consumed.
    :ivar given_back: tokens that reservations have given back; ``consumed`` still counts them.
    :ivar rejected: tokens refused.
    :ivar parked_nanos: for how long threads had to wait in ``consume``.
    :ivar delayed_nanos: for how long tasks had to wait in it.
    :ivar interrupted: waits that were cut short.
    :ivar degraded: decisions made without the store.
    :ivar failed: decisions that raised an error.
    """

    _advice = "make one in each process, and add up what they have counted"

    def __init__(self) -> None:
        self.consumed = 0
        self.given_back = 0
        self.rejected = 0
        self.parked_nanos = 0
        self.delayed_nanos = 0
        self.interrupted = 0
        self.degraded = 0
        self.failed = 0
        self._lock = fork_safety.lock()

    def on_decision(self, decision: Decision) -> None:
        """See :class:`ratelimit.Listener`."""
        with self._lock:
            self.degraded += decision.degraded
            if decision.error is not None and not decision.degraded:
                self.failed += 1
                return
            self.consumed += decision.consumed
            self.given_back += decision.given_back
            if not decision.consumed and decision.verb in _NEVER_REFUSED:
                return
            if not decision.consumed:
                self.rejected += decision.tokens
            elif decision.verb == "consume" and decision.asynchronous:
                self.delayed_nanos += decision.wait_nanos
            elif decision.verb == "consume":
                self.parked_nanos += decision.wait_nanos

    def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
        """See :class:`ratelimit.Listener`."""
        with self._lock:
            self.interrupted += 1
