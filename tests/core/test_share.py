"""A share of some limits lets through no more than the share, and holds no more."""

from __future__ import annotations

from datetime import UTC, datetime
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import Bandwidth, BucketConfiguration
from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket.share import share_of
from tests.support.strategies import bandwidths

shares = st.fractions(min_value=Fraction(1, 10_000), max_value=1, max_denominator=10_000)


@pytest.mark.parametrize(
    ("limits", "share", "expected"),
    [
        ("100/minute", Fraction(1, 4), "25/minute"),
        ("10/second burst 50", Fraction(1, 4), "2/800ms burst 12"),
        ("3/hour", Fraction(1, 4), "1/80minutes"),
        ("3/hour intervally", Fraction(1, 4), "1/80minutes intervally"),
        ("10/second intervally", Fraction(1, 4), "2/second intervally"),
        ("100/minute initial 10; 1000/day id quota", Fraction(1, 4), "25/minute initial 2; 250/day id quota"),
        ("100/minute", Fraction(1), "100/minute"),
    ],
)
def test_what_share_means(limits: str, share: Fraction, expected: str) -> None:
    assert share_of(BucketConfiguration.parse(limits), share) == BucketConfiguration.parse(expected)


def test_alignment_is_kept() -> None:
    midnight = datetime(2024, 1, 1, tzinfo=UTC)
    whole = Bandwidth.intervally_aligned(100, 3600, first_refill=midnight, adaptive_initial_tokens=True)
    (part,) = share_of(BucketConfiguration(whole), Fraction(1, 3))
    assert part == Bandwidth.intervally_aligned(33, 3600, first_refill=midnight, adaptive_initial_tokens=True)


@given(bandwidths(), shares)
def test_a_share_is_a_share_of_the_rate_the_capacity_and_the_beginning(whole: Bandwidth, share: Fraction) -> None:
    (part,) = share_of(BucketConfiguration(whole), share)
    rate = Fraction(part.refill_tokens, part.refill_period_nanos)
    assert rate <= share * Fraction(whole.refill_tokens, whole.refill_period_nanos) or part.refill_period_nanos == MAX
    assert part.capacity <= max(Fraction(1), share * whole.capacity)
    assert part.initial_tokens <= max(Fraction(1), share * whole.initial_tokens)
    assert part.id == whole.id
