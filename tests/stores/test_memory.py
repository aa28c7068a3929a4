from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from ratelimit import AsyncMemoryStore, MemoryStore
from ratelimit.testing import ManualClock

MILLISECOND = 10**6


def test_expired_states_go_though_nobody_asks_for_them() -> None:
    clock = ManualClock(0)
    store = MemoryStore(clock=clock)
    for number in range(10_000):
        store.swap(b"%d" % number, None, b"state", 100)
        clock.advance(nanos=MILLISECOND)
    assert len(store) <= 200
    clock.advance(1)
    for _ in range(200):
        store.delete(b"other")
        store.swap(b"other", None, b"state", 100)
    assert len(store) == 1


def test_a_state_in_use_costs_no_more_memory_with_every_swap() -> None:
    store = MemoryStore(clock=ManualClock(0))
    store.swap(b"key", None, b"0", 3_600_000)
    for number in range(1000):
        store.swap(b"key", b"%d" % number, b"%d" % (number + 1), 3_600_000)
    assert (len(store), len(store._queue)) == (1, 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 30), st.integers(0, 20)), max_size=60))
def test_a_state_lives_exactly_as_long_as_the_last_swap_said(steps: list[tuple[int, int, int]]) -> None:
    clock = ManualClock(0)
    store = MemoryStore(clock=clock)
    deadlines: dict[bytes, int | None] = {}
    for number, (name, ttl, pause) in enumerate(steps):
        key, state = b"%d" % name, b"%d" % number
        assert store.swap(key, store.get(key), state, ttl) is None
        deadlines[key] = clock.now_nanos() + ttl * MILLISECOND if ttl > 0 else None
        clock.advance(nanos=pause * MILLISECOND)
        for other, deadline in deadlines.items():
            assert (store.get(other) is None) == (deadline is not None and deadline <= clock.now_nanos())


def test_what_is_put_stays() -> None:
    clock = ManualClock(0)
    store = MemoryStore(clock=clock)
    store.swap(b"key", None, b"1", 10)
    store.put(b"key", b"2")
    clock.advance(3600)
    store.swap(b"other", None, b"1", 10)
    assert store.get(b"key") == b"2"


def test_tests_may_name_a_key_as_callers_do() -> None:
    store = MemoryStore()
    store.put("schlüssel", b"1")
    assert store.get("schlüssel") == store.get("schlüssel".encode()) == b"1"


def test_threads_swap_one_after_another() -> None:
    store = MemoryStore()
    store.swap(b"key", None, b"0", 60_000)

    def add(times: int) -> None:
        for _ in range(times):
            current = store.get(b"key")
            while True:
                assert current is not None
                loss = store.swap(b"key", current, b"%d" % (int(current) + 1), 60_000)
                if loss is None:
                    break
                current = loss.state

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(add, [500] * 8))
    assert store.get(b"key") == b"4000"


def test_both_faces_may_share_one_store() -> None:
    store = MemoryStore()
    store.put(b"key", b"1")
    assert asyncio.run(AsyncMemoryStore(store).get(b"key")) == b"1"
    asyncio.run(AsyncMemoryStore(store).put(b"key", b"2"))
    assert store.get(b"key") == b"2"
