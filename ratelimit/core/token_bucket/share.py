"""A part of some limits, for one of several that have to do without each other."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration, CalendarBandwidth


@lru_cache(maxsize=256)
def share_of(configuration: BucketConfiguration, share: Fraction) -> BucketConfiguration:
    """Return limits that let through no more than this share of others in the long run, and hold it, or one token.

    :param share: above 0 and at most 1.
    """
    return BucketConfiguration(*(_share_of(bandwidth, share) for bandwidth in configuration))


def _share_of(bandwidth: Bandwidth, share: Fraction) -> Bandwidth:
    capacity = max(1, math.floor(bandwidth.capacity * share))
    if isinstance(bandwidth, CalendarBandwidth):
        return CalendarBandwidth(capacity=capacity, unit=bandwidth.unit, tz=bandwidth.tz, id=bandwidth.id)
    refill = bandwidth.refill_tokens * share
    tokens, period = max(1, math.floor(refill)), bandwidth.refill_period_nanos
    # Whole refills come when those of the undivided limit come.
    if refill < 1 or not bandwidth.refill_intervally:
        period = math.ceil(period * tokens / refill)
    full = bandwidth.initial_tokens == bandwidth.capacity
    return replace(
        bandwidth,
        capacity=capacity,
        refill_tokens=tokens,
        refill_period_nanos=min(period, MAX),
        initial_tokens=capacity if full else math.floor(bandwidth.initial_tokens * share),
    )
