"""Decisions without the store: what they may admit, what they may cost, and that nothing handed out is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import random
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit import (
    NEVER,
    AsyncProxyManager,
    BandwidthState,
    BucketNotFoundError,
    CorruptStateError,
    Expiration,
    InvalidArgumentError,
    InvalidConfigurationError,
    MemoryStore,
    Optimization,
    ProxyManager,
    Recovery,
    ReservationOverflowError,
    StoreError,
    StoreUnavailableError,
    TokensInheritance,
)
from ratelimit.core.commands import ConsumeAsMuchAsPossible, TryConsume
from ratelimit.core.numbers import MIN
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.keys import Key
from ratelimit.runtime.steps import run
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.faces import Settled, for_asyncio, settled
from tests.support.inside import local_decisions_of, proxy_of, steps_of
from tests.support.monitors import monitored

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
LIMITS = "1/second burst 10"
SKIP = Optimization.skip_sync_on_zero()
DELAYING = Optimization.delaying(5, 2)
PREDICTING = Optimization.predicting(5, 2)
MANUAL = Optimization.manual()


class CountingStore(ScriptedStore):
    """Knows how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.swaps = 0

    def get(self, key: Key) -> bytes | None:
        self.reads += 1
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        return super().swap(key, before, after, ttl_millis)

    def asked(self) -> tuple[int, int]:
        """Reads and swaps since the last call."""
        asked = self.reads, self.swaps
        self.reads = self.swaps = 0
        return asked


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


Make = Callable[..., Settled]


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest, store: CountingStore, clock: ManualClock) -> Make:
    """Makes managers over one store, by an optimization."""

    def made(optimization: Optimization | None, limits: Any = LIMITS, **keywords: Any) -> Settled:
        keywords = {"clock": clock, "optimization": optimization, **keywords}
        if request.param == "sync":
            return Settled(ProxyManager(store, limits, **keywords))
        return Settled(AsyncProxyManager(for_asyncio(store), limits, **keywords))

    return made


def stored(store: SwappingMemoryStore, clock: ManualClock) -> tuple[int, int]:
    """Tokens that are there, and tokens consumed so far, for anybody who asks the store."""
    snapshot = ProxyManager(store, LIMITS, clock=clock).snapshot("key")
    return snapshot.available_tokens, snapshot.consumed_tokens


async def close(face: Settled) -> None:
    manager: Any = face.face
    await settled(manager.aclose() if hasattr(manager, "aclose") else manager.close())


def unsynchronized(face: Settled | ProxyManager) -> dict[bytes, int]:
    entries = local_decisions_of(face)._entries.values
    return {key: entry.unsynchronized for key, entry in entries.items()}


# The values


@pytest.mark.parametrize(
    ("make_it", "field"),
    [
        (lambda: Optimization.skip_sync_on_zero(0), "recheck"),
        (lambda: Optimization.skip_sync_on_zero(math.nan), "recheck"),
        (lambda: Optimization.delaying(0, 1), "max_unsynchronized_tokens"),
        (lambda: Optimization.delaying(True, 1), "max_unsynchronized_tokens"),
        (lambda: Optimization.delaying(2**63, 1), "max_unsynchronized_tokens"),
        (lambda: Optimization.delaying(1, -1), "max_unsynchronized_time"),
        (lambda: Optimization.delaying(1, "1"), "max_unsynchronized_time"),  # type: ignore[arg-type]  # the point
        (lambda: Optimization.predicting(1, 1, min_samples=1), "min_samples"),
        (lambda: Optimization.predicting(1, 1, min_samples=5, max_samples=4), "max_samples"),
        (lambda: Optimization.predicting(1, 1, max_sample_age=0), "max_sample_age"),
    ],
)
def test_values_out_of_range_are_refused(make_it: Callable[[], Optimization], field: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=field) as caught:
        make_it()
    assert caught.value.field == field


def test_an_optimization_is_a_value() -> None:
    assert Optimization.delaying(5, 2.0) == DELAYING != PREDICTING
    assert hash(Optimization.manual()) == hash(MANUAL)
    assert PREDICTING.max_sample_age_nanos == 10 * 2 * SECOND
    with pytest.raises(dataclasses.FrozenInstanceError):
        DELAYING.max_unsynchronized_tokens = 6  # type: ignore[misc]  # the point


def test_something_else_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="must be an Optimization; got 'delaying'"):
        ProxyManager(MemoryStore(), LIMITS, optimization="delaying")  # type: ignore[arg-type]  # the point
    with pytest.raises(InvalidArgumentError, match="must be an Optimization"):
        ProxyManager(MemoryStore(), LIMITS).bucket("key", optimization=5)  # type: ignore[arg-type]  # the point


# Refusals without the store


async def test_a_bucket_known_empty_is_not_asked_about(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(SKIP)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    store.asked()
    for _ in range(5):
        assert not await face.try_consume("key")
    probe = await face.try_consume_and_return_remaining("key", 3)
    assert (probe.consumed, probe.remaining_tokens, probe.retry_after) == (False, 0, 3)
    assert await face.try_consume_as_much_as_possible("key") == 0
    assert not await face.consume("key", 5, max_wait=4)
    assert store.asked() == (0, 0)
    clock.advance(nanos=SECOND - 1)
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.advance(nanos=1)
    assert await face.try_consume("key")
    assert store.asked() == (0, 1)


async def test_a_debt_is_known_too(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(Optimization.skip_sync_on_zero(100))
    await face.consume_ignoring_rate_limits("key", 30)
    store.asked()
    clock.advance(20)
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.advance(1)
    assert await face.try_consume("key")


async def test_what_others_put_in_is_seen_after_the_recheck(make: Make, store: CountingStore) -> None:
    clock = ManualClock(NOW)
    face = make(SKIP, "10/day", clock=clock)
    await face.try_consume("key", 10)
    ProxyManager(store, LIMITS, clock=clock).reset("key")
    clock.advance(0.999_999)
    assert not await face.try_consume("key")
    clock.advance(0.000_001)
    assert await face.try_consume("key")


async def test_what_the_manager_itself_puts_in_is_seen_at_once(make: Make) -> None:
    face = make(SKIP)
    await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    assert not await face.try_consume("key")
    await face.add_tokens("key", 2)
    assert await face.try_consume("key", 2)
    assert not await face.try_consume("key")
    await face.reset("key")
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    await face.replace_configuration("key", "99/hour", TokensInheritance.RESET)
    assert await face.try_consume("key", 99)
    assert not await face.try_consume("key")
    await face.remove("key")
    assert await face.try_consume("key", 10)


async def test_reads_ask_the_store_where_only_refusals_are_skipped(make: Make, store: CountingStore) -> None:
    face = make(SKIP)
    await face.try_consume("key", 10)
    store.asked()
    assert await face.available_tokens("key") == 0
    assert (await face.estimate_ability_to_consume("key", 1)).retry_after == 1
    assert store.asked() == (2, 0)


async def test_a_clock_that_went_back_asks_the_store(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(SKIP)
    await face.try_consume("key", 10)
    store.asked()
    clock.set(NOW - 1000)  # as the estimate of a server's time may
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.set(NOW - SECOND)
    assert not await face.try_consume("key")
    assert store.asked() == (1, 0)


async def test_an_endless_wait_is_refused_as_ever(make: Make) -> None:
    face = make(SKIP)
    await face.consume_ignoring_rate_limits("key", 10)
    for _ in range(2):
        with pytest.raises(ReservationOverflowError):
            await face.consume("key", 2**63 - 1)
    assert not (await face.try_consume_and_return_remaining("key", 11)).consumed
    assert (await face.try_consume_and_return_remaining("key", 11)).nanos_to_wait_for_refill == NEVER


counts = st.integers(1, 12)
consumptions = st.tuples(
    st.integers(0, 2),  # the manager
    st.sampled_from(
        [
            "try_consume",
            "try_consume_and_return_remaining",
            "try_consume_as_much_as_possible",
            "consume_ignoring_rate_limits",
            "reserve",
        ]
    ),
    counts,
    st.sampled_from([0, 0, 1, 10**8, SECOND - 1, SECOND, 3 * SECOND]),  # the time after it
)


def ask(manager: Any, verb: str, tokens: int) -> Any:
    if verb == "reserve":
        return manager.bucket("key").consume(tokens, max_wait=5)
    return getattr(manager.bucket("key"), verb)(tokens)


limits = st.sampled_from(["1/second burst 10", "10/3 seconds intervally", "5/second; 8/10 seconds id long"])


@given(limits, st.lists(consumptions, max_size=40))
def test_refusals_without_the_store_are_those_of_the_store(text: str, schedule: list[Any]) -> None:
    clock = ManualClock(NOW, advance_on_sleep=False)
    plain_store, store = MemoryStore(clock=clock), MemoryStore(clock=clock)
    plain = [ProxyManager(plain_store, text, clock=clock) for _ in range(3)]
    optimized = [ProxyManager(store, text, clock=clock, optimization=SKIP) for _ in range(3)]
    for index, verb, tokens, pause in schedule:
        answer, expected = ask(optimized[index], verb, tokens), ask(plain[index], verb, tokens)
        if verb == "try_consume_and_return_remaining":  # how long a refusal tells to wait is as of the state last seen
            assert answer == expected if answer else not expected
        else:
            assert answer == expected
        assert store.get("key") == plain_store.get("key")
        clock.advance(nanos=pause)


# Consumption without the store


async def test_tokens_are_handed_out_and_told_later(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING)
    assert await face.try_consume("key", 2)
    store.asked()
    for _ in range(5):
        assert await face.try_consume("key")
    assert store.asked() == (0, 0)
    assert stored(store, clock) == (8, 2)
    store.asked()
    assert await face.try_consume("key")  # a sixth is more than may be unsynchronized
    assert store.asked() == (0, 1)
    assert stored(store, clock) == (2, 8)
    assert unsynchronized(face) == {b"key": 0}


async def test_refusals_are_local_too(make: Make, store: CountingStore) -> None:
    face = make(DELAYING)
    await face.try_consume("key", 8)
    store.asked()
    assert not await face.try_consume("key", 3)
    assert await face.try_consume("key", 2)
    assert not await face.try_consume("key")
    assert await face.try_consume_as_much_as_possible("key") == 0
    assert store.asked() == (0, 0)


async def test_after_its_time_the_store_is_told(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING)
    await face.try_consume("key")
    await face.try_consume("key")
    clock.advance(1.999_999_999)
    store.asked()
    assert await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.advance(nanos=1)
    assert await face.try_consume("key")
    assert store.asked() == (0, 1)
    assert stored(store, clock)[1] == 4


async def test_answers_show_what_was_handed_out(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING)
    await face.try_consume("key")
    store.asked()
    bucket = face.face.bucket("key")
    probe = await settled(bucket.try_consume_and_return_remaining(2))
    assert (probe.remaining_tokens, probe.reset_after) == (7, 3)
    verbose = await settled(bucket.verbose.try_consume(1))
    assert (verbose.value, verbose.available_tokens, verbose.operation_time_nanos) == (True, 6, NOW)
    clock.advance(1)
    assert await face.available_tokens("key") == 7
    assert (await face.estimate_ability_to_consume("key", 8)).retry_after == 1
    snapshot = await face.snapshot("key")
    assert (snapshot.consumed_tokens, snapshot.available_tokens) == (4, 7)
    assert store.asked() == (0, 0)


@pytest.mark.parametrize("optimization", [DELAYING, PREDICTING, MANUAL])
async def test_reads_never_write(
    make: Make, store: CountingStore, clock: ManualClock, optimization: Optimization
) -> None:
    face = make(optimization)
    for _ in range(3):
        await face.try_consume("key")
        clock.advance(0.1)
    before = sum(unsynchronized(face).values())
    assert before
    store.asked()
    for _ in range(50):
        clock.advance(0.1)
        await face.available_tokens("key")
        await face.estimate_ability_to_consume("key", 1)
        await face.snapshot("key")
    assert store.asked()[1] == 0
    assert sum(unsynchronized(face).values()) == before
    assert (await face.snapshot("key")).consumed_tokens == 3


async def test_reads_do_not_put_off_what_the_store_is_to_be_told(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(DELAYING)
    await face.try_consume("key")
    await face.try_consume("key")
    for _ in range(5):
        clock.advance(1)
        await face.available_tokens("key")
    store.asked()
    assert await face.try_consume("key")
    assert store.asked() == (0, 1)


@pytest.mark.parametrize(
    ("verb", "arguments", "left"),
    [
        ("consume", (7,), (0, 10)),
        ("consume_ignoring_rate_limits", (9,), (-2, 12)),
        ("add_tokens", (2,), (9, 3)),
        ("force_add_tokens", (20,), (27, 3)),
        ("reset", (), (10, 3)),
        ("replace_configuration", ("100/second", TokensInheritance.RESET), (100, 3)),
        ("sync", (), (7, 3)),
    ],
)
async def test_other_verbs_take_along_what_was_handed_out(
    make: Make, store: CountingStore, verb: str, arguments: tuple[Any, ...], left: tuple[int, int]
) -> None:
    clock = ManualClock(NOW)
    face = make(DELAYING, clock=clock)
    for _ in range(3):
        await face.try_consume("key")
    store.asked()
    await getattr(face, verb)("key", *arguments)
    assert store.asked() == (0, 1)
    assert clock.slept == []
    assert stored(store, clock) == left
    assert await face.available_tokens("key") == left[0]


async def test_a_wait_reserves_tokens_and_an_interrupted_one_returns_them(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(DELAYING)
    for _ in range(4):
        await face.try_consume("key")
    assert await face.consume("key", 8)
    assert clock.slept == [2 * SECOND]
    assert stored(store, clock) == (0, 12)


async def test_handles_and_the_manager_share_what_is_known(make: Make, store: CountingStore) -> None:
    face = make(None)
    one, other = face.face.bucket("key", optimization=DELAYING), face.face.bucket(b"key", optimization=DELAYING)
    await settled(one.try_consume(6))
    store.asked()
    assert await settled(one.try_consume(2))
    assert await settled(other.try_consume(2))
    assert not await settled(one.try_consume())
    assert store.asked() == (0, 0)
    assert await face.available_tokens("key") == 4  # without an optimization the store is asked
    await face.sync("key")
    assert await face.available_tokens("key") == 0


async def test_without_an_optimization_there_is_nothing_to_tell(make: Make, store: CountingStore) -> None:
    face = make(None)
    await face.try_consume("key")
    store.asked()
    await face.sync("key")
    await settled(face.face.bucket("other").sync())
    await close(face)
    assert store.asked() == (0, 0)
    assert not unsynchronized(face)


async def test_another_plan_asks_the_store(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING, configuration_version=1)
    await face.try_consume("key")
    await face.try_consume("key", 2)
    newer = face.face.bucket("key", "50/second", configuration_version=2)
    assert await settled(newer.available_tokens()) == 50 - 2
    await close(face)
    assert stored(store, clock) == (48, 3)


async def test_limits_that_others_replaced_are_seen_in_time(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(DELAYING)
    await face.try_consume("key")
    ProxyManager(store, LIMITS, clock=clock).replace_configuration("key", "2/day", TokensInheritance.RESET)
    assert await face.try_consume("key", 5)
    clock.advance(2)
    assert not await face.try_consume("key")
    assert str((await face.snapshot("key")).configuration) == "2/day"
    await face.sync("key")
    assert stored(store, clock) == (-3, 6)


async def test_limits_may_depend_on_the_key(make: Make, store: CountingStore) -> None:
    plans = {"free": "3/hour", "paid": "100/hour", "own": None}
    face = make(DELAYING, plans.__getitem__)
    assert [await face.try_consume("free") for _ in range(4)] == [True, True, True, False]
    assert await face.try_consume("own", 10**6)
    store.asked()
    assert await face.try_consume("free") is False
    plans["free"] = plans["paid"]
    await face.try_consume("free")
    assert store.asked() == (0, 1)


async def test_a_bucket_that_vanished_is_made_again(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING)
    for _ in range(4):
        await face.try_consume("key")
    store.delete(b"key")
    await face.sync("key")
    assert stored(store, clock) == (7, 3)


async def test_removing_a_bucket_forgets_what_was_handed_out(make: Make, store: CountingStore) -> None:
    face = make(DELAYING)
    for _ in range(4):
        await face.try_consume("key")
    await face.remove("key")
    await close(face)
    assert store.get("key") is None
    assert await make(DELAYING).try_consume("key", 10)


async def test_a_bucket_that_must_exist_is_missed_when_the_store_is_asked(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(DELAYING, recovery=Recovery.RAISE)
    for _ in range(4):
        await face.try_consume("key")
    store.delete(b"key")
    for _ in range(2):
        with pytest.raises(BucketNotFoundError):
            await face.try_consume("key", 5)
    assert unsynchronized(face) == {b"key": 3}
    ProxyManager(store, LIMITS, clock=clock).try_consume("key")
    assert await face.try_consume("key")
    assert stored(store, clock) == (5, 5)


async def test_foreign_bytes_are_an_error_when_the_store_is_asked(make: Make, store: CountingStore) -> None:
    face = make(DELAYING)
    for _ in range(3):
        await face.try_consume("key")
    store.put("key", b"?")
    for _ in range(2):
        with pytest.raises(CorruptStateError):
            await face.try_consume("key", 5)
    store.delete(b"key")
    await face.sync("key")
    assert (await face.snapshot("key")).consumed_tokens == 2


# Failures


async def test_what_could_not_be_told_is_told_later(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING)
    for _ in range(5):
        await face.try_consume("key")
    store.fail(times=2)
    with pytest.raises(StoreUnavailableError):
        await face.try_consume("key", 2)
    with pytest.raises(StoreUnavailableError):
        await face.sync("key")
    assert unsynchronized(face) == {b"key": 4}
    store.fail()
    assert await face.try_consume("key")  # within what may be unsynchronized, the store is not needed
    with pytest.raises(StoreUnavailableError):
        await face.try_consume("key")
    await face.sync("key")
    assert stored(store, clock) == (4, 6)


async def test_a_lost_reply_is_no_lost_token(make: Make, store: CountingStore, clock: ManualClock) -> None:
    clock.unique_readings = True
    face = make(DELAYING)
    for _ in range(5):
        await face.try_consume("key")
    clock.advance(nanos=1)
    store.lose_replies()
    await face.sync("key")
    assert stored(store, clock) == (5, 5)
    assert unsynchronized(face) == {b"key": 0}


async def test_in_doubt_tokens_are_rather_booked_twice(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING)
    for _ in range(4):
        await face.try_consume("key")
    store.lose_replies()
    store.lose_requests()
    with pytest.raises(StoreUnavailableError) as caught:
        await face.sync("key")
    assert caught.value.in_doubt
    assert stored(store, clock) == (6, 4)
    await face.sync("key")
    assert stored(store, clock) == (3, 7)


async def test_a_debt_beyond_all_numbers_stays_a_debt(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(MANUAL, "1000000/day")
    await face.try_consume("key")
    await face.try_consume("key", 900_000)
    other = ProxyManager(store, "1000000/day", clock=clock)
    other.replace_configuration("key", "1000/1000 days", TokensInheritance.AS_IS)
    await face.sync("key")
    assert stored(store, clock) == (1000 - 900_000, 900_001)


async def test_the_deepest_debt_is_no_wealth(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(MANUAL)
    for _ in range(4):
        await face.try_consume("key")
    state = codec.decode(store.get("key") or b"", "key")
    deep = state._replace(bandwidth_states=(BandwidthState(NOW, MIN + 2, 0),))
    store.put("key", codec.encode(deep))
    await face.sync("key")
    assert stored(store, clock) == (MIN, 3)


async def test_numbers_that_cannot_be_are_an_error(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(MANUAL, "10/10 seconds intervally")
    await face.try_consume("key")
    period = (10 * SECOND).to_bytes(8, "big")
    store.put("key", (store.get("key") or b"").replace(period, bytes(8)))
    await face.sync("key")
    clock.advance(1)
    with pytest.raises(CorruptStateError):
        await face.try_consume("key")


async def test_an_error_names_the_key_as_it_was_last_given(make: Make, store: CountingStore) -> None:
    face = make(DELAYING)
    await face.try_consume("key")
    await face.try_consume(b"key", 9)
    await face.add_tokens(b"key", 5)
    await face.try_consume("key")
    store.fail()
    with pytest.raises(StoreUnavailableError) as caught:
        await close(face)
    assert caught.value.key == b"key"


# Closing


@pytest.mark.parametrize("optimization", [DELAYING, PREDICTING, MANUAL])
async def test_closing_tells_the_store(
    make: Make, store: CountingStore, clock: ManualClock, optimization: Optimization
) -> None:
    face = make(optimization)
    for _ in range(4):
        clock.advance(0.1)
        assert await face.try_consume("key")
    await close(face)
    assert stored(store, clock)[1] == 4
    store.asked()
    await close(face)
    assert store.asked() == (0, 0)


async def test_closing_says_what_could_not_be_told(
    make: Make, store: CountingStore, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    face = make(DELAYING)
    for key in ("key", "other"):
        for _ in range(3):
            await face.try_consume(key)
    store.fail()
    with caplog.at_level(logging.WARNING), pytest.raises(StoreUnavailableError) as caught:
        await close(face)
    assert caught.value.key == "key"
    assert caplog.messages == ["4 tokens of 2 buckets could not be synchronized"]
    await close(face)
    assert stored(store, clock)[1] == 3


async def test_closing_goes_on_after_a_bucket_that_is_no_bucket(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(DELAYING)
    for key in ("other", "key"):
        for _ in range(3):
            await face.try_consume(key)
    store.put("other", b"?")
    with pytest.raises(CorruptStateError):
        await close(face)
    assert stored(store, clock)[1] == 3


def test_the_store_is_closed_in_any_case() -> None:
    closed: list[bool] = []
    manager = ProxyManager.from_url("memory://", LIMITS, optimization=MANUAL)
    manager._store.close = lambda: closed.append(True)  # type: ignore[method-assign]  # the point
    manager.try_consume("key")
    manager.try_consume("key")
    local_decisions_of(manager)._inner = None  # type: ignore[assignment]  # the point
    with pytest.raises(TypeError):
        manager.close()
    assert closed == [True]


# Manual


async def test_by_hand_the_store_is_asked_once(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(MANUAL)
    bucket = face.face.bucket("key")
    assert await face.try_consume("key")
    store.asked()
    assert await face.try_consume("key", 9)
    clock.advance(3600)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    await settled(bucket.sync())
    assert store.asked() == (0, 1)
    assert stored(store, clock) == (-9, 20)
    assert await face.available_tokens("key") == -9


async def test_by_hand_nothing_new_is_learned_before_it_is_asked_for(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(MANUAL)
    await face.try_consume("key")
    ProxyManager(store, LIMITS, clock=clock).try_consume("key", 9)
    assert await face.available_tokens("key") == 9
    store.asked()
    await face.sync("key")
    assert store.asked() == (1, 0)
    assert await face.available_tokens("key") == 0


# Predicting


async def test_a_prediction_needs_samples(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(Optimization.predicting(100, 60, min_samples=3), "1000/hour")
    asked = []
    for _ in range(6):
        store.asked()
        assert await face.try_consume("key")
        asked.append(sum(store.asked()))
        clock.advance(1)
    assert asked == [1, 1, 1, 0, 0, 0]


async def test_samples_of_one_time_are_one_sample(make: Make, store: CountingStore) -> None:
    face = make(Optimization.predicting(100, 60), "1000/hour")
    for _ in range(5):
        assert await face.try_consume("key")
    assert store.asked() == (0, 5)


async def test_samples_are_of_different_times(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(Optimization.predicting(100, 60, min_samples=3), "1000/hour")
    await face.try_consume("key")
    await face.try_consume("key")
    clock.advance(1)
    await face.try_consume("key")
    store.asked()
    clock.advance(1)
    await face.try_consume("key")
    assert store.asked() == (0, 1)


async def test_samples_grow_old(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(Optimization.predicting(100, 60, max_sample_age=5), "1000/hour")
    for _ in range(3):
        await face.try_consume("key")
        clock.advance(1)
    store.asked()
    clock.advance(4)
    await face.try_consume("key")
    assert store.asked() == (0, 1)


async def test_where_others_are_expected_the_store_is_asked(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(Optimization.predicting(100, 600), "100/day intervally")
    other = ProxyManager(store, "100/day intervally", clock=clock)
    for _ in range(3):  # others take 10 a second
        assert await face.try_consume("key")
        other.try_consume("key", 10)
        clock.advance(1)
    store.asked()
    granted = 0
    while not sum(store.asked()):
        assert await face.try_consume("key")
        granted += 1
        clock.advance(0.5)
    # The first exchange was 3 seconds ago, the second showed 88 tokens, and the third call took one of them: the k-th
    # here leaves 87 - k, and 25 + 5 k are expected to be gone. The eleventh asked.
    assert granted == 11


async def test_without_others_nothing_is_held_back(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(Optimization.predicting(100, 600), "20/day intervally")
    for _ in range(2):
        assert await face.try_consume("key")
        clock.advance(1)
    store.asked()
    assert [await face.try_consume("key") for _ in range(19)] == [True] * 18 + [False]
    assert store.asked() == (0, 0)


async def test_another_bucket_under_the_key_is_judged_anew(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(Optimization.predicting(100, 60), "1000/hour")
    for _ in range(3):
        await face.try_consume("key", 100)
        clock.advance(1)
    store.delete(b"key")
    clock.advance(60)
    await face.try_consume("key")
    store.asked()
    clock.advance(1)
    await face.try_consume("key")
    assert store.asked() == (0, 1)


def overshoot(optimization: Optimization) -> int:
    """What four processes that take all they get admit beyond a limit of 1000 that does not come back."""
    clock = ManualClock(NOW)
    store = MemoryStore(clock=clock)
    managers = [ProxyManager(store, "1000/day intervally", clock=clock, optimization=optimization) for _ in range(4)]
    chance = random.Random(3)
    admitted = 0
    for _ in range(4000):
        clock.advance(nanos=chance.randrange(10**7))
        admitted += chance.choice(managers).try_consume("key")
    return admitted - 1000


def test_a_prediction_overshoots_less() -> None:
    delayed, predicted = overshoot(Optimization.delaying(100, 60)), overshoot(Optimization.predicting(100, 60))
    assert 0 <= 2 * predicted < delayed <= 300


# Bounds


plain_consumptions = st.tuples(
    st.integers(0, 2),
    st.sampled_from(["try_consume", "try_consume_and_return_remaining", "try_consume_as_much_as_possible", "read"]),
    counts,
    st.sampled_from([0, 0, 1, 10**8, SECOND - 1, SECOND, 3 * SECOND]),
)
# What may be unsynchronized of each of three managers, and for how long.
budgets = st.lists(
    st.tuples(st.integers(1, 15), st.sampled_from([0.5, 2, 3600]), st.booleans()), min_size=3, max_size=3
)


def admitted_by(text: str, elapsed: int) -> int:
    """The most that limits admit from when a bucket is made until then."""
    admitted = []
    for bandwidth in BucketConfiguration.parse(text):
        periods = elapsed // bandwidth.refill_period_nanos
        whole = elapsed * bandwidth.refill_tokens // bandwidth.refill_period_nanos
        came = periods * bandwidth.refill_tokens if bandwidth.refill_intervally else whole
        admitted.append(bandwidth.capacity + came)
    return min(admitted)


@given(limits, budgets, st.lists(plain_consumptions, max_size=60))
def test_no_more_is_admitted_than_the_budgets_of_the_others(
    text: str, budgets: list[tuple[int, float, bool]], schedule: list[Any]
) -> None:
    clock = ManualClock(NOW)
    store = MemoryStore(clock=clock)
    managers = [
        ProxyManager(
            store,
            text,
            clock=clock,
            expiration=Expiration.none(),
            optimization=(Optimization.predicting if predicting else Optimization.delaying)(tokens, time),
        )
        for tokens, time, predicting in budgets
    ]
    used, admitted = set(), 0
    for index, verb, tokens, pause in schedule:
        manager = managers[index]
        if verb == "read":
            manager.available_tokens("key")
        else:
            used.add(index)
            answer = ask(manager, verb, tokens)
            admitted += int(answer) if verb == "try_consume_as_much_as_possible" else tokens * bool(answer)
        others = sorted(budgets[index][0] for index in used)[1:]
        assert admitted <= admitted_by(text, clock.now_nanos() - NOW) + sum(others)
        clock.advance(nanos=pause)
    for manager in managers:
        manager.close()
    if admitted:
        assert stored(store, clock)[1] == admitted


def test_the_bound_is_reached() -> None:
    clock = ManualClock(NOW)
    store = MemoryStore(clock=clock)
    delaying = Optimization.delaying(10, 60)
    managers = [ProxyManager(store, "100/day intervally", clock=clock, optimization=delaying) for _ in range(4)]
    for manager in managers:
        manager.try_consume("key", 15)
    while managers[0].available_tokens("key") > 10:
        managers[0].try_consume("key", 11)
    for manager in managers:  # 10 are left as all of them know by now
        manager.bucket("key").sync()
    left = managers[0].available_tokens("key")
    granted = [manager.try_consume("key", left) for manager in managers]
    assert granted == [True] * 4
    for manager in managers:
        manager.close()
    assert stored(store, clock)[0] == -3 * left


class TickingClock(ManualClock):
    """Which no two read alike, as those of real processes."""

    def now_nanos(self) -> int:
        self.advance(nanos=1)
        return super().now_nanos()


class Interleaved:
    """Calls of some managers, driven by hand from one place where another may come between to the next."""

    def __init__(self, text: str, budgets: list[tuple[int, float, bool]]) -> None:
        self.clock = TickingClock(NOW)
        self.store = ScriptedStore()
        self.managers = [
            ProxyManager(
                self.store,
                text,
                clock=self.clock,
                merging=False,
                expiration=Expiration.none(),
                optimization=Optimization.delaying(tokens, time),
            )
            for tokens, time, _ in budgets
        ]
        self.text = text
        self.overshoot = sum(tokens for tokens, *_ in budgets)
        self.running: list[tuple[Generator[Any, Any, Any], list[Any], int]] = []
        self.admitted = 0
        self.doubts = False

    def manager(self, index: int) -> ProxyManager:
        return self.managers[index % len(self.managers)]

    def call(self, index: int, tokens: int, greedy: bool) -> None:
        command: Any = ConsumeAsMuchAsPossible(tokens) if greedy else TryConsume(tokens)
        self.running.append((steps_of(self.manager(index).bucket("key"), command), [None], tokens))

    def sync(self, index: int) -> None:
        self.running.append((proxy_of(self.manager(index).bucket("key")).sync(), [None], 0))

    def step(self, index: int) -> None:
        if not self.running:
            return
        steps, value, tokens = call = self.running[index % len(self.running)]
        try:
            value[0] = steps.send(value[0])
        except StopIteration as end:
            self.running.remove(call)
            self.admitted += tokens if end.value is True else int(end.value or 0)
            assert self.admitted <= admitted_by(self.text, self.clock.now_nanos() - NOW) + self.overshoot
        except StoreError:
            self.running.remove(call)

    def pause(self, nanos: int) -> None:
        self.clock.advance(nanos=nanos)

    def fail(self, how: str) -> None:
        if "intervally" in self.text:
            how = "fail"  # such states do not show who wrote them
        getattr(self.store, how)()
        self.doubts |= how != "fail"

    def end(self) -> None:
        while self.running:
            self.step(0)
        self.store._script.clear()
        for manager in self.managers:
            manager.close()


@settings(max_examples=500, deadline=None)
@given(
    limits,
    st.one_of(budgets, budgets.map(lambda them: them[:1])),
    st.lists(
        st.one_of(
            st.tuples(st.just("call"), st.integers(0, 2), counts, st.booleans()),
            *[st.tuples(st.just("step"), st.integers(0, 20))] * 4,
            st.tuples(st.just("sync"), st.integers(0, 2)),
            st.tuples(st.just("pause"), st.sampled_from([1, 10**8, SECOND, 5 * SECOND])),
            st.tuples(st.just("fail"), st.sampled_from(["fail", "lose_replies", "lose_requests"])),
        ),
        max_size=150,
    ),
)
def test_calls_that_run_at_once_keep_the_bound_and_lose_nothing(
    text: str, budgets: list[tuple[int, float, bool]], schedule: list[Any]
) -> None:
    calls = Interleaved(text, budgets)
    for action, *arguments in schedule:
        getattr(calls, action)(*arguments)
    calls.end()
    if calls.store.get("key") is not None:
        consumed = stored(calls.store, calls.clock)[1]
        assert consumed >= calls.admitted
        assert consumed == calls.admitted or calls.doubts
    entries = [entry for manager in calls.managers for entry in local_decisions_of(manager)._entries.values.values()]
    assert not any(entry.pending or entry.under_way() for entry in entries)


class Overlapping:
    """A manager that is telling the store of 2 of its 3 tokens, and is held where that is."""

    def __init__(self, *, landed: bool) -> None:
        self.store = CountingStore()
        clock = TickingClock(NOW)
        optimization = Optimization.delaying(5, 60)
        self.manager = ProxyManager(self.store, "10/day", clock=clock, merging=False, optimization=optimization)
        assert self.manager.try_consume("key")
        assert self.manager.try_consume("key", 2)
        self.steps = proxy_of(self.manager.bucket("key")).sync()
        self.value = self.steps.send(None)  # the time
        if landed:
            self.value = self.steps.send(self.value)
        self.store.asked()

    def end(self) -> None:
        with pytest.raises(StopIteration):
            while True:
                self.value = self.steps.send(self.value)

    def available(self) -> int:
        self.store.asked()
        available = self.manager.available_tokens("key")
        assert self.store.asked() == (0, 0)
        return available


@pytest.mark.parametrize("landed", [False, True])
def test_what_is_handed_out_meanwhile_is_not_forgotten(landed: bool) -> None:
    calls = Overlapping(landed=landed)
    assert calls.manager.try_consume("key", 3)
    assert calls.store.asked() == (0, 0)
    calls.end()
    assert calls.available() == 4


def test_what_is_on_its_way_counts_against_what_may_be_handed_out() -> None:
    calls = Overlapping(landed=False)
    assert calls.manager.try_consume("key", 3)
    assert calls.store.asked() == (0, 0)
    assert calls.manager.try_consume("key", 1)
    assert sum(calls.store.asked()) == 1


@pytest.mark.parametrize(("landed", "meanwhile"), [(False, 2), (True, 0)])
def test_what_the_store_showed_last_counts(landed: bool, meanwhile: int) -> None:
    calls = Overlapping(landed=landed)
    assert calls.manager.try_consume("key", 5)  # of 9 or 7, by the store
    assert sum(calls.store.asked()) >= 1
    assert calls.available() == meanwhile
    calls.end()
    assert calls.available() == 2


# Memory


async def test_memory_is_bounded_and_nothing_is_dropped(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(DELAYING, memory_limit_bytes=20_000)
    for index in range(200):
        for _ in range(3):
            assert await face.try_consume(f"{index}")
    entries = local_decisions_of(face)._entries
    assert 5 <= len(entries.values) <= 15
    assert entries.size == sum(entry.weight for entry in entries.values.values()) <= 20_000
    await close(face)
    plain = ProxyManager(store, LIMITS, clock=clock)
    assert [plain.snapshot(f"{index}").consumed_tokens for index in range(200)] == [3] * 200


async def test_a_newcomer_pays_for_one_that_is_forgotten(make: Make, store: CountingStore) -> None:
    face = make(DELAYING, memory_limit_bytes=20_000)
    for index in range(100):
        await face.try_consume(f"{index}")
        await face.try_consume(f"{index}")
    store.asked()
    await face.try_consume("one more")
    assert store.asked() == (0, 2)


async def test_the_least_recently_used_is_forgotten(make: Make, store: CountingStore) -> None:
    face = make(MANUAL, memory_limit_bytes=20_000)
    await face.try_consume("used")
    for index in range(100):
        await face.try_consume(f"{index}")
        store.asked()
        await face.available_tokens("used")
        assert store.asked() == (0, 0)
    assert b"0" not in unsynchronized(face)


def test_one_that_is_used_meanwhile_is_not_forgotten() -> None:
    store = SwappingMemoryStore()
    manager = ProxyManager(store, LIMITS, optimization=MANUAL, memory_limit_bytes=3_000)
    assert manager.try_consume("old")
    assert manager.try_consume("old")
    steps = steps_of(manager.bucket("new"), TryConsume(1))
    steps.send(steps.send(None))  # the store has been told, and its answer not been seen
    assert manager.try_consume("old")
    run(steps)
    manager.close()
    assert ProxyManager(store, LIMITS).snapshot("old").consumed_tokens == 3


async def test_where_nothing_can_be_forgotten_newcomers_ask_the_store(
    make: Make, store: CountingStore, clock: ManualClock
) -> None:
    face = make(DELAYING, memory_limit_bytes=4_000)
    for key in ("a", "b", "c"):
        for _ in range(3):
            await face.try_consume(key)
    known = list(unsynchronized(face))
    store.put(known[0], b"?")
    store.put(known[-1], b"?")
    for _ in range(6):
        assert await face.try_consume("newcomer")
    assert unsynchronized(face) == dict.fromkeys(known, 2)
    assert ProxyManager(store, LIMITS, clock=clock).snapshot("newcomer").consumed_tokens == 6


async def test_no_memory_means_no_optimization(make: Make, store: CountingStore) -> None:
    face = make(DELAYING, memory_limit_bytes=0)
    for _ in range(5):
        await face.try_consume("key")
    assert not unsynchronized(face)
    assert store.swaps == 1 + 4 * 2  # nothing is remembered either


# At once


@pytest.mark.parametrize("merging", [True, False])
def test_threads_lose_nothing(merging: bool) -> None:
    chance = random.Random(1)
    store = ScriptedStore()
    managers = [
        ProxyManager(
            store,
            "3000/day intervally",
            merging=merging,
            max_attempts=10_000,
            optimization=Optimization.delaying(50, 60),
        )
        for _ in range(3)
    ]

    def call(index: int) -> int:
        if chance.random() < 0.01:
            store.fail()
        try:
            return managers[index % 3].try_consume("key")
        except StoreUnavailableError:
            return 0

    with ThreadPoolExecutor(8) as threads:
        admitted = sum(threads.map(call, range(6000)))
    store._script.clear()
    for manager in managers:
        manager.close()
    assert 2900 <= admitted <= 3000 + 3 * 50
    assert ProxyManager(store, "1/day").snapshot("key").consumed_tokens == admitted


class SlowStore(AsyncSwappingMemoryStore):
    """Lets other tasks run, and calls be cancelled, before and after each swap."""

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        await asyncio.sleep(0)
        answer = await super().swap(key, before, after, ttl_millis)
        await asyncio.sleep(0)
        return answer


async def test_tasks_that_are_cancelled_lose_nothing() -> None:
    chance = random.Random(2)
    store = SlowStore()
    manager = AsyncProxyManager(store, "100000/day intervally", optimization=Optimization.delaying(20, 60), timeout=60)
    running = [asyncio.create_task(manager.try_consume(f"{chance.randrange(3)}")) for _ in range(3000)]
    for _ in range(20):
        for task in chance.sample(running, 50):
            task.cancel()
        await asyncio.sleep(0)
        running += [asyncio.create_task(manager.try_consume(f"{chance.randrange(3)}")) for _ in range(100)]
    results = await asyncio.gather(*running, return_exceptions=True)
    admitted = results.count(True)
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert admitted + cancelled == len(running)
    assert cancelled
    await manager.aclose()
    plain = AsyncProxyManager(store, "1/day")
    consumed = sum([(await plain.snapshot(f"{key}")).consumed_tokens for key in range(3)])
    assert admitted <= consumed <= admitted + cancelled


async def test_a_cancelled_call_sees_the_tokens_of_others_through() -> None:
    store = SlowStore()
    clock = ManualClock(NOW)
    manager = AsyncProxyManager(store, LIMITS, clock=clock, optimization=DELAYING)
    for _ in range(5):
        await manager.try_consume("key")
    task = asyncio.create_task(manager.try_consume("key", 3))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await manager.aclose()
    consumed = (await AsyncProxyManager(store, LIMITS, clock=clock).snapshot("key")).consumed_tokens
    assert consumed == 8  # its own had been sent, too


# A real server


@pytest.mark.redis
def test_what_is_sent(redis_url: str) -> None:
    with monitored(redis_url) as monitor:
        with ProxyManager.from_url(redis_url, "5/hour", optimization=SKIP) as manager:
            for _ in range(6):
                manager.try_consume("refused")
            monitor.sent()
            for _ in range(20):
                assert not manager.try_consume("refused")
            assert monitor.sent() == []
        with ProxyManager.from_url(redis_url, "1000/hour", optimization=Optimization.delaying(9, 60)) as manager:
            assert manager.try_consume("delayed")
            monitor.sent()
            for _ in range(100):
                assert manager.try_consume("delayed")
            assert len(without_time(monitor.sent())) == 10
            for _ in range(20):
                manager.available_tokens("delayed")
                manager.snapshot("delayed")
            assert monitor.sent() == []
            assert manager.try_consume("delayed", 3)
        assert len(without_time(monitor.sent())) == 1
        with ProxyManager.from_url(redis_url, "1000/hour") as manager:
            assert manager.snapshot("delayed").consumed_tokens == 104


def without_time(sent: list[str]) -> list[str]:
    """Without what goes along with the first commands."""
    return [command for command in sent if command != "TIME"]


@pytest.mark.redis
async def test_what_is_sent_by_asyncio(redis_url: str) -> None:
    with monitored(redis_url) as monitor:
        async with AsyncProxyManager.from_url(redis_url, "1000/hour", optimization=MANUAL) as manager:
            assert await manager.try_consume("key")
            monitor.sent()
            for _ in range(100):
                assert await manager.try_consume("key")
            assert monitor.sent() == []
        assert len(without_time(monitor.sent())) == 1
        async with AsyncProxyManager.from_url(redis_url, "1000/hour") as manager:
            assert (await manager.snapshot("key")).consumed_tokens == 101
