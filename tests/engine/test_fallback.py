"""Where the store fails, ``on_error`` answers; what it has given is charged when the store is back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import pytest

from ratelimit import (
    NEVER,
    AsyncProxyManager,
    ConsumptionProbe,
    EstimationProbe,
    InvalidArgumentError,
    InvalidConfigurationError,
    OnError,
    ProxyManager,
    StoreUnavailableError,
    UnsupportedStateError,
)
from ratelimit.core.numbers import MAX
from ratelimit.errors import RateLimitError
from ratelimit.keys import Key
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock
from tests.engine.unreliable import DOWN, IN_DOUBT, Unreliable
from tests.support.both_faces import Settled, for_asyncio, settled
from tests.support.inside import pipeline_of
from tests.support.servers import wait_until

NOW = 1_700_000_000 * 10**9
LIMITS = "8/hour"
SECOND = 10**9

Make = Callable[..., Settled]


@pytest.fixture
def store() -> Unreliable:
    return Unreliable()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest, store: Unreliable, clock: ManualClock) -> Make:
    def make(on_error: Any = OnError.RAISE, limits: Any = LIMITS, **settings: Any) -> Settled:
        settings = {"clock": clock, "on_error": on_error, **settings}
        if request.param == "sync":
            return Settled(ProxyManager(store, limits, **settings))
        return Settled(AsyncProxyManager(for_asyncio(store), limits, **settings))

    return make


async def stored(face: Settled, key: str = "key") -> int:
    """Tokens that the store has been told of."""
    return int((await face.snapshot(key)).consumed_tokens)


async def test_by_default_the_error_is_raised(make: Make, store: Unreliable) -> None:
    store.down = DOWN
    face = make()
    with pytest.raises(StoreUnavailableError):
        await face.try_consume("key")
    assert await settled(face.face.bucket("key", on_error=OnError.ALLOW).try_consume())


async def test_allow_answers_as_if_there_were_no_limit(make: Make, store: Unreliable) -> None:
    store.down = DOWN
    face = make(OnError.ALLOW)
    assert await face.try_consume("key", 1000)
    assert await face.try_consume_and_return_remaining("key") == ConsumptionProbe(True, MAX, 0, 0, degraded=True)
    assert await face.try_consume_as_much_as_possible("key", 7) == 7
    assert await face.estimate_ability_to_consume("key", 1000) == EstimationProbe(True, MAX, 0, degraded=True)
    assert await face.consume_ignoring_rate_limits("key", 1000) == 0
    assert await face.consume("key", 1000)
    verbose = face.face.bucket("key").verbose
    result = await settled(verbose.try_consume_and_return_remaining())
    assert (result.degraded, result.value.degraded, result.value.consumed) == (True, True, True)


async def test_deny_answers_as_if_there_were_no_tokens(make: Make, store: Unreliable, clock: ManualClock) -> None:
    store.down = DOWN
    face = make(OnError.DENY)
    assert not await face.try_consume("key")
    probe = await face.try_consume_and_return_remaining("key")
    assert (probe.consumed, probe.remaining_tokens, probe.retry_after, probe.degraded) == (False, 0, 1.0, True)
    assert await face.try_consume_as_much_as_possible("key") == 0
    assert await face.estimate_ability_to_consume("key", 1) == EstimationProbe(False, 0, SECOND, degraded=True)
    assert not await face.consume("key")
    assert not await face.consume("key", max_wait=100)
    assert (await settled(face.face.bucket("key").verbose.try_consume())).degraded
    with pytest.raises(StoreUnavailableError):  # which consumes in any case
        await face.consume_ignoring_rate_limits("key", 1)
    assert clock.slept == []


@pytest.mark.parametrize("policy", [OnError.ALLOW, OnError.DENY, OnError.local(1)], ids=lambda policy: policy.kind)
async def test_what_is_no_decision_raises_the_error(make: Make, store: Unreliable, policy: OnError) -> None:
    store.down = DOWN
    face = make(policy)
    for verb, *arguments in (
        *(("available_tokens",), ("snapshot",), ("reset",), ("add_tokens", 1), ("force_add_tokens", 1)),
        ("configuration",),
    ):
        with pytest.raises(StoreUnavailableError):
            await getattr(face, verb)("key", *arguments)


async def test_a_callable_chooses_by_key_and_error(make: Make, store: Unreliable) -> None:
    seen: list[tuple[Key, type[RateLimitError]]] = []

    def choose(key: Key, error: RateLimitError) -> OnError:
        seen.append((key, type(error)))
        return OnError.ALLOW if key == "guest" else OnError.RAISE

    face = make(choose)
    store.down = DOWN
    assert await face.try_consume("guest")
    with pytest.raises(StoreUnavailableError) as caught:
        await face.try_consume("admin")
    assert caught.value.key == "admin"
    store.down = None
    store.put("guest", b"something else")
    assert await face.try_consume("guest")
    assert seen == [
        ("guest", StoreUnavailableError),
        ("admin", StoreUnavailableError),
        ("guest", UnsupportedStateError),
    ]


async def test_what_is_no_policy_is_refused(make: Make, store: Unreliable) -> None:
    with pytest.raises(InvalidArgumentError, match="on_error must be an OnError"):
        make("allow")
    with pytest.raises(InvalidArgumentError, match="on_error must be an OnError"):
        make().face.bucket("key", on_error=True)
    for share in (0, 1.5, -1, float("nan"), True, "1/2"):
        with pytest.raises(InvalidConfigurationError, match="share must be a number above 0, at most 1"):
            OnError.local(share)  # type: ignore[arg-type]  # the point
    store.down = DOWN
    face = make(lambda _key, _error: None)
    with pytest.raises(InvalidArgumentError, match="on_error must give an OnError") as caught:
        await face.try_consume("key")
    assert isinstance(caught.value.__cause__, StoreUnavailableError)


async def test_mistakes_of_the_caller_are_errors_whatever_the_policy(make: Make, store: Unreliable) -> None:
    store.down = DOWN
    with pytest.raises(InvalidArgumentError):
        await make(OnError.ALLOW).try_consume("key", 0)


# Local buckets


async def test_a_local_bucket_holds_its_share_and_refills(make: Make, store: Unreliable, clock: ManualClock) -> None:
    store.down = DOWN
    face = make(OnError.local(1 / 4))
    assert [await face.try_consume("key") for _ in range(3)] == [True, True, False]
    assert [await face.try_consume("other") for _ in range(3)] == [True, True, False]
    clock.advance(1800)
    probe = await face.try_consume_and_return_remaining("key")
    assert (probe.consumed, probe.remaining_tokens, probe.degraded) == (True, 0, True)
    assert not await face.try_consume("key")
    assert await face.consume("key")  # by waiting
    assert clock.slept == [1800 * SECOND]


async def test_what_was_consumed_locally_is_charged_with_the_next_decision(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2))
    assert await face.try_consume("key", 6)
    store.down = DOWN
    assert [await face.try_consume("key", 2) for _ in range(3)] == [True, True, False]
    store.down = None
    store.asked = 0
    assert not await face.try_consume("key")
    assert store.asked == 1
    assert await stored(face) == 10
    assert await face.available_tokens("key") == -2
    assert not await face.try_consume("key")
    assert await stored(face) == 10  # once


async def test_keys_that_nobody_asks_for_are_charged_when_the_store_is_back(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2))
    store.down = DOWN
    for number in range(20):
        assert await face.try_consume(f"key {number}", 3)
    store.down = None
    assert await face.try_consume("another")
    async with asyncio.timeout(10):
        while store.get("key 19") is None:
            await asyncio.sleep(0)
    wait_until(lambda: not pipeline_of(face).fallback._sweeping, "all is charged")
    assert [await stored(face, f"key {number}") for number in range(20)] == [3] * 20


async def test_what_is_in_doubt_is_not_charged(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2))
    store.down = IN_DOUBT
    assert [await face.try_consume("key") for _ in range(5)] == [True] * 4 + [False]
    store.down = None
    assert await face.try_consume("key")
    assert await stored(face) == 1


async def test_a_charge_that_fails_is_tried_again_unless_it_is_in_doubt(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2))
    store.down = DOWN
    assert await face.try_consume("key", 3)
    assert await face.try_consume("key", 1)  # which has tried to charge three
    store.down = None
    assert await face.try_consume("key")
    assert await stored(face) == 5
    store.down = DOWN
    assert not await face.try_consume("key")
    face = make(OnError.local(1 / 2))
    assert await face.try_consume("key", 2)
    store.down = IN_DOUBT
    assert await face.try_consume("key")  # the charge may have got there
    store.down = None
    assert await face.try_consume("key")
    assert await stored(face) == 6


async def test_a_store_that_fails_on_and_off_fills_no_local_bucket_anew(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2), limits="1000/hour")
    admitted = 0
    for _ in range(300):
        store.down = DOWN
        admitted += await face.try_consume("key", 10)
        store.down = None
        await face.estimate_ability_to_consume("key", 1)
    assert admitted == 50


async def test_local_buckets_are_bounded(make: Make, store: Unreliable) -> None:
    store.down = DOWN
    face = make(OnError.local(1 / 2), memory_limit_bytes=100_000)
    for number in range(1000):
        assert await face.try_consume(f"key {number}")
    assert 30 < len(pipeline_of(face).local_buckets._buckets.values) < 100


async def test_a_local_bucket_keeps_its_limits_as_shared_ones_do(make: Make, store: Unreliable) -> None:
    store.down = DOWN
    face = make(OnError.local(1 / 2))
    other = face.face.bucket("key", "1000/hour")
    newer = face.face.bucket("key", "100/hour", configuration_version=1)
    assert [await face.try_consume("key", 2), await settled(other.try_consume(2))] == [True, True]
    assert [await face.try_consume("key"), await settled(other.try_consume())] == [False, False]
    assert await settled(newer.try_consume(50))
    assert not await settled(newer.try_consume())


async def test_a_bucket_that_is_removed_is_also_forgotten_locally(make: Make, store: Unreliable) -> None:
    store.down = DOWN
    face = make(OnError.local(1 / 2))
    assert await face.try_consume("key", 4)
    store.down = None
    await face.remove("key")
    assert await face.try_consume("key")
    assert await stored(face) == 1


async def test_a_key_that_cannot_be_charged_holds_up_no_other(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2))
    store.down = DOWN
    for number in range(4):
        assert await face.try_consume(f"key {number}")
    store.put("key 0", b"something else")
    store.down = None
    assert await face.try_consume("another")
    async with asyncio.timeout(10):
        while not all(store.get(f"key {number}") for number in range(4)):
            await asyncio.sleep(0)
    wait_until(lambda: not pipeline_of(face).fallback._sweeping, "all is charged")
    assert [await stored(face, f"key {number}") for number in range(1, 4)] == [1] * 3


async def test_a_wait_that_took_nothing_gives_nothing_back(make: Make, store: Unreliable) -> None:
    face = make(OnError.ALLOW)
    assert await face.try_consume("key", 8)
    local = face.face.bucket("key", on_error=OnError.local(1))

    def come_back(_nanos: int) -> None:
        store.down = None
        raise KeyboardInterrupt

    pipeline_of(face).sleep = come_back
    for bucket, wanted in ((face.face.bucket("key"), 3), (local, 10)):
        store.down = IN_DOUBT
        with contextlib.suppress(KeyboardInterrupt):
            await settled(bucket.consume(wanted))
        store.down = None
        assert await stored(face) == 8


async def test_a_charge_that_another_call_carried_is_not_repeated() -> None:
    store = Unreliable()
    gate = asyncio.Event()

    class Gated(AsyncSwappingMemoryStore):
        async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
            if store.down is None:
                await gate.wait()
            return store.swap(key, before, after, ttl_millis)

    manager = AsyncProxyManager(Gated(store), "100/hour", clock=ManualClock(NOW), on_error=OnError.local(1))
    store.down = DOWN
    assert await manager.try_consume("key", 5)
    store.down = None
    leading = asyncio.create_task(manager.bucket("key", on_error=OnError.RAISE).try_consume())
    await asyncio.sleep(0)
    charging = asyncio.create_task(manager.try_consume("key", 2))
    await asyncio.sleep(0)
    gate.set()
    assert await leading
    gate.clear()
    await asyncio.sleep(0)
    charging.cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(charging, return_exceptions=True)
    assert await manager.try_consume("key")
    consumed = (await manager.snapshot("key")).consumed_tokens
    assert consumed in {1 + 5 + 2 + 1, 1 + 5 + 1}


async def test_a_local_wait_that_is_interrupted_gives_its_tokens_back(
    make: Make, store: Unreliable, clock: ManualClock
) -> None:
    store.down = DOWN
    face = make(OnError.local(1 / 2))
    assert await face.try_consume("key", 4)

    def interrupt(_nanos: int) -> None:
        raise KeyboardInterrupt

    pipeline_of(face).sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        await face.consume("key", 2)
    clock.advance(900)
    assert await face.try_consume("key")  # the one that came back meanwhile
    store.down = None
    await face.try_consume("key")
    assert await stored(face) == 4 + 1 + 1


async def test_closing_charges_what_was_not(make: Make, store: Unreliable) -> None:
    face = make(OnError.local(1 / 2))
    store.down = DOWN
    assert await face.try_consume("key", 3)
    store.down = None
    await settled(face.face.aclose() if hasattr(face.face, "aclose") else face.face.close())
    assert await stored(make()) == 3


async def test_closing_without_the_store_says_what_is_lost(
    make: Make, store: Unreliable, caplog: pytest.LogCaptureFixture
) -> None:
    face = make(OnError.local(1 / 2))
    store.down = DOWN
    assert await face.try_consume("key", 3)
    caplog.clear()
    await settled(face.face.aclose() if hasattr(face.face, "aclose") else face.face.close())
    (record,) = caplog.records
    assert "could not be charged" in record.message


async def test_it_is_logged_once(make: Make, store: Unreliable, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    face = make(OnError.ALLOW)
    for _ in range(3):
        store.down = DOWN
        for _ in range(100):
            assert await face.try_consume("key")
        store.down = None
        assert await face.try_consume("key")
    levels = [record.levelname for record in caplog.records]
    assert levels == ["WARNING", "INFO"]
    assert "on_error=allow" in caplog.records[0].message
    assert "100 decisions were made without it" in caplog.records[1].message


def test_nothing_that_a_refusal_tells_to_wait_is_endless() -> None:
    store = Unreliable()
    store.down = DOWN
    manager = ProxyManager(store, LIMITS, on_error=OnError.DENY)
    assert manager.try_consume_and_return_remaining("key", 1000).nanos_to_wait_for_refill < NEVER
