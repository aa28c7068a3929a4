"""What is computed in short for everyday numbers is what the format's own steps give, for all numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit import Bandwidth, BandwidthState, BucketConfiguration, Expiration
from ratelimit.core.commands import (
    Batch,
    Command,
    ConsumeAsMuchAsPossible,
    GetAvailableTokens,
    Reset,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
)
from ratelimit.core.numbers import MAX, MIN, quotient, remainder, saturating_product, truncated, wrap
from ratelimit.core.token_bucket import codec, everyday, modified_utf8
from ratelimit.core.token_bucket.state import BucketState, _nanos_to_gain, _refilled, _refilled_near_overflow
from ratelimit.errors import CorruptStateError
from tests.support.strategies import anything_64_bit, states

NOW = 1_700_000_000 * 10**9
EXPIRATIONS = (Expiration.none(), Expiration.fixed(2), Expiration.after_refill(0.5), Expiration.automatic())

# Products of two of them are on both sides of 2**63, and so are sums with them.
numbers = st.one_of(
    st.integers(0, 63).flatmap(lambda bits: st.integers(2**bits // 2, 2**bits - 1)),
    st.integers(1, 100),
    anything_64_bit,
)
counts = numbers.filter(lambda number: number >= 0)
"""Tokens that are asked for."""


@st.composite
def stored_bandwidths(draw: st.DrawFn) -> Bandwidth:
    """Any bandwidth that bytes can hold, sound or not; but for a period of 0, which fails as soon as it is used."""
    tokens, initial = draw(numbers), draw(numbers)
    capacity = draw(st.one_of(numbers, st.just(MAX)))  # so large that it does not hide what has come in
    period = draw(numbers.filter(bool))
    return Bandwidth.unchecked(capacity, tokens, period, initial, draw(st.booleans()), None, False, None)


@st.composite
def bandwidth_states(draw: st.DrawFn, bandwidth: Bandwidth, now: int) -> BandwidthState:
    """Any state; often one of a bandwidth that was in use a while ago."""
    period, capacity = bandwidth.refill_period_nanos, bandwidth.capacity
    ago = draw(st.one_of(st.integers(-1, max(1, 3 * period)), numbers))
    size = draw(st.one_of(st.integers(min(0, capacity), max(0, capacity)), numbers))
    error = draw(st.one_of(st.integers(0, max(1, period)), numbers))
    return BandwidthState(max(MIN, min(MAX, now - ago)), size, error)


moments = st.one_of(st.integers(NOW, NOW + 10**12), anything_64_bit)


@st.composite
def stored_states(draw: st.DrawFn) -> tuple[BucketState, int]:
    """A state and a time at which something is done to it."""
    now = draw(moments)
    bandwidths = draw(st.lists(stored_bandwidths(), min_size=1, max_size=3))
    return (
        BucketState(
            BucketConfiguration(*bandwidths),
            draw(st.one_of(st.none(), anything_64_bit)),
            draw(numbers),
            tuple(draw(bandwidth_states(bandwidth, now)) for bandwidth in bandwidths),
        ),
        now,
    )


def refilled_step_by_step(bandwidth: Bandwidth, state: BandwidthState, now: int) -> BandwidthState:
    last, size, error = state
    if now <= last:
        return state
    if bandwidth.refill_intervally:
        now = wrap(now - remainder(wrap(now - last), bandwidth.refill_period_nanos))
        if now <= last:
            return state
    if size >= bandwidth.capacity:
        return BandwidthState(now, size, error)
    return _refilled_near_overflow(bandwidth, state, now)


def nanos_to_gain_step_by_step(bandwidth: Bandwidth, state: BandwidthState, missing: int) -> int:
    tokens, period = bandwidth.refill_tokens, bandwidth.refill_period_nanos
    needed = saturating_product(period, missing)
    if needed == MAX:
        return truncated(float(missing) / float(tokens) * float(period))
    return quotient(wrap(needed - state.rounding_error), tokens)


def outcome(compute: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives, or how it fails."""
    try:
        return compute(*arguments)
    except ZeroDivisionError as error:
        return type(error)


@settings(max_examples=500, deadline=None)
@given(stored_states())
def test_a_refill_is_that_of_the_format(case: tuple[BucketState, int]) -> None:
    state, now = case
    for bandwidth, numbers in zip(state.configuration, state.bandwidth_states, strict=True):
        assert _refilled(bandwidth, numbers, now) == refilled_step_by_step(bandwidth, numbers, now)


@given(stored_states(), numbers)
def test_a_wait_is_that_of_the_format(case: tuple[BucketState, int], missing: int) -> None:
    state, now = case
    for bandwidth, numbers in zip(state.configuration, state.bandwidth_states, strict=True):
        if bandwidth.refill_intervally:
            continue
        for wanted in (missing, wrap(bandwidth.capacity - numbers.current_size)):
            short = outcome(_nanos_to_gain, bandwidth, numbers, wanted, now)
            assert short == outcome(nanos_to_gain_step_by_step, bandwidth, numbers, wanted)


@settings(max_examples=1_000, deadline=None)
@given(stored_states(), counts, st.booleans(), st.booleans())
def test_the_everyday_decision_from_bytes_to_bytes_is_that_of_the_states(
    case: tuple[BucketState, int], tokens: int, about_all: bool, alone: bool
) -> None:
    state, now = case
    if alone:
        configuration = BucketConfiguration(state.configuration.bandwidths[0])
        state = state._replace(configuration=configuration, bandwidth_states=state.bandwidth_states[:1])
    head = everyday.head_of(state.configuration, state.configuration_version)
    if head is None:
        assert len(state.configuration) > 1 or state.configuration.only_greedy is None
        return
    if about_all:
        tokens = max(0, state.refilled(now).available_tokens) + tokens % 2
    done = everyday.consumed(head, codec.encode(state), tokens, now)
    after, probe = execute(TryConsumeAndReturnRemaining(tokens), Terms(state.configuration), state, now)
    if done is None:
        return
    if isinstance(done, bool):
        assert (done, after) == (False, None)
        return
    assert isinstance(after, BucketState)
    assert done == (codec.encode(after), probe.remaining_tokens, probe.nanos_to_wait_for_reset)
    for expiration in EXPIRATIONS:
        ttl = expiration.ttl_until(done[2], is_new_when_full=head.is_new_when_full)
        assert ttl == expiration.ttl_millis(after, now)


@given(st.sampled_from(["100/minute", "1000/day", "10/second burst 50", "5/hour initial 2 id a"]), st.data())
def test_what_people_limit_is_everyday(limits: str, data: st.DataObject) -> None:
    configuration = BucketConfiguration.parse(limits)
    (bandwidth,) = configuration.bandwidths
    version = data.draw(st.sampled_from([None, 0, 7]))
    size = data.draw(st.integers(-10, bandwidth.capacity))
    part = data.draw(st.integers(0, bandwidth.refill_period_nanos - 1)) if size < bandwidth.capacity else 0
    numbers = BandwidthState(NOW - data.draw(st.integers(-(10**9), 10**15)), size, part)
    stored = codec.encode(BucketState(configuration, version, data.draw(st.integers(0, 10**12)), (numbers,)))
    head = everyday.head_of(configuration, version)
    assert head is not None
    assert everyday.consumed(head, stored, data.draw(st.integers(1, 2 * bandwidth.capacity)), NOW) is not None


@given(stored_states(), st.integers(0, 120), st.binary(max_size=3))
def test_the_everyday_decision_leaves_other_bytes_alone(
    case: tuple[BucketState, int], place: int, other: bytes
) -> None:
    state, now = case
    configuration = BucketConfiguration(state.configuration.bandwidths[0])
    head = everyday.head_of(configuration, state.configuration_version)
    if head is None:
        return
    stored = codec.encode(state._replace(configuration=configuration, bandwidth_states=state.bandwidth_states[:1]))
    garbled = stored[:place] + other + stored[place + 1 :]
    done = everyday.consumed(head, garbled, 1, now)
    if isinstance(done, tuple):
        after, _ = execute(TryConsume(1), Terms(configuration), codec.decode(garbled), now)
        assert isinstance(after, BucketState)
        assert done[0] == codec.encode(after)


@given(stored_states(), counts, st.booleans())
def test_a_refill_and_a_consumption_are_the_same_in_one_as_one_after_the_other(
    case: tuple[BucketState, int], tokens: int, about_all: bool
) -> None:
    state, now = case
    refilled = state.refilled(now)
    if about_all:
        tokens = max(0, refilled.available_tokens) + tokens % 2
    expected = refilled.consumed(tokens) if tokens <= refilled.available_tokens else None
    assert state.refilled_and_consumed(tokens, now) == expected
    for kind in (TryConsume, TryConsumeAndReturnRemaining):
        command: Command[Any] = kind(tokens)
        both = outcome(command.refill_and_decide, state, now)
        assert both == outcome(command.decide, refilled, now)
        if both is not ZeroDivisionError:
            assert both[0] == expected


@given(stored_states(), st.lists(st.tuples(st.integers(0, 4), counts, st.integers(1, 30)), max_size=4))
def test_a_batch_is_its_commands_one_by_one(case: tuple[BucketState, int], parts: list[tuple[int, int, int]]) -> None:
    state, now = case
    refilled = state.refilled(now)
    commands: list[Command[Any]] = []
    for kind, tokens, times in parts:
        share = max(1, refilled.available_tokens // max(1, times - 1)) if tokens % 2 else tokens
        command = (TryConsume(share), TryConsume(share), ConsumeAsMuchAsPossible(share), Reset(), GetAvailableTokens())
        commands += [command[kind]] * times
    stored, answers = None, []
    for one in commands:
        after, answer = one.decide(stored or refilled, now)
        stored = stored if after is None else after
        answers.append(answer)
    assert execute(Batch(tuple(commands)), Terms(state.configuration), state, now) == (stored, answers)


@given(states(), moments, st.integers(0, 50))
def test_a_verbose_answer_shows_what_is_stored(state: BucketState, now: int, tokens: int) -> None:
    after, result = execute(Verbose(TryConsume(tokens)), Terms(state.configuration), state, now)
    shown = state.refilled(now) if after is None else after
    assert (result.value, result.bandwidth_states) == (after is not None, shown.bandwidth_states)
    assert result.available_tokens == min(result.available_tokens_per_bandwidth) == shown.available_tokens


def encoded_field_by_field(state: BucketState) -> bytes:
    version = state.configuration_version
    parts = [struct.pack(">iii", 1 if version is None else 2, 1, len(state.configuration))]
    for one in state.configuration:
        first = MIN if one.first_refill_millis is None else one.first_refill_millis
        parts.append(
            struct.pack(">iqqqq", 1, one.capacity, one.initial_tokens, one.refill_period_nanos, one.refill_tokens)
        )
        parts.append(struct.pack(">?q?", one.refill_intervally, first, one.adaptive_initial_tokens))
        if one.id is None:
            parts.append(b"\0")
        else:
            id = modified_utf8.encode(one.id)
            parts.append(b"\1" + len(id).to_bytes(2, "big") + id)
    parts.append(struct.pack(">iii", 3, 1, 3 * len(state.configuration)))
    parts += [struct.pack(">qqq", *numbers) for numbers in state.bandwidth_states]
    parts.append(struct.pack(">iq", 1, state.consumed_tokens))
    if version is not None:
        parts.append(struct.pack(">?q", True, version))
    return b"".join(parts)


@given(states())
def test_a_state_is_written_field_by_field(state: BucketState) -> None:
    for _ in range(2):  # the second time by a layout that is known
        assert codec.encode(state) == encoded_field_by_field(state)


def decoded(decode: Callable[..., BucketState], data: bytes) -> Any:
    try:
        return decode(data, "key")
    except CorruptStateError as error:
        return str(error)


@given(states(), states(), st.data())
def test_bytes_whose_beginning_is_known_are_read_as_if_it_were_not(
    state: BucketState, other: BucketState, data: st.DataObject
) -> None:
    codec._known_prefixes.clear()
    whole = codec.encode(state)
    assert codec.decode(whole) == state
    assert len(codec._known_prefixes) == 1
    assert codec.decode(codec.encode(state._replace(consumed_tokens=5))) == state._replace(consumed_tokens=5)
    codec.decode(codec.encode(other))
    assert codec.decode(whole) == state

    damaged = bytearray(whole)
    if data.draw(st.booleans()):  # what follows the beginning
        place = st.integers(max(0, len(whole) - 50), len(whole) - 1)
    else:
        place = st.integers(0, len(whole) - 1)
    for _ in range(data.draw(st.integers(1, 2))):
        damaged[data.draw(place)] = data.draw(st.one_of(st.integers(0, 3), st.integers(0, 255)))
    length = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    without_flag = whole[:-9] + b"\0" + whole[-8:]  # that there is a version, if there is one
    for variant in (bytes(damaged), without_flag, whole[:length], whole + bytes(damaged[: length % 40])):
        by_known_beginning = decoded(codec.decode, variant)
        known = dict(codec._known_prefixes)
        codec._known_prefixes.clear()
        assert by_known_beginning == decoded(codec.decode, variant)
        codec._known_prefixes.update(known)
