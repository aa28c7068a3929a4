"""Tokens that were handed out are not lost when the store fails, and when a manager is closed."""

from __future__ import annotations

import logging

import pytest

from ratelimit import (
    BandwidthState,
    CorruptStateError,
    Optimization,
    ProxyManager,
    StoreUnavailableError,
    TokensInheritance,
)
from ratelimit.core.numbers import MIN
from ratelimit.core.token_bucket import codec
from ratelimit.testing import ManualClock
from tests.engine.local_decisions.doubles import (
    DELAYING,
    LIMITS,
    MANUAL,
    NOW,
    PREDICTING,
    SECOND,
    CountingStore,
    Make,
    close,
    stored,
    unsynchronized,
)
from tests.support.inside import local_decisions_of


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


# When a manager is closed


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
