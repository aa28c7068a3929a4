from __future__ import annotations

from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import (
    NEVER,
    Bandwidth,
    BandwidthState,
    BucketConfiguration,
    Expiration,
    InvalidConfigurationError,
)
from ratelimit.core.expiration import NO_EXPIRY
from ratelimit.core.numbers import NANOS_PER_MILLISECOND, quotient, wrap
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from tests.support import vectors
from tests.support.strategies import anything_64_bit, states

RECORDED = vectors.load("ttl.json")
NOW = 1_700_000_000 * 10**9


def strategy(kind: str, nanos: int = 0) -> Expiration:
    seconds = Fraction(nanos, 10**9)
    match kind:
        case "none":
            return Expiration.none()
        case "fixed_time_to_live":
            return Expiration.fixed(seconds)
        case "based_on_time_for_refilling_up_to_max":
            return Expiration.after_refill(seconds)
    raise ValueError(kind)


def bucket(limits: str) -> BucketState:
    return BucketState.initial(BucketConfiguration.parse(limits), None, NOW)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: case["name"])
def test_times_to_live_are_the_recorded_ones(case: dict[str, Any]) -> None:
    """But for one thing: the time to fill up is rounded up, where Bucket4j cuts it to whole milliseconds."""
    state = codec.decode(bytes.fromhex(case["state"]))
    full = case["full_refilling_time_nanos"]
    assert state.nanos_until_full(case["now_nanos"]) == full
    for expected in case["expected"]:
        recorded = expected["strategy"]
        kinds = {"fixed_time_to_live": "fixed", "based_on_time_for_refilling_up_to_max": "after_refill"}
        # Durations of up to 2**63 - 1 ms do not fit into the nanoseconds that the constructors take.
        duration = recorded.get("duration_millis", 0)
        expiration = Expiration(kinds.get(recorded["kind"], "none"), duration)  # type: ignore[arg-type]
        ttl = expected["ttl_millis"]
        if expiration.kind == "after_refill":
            assert ttl == max(1, wrap(duration + quotient(full, NANOS_PER_MILLISECOND)))
            is_cut = full > 0 and full % NANOS_PER_MILLISECOND > 0
            ttl = max(1, wrap(duration + quotient(full, NANOS_PER_MILLISECOND) + is_cut))
        assert expiration.ttl_millis(state, case["now_nanos"]) == ttl, recorded


@pytest.mark.parametrize("case", RECORDED["construction"], ids=str)
def test_durations_are_taken_and_refused_as_recorded(case: dict[str, Any]) -> None:
    if case["ok"]:
        expiration = strategy(case["kind"], case["duration_nanos"])
        assert expiration.ttl_millis(bucket("5/second"), NOW) == case["ttl_millis_of_full_bucket"]
    else:
        with pytest.raises(InvalidConfigurationError):
            strategy(case["kind"], case["duration_nanos"])


def test_the_recordings_are_complete() -> None:
    assert (len(RECORDED["cases"]), len(RECORDED["construction"])) == (80, 20)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(10**6, 10**12), st.integers(1, 10**6), st.booleans())
def test_a_bucket_is_not_forgotten_before_it_is_full(
    capacity: int, refill: int, period: int, taken: int, intervally: bool
) -> None:
    limit = Bandwidth(capacity=capacity, refill_tokens=refill, refill_period_nanos=period, refill_intervally=intervally)
    state = BucketState.initial(BucketConfiguration(limit), None, NOW).consumed(taken)
    ttl = Expiration.after_refill().ttl_millis(state, NOW) * NANOS_PER_MILLISECOND
    # The time to fill up is rounded down to a nanosecond.
    assert state.refilled(NOW + ttl + 1).available_tokens == capacity
    assert ttl == NANOS_PER_MILLISECOND or state.refilled(NOW + ttl - NANOS_PER_MILLISECOND).available_tokens < capacity


@pytest.mark.parametrize("duration", ["5", None, True, float("nan"), -1])
def test_what_is_no_duration_is_refused(duration: Any) -> None:
    with pytest.raises(InvalidConfigurationError):
        Expiration.fixed(duration)
    with pytest.raises(InvalidConfigurationError):
        Expiration.after_refill(duration)


def test_automatic_expiration_waits_for_the_refill_and_a_margin() -> None:
    state = bucket("60/minute").consumed(30)
    assert Expiration.automatic().ttl_millis(state, NOW) == 30_000 + 10_000
    assert Expiration.automatic().ttl_millis(bucket("60/minute"), NOW) == 10_000


@pytest.mark.parametrize(
    "state",
    [
        bucket("20/hour initial 0"),
        bucket("20/hour initial 50"),
        bucket("20/hour aligned 2020-01-01T00:00Z adaptive"),
        bucket("20/hour").force_added(1),
        bucket("5/second; 20/hour initial 1"),
    ],
    ids=lambda state: str(state.configuration),
)
def test_automatic_expiration_keeps_what_a_new_bucket_would_not_have(state: BucketState) -> None:
    month = timedelta(days=30) // timedelta(milliseconds=1)
    assert Expiration.automatic().ttl_millis(state, NOW) >= month


@given(states(), anything_64_bit)
def test_automatic_expiration_forgets_no_debt_however_deep(state: BucketState, now: int) -> None:
    state = state.refilled(now)
    full = state.nanos_until_full(now)
    ttl = Expiration.automatic().ttl_millis(state, now)
    assert ttl >= 10_000 + (NEVER if full < 0 else full) // 10**6


def test_no_expiration_is_none() -> None:
    assert Expiration.none().ttl_millis(bucket("5/second").consumed(5), NOW) == NO_EXPIRY


@pytest.mark.parametrize("tokens", [0, -5])
def test_a_stored_rate_at_which_a_bucket_never_fills_up_is_no_error(tokens: int) -> None:
    rate = Bandwidth.unchecked(10, tokens, 60 * 10**9, 10, True, None, False, None)
    state = BucketState(BucketConfiguration(rate), None, 0, (BandwidthState(NOW, 3, 0),))
    for expiration in (Expiration.automatic(), Expiration.after_refill(1)):
        assert expiration.ttl_millis(state, NOW) > 0
