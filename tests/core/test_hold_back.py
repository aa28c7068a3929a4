"""Holding back: no token before a time, however often it is said, and nothing else changed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import NEVER, Bandwidth, BandwidthState, BucketConfiguration
from ratelimit.core.algorithm import State, encode
from ratelimit.core.commands import HoldBack, Reserve, Terms, TryConsume, execute
from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from tests.core.test_token_bucket import bandwidths
from tests.support.strategies import states

NOW = 1_700_000_000 * 10**9
SECOND = 10**9

durations = st.one_of(st.integers(1, 10**12), st.sampled_from([1, SECOND, 60 * SECOND, 3600 * SECOND]))


@st.composite
def ordinary_states(draw: st.DrawFn) -> BucketState:
    """Refilled just now, full, empty or in debt."""
    them = draw(st.lists(bandwidths(), min_size=1, max_size=3))
    return BucketState(
        BucketConfiguration(*them),
        None,
        draw(st.integers(0, 10**6)),
        tuple(
            BandwidthState(
                NOW - (draw(st.integers(0, one.refill_period_nanos - 1)) if one.refill_intervally else 0),
                size := draw(st.integers(-1000, one.capacity)),
                draw(st.integers(0, one.refill_period_nanos - 1))
                if size < one.capacity and not one.refill_intervally
                else 0,
            )
            for one in them
        ),
    )


def held_back(state: State, nanos: int) -> State:
    after, _ = HoldBack(nanos).decide(state, NOW)
    return state if after is None else after


def wait(state: State, tokens: int = 1) -> int:
    return state.nanos_until(tokens, NOW, check_capacity=False)


@given(ordinary_states(), durations, st.lists(st.floats(0, 1), max_size=5), st.integers(1, 100))
def test_there_is_no_token_before_the_end_and_one_when_the_wait_is_over(
    state: BucketState, nanos: int, fractions: list[float], tokens: int
) -> None:
    terms = Terms(state.configuration)
    after = held_back(state, nanos)
    assert wait(after) >= nanos
    at = after
    for time in sorted({NOW + int(fraction * (nanos - 1)) for fraction in fractions} | {NOW + nanos - 1}):
        at = at.refilled(time)  # as whoever stores something does, and that changes nothing
        assert execute(TryConsume(1), terms, at, time) == (None, False)
        assert at.nanos_until(tokens, time, check_capacity=False) >= nanos - (time - NOW)
        longest = nanos - (time - NOW) - 1
        refused, reserved = execute(Reserve(tokens, longest), terms, at, time)
        assert refused is None
        assert reserved.wait == NEVER
        assert reserved.refused_wait > longest
    end = NOW + wait(after) + 1  # the wait is rounded down
    assert execute(TryConsume(1), terms, at, end)[1]


@given(ordinary_states(), durations, durations)
def test_twice_is_once_and_the_longer_one_counts(state: BucketState, nanos: int, other: int) -> None:
    once = held_back(state, nanos)
    assert HoldBack(nanos).decide(once, NOW) == (None, None)
    if other <= nanos:
        assert HoldBack(other).decide(once, NOW) == (None, None)
    assert wait(held_back(once, other)) >= max(nanos, other)


@given(ordinary_states(), durations, st.integers(1, 1000))
def test_nothing_comes_sooner_and_one_bandwidth_at_most_is_changed(state: BucketState, nanos: int, tokens: int) -> None:
    after = held_back(state, nanos)
    assert wait(after, tokens) >= wait(state, tokens)
    pairs = zip(state.bandwidth_states, after.bandwidth_states, strict=True)
    assert sum(before != now for before, now in pairs) == (wait(state) < nanos)
    assert isinstance(after, BucketState)
    assert after._replace(bandwidth_states=state.bandwidth_states) == state
    assert codec.decode(encode(after), b"key") == after


@given(bandwidths(), durations, st.data())
def test_a_greedy_bandwidth_is_held_back_to_the_nanosecond(
    bandwidth: Bandwidth, nanos: int, data: st.DataObject
) -> None:
    if bandwidth.refill_intervally:
        return
    one = BandwidthState(NOW, data.draw(st.integers(-1000, bandwidth.capacity)), 0)
    state = BucketState(BucketConfiguration(bandwidth), None, 0, (one,))
    assert wait(held_back(state, nanos)) == max(nanos, wait(state))


@given(states(), st.integers(1, MAX), st.integers(0, MAX))
def test_any_state_stays_one_that_bytes_can_hold(state: BucketState, nanos: int, now: int) -> None:
    after, answer = HoldBack(nanos).decide(state, now)
    assert answer is None
    if after is not None:
        assert codec.decode(encode(after), b"key") == after
        for bandwidth, one, other in zip(
            state.configuration, state.bandwidth_states, after.bandwidth_states, strict=True
        ):
            if 0 <= one.rounding_error < bandwidth.refill_period_nanos:  # else whole tokens count as unfinished ones
                assert other.current_size <= one.current_size


@pytest.mark.parametrize(
    ("limits", "sizes", "seconds", "expected", "waits"),
    [
        # What is taken of ten per second is there again first, whatever the other holds.
        ("10/second; 1000/hour", (10, 1000), 60, (-599, 1000), 60),
        ("10/second; 1000/hour", (10, 100), 60, (-599, 100), 60),
        # Nothing has to be taken of a bucket that nobody would get a token of in time.
        ("10/second; 1000/hour", (-600, 100), 60, (-600, 100), 60.1),
        # A token that would be an hour's is taken in part.
        ("1/hour", (1,), 5, (0,), 5),
        ("1/hour", (0,), 5, (0,), 3600),
        # Tokens that come together are taken together: those of this period, or of further ones.
        ("10/minute intervally", (7,), 5, (0,), 60),
        ("10/minute intervally", (7,), 61, (-10,), 120),
        ("10/minute intervally", (-3,), 61, (-10,), 120),
        ("10/minute intervally", (-10,), 61, (-10,), 120),
        # Not those of a day, for five seconds, although they are fewer.
        ("10/second; 1000/day intervally", (10, 20), 5, (-49, 20), 5),
    ],
)
def test_what_is_taken(
    limits: str, sizes: tuple[int, ...], seconds: int, expected: tuple[int, ...], waits: float
) -> None:
    state = BucketState(
        BucketConfiguration.parse(limits), None, 0, tuple(BandwidthState(NOW, size, 0) for size in sizes)
    )
    after = held_back(state, seconds * SECOND)
    assert tuple(one.current_size for one in after.bandwidth_states) == expected
    assert wait(after) == round(waits * SECOND)


def test_a_new_bucket_is_made_and_held_back() -> None:
    after, _ = execute(HoldBack(SECOND), Terms(BucketConfiguration.parse("10/second")), None, NOW)
    assert after is not None
    assert (wait(after), after.consumed_tokens, after.available_tokens) == (SECOND, 0, -9)
