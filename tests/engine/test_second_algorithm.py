"""A second algorithm behind the same verbs: terms, versions, replacement, waits, expiration and what is shown.

Calls at the same time, replies that are lost, stores that fail and decisions without the store have files of their own.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import redis

from ratelimit import (
    AsyncProxyManager,
    BucketConfiguration,
    BucketNotFoundError,
    ConsumptionProbe,
    CorruptStateError,
    EstimationProbe,
    Expiration,
    MemoryStore,
    ProxyManager,
    Recovery,
    ReservationOverflowError,
    TokensInheritance,
)
from ratelimit.cli import main
from ratelimit.core.algorithm import decode, encode
from ratelimit.core.commands import Terms
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore, SwappingMemoryStore
from tests.engine.conftest import NOW, SECOND, Make
from tests.support.both_faces import Settled, settled
from tests.support.decision_paths import By, deciding_by
from tests.support.fixed_window import FORMAT, FixedWindow, Window, WindowState

LIMITS = FixedWindow(10, 10 * SECOND)
TOKEN_BUCKET = BucketConfiguration.parse("5/second burst 20")


@pytest.fixture(params=["applies functions", "swaps"])
def store(request: pytest.FixtureRequest, clock: ManualClock) -> SwappingMemoryStore:
    return MemoryStore(clock=clock) if request.param == "applies functions" else SwappingMemoryStore(clock=clock)


@pytest.fixture
def face(make: Make, store: SwappingMemoryStore, clock: ManualClock) -> Settled:
    return make(store, LIMITS, clock=clock)


def format_of(store: SwappingMemoryStore, key: str = "key") -> int:
    state = store.get(key)
    assert state is not None
    return int.from_bytes(state[:4], "big")


# Verbs


async def test_every_verb_answers(face: Settled, store: SwappingMemoryStore, clock: ManualClock) -> None:
    clock.advance(3)
    assert await face.try_consume("key", 4)
    assert await face.try_consume_and_return_remaining("key") == ConsumptionProbe(True, 5, 0, 7 * SECOND)
    assert await face.estimate_ability_to_consume("key", 6) == EstimationProbe(False, 5, 7 * SECOND)
    assert await face.try_consume_as_much_as_possible("key") == 5
    assert not await face.try_consume("key")
    assert await face.consume_ignoring_rate_limits("key", 12) == 17 * SECOND
    assert await face.available_tokens("key") == -12
    await face.add_tokens("key", 2)
    await face.give_back("key", 1)
    assert await face.available_tokens("key") == -9
    await face.reset("key")
    await face.force_add_tokens("key", 5)
    assert await face.available_tokens("key") == 15
    await face.hold_back("key", 20)
    assert not await face.try_consume("key")
    clock.advance(17)
    assert not await face.try_consume("key")
    clock.advance(10)
    assert await face.try_consume("key", 10)
    assert format_of(store) == FORMAT


async def test_windows_begin_at_whole_periods(face: Settled, clock: ManualClock) -> None:
    clock.advance(9)
    assert await face.try_consume("key", 10)
    clock.advance(nanos=SECOND - 1)
    assert not await face.try_consume("key")
    clock.advance(nanos=1)
    assert await face.try_consume("key", 10)


async def test_keys_are_apart_and_are_removed(face: Settled) -> None:
    assert await face.try_consume("key", 10)
    assert await face.try_consume("other", 10)
    await face.remove("key")
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("other")


async def test_limits_may_depend_on_the_key(make: Make, store: SwappingMemoryStore, clock: ManualClock) -> None:
    plans = {"free": FixedWindow(2, SECOND), "paid": "50/second", "own": None}
    face = make(store, plans.get, clock=clock)
    assert [await face.try_consume("free") for _ in range(3)] == [True, True, False]
    assert await face.try_consume("paid", 50)
    assert await face.try_consume("own", 1_000)
    assert [await face.configuration(key) for key in plans] == [plans["free"], BucketConfiguration.parse("50/s"), None]


async def test_a_bucket_may_have_windows_where_its_manager_has_none(
    make: Make, store: SwappingMemoryStore, clock: ManualClock
) -> None:
    face = make(store, "50/second", clock=clock)
    bucket = face.face.bucket("key", LIMITS)
    assert await settled(bucket.try_consume(10))
    assert not await settled(bucket.try_consume())
    # The bucket keeps the limits that it was made with, whatever the terms of those that ask.
    assert not await face.try_consume("key")
    assert await face.try_consume("other", 50)


# What is shown


async def test_a_snapshot_shows_the_window(face: Settled, clock: ManualClock) -> None:
    clock.advance(3)
    await face.try_consume("key", 4)
    snapshot = await face.snapshot("key")
    assert (snapshot.configuration, snapshot.configuration_version) == (LIMITS, None)
    assert snapshot.bandwidth_states == (Window(6, NOW),)
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (6, 4)
    assert await face.configuration("key") == LIMITS
    assert await face.configuration("missing") is None


async def test_verbose_answers_show_the_window(face: Settled, clock: ManualClock) -> None:
    clock.advance(3)
    verbose = Settled(face.face.bucket("key").verbose)
    result = await verbose.try_consume(4)
    assert (result.value, result.available_tokens, result.available_tokens_per_bandwidth) == (True, 6, (6,))
    assert (result.operation_time_nanos, result.full_refilling_time_nanos) == (NOW + 3 * SECOND, 7 * SECOND)
    assert (result.configuration, result.bandwidth_states) == (LIMITS, (Window(6, NOW),))
    assert (await verbose.snapshot()).value.consumed_tokens == 4


async def test_a_manager_prints_its_limits(face: Settled) -> None:
    assert "'10/10000000000 ns fixed'" in repr(face.face)


async def test_bytes_that_make_no_sense_are_corrupt_whatever_is_asked(
    face: Settled, store: SwappingMemoryStore
) -> None:
    good = encode(Terms(LIMITS).initial(NOW))
    for bad, reason in ((good[:30], "a window of 30 bytes"), (good[:4] + bytes(16) + good[20:], "out of range")):
        store.put("key", bad)
        for verb in ("try_consume", "available_tokens", "snapshot", "configuration"):
            with pytest.raises(CorruptStateError, match=reason) as caught:
                await getattr(face, verb)("key")
            assert (caught.value.key, caught.value.state) == ("key", bad)
        assert store.get("key") == bad


async def test_a_bucket_that_has_vanished_is_an_error_where_that_is_wanted(
    make: Make, store: SwappingMemoryStore, clock: ManualClock
) -> None:
    face = make(store, LIMITS, clock=clock, recovery=Recovery.RAISE)
    assert await face.try_consume("key")
    assert await face.try_consume("key")
    store.delete(b"key")
    with pytest.raises(BucketNotFoundError):
        await face.try_consume("key")


# Terms


@pytest.mark.parametrize("inheritance", TokensInheritance)
async def test_a_token_bucket_is_replaced_by_windows_and_back_with_nothing_inherited(
    make: Make, store: SwappingMemoryStore, clock: ManualClock, inheritance: TokensInheritance
) -> None:
    face = make(store, TOKEN_BUCKET, clock=clock)
    assert await face.try_consume("key", 17)
    await face.replace_configuration("key", LIMITS, inheritance)
    assert (await face.configuration("key"), format_of(store)) == (LIMITS, FORMAT)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    await face.replace_configuration("key", TOKEN_BUCKET, inheritance)
    assert (await face.configuration("key"), format_of(store)) == (TOKEN_BUCKET, 1)
    assert await face.try_consume("key", 20)
    snapshot = await face.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (0, 17 + 10 + 20)


@pytest.mark.parametrize(
    ("inheritance", "left"),
    [
        (TokensInheritance.RESET, 20),
        (TokensInheritance.AS_IS, 4),
        (TokensInheritance.ADDITIVE, 14),
        (TokensInheritance.PROPORTIONALLY, 8),
    ],
)
async def test_windows_are_replaced_by_windows_as_the_inheritance_says(
    face: Settled, inheritance: TokensInheritance, left: int
) -> None:
    assert await face.try_consume("key", 6)
    await face.replace_configuration("key", FixedWindow(20, 10 * SECOND), inheritance)
    assert await face.available_tokens("key") == left


async def test_a_newer_version_changes_the_algorithm_and_an_older_one_does_not(
    make: Make, store: SwappingMemoryStore, clock: ManualClock
) -> None:
    oldest = make(store, TOKEN_BUCKET, clock=clock, configuration_version=1)
    newer = make(store, LIMITS, clock=clock, configuration_version=2)
    newest = make(store, "3/second", clock=clock, configuration_version=3)
    assert await oldest.try_consume("key", 20)
    assert await newer.try_consume("key", 9)
    assert await oldest.try_consume("key")
    assert not await oldest.try_consume("key")
    snapshot = await oldest.snapshot("key")
    assert (snapshot.configuration, snapshot.configuration_version) == (LIMITS, 2)
    assert await newest.available_tokens("key") == 3
    for face in (oldest, newer):
        assert str(await face.configuration("key")) == "3/second"
        assert await face.try_consume("key")
    snapshot = await newest.snapshot("key")
    assert (snapshot.configuration_version, snapshot.consumed_tokens) == (3, 20 + 9 + 1 + 2)


@pytest.mark.redis
@pytest.mark.parametrize("by", By)
def test_over_redis_terms_may_change_the_algorithm_whoever_decides(redis_url: str, by: By) -> None:
    with (
        deciding_by(by),
        ProxyManager.from_url(redis_url, "20/day", configuration_version=1) as old,
        ProxyManager.from_url(redis_url, FixedWindow(10, 10**18), configuration_version=2) as new,
    ):
        assert [old.try_consume("key", 5) for _ in range(3)] == [True] * 3
        assert [new.try_consume("key", 4) for _ in range(3)] == [True, True, False]
        # The server finds bytes that its script does not know, and leaves them to the client.
        assert [old.try_consume("key") for _ in range(3)] == [True, True, False]
        assert new.snapshot("key").consumed_tokens == 15 + 8 + 2
        for _ in range(2):
            for manager in (old, new):
                manager.replace_configuration("key", "7/day", TokensInheritance.AS_IS)
                assert str(new.configuration("key")) == "7/day"
                assert manager.try_consume("key", 7)
                assert not manager.try_consume("key")
                manager.replace_configuration("key", FixedWindow(3, 10**18), TokensInheritance.AS_IS)
                assert str(old.configuration("key")) == str(FixedWindow(3, 10**18))
                assert manager.try_consume("key", 3)
                assert not manager.try_consume("key")
        assert old.snapshot("key").configuration_version == 2


# Waits


async def test_a_wait_is_exactly_until_the_window_in_which_the_tokens_are(face: Settled, clock: ManualClock) -> None:
    clock.advance(3)
    assert await face.consume("key", 10)
    assert clock.slept == []
    assert await face.consume("key", 3)
    assert clock.slept == [7 * SECOND]
    assert await face.consume("key", 7)
    assert clock.slept == [7 * SECOND]
    assert not await face.consume("key", 1, max_wait=9.999)
    assert await face.consume("key", 1, max_wait=10)
    assert clock.slept == [7 * SECOND, 10 * SECOND]
    assert (await face.snapshot("key")).consumed_tokens == 21


async def test_a_wait_without_end_is_an_error_or_refused(face: Settled, clock: ManualClock) -> None:
    with pytest.raises(ReservationOverflowError):
        await face.consume("key", 2**63 - 1)
    with pytest.raises(ReservationOverflowError):
        await face.consume_ignoring_rate_limits("key", 2**63 - 1)
    assert not await face.consume("key", 2**63 - 1, max_wait=10)
    assert clock.slept == []
    assert (await face.snapshot("key")).consumed_tokens == 0


class InterruptedClock(ManualClock):
    """A clock at which somebody presses Ctrl-C while it sleeps."""

    def sleep(self, nanos: int) -> None:
        super().sleep(nanos)
        raise KeyboardInterrupt


@pytest.mark.parametrize("make_store", [MemoryStore, SwappingMemoryStore])
def test_an_interrupted_sync_wait_gives_its_tokens_back(make_store: Any) -> None:
    store = make_store()
    clock = InterruptedClock(NOW, advance_on_sleep=False)
    manager = ProxyManager(store, LIMITS, clock=clock)
    assert manager.try_consume("key", 4)
    before = decode(store.get("key"))
    with pytest.raises(KeyboardInterrupt):
        manager.consume("key", 8)
    assert clock.slept == [10 * SECOND]
    # What was given up of the present window is back as well.
    assert decode(store.get("key")) == before


async def test_a_cancelled_wait_gives_its_tokens_back() -> None:
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), FixedWindow(10, 10**18))
    await manager.try_consume("key", 4)
    first = asyncio.create_task(manager.consume("key", 8))
    while await manager.available_tokens("key") != -8:
        await asyncio.sleep(0)
    second = asyncio.create_task(manager.consume("key", 2))
    while await manager.available_tokens("key") != -10:
        await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    # Its place stays empty while another wait stands behind it, and comes back with that one.
    assert await manager.available_tokens("key") == -10
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (6, 4)


@pytest.mark.redis
async def test_cancelled_waiters_over_redis_keep_nothing(url: str) -> None:
    async with AsyncProxyManager.from_url(url, FixedWindow(10, 10**18)) as manager:
        await manager.try_consume("key", 4)
        waiters = [asyncio.create_task(manager.consume("key", tokens)) for tokens in (8, 3, 5)]
        while await manager.available_tokens("key") > -14:
            await asyncio.sleep(0.001)
        for waiter in waiters:
            waiter.cancel()
        assert [type(each) for each in await asyncio.gather(*waiters, return_exceptions=True)] == [
            asyncio.CancelledError
        ] * 3
        snapshot = await manager.snapshot("key")
        assert (snapshot.available_tokens, snapshot.consumed_tokens) == (6, 4)


# Expiration


class TtlStore(ScriptedStore):
    """A store that notes for how long it is to keep each state."""

    def __init__(self) -> None:
        super().__init__()
        self.ttls: list[int] = []

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Any:
        self.ttls.append(ttl_millis)
        return super().swap(key, before, after, ttl_millis)


@pytest.mark.parametrize(
    ("expiration", "ttls"),
    [
        (Expiration.automatic(), [17_000, 37_000]),
        (Expiration.after_refill(keep=3), [10_000, 30_000]),
        (Expiration.fixed(5), [5_000, 5_000]),
        (Expiration.none(), [-1, -1]),
    ],
    ids=lambda each: getattr(each, "kind", ""),
)
async def test_a_window_is_kept_until_it_is_full_again(
    make: Make, clock: ManualClock, expiration: Expiration, ttls: list[int]
) -> None:
    store = TtlStore()
    face = make(store, LIMITS, clock=clock, expiration=expiration)
    clock.advance(3)
    await face.try_consume("key", 1)
    await face.consume_ignoring_rate_limits("key", 25)
    assert store.ttls == ttls


async def test_what_has_expired_is_as_good_as_new(make: Make, store: SwappingMemoryStore, clock: ManualClock) -> None:
    face = make(store, LIMITS, clock=clock)
    assert await face.try_consume("key", 10)
    clock.advance(20)
    assert store.get("key") is None
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")


# The command line


@pytest.mark.redis
def test_the_command_line_shows_a_window_and_fills_it(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    limits = FixedWindow(10, 10**18)
    with ProxyManager.from_url(redis_url, limits, configuration_version=4) as manager:
        manager.try_consume("key", 3)
        assert main(["inspect", "--url", redis_url, "key"]) == 0
        told = capsys.readouterr().out
        for words in (str(limits), "7 of 10", "3 so far", "version   4"):
            assert words in told
        assert main(["inspect", "--json", "--url", redis_url, "key"]) == 0
        shown = json.loads(capsys.readouterr().out)
        (level,) = shown["bandwidths"]
        assert (shown["limits"], shown["tokens"], shown["consumed"]) == (str(limits), 7, 3)
        assert (level["limit"], level["capacity"], level["tokens"]) == (str(limits), 10, 7)
        assert level["next_token_after"] == level["full_after"] > 0
        assert main(["reset", "--url", redis_url, "key"]) == 0
        assert manager.available_tokens("key") == 10
        assert main(["remove", "--url", redis_url, "key"]) == 0
        assert manager.configuration("key") is None


@pytest.mark.redis
def test_redis_keeps_a_window_for_as_long_as_it_was_told(redis_url: str) -> None:
    with (
        redis.Redis.from_url(redis_url) as client,
        ProxyManager.from_url(redis_url, FixedWindow(10, 10**18)) as manager,
    ):
        assert manager.try_consume("key")
        stored = client.get("key")
        assert isinstance(stored, bytes)
        state = decode(stored)
        assert isinstance(state, WindowState)
        now = client.time()
        assert isinstance(now, tuple)
        left = (state.begin + 10**18) // 10**6 - (now[0] * 1_000 + now[1] // 1_000)
        assert abs(client.pttl("key") - left - 10_000) < 5_000
