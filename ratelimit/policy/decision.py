"""What limiters decide about requests, and what clients may be shown of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Generic, NamedTuple, TypeVar

from ratelimit.bucket import AsyncBucket, Bucket, settled
from ratelimit.checks import whole_number
from ratelimit.core.algorithm import Configuration, Level, levels
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER, to_seconds
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.engine.reserving import probe_of
from ratelimit.errors import InvalidArgumentError, RateLimitError
from ratelimit.keys import Key, brief
from ratelimit.policy.rule import Rule
from ratelimit.runtime.steps import Steps, arun, run

R = TypeVar("R")

_logger = logging.getLogger("ratelimit")

LARGEST_INTEGER: Final = 10**15 - 1
"""Clients are shown no larger number: it is the largest that a structured field (RFC 9651) holds."""


class Policy(NamedTuple):
    """One of the limits of a bucket, as clients see it.

    :param name: of the policy.
    :param quota: the capacity.
    :param window: in how many seconds the capacity comes back, rounded up.
    """

    name: str
    quota: int
    window: int


@dataclass(frozen=True, slots=True)
class ServiceLimit:
    """What is left of a policy.

    :param remaining: tokens, 0 at least.
    :param effective_window: seconds, rounded up, until the next token comes; until then no more than the remaining ones
        can be used. None where no token will come: the limit is at its capacity.
    :param reset_after: seconds, rounded up, until it is at its capacity again.
    :param violated: whether the request was refused by this limit.
    """

    policy: Policy
    remaining: int
    effective_window: int | None
    reset_after: int
    violated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one rule has decided about a request.

    :param key: the key of the request, as the rule's key has found it; None where the rule has no key.
    :param bucket: the bucket that was asked.
    :param tokens: the cost.
    :param result: the answer of the bucket.
    :ivar settled: what the request has cost in the end; None as long as that is not settled.
    """

    rule: Rule[Any]
    key: Key | None = field(repr=False)
    bucket: Bucket | AsyncBucket = field(repr=False)
    tokens: int
    result: VerboseResult[ConsumptionProbe] = field(repr=False)
    _limits: list[tuple[ServiceLimit, ...]] = field(default_factory=list, init=False, repr=False)
    # The class is frozen, because the rest of it is what was decided.
    _settlement: dict[str, object] = field(default_factory=dict, init=False, repr=False)

    @property
    def probe(self) -> ConsumptionProbe:
        """The answer of the bucket, without its state."""
        return self.result.value

    @property
    def configuration(self) -> Configuration | None:
        """The limits of the bucket; None where the store has failed and nobody knows."""
        return self.result.configuration

    @property
    def limits(self) -> tuple[ServiceLimit, ...]:
        """What is left by each limit of the bucket; empty where the store has failed and nobody knows."""
        if not self._limits:
            self._limits.append(service_limits(self.rule, self.tokens, self.result))
        return self._limits[0]

    @property
    def consumed(self) -> bool:
        """Whether the bucket was charged. Rules that decide together charge all of their buckets, or none."""
        return self.result.value.consumed

    @property
    def refuses(self) -> bool:
        """Whether the bucket did not have the tokens; one that had them may be charged nothing because of another."""
        probe = self.result.value
        return not probe.consumed and probe.nanos_to_wait_for_refill > 0

    @property
    def settled(self) -> int | None:
        """What the request has cost in the end; None as long as that is not settled."""
        return self._settlement.get("cost")  # type: ignore[return-value]  # an int is kept there

    @property
    def is_open(self) -> bool:
        """Whether the request has paid here, and nobody has begun to settle or to give back what it has paid."""
        return self.consumed and not self._settlement

    def claim(self) -> bool:
        """Return True to the first caller, which is to settle the outcome, or to give back what was paid."""
        mine = object()
        # One step, at which two threads cannot both be first.
        return self._settlement.setdefault("claim", mine) is mine

    def note(self, cost: int, result: VerboseResult[int] | None) -> None:
        """Take note of what the request has cost.

        :param result: the bucket after that; None where it is as it was.
        """
        self._settlement["cost"] = cost
        if result is not None:
            shown = replace(result, value=probe_of(result, 0, consumed=True))  # type: ignore[arg-type]
            self._limits[:] = [service_limits(self.rule, cost, shown)]  # type: ignore[arg-type]  # its value is the probe now

    @property
    def violated_policies(self) -> list[str]:
        """The names of the policies by which the request was refused."""
        violated = [limit.policy.name for limit in self.limits if limit.violated]
        return violated or ([self.rule.name] if self.refuses else [])


@dataclass(frozen=True, slots=True)
class Decision(Generic[R]):
    """What was decided about a request, by all rules that have looked at it so far; true where it may go on.

    :param outcomes: one for each bucket, in the order of the rules. Those of a refusal show what is left.
    :param missing: the rule whose key the request does not have, where that is an error.
    :param request: the request; None where no rule has looked at it.
    :param fault: says what is wrong with the key, where it is not missing but ambiguous.
    """

    outcomes: tuple[Outcome, ...] = ()
    missing: Rule[R] | None = None
    request: R | None = field(default=None, repr=False, compare=False)
    fault: str | None = None

    def __bool__(self) -> bool:
        return self.missing is None and (not self.outcomes or self.outcomes[-1].result.value.consumed)

    def settle(self, cost: int, *names: str) -> None:
        """Settle what the request has cost, once that is known: a rest is given back, an excess is debt.

        The header fields of an answer that has not begun yet show what is left after it. Where the store fails the
        tokens that were paid stay charged, and the error is logged.

        :param cost: what the request has cost, 0 or more.
        :param names: of the rules whose cost it is; those that have not charged the request are passed over. Without
            names, it is that of the rules with a ``cost=``; where there are none, that of all rules.
        :raises InvalidArgumentError: for what is not such a number, where it is settled already, and where a limiter of
            asyncio has decided: await :meth:`asettle` there.
        """
        run(self._settle(cost, names, asynchronous=False))

    async def asettle(self, cost: int, *names: str) -> None:
        """See :meth:`settle`; for requests about which a limiter of asyncio has decided."""
        await arun(self._settle(cost, names, asynchronous=True))

    def _settle(self, cost: int, names: tuple[str, ...], *, asynchronous: bool) -> Steps[None]:
        whole_number(cost, "cost", least=0)
        # A request that is refused has paid nothing.
        chosen = list(self._chosen(names)) if self else []
        for outcome in chosen:
            if isinstance(outcome.bucket, AsyncBucket) is not asynchronous:
                raise InvalidArgumentError(
                    "a decision of a limiter for sync code must be settled by settle(cost)"
                    if asynchronous
                    else "a decision of a limiter for asyncio must be settled by: await asettle(cost)"
                )
            if not outcome.is_open:
                raise InvalidArgumentError(f"a decision must be settled once; that of {brief(outcome.rule.name)} is")
        for outcome in chosen:
            if outcome.claim():
                yield from settling(outcome, cost, outcome.bucket)

    def _chosen(self, names: tuple[str, ...]) -> Iterator[Outcome]:
        """Yield the outcomes of the rules with these names, or of those whose cost may be settled."""
        have_cost = any(outcome.rule.cost != 1 for outcome in self.outcomes)
        for outcome in self.outcomes:
            if outcome.rule.name in names if names else outcome.rule.cost != 1 or not have_cost:
                yield outcome

    @property
    def refusals(self) -> tuple[Outcome, ...]:
        """The outcomes of all buckets that did not have the tokens."""
        return tuple([outcome for outcome in self.outcomes if outcome.refuses])

    @property
    def refused(self) -> Outcome | None:
        """The outcome of the first rule that has refused the request."""
        if self or self.missing is not None:
            return None
        return next((outcome for outcome in self.outcomes if outcome.refuses), self.outcomes[-1])

    @property
    def violated_policies(self) -> list[str]:
        """The names of the policies by which the request was refused."""
        return [name for outcome in self.refusals for name in outcome.violated_policies]

    @property
    def degraded(self) -> bool:
        """Whether the store has failed, and a policy has decided for it."""
        return any(outcome.probe.degraded for outcome in self.outcomes)

    @property
    def retry_after(self) -> float | None:
        """Seconds until a refused request may be sent again; None for never, and for one that was not refused.

        It is the longest of the waits of all rules that have refused it.
        """
        return None if self.refused is None else to_seconds(self.nanos_to_wait)

    @property
    def nanos_to_wait(self) -> int:
        """The nanoseconds until a refused request may be sent again; ``NEVER`` for never, 0 where nothing refuses."""
        return max([outcome.probe.nanos_to_wait_for_refill for outcome in self.refusals], default=0)


def settling(outcome: Outcome, cost: int, bucket: Bucket | AsyncBucket) -> Steps[None]:
    """Settle an outcome that was claimed. An error of the store is logged, because the client must get its answer.

    :param bucket: that of the outcome, in the face of the caller.
    """
    result: VerboseResult[int] | None = None
    # Of what was admitted without the store, the store does not know.
    if outcome.configuration is not None and not outcome.probe.degraded:
        try:
            result = yield settled(bucket, outcome.tokens, cost)
        except RateLimitError as error:
            _logger.warning("a request that has paid %d tokens could not be settled: %s", outcome.tokens, error)
            return
        if result is not None and result.degraded:
            # By ``on_error``, the store has settled nothing.
            return
    outcome.note(cost, result)


def service_limits(rule: Rule[Any], tokens: int, result: VerboseResult[ConsumptionProbe]) -> tuple[ServiceLimit, ...]:
    """Return what is left by each limit of a bucket."""
    if result.configuration is None:
        return ()
    is_refused = not result.value.consumed
    return tuple(
        _service_limit(policy, level, violated=is_refused and tokens > level.tokens)
        for policy, level in zip(
            _policies(rule, result.configuration), levels(result, result.operation_time_nanos), strict=True
        )
    )


def _service_limit(policy: Policy, level: Level, *, violated: bool) -> ServiceLimit:
    remaining = min(max(0, level.tokens), LARGEST_INTEGER)
    reset_after = whole_seconds(level.nanos_until_full) or 0
    return ServiceLimit(policy, remaining, whole_seconds(level.nanos_until_next), reset_after, violated)


@lru_cache(maxsize=4096)
def _policies(rule: Rule[Any], configuration: Configuration) -> tuple[Policy, ...]:
    return tuple(
        Policy(rule.policy_name(configuration, limit), min(limit.capacity, LARGEST_INTEGER), _window(limit))
        for limit in configuration
    )


def _window(limit: Any) -> int:
    nanos: int = limit.window_nanos
    return min(-(-nanos // NANOS_PER_SECOND), LARGEST_INTEGER)


def whole_seconds(nanos: int) -> int | None:
    """Return whole seconds, rounded up; None for never."""
    return None if nanos >= NEVER else -(-nanos // NANOS_PER_SECOND)
