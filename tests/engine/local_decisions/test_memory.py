"""Memory is bounded, and what leaves it has been reported to the store before."""

from __future__ import annotations

from ratelimit import ProxyManager
from ratelimit.core.commands import TryConsume
from ratelimit.runtime.steps import run
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.engine.local_decisions.doubles import DELAYING, LIMITS, MANUAL, CountingStore, Make, close, unsynchronized
from tests.support.inside import local_decisions_of, steps_of


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
    manager = ProxyManager(store, LIMITS, optimization=MANUAL, memory_limit_bytes=3_000, merging=False)
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
