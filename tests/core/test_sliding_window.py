"""Sliding windows, held against a log of every token that was admitted."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import (
    NEVER,
    BucketConfiguration,
    CorruptStateError,
    Expiration,
    InvalidConfigurationError,
    SlidingWindow,
    SlidingWindows,
    TokensInheritance,
)
from ratelimit.core.algorithm import LONGEST_STATE, decode, encode
from ratelimit.core.commands import (
    AddTokens,
    Book,
    Cancel,
    Command,
    ConsumeIgnoringRateLimits,
    ForceAddTokens,
    GiveBack,
    HoldBack,
    ReplaceConfiguration,
    Reserve,
    Reset,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    execute,
)
from ratelimit.core.limits import configuration_of
from ratelimit.core.numbers import MAX
from ratelimit.core.sliding_window.configuration import GRID, share_of
from ratelimit.core.sliding_window.state import MOST_ENTRIES, SlidingWindowState
from tests.support.strategies import anything_64_bit

SECOND = 10**9
NOW = 1_700_000_000 * SECOND + 7

lengths = st.sampled_from([1, 7, 63, 64, 65, 1_000, SECOND, 60 * SECOND])
windows = st.builds(SlidingWindow.of_nanos, st.integers(1, 8) | st.integers(60, 130), lengths)
configurations = st.lists(windows, min_size=1, max_size=3, unique_by=lambda window: window.window_nanos).map(
    configuration_of
)


def made(limits: Any, *commands: Command[Any], now: int = NOW) -> SlidingWindowState:
    """Return a new bucket after these commands."""
    state = Terms(limits).initial(now)
    assert isinstance(state, SlidingWindowState)
    for command in commands:
        state = stored(command, state, now)
    return state


def stored(command: Command[Any], state: SlidingWindowState, now: int) -> SlidingWindowState:
    """Return what is stored after a command."""
    after, _ = execute(command, Terms(state.configuration), state, now)
    assert after is None or isinstance(after, SlidingWindowState)
    return after or state


def most_in_a_window(uses: Iterable[tuple[int, int]], length: int) -> int:
    """Return the most tokens that were used in a span of this length, its end not included, whatever its phase."""
    log, most = sorted(uses), 0
    begin = total = 0
    for time, tokens in log:
        total += tokens
        while log[begin][0] <= time - length:
            total -= log[begin][1]
            begin += 1
        most = max(most, total)
    return most


class TestNeverMoreThanTheCapacity:
    @given(configurations, st.data())
    def test_in_any_window_of_any_phase_whoever_consumes_or_waits(self, limits: Any, data: st.DataObject) -> None:
        shortest = min(window.window_nanos for window in limits)
        most = min(window.capacity for window in limits)
        state: Any = None
        now, uses = NOW, []
        for _ in range(data.draw(st.integers(1, 40))):
            now += data.draw(st.just(0) | st.integers(0, shortest) | st.integers(0, 3 * shortest))
            tokens = data.draw(st.integers(1, min(most, 4)) | st.integers(1, most))
            if data.draw(st.booleans()):
                after, admitted = execute(TryConsume(tokens), Terms(limits), state, now)
                if admitted:
                    uses.append((now, tokens))
            else:
                after, reserved = execute(Reserve(tokens), Terms(limits), state, now)
                assert reserved.wait < NEVER
                uses.append((now + reserved.wait, tokens))
            state = state if after is None else decode(encode(after))
        for window in limits:
            assert most_in_a_window(uses, window.window_nanos) <= window.capacity

    @given(configurations, st.data())
    def test_whatever_the_clock_and_whoever_stops_waiting(self, limits: Any, data: st.DataObject) -> None:
        length = min(window.window_nanos for window in limits)
        most = min(window.capacity for window in limits)
        state, now, latest = made(limits), NOW, NOW
        uses: list[tuple[int, int]] = []
        waiting: list[tuple[int, int, Cancel]] = []
        for _ in range(data.draw(st.integers(1, 30))):
            now += data.draw(st.integers(-length, length))
            # By a clock that went back, all happens at the latest time that was seen.
            latest = max(latest, now)
            waiting = [one for one in waiting if one[0] > latest]
            stops: bool = bool(waiting) and data.draw(st.booleans())
            if stops:
                due, tokens, cancel = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
                state = stored(cancel, state, now)
                uses.remove((due, tokens))
                continue
            tokens = data.draw(st.integers(1, most))
            after: Any
            after, reserved = execute(Reserve(tokens), Terms(limits), state, now)
            state = after
            due = max(latest, now + reserved.wait)
            uses.append((due, tokens))
            waiting.append((due, tokens, Cancel(tokens, reserved.noted, reserved.surplus)))  # type: ignore[arg-type]
        for window in limits:
            assert most_in_a_window(uses, window.window_nanos) <= window.capacity

    @pytest.mark.parametrize("capacity", [5, 64, 65, 1_000, 1_000_000])
    def test_by_a_million_arrivals(self, capacity: int) -> None:
        window, rng = SlidingWindow(capacity, per=60), random.Random(capacity)
        each = max(1, capacity // 500)
        mean = window.window_nanos * each / capacity / 1.5
        state, now, uses, longest = Terms(window).initial(NOW), NOW, [], 0
        for _ in range(200_000):
            now += int(rng.expovariate(1) * mean)
            after = state.refilled_and_consumed(each, now)
            if after is not None:
                state = after
                uses.append((now, each))
                longest = max(longest, len(after.bandwidth_states[0].entries))
        assert capacity * 0.97 < most_in_a_window(uses, window.window_nanos) <= capacity
        assert longest <= GRID + 1
        assert decode(encode(state)) == state
        # Over the long run, no more is lost than what counts for a part of the grid longer.
        windows_passed = (now - NOW) / window.window_nanos
        assert len(uses) * each / windows_passed / capacity > (0.75 if capacity == 5 else 0.95)


class TestWaits:
    @given(configurations, st.data())
    def test_a_refusal_says_to_the_nanosecond_when_the_tokens_are_there(self, limits: Any, data: st.DataObject) -> None:
        length = max(window.window_nanos for window in limits)
        most = min(window.capacity for window in limits)
        state, now = made(limits), NOW
        for _ in range(data.draw(st.integers(1, 20))):
            now += data.draw(st.integers(0, length // 3))
            command = data.draw(st.sampled_from([TryConsume, Reserve]))
            state = stored(command(data.draw(st.integers(1, most))), state, now)
        tokens = data.draw(st.integers(1, most))
        _, probe = execute(TryConsumeAndReturnRemaining(tokens), Terms(limits), state, now)
        wait = probe.nanos_to_wait_for_refill
        assert (wait == 0) is probe.consumed
        assert execute(TryConsume(tokens), Terms(limits), state, now + wait)[1]
        if wait:
            assert not execute(TryConsume(tokens), Terms(limits), state, now + wait - 1)[1]
        full = state.refilled(now).nanos_until_full(now)
        assert state.refilled(now + full).available_tokens == most
        assert not full or any(window.entries for window in state.refilled(now + full - 1).bandwidth_states)

    def test_a_token_is_back_after_a_window_and_of_many_after_a_part_of_the_grid_more(self) -> None:
        exact, many = made(SlidingWindow(64, per=64), TryConsume(64)), made(SlidingWindow(65, per=64), TryConsume(65))
        assert exact.nanos_until(1, NOW, check_capacity=True) == 64 * SECOND
        # NOW is 7 ns after a whole second, which is the grain here.
        assert many.nanos_until(1, NOW, check_capacity=True) == 65 * SECOND - 7

    def test_waits_are_served_in_their_order_for_as_long_as_it_takes(self) -> None:
        limits = SlidingWindow(100, per=64)
        state: Any = made(limits)
        waits, uses = [], []
        for _ in range(10_000):
            state, reserved = execute(Reserve(3), Terms(limits), state, NOW)
            waits.append(reserved.wait)
            uses.append((NOW + reserved.wait, 3))
            assert len(state.bandwidth_states[0].entries) <= MOST_ENTRIES
        assert waits == sorted(waits)
        assert most_in_a_window(uses, limits.window_nanos) == 99
        # 33 calls in each window, none of which is lost to the grid.
        assert waits[-1] // limits.window_nanos == 9_999 // 33
        assert len(encode(state)) < 1_100
        assert not execute(TryConsume(1), Terms(limits), state, NOW + waits[-1] - 1)[1]
        assert state.available_tokens == 100 - 30_000

    def test_more_than_a_window_holds_is_never_granted(self) -> None:
        limits = SlidingWindow(10, per=1)
        assert execute(Reserve(11), Terms(limits), None, NOW)[1].wait == NEVER
        refused = execute(TryConsumeAndReturnRemaining(11), Terms(limits), None, NOW)[1]
        assert refused.nanos_to_wait_for_refill == NEVER

    def test_a_debt_is_over_a_window_after_it_was_made(self) -> None:
        limits = SlidingWindow(10, per=1)
        after, penalty = execute(ConsumeIgnoringRateLimits(25), Terms(limits), None, NOW)
        assert after is not None
        assert (penalty, after.available_tokens) == (2 * SECOND, -15)
        assert execute(TryConsume(1), Terms(limits), after, NOW + SECOND - 1) == (None, False)
        assert execute(TryConsume(10), Terms(limits), after, NOW + SECOND)[1]

    @given(configurations, st.integers(0, 9), st.integers(0, 200 * SECOND))
    def test_a_hold_ends_no_sooner_than_it_was_asked_for(self, limits: Any, taken: int, nanos: int) -> None:
        state = made(limits, ConsumeIgnoringRateLimits(taken), ForceAddTokens(3), HoldBack(nanos))
        grain = max(window.grain for window in limits)
        longest = max(window.window_nanos for window in limits)
        wait = state.nanos_until(1, NOW, check_capacity=True)
        assert nanos <= wait <= max(nanos, longest) + grain
        assert execute(HoldBack(nanos), Terms(limits), state, NOW)[0] is None


class TestPuttingIn:
    def test_what_is_given_back_is_what_was_used_last_and_waits_keep_their_times(self) -> None:
        limits = SlidingWindow(10, per=10)
        state = made(limits, TryConsume(6))
        state = stored(TryConsume(4), state, NOW + SECOND)
        state = stored(Reserve(5), state, NOW + 2 * SECOND)
        assert state.available_tokens == -5
        back = execute(GiveBack(5), Terms(limits), state, NOW + 3 * SECOND)[0]
        assert back is not None
        assert back.bandwidth_states[0].entries == ((NOW, 5), (NOW + 10 * SECOND, 5))
        assert (back.available_tokens, back.consumed_tokens) == (0, 10)

    @given(configurations, st.lists(st.tuples(st.integers(1, 4), st.integers(0, SECOND)), max_size=10), st.data())
    def test_the_last_use_is_undone_as_if_it_had_not_been(
        self, limits: Any, before: list[tuple[int, int]], data: st.DataObject
    ) -> None:
        state, now = made(limits), NOW
        for tokens, pause in before:
            now += pause
            state = stored(TryConsume(tokens), state, now)
        tokens = data.draw(st.integers(1, min(window.capacity for window in limits)))
        after, reserved = execute(Reserve(tokens), Terms(limits), state, now)
        cancel = Cancel(tokens, reserved.noted, reserved.surplus)  # type: ignore[arg-type]  # it is noted
        assert execute(cancel, Terms(limits), after, now) == (state.refilled(now), True)
        if not reserved.wait:
            assert execute(GiveBack(tokens), Terms(limits), after, now)[0] == state.refilled(now)

    def test_forced_tokens_are_used_first_and_stay_until_then(self) -> None:
        limits = SlidingWindow(10, per=1)
        state = made(limits, TryConsume(4), ForceAddTokens(9))
        assert (state.available_tokens, state.is_new_when_full) == (15, False)
        assert Expiration.automatic().ttl_millis(state, NOW) > 86_400_000
        later = execute(TryConsume(3), Terms(limits), state, NOW + 5 * SECOND)[0]
        assert later is not None
        assert (later.available_tokens, later.bandwidth_states[0].entries) == (12, ())
        used = made(limits, ForceAddTokens(5), TryConsume(15))
        assert used.bandwidth_states[0] == (0, ((NOW, 10),))
        assert made(limits, ForceAddTokens(5), AddTokens(1)).available_tokens == 15
        assert made(limits, ConsumeIgnoringRateLimits(30), Reset()).bandwidth_states == ((10, ()),)


class TestReplacing:
    @pytest.mark.parametrize(
        ("inheritance", "more", "fewer"),
        [
            (TokensInheritance.RESET, 20, 5),
            (TokensInheritance.AS_IS, 4, -1),
            (TokensInheritance.ADDITIVE, 14, -1),
            (TokensInheritance.PROPORTIONALLY, 8, 2),
        ],
    )
    def test_tokens_are_inherited(self, inheritance: TokensInheritance, more: int, fewer: int) -> None:
        state = made(SlidingWindow(10, per=1), TryConsume(6))
        for capacity, available in ((20, more), (5, fewer)):
            wanted = SlidingWindow(capacity, per=1)
            after, _ = execute(ReplaceConfiguration(wanted, inheritance), Terms(wanted), state, NOW + 5)
            assert after is not None
            assert (after.configuration, after.available_tokens, after.consumed_tokens) == (wanted, available, 6)
            assert after.refilled(NOW + 5 + SECOND).available_tokens == capacity

    @given(configurations, configurations, st.data())
    def test_what_was_used_goes_on_counting_by_either_limit(self, old: Any, new: Any, data: st.DataObject) -> None:
        state, now = made(old), NOW
        uses = []
        for _ in range(data.draw(st.integers(0, 12))):
            now += data.draw(st.integers(0, 200))
            tokens = data.draw(st.integers(1, 5))
            after = stored(TryConsume(tokens), state, now)
            if after is not state:
                state = after
                uses.append((now, tokens))
        inheritance = data.draw(st.sampled_from([TokensInheritance.AS_IS, TokensInheritance.ADDITIVE]))
        state = stored(ReplaceConfiguration(new, inheritance), state, now)
        reach = max(window.window_nanos for window in old)
        for window, kept in zip(new, state.bandwidth_states, strict=True):
            counting = sum(tokens for time, tokens in uses if time > now - min(reach, window.window_nanos))
            assert kept.current_size <= window.capacity - counting
        assert decode(encode(state)) == state

    def test_a_window_takes_its_log_from_the_one_that_reaches_far_enough(self) -> None:
        old = configuration_of("10/second sliding; 100/minute sliding; 1000/hour sliding")
        state = made(old, TryConsume(7))
        state = stored(TryConsume(2), state, NOW + 30 * SECOND)
        wanted = configuration_of("20/2 seconds sliding; 200/minute sliding; 5000/day sliding")
        after, _ = execute(
            ReplaceConfiguration(wanted, TokensInheritance.ADDITIVE), Terms(wanted), state, NOW + 31 * SECOND
        )
        assert after is not None
        assert [window.current_size for window in after.bandwidth_states] == [18, 191, 4991]


class TestConfiguration:
    @pytest.mark.parametrize(
        ("capacity", "per", "message"),
        [
            (0, 60, "capacity must be an int from 1 to 2[*][*]63 - 1; got 0"),
            (True, 60, "capacity must be an int"),
            (1.5, 60, "capacity must be an int"),
            (2**63, 60, "capacity must be an int"),
            (1, 0, "per must be at least a nanosecond; got 0"),
            (1, "minute", "per must be a timedelta or a number of seconds; got 'minute'"),
        ],
    )
    def test_what_is_wrong_is_refused(self, capacity: Any, per: Any, message: str) -> None:
        with pytest.raises(InvalidConfigurationError, match=message):
            SlidingWindow(capacity, per=per)

    @pytest.mark.parametrize(
        ("text", "limits", "printed"),
        [
            ("100/minute sliding", SlidingWindow(100, per=60), "100/minute sliding"),
            ("5 per 1500ms SLIDING", SlidingWindow(5, per=1.5), "5/1500 ms sliding"),
            ("1/ns sliding", SlidingWindow(1, per=1e-9), "1/ns sliding"),
            ("7/ns sliding", SlidingWindow.of_nanos(7, 1), "7/ns sliding"),
            (
                "5/s sliding, 100/min\n  sliding;",
                SlidingWindows(SlidingWindow(5, per=1), SlidingWindow(100, per=60)),
                "5/second sliding; 100/minute sliding",
            ),
        ],
    )
    def test_text_is_read_and_printed(self, text: str, limits: Any, printed: str) -> None:
        assert configuration_of(text) == limits
        assert str(limits) == printed
        assert repr(limits) == f"{type(limits).__name__}.parse({printed!r})"
        assert type(limits).parse(printed) == limits

    @given(configurations)
    def test_every_configuration_comes_back_from_its_text_and_from_a_list(self, limits: Any) -> None:
        assert configuration_of(str(limits)) == limits
        assert configuration_of(list(limits)) == limits
        assert configuration_of([str(limit) for limit in limits]) == limits

    @pytest.mark.parametrize(
        ("text", "message", "marked"),
        [
            ("100/minute sliding burst 5", "sliding goes without other options", "sliding"),
            ("100/minute id a sliding", "sliding goes without other options", "sliding"),
            ("100/minute sliding sliding", "sliding is given twice", "sliding"),
            ("100/minute slided", "an option must be .* id or sliding; got 'slided'", "slided"),
            ("0/minute sliding", "capacity must be an int from 1", "0"),
            ("1/0 s sliding", "per must be an int from 1 to 2[*][*]63 - 1 nanoseconds; got 0", "0 s"),
            ("100/minute sliding; 5/second", "must be all sliding or none; got both: .* all_of", "5/second"),
            ("5/second; 100/minute sliding", "must be all sliding or none; got both: .* all_of", "100/minute sliding"),
            ("5/s sliding; 6/1000 ms sliding", "per must differ between sliding windows", "6/1000 ms sliding"),
            (
                "; ".join(f"1/{n} s sliding" for n in range(1, 10)),
                "windows must be from 2 to 8; got 9",
                "1/9 s sliding",
            ),
        ],
    )
    def test_an_error_points_at_the_place_that_is_wrong(self, text: str, message: str, marked: str) -> None:
        with pytest.raises(InvalidConfigurationError, match=message) as caught:
            configuration_of(text)
        _, line, marks = str(caught.value).split("\n")
        assert line == f"  {text}"
        begin, length = marks.rindex("^") + 1 - marks.count("^"), marks.count("^")
        assert line[begin : begin + length] == marked

    def test_kinds_that_do_not_go_together_are_refused(self) -> None:
        for mixed in (["5/second", SlidingWindow(9, per=1)], [SlidingWindow(9, per=1), "5/second; 6/minute"]):
            with pytest.raises(InvalidConfigurationError, match=r"must be all sliding or none.* by all_of"):
                configuration_of(mixed)
        for parse in (BucketConfiguration.parse, BucketConfiguration.of):
            with pytest.raises(InvalidConfigurationError, match="a bandwidth must not be sliding: see SlidingWindow"):
                parse("5/second sliding")
        with pytest.raises(InvalidConfigurationError, match="must end with the word sliding"):
            SlidingWindow.parse("5/second")

    def test_a_share_is_a_share_of_each_window(self) -> None:
        limits = configuration_of("100/minute sliding; 1000/hour sliding")
        assert str(share_of(limits, Fraction(1, 8))) == "12/minute sliding; 125/hour sliding"
        assert str(share_of(limits, Fraction(1, 400))) == "1/4 minutes sliding; 2/hour sliding"
        assert str(share_of(configuration_of("2/minute sliding; 4/2 minutes sliding"), Fraction(1, 5))) == (
            "1/150 seconds sliding"
        )


@st.composite
def window_states(draw: st.DrawFn) -> SlidingWindowState:
    """Return a state as commands leave it."""
    limits = draw(configurations)
    state = Terms(limits, draw(st.none() | anything_64_bit)).initial(draw(anything_64_bit))
    commands: st.SearchStrategy[Command[Any]] = st.one_of(
        st.builds(ConsumeIgnoringRateLimits, st.integers(1, 10) | st.integers(1, MAX)),
        st.builds(Reserve, st.integers(1, 10)),
        st.builds(ForceAddTokens, st.integers(1, MAX)),
        st.builds(HoldBack, st.integers(0, MAX)),
        st.builds(GiveBack, st.integers(1, 5)),
        st.builds(AddTokens, st.integers(1, 5)),
    )
    for command, now in draw(st.lists(st.tuples(commands, anything_64_bit), max_size=8)):
        state = execute(command, Terms(limits), state, now)[0] or state
    return state  # type: ignore[return-value]  # it stays one


class TestBytes:
    @given(window_states())
    def test_a_state_comes_back_from_its_bytes(self, state: SlidingWindowState) -> None:
        data = encode(state)
        assert decode(data) == state
        assert decode(data + b"more") == state
        assert len(data) <= LONGEST_STATE
        assert int.from_bytes(data[:4], "big") == 64

    @given(window_states(), st.data())
    def test_any_bytes_are_a_state_that_is_encoded_again_or_an_error(
        self, state: SlidingWindowState, data: st.DataObject
    ) -> None:
        changed = bytearray(encode(state))
        for _ in range(data.draw(st.integers(1, 3))):
            changed[data.draw(st.integers(4, len(changed) - 1))] = data.draw(st.integers(0, 255))
        found = bytes(changed[: data.draw(st.integers(4, len(changed)))])
        try:
            decoded = decode(found, "key")
        except CorruptStateError as error:
            assert (error.key, error.state) == ("key", found)
            return
        commands: list[Command[Any]] = [TryConsume(1), Reserve(1), HoldBack(5), GiveBack(3)]
        for command in commands:
            after = execute(command, Terms(decoded.configuration), decoded, NOW)[0] or decoded
            assert decode(encode(after)) == after

    @pytest.mark.parametrize(
        ("limits", "commands", "size"),
        [
            (SlidingWindow(100, per=60), [], 56),
            (SlidingWindow(100, per=60), [TryConsume(3)], 64),
            (SlidingWindow(5, per=60), [TryConsume(3)], 64),
            (SlidingWindow(100, per=60), [ConsumeIgnoringRateLimits(2**33)], 68),
            (configuration_of("10/second sliding; 100/minute sliding"), [TryConsume(3)], 106),
        ],
    )
    def test_sizes(self, limits: Any, commands: list[Command[Any]], size: int) -> None:
        assert len(encode(made(limits, *commands))) == size

    @pytest.mark.parametrize("capacity", [10, 64, 65, 10_000])
    def test_the_size_is_bounded_whatever_is_used(self, capacity: int) -> None:
        limits = SlidingWindows(*[SlidingWindow(capacity, per=60 + number) for number in range(8)])
        state, now, rng = made(limits), NOW, random.Random(capacity)
        longest = 0
        for _ in range(1_500):
            now += rng.randrange(SECOND // 10)
            tokens = rng.choice([1, 1, 1, 2**40])
            command: Command[Any] = rng.choice([Book(tokens), Reserve(min(tokens, capacity))])
            state = stored(command, state, now)
            longest = max(longest, len(encode(state)))
        assert 2_000 < longest <= LONGEST_STATE

    @pytest.mark.parametrize(
        ("place", "value", "reason"),
        [
            (5, b"\0", "0 sliding windows, where 1 to 8"),
            (5, b"\x09", "9 sliding windows, where 1 to 8"),
            (22, bytes(8), "capacity must be an int from 1"),
            (30, bytes(8), "per must be an int from 1"),
            (38, b"\xff" * 8, "its tokens are out of range"),
            (46, b"\4", "an unknown kind of entries, 4"),
            (47, b"\xff", "255 entries in a window, where 120"),
            (47, b"\3", "the data ends after 72 bytes"),
            (64, bytes(4), "its entries are not in order"),
            (60, bytes(4), "its entries are not in order"),
            (72, bytes(LONGEST_STATE), "more than 16384 bytes"),
        ],
    )
    def test_what_cannot_be_is_corrupt(self, place: int, value: bytes, reason: str) -> None:
        state = made(SlidingWindow(100, per=64), TryConsume(3))
        state = stored(TryConsume(2), state, NOW + 2 * SECOND)
        data = encode(state)
        assert len(data) == 72
        with pytest.raises(CorruptStateError, match=reason):
            decode(data[:place] + value + data[place + len(value) :])

    def test_the_layout(self) -> None:
        state = made(SlidingWindow(100, per=64), TryConsume(3))
        assert encode(state) == struct.pack(
            ">iBBqq qq qBBq II", 64, 0, 1, 3, NOW, 100, 64 * SECOND, 0, 0, 1, NOW // SECOND + 1, 0, 3
        )
