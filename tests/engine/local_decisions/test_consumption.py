"""Tokens are handed out without the store, which learns of them later."""

from __future__ import annotations

from typing import Any

import pytest

from ratelimit import BucketNotFoundError, CorruptStateError, Optimization, ProxyManager, Recovery, TokensInheritance
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
from tests.support.both_faces import settled


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


# By hand


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
