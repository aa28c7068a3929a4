"""The arithmetic against a token bucket in exact fractions."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import NEVER, Bandwidth, BandwidthState, BucketConfiguration, TokensInheritance
from ratelimit.core.algorithm import State
from ratelimit.core.commands import (
    Cancel,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    Reserve,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    execute,
)
from ratelimit.core.numbers import MAX, MIN
from ratelimit.core.token_bucket.inheritance import replaced
from ratelimit.core.token_bucket.state import BucketState
from tests.support.strategies import anything_64_bit, states

BEGIN = 1_700_000_000 * 10**9
SECOND = 10**9
MINUTE = 60 * SECOND

ordinary = st.integers(1, 1_000_000)


@st.composite
def bandwidths(draw: st.DrawFn) -> Bandwidth:
    """Limits as people have them, whose products stay within 64 bits; beyond, Bucket4j computes with doubles."""
    period = draw(st.one_of(st.integers(1_000_000, 10**12), st.sampled_from([10**9, MINUTE, 15 * MINUTE])))
    return Bandwidth(
        capacity=draw(ordinary),
        refill_tokens=draw(ordinary),
        refill_period_nanos=period,
        initial_tokens=draw(st.one_of(st.none(), st.integers(0, 1_000_000))),
        refill_intervally=draw(st.booleans()),
    )


# Steps in time: mostly short, some long, some backwards.
times = st.lists(
    st.one_of(st.integers(0, 10**8), st.integers(0, 10**13), st.integers(-(10**10), -1), st.just(0)), min_size=1
).map(lambda steps: list(accumulate(steps, initial=BEGIN)))


class ExactBucket(NamedTuple):
    """A bandwidth as the textbooks have it: a level that grows with time, as an exact fraction."""

    bandwidth: Bandwidth
    level: Fraction
    now: int
    next_refill: int

    @classmethod
    def new(cls, bandwidth: Bandwidth, now: int) -> ExactBucket:
        return cls(bandwidth, Fraction(bandwidth.initial_tokens), now, now + bandwidth.refill_period_nanos)

    def at(self, now: int) -> ExactBucket:
        bandwidth, level, next_refill = self.bandwidth, self.level, self.next_refill
        if now <= self.now:  # a clock that went back: time stands still
            return self
        if bandwidth.refill_intervally:
            periods = max(0, (now - next_refill) // bandwidth.refill_period_nanos + 1)
            next_refill += periods * bandwidth.refill_period_nanos
            gained = Fraction(periods * bandwidth.refill_tokens)
        else:
            gained = Fraction((now - self.now) * bandwidth.refill_tokens, bandwidth.refill_period_nanos)
        if level < bandwidth.capacity:
            level = min(Fraction(bandwidth.capacity), level + gained)
        return ExactBucket(bandwidth, level, now, next_refill)


def level(bandwidth: Bandwidth, state: BandwidthState) -> Fraction:
    return state.current_size + Fraction(state.rounding_error, bandwidth.refill_period_nanos)


@given(st.lists(bandwidths(), min_size=1, max_size=3), times, st.data())
def test_every_decision_is_that_of_exact_arithmetic(
    limits: list[Bandwidth], moments: list[int], data: st.DataObject
) -> None:
    configuration = BucketConfiguration(*limits)
    terms = Terms(configuration)
    state: State | None = None
    stored = [ExactBucket.new(bandwidth, moments[0]) for bandwidth in limits]
    for now in moments:
        models = [model.at(now) for model in stored]
        available = min(model.level.__floor__() for model in models)
        assert (state or BucketState.initial(configuration, None, now)).refilled(now).available_tokens == available
        tokens = data.draw(st.integers(1, max(1, 2 * abs(available))))
        ignoring_limits = data.draw(st.sampled_from([False, False, False, True]))
        command: Any = ConsumeIgnoringRateLimits(tokens) if ignoring_limits else TryConsume(tokens)
        after, answer = execute(command, terms, state, now)
        if not ignoring_limits:
            assert answer is (tokens <= available)
        if ignoring_limits or answer:
            models = [model._replace(level=model.level - tokens) for model in models]
        if after is not None:
            state, stored = after, models
            assert [level(*pair) for pair in zip(limits, after.bandwidth_states, strict=True)] == [
                model.level for model in models
            ]


@given(bandwidths(), times, st.data())
def test_no_more_is_admitted_than_capacity_and_rate_allow(
    bandwidth: Bandwidth, moments: list[int], data: st.DataObject
) -> None:
    moments = sorted(moments)
    terms = Terms(BucketConfiguration(bandwidth))
    capacity, tokens, period = bandwidth.capacity, bandwidth.refill_tokens, bandwidth.refill_period_nanos
    state = None
    admitted: list[tuple[int, int]] = []
    for now in moments:
        wanted = data.draw(st.integers(1, capacity))
        state = execute(TryConsume(wanted), terms, state, now)[0] or state
        assert state is not None
        admitted.append((now, state.consumed_tokens))
    for begin in range(len(admitted)):
        for end in range(begin, len(admitted)):
            elapsed = admitted[end][0] - admitted[begin][0]
            used = admitted[end][1] - (admitted[begin - 1][1] if begin else 0)
            refill = Fraction(tokens * elapsed, period)
            if bandwidth.refill_intervally:
                refill = Fraction(tokens * (elapsed // period + 1))
            assert used <= max(capacity, bandwidth.initial_tokens) + refill


@pytest.mark.parametrize("text", ["100/minute burst 2", "7/minute burst 3", "1000/hour burst 2", "3/second burst 3"])
def test_no_fraction_of_a_token_is_lost_over_hours(text: str) -> None:
    bandwidth = Bandwidth.parse(text)
    terms = Terms(BucketConfiguration(bandwidth))
    hours, step = 6, 250_000_013  # often enough that the bucket is never full, and never at a round time
    state, now, end = None, BEGIN, BEGIN + hours * 60 * MINUTE
    while now < end:
        state = execute(TryConsume(1), terms, state, now)[0] or state
        now += step
    assert state is not None
    exact = bandwidth.capacity + Fraction((now - step - BEGIN) * bandwidth.refill_tokens, bandwidth.refill_period_nanos)
    assert state.consumed_tokens == exact.__floor__()


@given(bandwidths(), st.integers(0, 10**13), st.integers(1, 10**6), st.integers(0, 10**6))
def test_a_wait_is_as_long_as_needed_and_no_longer(bandwidth: Bandwidth, elapsed: int, tokens: int, debt: int) -> None:
    state = BucketState.initial(BucketConfiguration(bandwidth), None, BEGIN).consumed(debt)
    now = BEGIN + elapsed
    state = state.refilled(now)
    wait = state.nanos_until(tokens, now, check_capacity=False)
    if tokens <= state.available_tokens:
        assert wait == 0
    elif tokens > bandwidth.capacity:
        assert state.nanos_until(tokens, now, check_capacity=True) == NEVER
    else:
        # Bucket4j rounds a greedy wait down, so that one more nanosecond may be needed.
        assert state.refilled(now + wait + 1).available_tokens >= tokens
        assert state.refilled(now + wait - 1).available_tokens < tokens


@given(bandwidths(), st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.integers(0, 10**10))
def test_reservations_are_served_in_their_order(bandwidth: Bandwidth, wanted: list[int], elapsed: int) -> None:
    terms = Terms(BucketConfiguration(bandwidth))
    state: State | None = None
    moment, served = BEGIN, []
    for number, tokens in enumerate(wanted):
        state, reserved = execute(Reserve(tokens), terms, state, moment)
        assert state is not None
        served.append(moment + reserved.wait)
        moment += elapsed // (number + 1)
    assert served == sorted(served)


@given(bandwidths(), st.integers(1, 10**6), st.integers(1, 10**12))
def test_a_reservation_that_would_take_too_long_takes_nothing(bandwidth: Bandwidth, tokens: int, longest: int) -> None:
    terms = Terms(BucketConfiguration(bandwidth))
    state, _ = execute(TryConsume(1), terms, None, BEGIN)
    assert state is not None
    after, (wait, *_) = execute(Reserve(tokens, longest), terms, state, BEGIN)
    assert (after is None) == (wait == NEVER)
    unbounded = execute(Reserve(tokens), terms, state, BEGIN)[1].wait
    assert wait == (unbounded if unbounded <= longest else NEVER)


@given(bandwidths(), st.integers(0, 10**6), st.integers(1, 10**6), st.integers(0, 10**13))
def test_what_is_given_back_is_there_again_and_no_more(
    bandwidth: Bandwidth, debt: int, tokens: int, elapsed: int
) -> None:
    before = BucketState.initial(BucketConfiguration(bandwidth), None, BEGIN).consumed(debt)
    now = BEGIN + elapsed
    after = before.consumed(tokens).refilled(now).given_back(tokens)
    assert after.consumed_tokens == before.consumed_tokens
    assert after.available_tokens <= max(before.refilled(now).available_tokens, bandwidth.capacity)
    assert after.available_tokens >= min(before.refilled(now).available_tokens - 1, bandwidth.capacity)
    if elapsed == 0:
        assert after.available_tokens == max(
            before.available_tokens - tokens, min(before.available_tokens, bandwidth.capacity)
        )


def test_giving_back_leaves_a_size_above_the_capacity_alone() -> None:
    state = BucketState.initial(BucketConfiguration.parse("10/second"), None, BEGIN).force_added(5)
    assert state.given_back(3).available_tokens == 15


@given(states(), anything_64_bit, st.integers(1, MAX))
def test_any_state_at_any_time_gives_numbers_of_64_bits(state: BucketState, now: int, tokens: int) -> None:
    terms = Terms(state.configuration)
    commands: list[Any] = [TryConsumeAndReturnRemaining(tokens), EstimateAbilityToConsume(tokens), Reserve(tokens)]
    for command in commands:
        after, _ = execute(command, terms, state, now)
        for numbers in (after or state).bandwidth_states:
            assert all(MIN <= number <= MAX for number in numbers)


@given(states(), anything_64_bit, st.sampled_from(TokensInheritance), st.data())
def test_any_state_takes_any_other_configuration(
    state: BucketState, now: int, inheritance: TokensInheritance, data: st.DataObject
) -> None:
    other = data.draw(states()).configuration
    after = replaced(state.refilled(now), other, None, inheritance, now)
    assert after.configuration == other
    for bandwidth, numbers in zip(other, after.bandwidth_states, strict=True):
        assert all(MIN <= number <= MAX for number in numbers)
        assert numbers.current_size <= max(bandwidth.capacity, bandwidth.initial_tokens)


@pytest.mark.parametrize(
    ("inheritance", "tokens"),
    [
        (TokensInheritance.AS_IS, 4),
        (TokensInheritance.PROPORTIONALLY, 40),
        (TokensInheritance.ADDITIVE, 94),
        (TokensInheritance.RESET, 100),
    ],
)
def test_tokens_are_inherited_as_documented(inheritance: TokensInheritance, tokens: int) -> None:
    state = BucketState.initial(BucketConfiguration.parse("10/hour"), None, BEGIN).consumed(6)
    after = replaced(state, BucketConfiguration.parse("100/hour"), None, inheritance, BEGIN)
    assert after.available_tokens == tokens
    assert after.consumed_tokens == 6


def reserved(state: State, tokens: int, now: int = BEGIN) -> tuple[State, Cancel]:
    after, answer = Reserve(tokens).decide(state.refilled(now), now)
    assert after is not None
    assert answer.noted is not None
    return after, Cancel(tokens, answer.noted, answer.surplus)


@given(
    st.lists(bandwidths(), min_size=1, max_size=3), st.integers(0, 50), st.integers(1, 10**6), st.integers(0, 10**13)
)
def test_the_last_reservation_is_undone_as_if_it_had_not_been_made(
    limits: list[Bandwidth], taken: int, tokens: int, elapsed: int
) -> None:
    limits = [replace(limit, initial_tokens=limit.capacity, id=str(place)) for place, limit in enumerate(limits)]
    before = BucketState.initial(BucketConfiguration(*limits), None, BEGIN).refilled(BEGIN).consumed(taken)
    after, cancel = reserved(before, tokens)
    undone, is_undone = execute(cancel, Terms(before.configuration), after, BEGIN + elapsed)
    assert is_undone
    assert undone == before.refilled(BEGIN + elapsed)


def test_a_place_with_others_behind_it_stays_empty_until_they_have_left_too() -> None:
    state = BucketState.initial(BucketConfiguration.parse("1/second burst 2; 9/minute"), None, BEGIN).refilled(BEGIN)
    one, cancel_one = reserved(state, 4)
    two, cancel_two = reserved(one, 1)
    assert cancel_one.decide(two, BEGIN) == (None, False)
    assert cancel_two.decide(two, BEGIN) == (one, True)
    assert cancel_one.decide(one, BEGIN) == (state, True)


def test_where_nobody_waits_no_more_comes_back_than_can_be_there() -> None:
    full = BucketState.initial(BucketConfiguration.parse("10/second"), None, BEGIN).refilled(BEGIN)
    one, cancel = reserved(full, 4)
    later = one.refilled(BEGIN + SECOND)  # full once more, as if the four had never been taken
    assert later.available_tokens == 10
    after, _ = cancel.decide(later.consumed(3), BEGIN + SECOND)
    assert after is not None
    assert (after.available_tokens, after.consumed_tokens) == (7, 3)
    at_once, _ = cancel.decide(one.consumed(3), BEGIN)
    assert at_once == full.consumed(3)


def test_a_part_of_a_token_does_not_come_on_top_of_the_capacity() -> None:
    state = BucketState.initial(BucketConfiguration.parse("1/second"), None, BEGIN).consumed(1)
    later = state.refilled(BEGIN + SECOND * 9 // 10)
    assert later.given_back(1).bandwidth_states == (BandwidthState(BEGIN + SECOND * 9 // 10, 1, 0),)


def test_a_penalty_under_several_limits_is_not_a_wait() -> None:
    state = BucketState.initial(BucketConfiguration.parse("1/second; 9/hour intervally"), None, BEGIN).refilled(BEGIN)
    after, _ = ConsumeIgnoringRateLimits(12).decide(state, BEGIN)
    assert after == state.consumed(12)
