"""What others may be told of decisions, for metrics and logs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ratelimit.copies import OfThisProcess
from ratelimit.errors import Key
from ratelimit.runtime import fork_safety


class Decision(NamedTuple):
    """A decision that was made, or could not be made.

    Keys are user input, and there may be millions of them: good for a line in a log, and never for a label of a metric.

    :param verb: the name of the verb; ``consume`` is told of when its tokens are reserved, before it waits for them.
    :param tokens: what was asked for; for ``try_consume_as_much_as_possible`` the most that would be taken.
    :param consumed: tokens that were consumed.
    :param remaining: tokens that are left, negative in debt; None where nobody knows.
    :param wait_nanos: until the tokens will be there: how long ``consume`` waits, or when to come back after a refusal;
        ``NEVER`` where they will not.
    :param duration_nanos: what the decision took, the waiting of ``consume`` not included.
    :param round_trips: how often the store was asked, on behalf of this call and of those that went along with it.
    :param degraded: whether the store has failed, and the ``OnError`` policy has decided.
    :param error: why there is no decision of the store; also where the policy has made one.
    :param asynchronous: whether asyncio code has asked.
    """

    key: Key
    verb: str
    tokens: int
    consumed: int
    remaining: int | None
    wait_nanos: int
    duration_nanos: int
    round_trips: int
    degraded: bool
    error: Exception | None
    asynchronous: bool


class Listener(Protocol):
    """Is told of decisions, in the thread or task that has asked for them; what it raises is logged, and has no effect.

    It is called for each decision and must be quick. To be told what is left after each decision takes a little more
    computation.
    """

    def on_decision(self, decision: Decision) -> None:
        """A decision was made, or failed."""
        ...

    def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
        """A wait of ``consume`` was cut short; its tokens are given back, unless others wait behind it."""
        ...


_NEVER_REFUSED = ("estimate_ability_to_consume", "try_consume_as_much_as_possible")


class CountingListener(OfThisProcess):
    """Counts, as Bucket4j's ``SimpleBucketListener`` does; safe for threads. One for as many managers as you like.

    :ivar consumed: tokens consumed.
    :ivar rejected: tokens refused.
    :ivar parked_nanos: for how long threads had to wait in ``consume``.
    :ivar delayed_nanos: for how long tasks had to.
    :ivar interrupted: waits that were cut short.
    :ivar degraded: decisions made without the store.
    :ivar failed: decisions that raised an error.
    """

    _advice = "make one in each process, and add up what they have counted"

    def __init__(self) -> None:
        self.consumed = 0
        self.rejected = 0
        self.parked_nanos = 0
        self.delayed_nanos = 0
        self.interrupted = 0
        self.degraded = 0
        self.failed = 0
        self._lock = fork_safety.lock()

    def on_decision(self, decision: Decision) -> None:
        """See :class:`Listener`."""
        with self._lock:
            self.degraded += decision.degraded
            if decision.error is not None and not decision.degraded:
                self.failed += 1
                return
            self.consumed += decision.consumed
            if not decision.consumed and decision.verb in _NEVER_REFUSED:
                return
            if not decision.consumed:
                self.rejected += decision.tokens
            elif decision.verb == "consume" and decision.asynchronous:
                self.delayed_nanos += decision.wait_nanos
            elif decision.verb == "consume":
                self.parked_nanos += decision.wait_nanos

    def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
        """See :class:`Listener`."""
        with self._lock:
            self.interrupted += 1
