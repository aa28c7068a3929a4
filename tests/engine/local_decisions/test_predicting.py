"""A prediction learns from the store what other processes take, and leaves it to them."""

from __future__ import annotations

import random

from ratelimit import MemoryStore, Optimization, ProxyManager
from ratelimit.testing import ManualClock
from tests.engine.local_decisions.doubles import NOW, CountingStore, Make


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
    """Return what four greedy processes admit beyond a limit of 1000 that does not refill."""
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
