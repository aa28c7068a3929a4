"""How many tokens the buckets of the demo may have given away, and whether they gave away more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ratelimit.core.algorithm import Configuration
from ratelimit.core.numbers import NANOS_PER_SECOND
from ratelimit.core.sliding_window.configuration import SlidingWindow
from ratelimit.core.token_bucket.bandwidth import Bandwidth


def bound(configuration: Configuration, elapsed_nanos: int) -> int:
    """Return the most tokens that a bucket made within this time gives away in it: capacity + rate x time."""
    return min(_bound(limit, elapsed_nanos) for limit in configuration)


def _bound(limit: Bandwidth | SlidingWindow, elapsed_nanos: int) -> int:
    if isinstance(limit, SlidingWindow):
        return limit.capacity * (elapsed_nanos // limit.window_nanos + 1)
    return _bound_of_bandwidth(limit, elapsed_nanos)


def _bound_of_bandwidth(bandwidth: Bandwidth, elapsed_nanos: int) -> int:
    initial, tokens, period = bandwidth.initial_tokens, bandwidth.refill_tokens, bandwidth.refill_period_nanos
    if not bandwidth.refill_intervally:
        return initial + tokens * elapsed_nanos // period
    if bandwidth.first_refill_millis is None:
        return initial + elapsed_nanos // period * tokens
    # The periods began at another time: one more may end within this time, and those before have filled the bucket.
    return max(initial, bandwidth.capacity) + (elapsed_nanos // period + 1) * tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a bucket that was new at the start has given away.

    :param admitted: tokens that it gave away.
    :param elapsed_nanos: the longest time that it may have had for that.
    """

    key: str
    limits: Configuration
    admitted: int
    elapsed_nanos: int

    @property
    def bound(self) -> int:
        """Return the most tokens that it may have given away."""
        return bound(self.limits, self.elapsed_nanos)

    @property
    def broken(self) -> bool:
        """Return whether it gave away more."""
        return self.admitted > self.bound

    @property
    def share(self) -> float:
        """Return the part of the bound that was used."""
        return self.admitted / self.bound if self.bound else float(self.admitted)

    @property
    def seconds(self) -> float:
        """Return the time in seconds."""
        return self.elapsed_nanos / NANOS_PER_SECOND


def verdict(outcomes: Sequence[Outcome]) -> tuple[bool, str]:
    """Return whether the limits held, and the sentence that says so."""
    allowed = "and capacity + rate x time allowed"
    broken = [f"{each.key} admitted {each.admitted} tokens, {allowed} {each.bound}" for each in outcomes if each.broken]
    if broken:
        return False, f"Verdict: broken. {'; '.join(broken)}."
    admitted, most = sum(each.admitted for each in outcomes), sum(each.bound for each in outcomes)
    return True, f"Verdict: the limits held. {admitted} tokens were admitted in total, {allowed} {most}."
