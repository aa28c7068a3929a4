"""The seam of algorithms, over Bucket4j's token bucket and a second one that only the tests have."""

from __future__ import annotations

import ast
from dataclasses import fields
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ratelimit
from ratelimit import (
    NEVER,
    Bandwidth,
    BucketConfiguration,
    CorruptStateError,
    Expiration,
    MemoryStore,
    SlidingWindow,
    TokensInheritance,
    UnsupportedStateError,
)
from ratelimit.core.algorithm import LONGEST_STATE, Level, State, decode, encode, levels, register
from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Book,
    Cancel,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    ForceAddTokens,
    GetAvailableTokens,
    GiveBack,
    HoldBack,
    ReplaceConfiguration,
    Reserve,
    Reset,
    Settle,
    Synchronize,
    TakeSnapshot,
    Terms,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
)
from ratelimit.core.sliding_window import SLIDING_WINDOW
from ratelimit.core.token_bucket import TOKEN_BUCKET
from ratelimit.core.token_bucket.state import BandwidthState, BucketState
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.support.fixed_window import FIXED_WINDOW, FORMAT, FixedWindow, WindowState
from tests.support.strategies import anything_64_bit, states

SECOND = 10**9
NOW = 1_700_000_000 * SECOND
LIMITS = [BucketConfiguration.parse("10/second intervally"), FixedWindow(10, SECOND), SlidingWindow(10, per=1)]
each_algorithm = pytest.mark.parametrize("limits", LIMITS, ids=["token bucket", "fixed window", "sliding window"])

window_states = st.builds(
    WindowState,
    st.builds(FixedWindow, st.integers(1, 10**6), st.integers(1, 10**12)),
    st.none() | anything_64_bit,
    anything_64_bit,
    anything_64_bit,
    anything_64_bit,
    anything_64_bit,
)


class TestBytes:
    @given(states() | window_states)
    def test_the_first_four_bytes_choose_the_algorithm(self, state: State) -> None:
        data = encode(state)
        assert decode(data, "key") == state
        assert int.from_bytes(data[:4], "big") in state.configuration.algorithm.formats

    @pytest.mark.parametrize("format", [0, 3, 63, 65, FORMAT - 1, FORMAT + 1, -1, 2**31 - 1])
    def test_an_unknown_format_is_unsupported(self, format: int) -> None:
        data = format.to_bytes(4, "big", signed=True) + encode(Terms(LIMITS[0]).initial(NOW))[4:]
        with pytest.raises(UnsupportedStateError, match=f"in format {format}, known is 1 to 2, 64, {FORMAT}") as caught:
            decode(data, "key")
        assert (caught.value.key, caught.value.state, caught.value.format) == ("key", data, format)

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "ends after 0 bytes, where 4"),
            (b"\0\0\1", "ends after 3 bytes, where 4"),
            (b"\0" * 4 + b"\0" * LONGEST_STATE, "more than 16384 bytes"),
            (FORMAT.to_bytes(4, "big"), "a window of 4 bytes"),
            (b"\0\0\0\1", "ends after 4 bytes, where 8"),
        ],
    )
    def test_foreign_bytes_are_corrupt(self, data: bytes, reason: str) -> None:
        with pytest.raises(CorruptStateError, match=reason) as caught:
            decode(data, "key")
        assert type(caught.value) is CorruptStateError
        assert (caught.value.key, caught.value.state) == ("key", data)

    @given(st.binary(max_size=80))
    def test_any_bytes_are_a_state_or_an_error_of_ours(self, rest: bytes) -> None:
        try:
            assert isinstance(decode(FORMAT.to_bytes(4, "big") + rest), WindowState)
        except CorruptStateError as error:
            assert error.state[4:] == rest

    def test_a_format_belongs_to_one_algorithm(self) -> None:
        for taken in (TOKEN_BUCKET, FIXED_WINDOW, SLIDING_WINDOW):
            with pytest.raises(ValueError, match="formats must be free"):
                register(taken)


def made(limits: Any, *commands: Command[Any], now: int = NOW) -> State:
    """Return a new bucket after these commands."""
    state, _ = execute(Batch((GiveBack(0), *commands)), Terms(limits, 1), None, now)
    assert state is not None
    return state


@each_algorithm
class TestCommands:
    def test_tokens_are_consumed_and_come_back(self, limits: Any) -> None:
        state, admitted = execute(TryConsume(8), Terms(limits), None, NOW)
        assert admitted
        assert execute(TryConsume(3), Terms(limits), state, NOW) == (None, False)
        assert execute(GetAvailableTokens(), Terms(limits), state, NOW) == (None, 2)
        assert execute(GetAvailableTokens(), Terms(limits), state, NOW + SECOND) == (None, 10)
        assert execute(ConsumeAsMuchAsPossible(), Terms(limits), state, NOW)[1] == 2

    def test_probes_say_how_long_to_wait(self, limits: Any) -> None:
        state = made(limits, TryConsume(8))
        refused = execute(TryConsumeAndReturnRemaining(3), Terms(limits), state, NOW + 1)[1]
        assert (refused.consumed, refused.remaining_tokens) == (False, 2)
        assert (refused.nanos_to_wait_for_refill, refused.nanos_to_wait_for_reset) == (SECOND - 1, SECOND - 1)
        admitted = execute(TryConsumeAndReturnRemaining(2), Terms(limits), state, NOW + 1)[1]
        assert (admitted.consumed, admitted.remaining_tokens) == (True, 0)
        estimate = execute(EstimateAbilityToConsume(11), Terms(limits), state, NOW)[1]
        assert estimate.nanos_to_wait_for_refill == NEVER

    def test_what_is_put_in_is_there(self, limits: Any) -> None:
        state = made(limits, ConsumeIgnoringRateLimits(15))
        for command, tokens in ((AddTokens(3), -2), (AddTokens(30), 10), (ForceAddTokens(30), 25), (Reset(), 10)):
            assert made(limits, ConsumeIgnoringRateLimits(15), command).available_tokens == tokens
        back, _ = execute(GiveBack(15), Terms(limits), state, NOW)
        assert back is not None
        assert (back.available_tokens, back.consumed_tokens, state.consumed_tokens) == (10, 0, 15)

    def test_nothing_is_there_before_a_hold_is_over(self, limits: Any) -> None:
        state = made(limits, HoldBack(5 * SECOND))
        assert state.nanos_until(1, NOW, check_capacity=False) == 5 * SECOND
        assert execute(HoldBack(3 * SECOND), Terms(limits), state, NOW) == (None, None)
        assert execute(TryConsume(1), Terms(limits), state, NOW + 5 * SECOND - 1) == (None, False)
        assert execute(TryConsume(1), Terms(limits), state, NOW + 5 * SECOND)[1]

    def test_a_refused_reservation_says_what_the_wait_would_have_been(self, limits: Any) -> None:
        state = made(limits, TryConsume(10))
        after, reserved = execute(Reserve(5, SECOND - 1), Terms(limits), state, NOW)
        assert after is None
        assert (reserved.wait, reserved.refused_wait) == (NEVER, SECOND)
        assert execute(Reserve(5, SECOND), Terms(limits), state, NOW)[1].refused_wait == 0
        assert Reserve(5).answer_refused(7).refused_wait == 7

    def test_verbose_answers_and_snapshots_show_the_state(self, limits: Any) -> None:
        state, shown = execute(Verbose(TryConsume(3)), Terms(limits, 1), None, NOW)
        assert state is not None
        assert (shown.value, shown.available_tokens, shown.available_tokens_per_bandwidth) == (True, 7, (7,))
        assert (shown.configuration, shown.bandwidth_states) == (limits, state.bandwidth_states)
        snapshot = execute(TakeSnapshot(), Terms(limits), state, NOW)[1]
        assert snapshot is not None
        assert (snapshot.available_tokens, snapshot.consumed_tokens) == (7, 3)
        assert snapshot.configuration_version == 1
        (limit,) = limits
        for each in (shown, snapshot, state):
            assert levels(each, NOW) == (Level(limit, 7, SECOND, SECOND),)
        assert levels(made(limits), NOW) == (Level(limit, 10, NEVER, 0),)
        assert (limit.capacity, limit.window_nanos) == (10, SECOND)
        assert levels(Verbose(TryConsume(1)).answer_without_limit(), NOW) == ()

    def test_a_synchronisation_counts_what_its_command_consumes(self, limits: Any) -> None:
        state = made(limits, TryConsume(1))
        after, outcome = execute(Synchronize(4, TryConsume(3), booking=True), Terms(limits), state, NOW)
        assert after is not None
        assert (outcome.answer, outcome.consumed, after.available_tokens) == (True, 3, 2)
        looked = Synchronize(4, TryConsume(3), booking=False)
        assert execute(looked, Terms(limits), state, NOW)[0] is None
        assert not looked.only_reads
        assert Synchronize(4, TakeSnapshot(), booking=False).only_reads

    def test_a_newer_version_replaces_the_limits(self, limits: Any) -> None:
        state = made(limits, TryConsume(4))
        other = limits.algorithm.share_of(limits, Fraction(1, 2))
        after, available = execute(GetAvailableTokens(), Terms(other, 2, TokensInheritance.PROPORTIONALLY), state, NOW)
        assert after is not None
        assert available == 3
        assert (after.configuration, after.configuration_version, after.consumed_tokens) == (other, 2, 4)

    def test_limits_of_another_algorithm_inherit_nothing(self, limits: Any) -> None:
        state = made(limits, TryConsume(4))
        for other, inheritance in product((one for one in LIMITS if one is not limits), TokensInheritance):
            by_version, _ = execute(GetAvailableTokens(), Terms(other, 2, inheritance), state, NOW)
            by_verb, _ = execute(ReplaceConfiguration(other, inheritance), Terms(limits), state, NOW)
            for after, version in ((by_version, 2), (by_verb, 1)):
                assert after is not None
                assert (after.configuration, after.configuration_version) == (other, version)
                assert (after.available_tokens, after.consumed_tokens) == (10, 4)
                assert decode(encode(after)) == after

    def test_bytes_show_the_time_that_they_were_written_at(self, limits: Any) -> None:
        new = made(limits, TryConsume(1))
        assert new.shows(None, NOW)
        assert all(new.shows(made(other), NOW) for other in LIMITS if other is not limits)
        same, _ = execute(TryConsume(1), Terms(limits), new, NOW)
        assert same is not None
        assert not same.shows(new, NOW)
        later, _ = execute(TryConsume(1), Terms(limits), new, NOW + SECOND)
        assert later is not None
        assert later.shows(new, NOW + SECOND)
        behind, _ = execute(TryConsume(1), Terms(limits), later, NOW)
        assert behind is not None
        assert not behind.shows(later, NOW)

    def test_it_is_kept_until_it_has_filled_up_and_longer_where_a_new_one_would_differ(self, limits: Any) -> None:
        state = made(limits, TryConsume(1))
        assert Expiration.after_refill(3).ttl_millis(state, NOW) == 4_000
        assert Expiration.automatic().ttl_millis(state, NOW) == 11_000
        assert Expiration.fixed(3).ttl_millis(state, NOW) == 3_000
        overfull = made(limits, ForceAddTokens(5))
        assert Expiration.automatic().ttl_millis(overfull, NOW) > 86_400_000


class TestFixedWindow:
    """That the second algorithm keeps its own promises; those of buckets are in test_token_bucket.py."""

    @given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3 * SECOND)), min_size=1, max_size=30))
    def test_reservations_keep_within_each_window(self, wanted: list[tuple[int, int]]) -> None:
        limits, state, now = FixedWindow(12, SECOND), None, NOW
        used: dict[int, int] = {}
        for tokens, pause in wanted:
            state, reserved = execute(Reserve(tokens), Terms(limits), state, now)
            window = (now + reserved.wait) // SECOND
            used[window] = used.get(window, 0) + tokens
            now += pause
        assert max(used.values()) <= 12

    @given(st.integers(0, 30), st.integers(1, 40), st.integers(0, 5 * SECOND))
    def test_the_last_reservation_is_undone_as_if_it_had_not_been_made(
        self, taken: int, tokens: int, elapsed: int
    ) -> None:
        limits = FixedWindow(10, SECOND)
        before = made(limits, Book(taken))
        after, reserved = execute(Reserve(tokens), Terms(limits), before, NOW)
        assert reserved.noted is not None
        cancel = Cancel(tokens, reserved.noted, reserved.surplus)
        undone, is_undone = execute(cancel, Terms(limits), after, NOW + elapsed)
        assert is_undone
        assert undone == before.refilled(NOW + elapsed)


COMMANDS = st.one_of(
    st.builds(TryConsume, st.integers(1, 12)),
    st.builds(TryConsumeAndReturnRemaining, st.integers(1, 12)),
    st.builds(ConsumeIgnoringRateLimits, st.integers(1, 30)),
    st.builds(Reserve, st.integers(1, 30)),
    st.builds(GiveBack, st.integers(1, 12)),
    st.builds(Settle, st.integers(1, 12), st.integers(0, 30)),
    st.builds(ForceAddTokens, st.integers(1, 12)),
    st.builds(HoldBack, st.integers(0, 3 * SECOND)),
    st.builds(ReplaceConfiguration, st.sampled_from(LIMITS), st.sampled_from(TokensInheritance)),
    st.just(Reset()),
    st.just(TakeSnapshot()),
)


@each_algorithm
@given(st.lists(st.tuples(COMMANDS, st.integers(-SECOND, 20 * SECOND)), max_size=20))
def test_a_store_that_applies_functions_does_what_swaps_do(limits: Any, steps: list[tuple[Command[Any], int]]) -> None:
    clock, expiration = ManualClock(NOW), Expiration.automatic()
    updating, swapping = MemoryStore(clock=clock), SwappingMemoryStore(clock=clock)
    terms = Terms(limits)
    for command, pause in steps:
        clock.advance(nanos=pause)
        now = clock.now_nanos()
        updated = updating.update(b"key", partial(execute, command, terms), expiration, None, must_exist=False)
        before = swapping.get(b"key")
        after, answer = execute(command, terms, None if before is None else decode(before), now)
        if after is not None:
            assert swapping.swap(b"key", before, encode(after), expiration.ttl_millis(after, now)) is None
        assert updated is not None
        assert updated[0] == answer
        assert updating.get(b"key") == swapping.get(b"key")


def test_nothing_but_its_own_room_speaks_of_token_buckets() -> None:
    package = Path(ratelimit.__file__).parent
    shared = [
        *(package / "core").glob("*.py"),
        *(package / "engine").rglob("*.py"),
        *(package / "stores").rglob("*.py"),
        *(package / "telemetry").rglob("*.py"),
        *(package / f"{name}.py" for name in ("bucket", "manager", "reservation", "settings", "testing")),
    ]
    parts = {each.name for each in (*fields(Bandwidth), *fields(BucketConfiguration)) if each.name != "capacity"}
    parts |= {*BandwidthState._fields} - {"current_size"}
    for path in [*shared, package / "cli" / "buckets.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                room = "ratelimit.core.token_bucket"
                assert node.module not in (room, f"{room}.codec", f"{room}.share"), path
                assert not any(alias.name == BucketState.__name__ for alias in node.names), path
            elif path.name == "script_arguments.py":
                continue  # speaks to the script of token buckets
            elif isinstance(node, ast.Attribute):
                assert node.attr not in parts, f"{path}:{node.lineno}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert BucketConfiguration.__name__ not in ast.unparse(node.args[1]), f"{path}:{node.lineno}"
