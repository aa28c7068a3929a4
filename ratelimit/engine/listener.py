"""What others may be told of decisions, for metrics and logs."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ratelimit.keys import Key


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
