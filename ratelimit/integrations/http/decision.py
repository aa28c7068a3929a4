"""What was decided about a request, as clients are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, NamedTuple

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.core.token_bucket.state import BandwidthState, nanos_until, nanos_until_full
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule
from ratelimit.keys import Key

LARGEST_INTEGER: Final = 10**15 - 1
"""Of a structured field (RFC 9651)."""


class Policy(NamedTuple):
    """A bandwidth as a quota policy of draft-ietf-httpapi-ratelimit-headers.

    :param name: of the policy.
    :param quota: the capacity; what ``q`` says.
    :param window: in how many seconds an empty bandwidth is full again, rounded up; what ``w`` says.
    """

    name: str
    quota: int
    window: int


@dataclass(frozen=True, slots=True)
class ServiceLimit:
    """What is left of a policy.

    :param remaining: tokens, 0 at least; what ``r`` says.
    :param effective_window: for so many seconds, rounded up, no more than these can be used, for then the next token
        comes; what ``t`` says. None where none will: the bandwidth is full.
    :param reset_after: seconds, rounded up, until it is full again.
    :param violated: whether this is what the request was refused by.
    """

    policy: Policy
    remaining: int
    effective_window: int | None
    reset_after: int
    violated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a request by one rule.

    :param key: of the request, as the rule's key has found it.
    :param bucket: that was asked.
    :param tokens: the cost.
    :param limits: one for each bandwidth; none where the store has failed and nobody knows.
    :param configuration: that the bucket has; None as before.
    """

    rule: Rule
    key: Key = field(repr=False)
    bucket: Bucket | AsyncBucket = field(repr=False)
    tokens: int
    probe: ConsumptionProbe
    limits: tuple[ServiceLimit, ...]
    configuration: BucketConfiguration | None = None

    @property
    def consumed(self) -> bool:
        """Whether the tokens were there."""
        return self.probe.consumed

    @property
    def violated_policies(self) -> list[str]:
        """The names of the policies by which it was refused."""
        violated = [limit.policy.name for limit in self.limits if limit.violated]
        return violated or ([] if self.consumed else [self.rule.name])


@dataclass(frozen=True, slots=True)
class HttpDecision:
    """What was decided about a request, by all rules that have looked at it so far; true where it may go on.

    :param outcomes: one for each bucket, in the order of the rules; after a refusal there are no more.
    :param missing: the rule for whose key there was nothing in the request, where that is an error.
    :param request: that was decided about, so that an answer can be in its language; None where no rule has looked at
        it.
    """

    outcomes: tuple[Outcome, ...] = ()
    missing: Rule | None = None
    request: HttpRequest | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        return self.missing is None and self.refused is None

    @property
    def refused(self) -> Outcome | None:
        """The outcome that the request was refused by."""
        last = self.outcomes[-1] if self.outcomes else None
        return None if last is None or last.consumed else last

    @property
    def degraded(self) -> bool:
        """Whether the store has failed, and a policy has decided for it."""
        return any(outcome.probe.degraded for outcome in self.outcomes)

    @property
    def retry_after(self) -> int | None:
        """Whole seconds, rounded up, 1 at least, until a refused request may be sent again; None for never."""
        return None if self.refused is None else seconds(max(1, self.refused.probe.nanos_to_wait_for_refill))


def service_limits(rule: Rule, tokens: int, result: VerboseResult[ConsumptionProbe]) -> tuple[ServiceLimit, ...]:
    """What is left by each bandwidth."""
    if result.configuration is None:
        return ()
    refused, now = not result.value.consumed, result.operation_time_nanos
    return tuple(
        _service_limit(policy, bandwidth, state, now, violated=refused and tokens > state.current_size)
        for policy, bandwidth, state in zip(
            _policies(rule, result.configuration), result.configuration, result.bandwidth_states, strict=True
        )
    )


def _service_limit(
    policy: Policy, bandwidth: Bandwidth, state: BandwidthState, now: int, *, violated: bool
) -> ServiceLimit:
    remaining = max(0, state.current_size)
    window = None
    if state.current_size < bandwidth.capacity:
        window = seconds(nanos_until(bandwidth, state, remaining + 1, now, check_capacity=False))
    reset_after = seconds(nanos_until_full(bandwidth, state, now)) or 0
    return ServiceLimit(policy, min(remaining, LARGEST_INTEGER), window, reset_after, violated)


@lru_cache(maxsize=4096)
def _policies(rule: Rule, configuration: BucketConfiguration) -> tuple[Policy, ...]:
    return tuple(
        Policy(rule.policy_name(configuration, bandwidth), min(bandwidth.capacity, LARGEST_INTEGER), _window(bandwidth))
        for bandwidth in configuration
    )


def _window(bandwidth: Bandwidth) -> int:
    nanos = bandwidth.capacity * bandwidth.refill_period_nanos
    return min(-(-nanos // (bandwidth.refill_tokens * NANOS_PER_SECOND)), LARGEST_INTEGER)


def seconds(nanos: int) -> int | None:
    """Whole seconds, rounded up; None for never."""
    return None if nanos >= NEVER else -(-nanos // NANOS_PER_SECOND)
