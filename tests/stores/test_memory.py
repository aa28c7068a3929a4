from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import (
    AsyncMemoryStore,
    BucketConfiguration,
    BucketNotFoundError,
    Expiration,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    RateLimitError,
    Recovery,
    TokensInheritance,
)
from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, SwappingMemoryStore
from tests.support.inside import pipeline_of

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


@pytest.mark.parametrize("method", ["get", "swap"])
def test_a_class_whose_own_swaps_would_be_bypassed_is_refused(method: str) -> None:
    body = {method: lambda *_: None}
    for base in (MemoryStore, AsyncMemoryStore):
        with pytest.raises(TypeError, match=rf"Double\.{method} would be bypassed.*derive from .*SwappingMemoryStore"):
            type("Double", (base,), body)
        type("Double", (base,), {"close": lambda _: None})
    for unbypassed in (SwappingMemoryStore, AsyncSwappingMemoryStore):
        type("Double", (unbypassed,), body)


def test_a_store_without_updates_is_refused_as_one_that_has_them() -> None:
    wrong: Any = SwappingMemoryStore()
    with pytest.raises(InvalidArgumentError, match="store must be a MemoryStore, or be given to an AsyncSwapping"):
        AsyncMemoryStore(wrong)


VERBS: list[Callable[[Any, int], Any]] = [
    lambda bucket, tokens: bucket.try_consume(tokens),
    lambda bucket, tokens: bucket.try_consume(tokens),
    lambda bucket, tokens: bucket.verbose.try_consume_and_return_remaining(tokens),
    lambda bucket, tokens: bucket.try_consume_as_much_as_possible(tokens),
    lambda bucket, tokens: bucket.consume_ignoring_rate_limits(tokens),
    lambda bucket, tokens: bucket.consume(tokens, max_wait=30),
    lambda bucket, tokens: bucket.estimate_ability_to_consume(tokens),
    lambda bucket, _: bucket.available_tokens(),
    lambda bucket, _: bucket.snapshot(),
    lambda bucket, tokens: bucket.add_tokens(tokens),
    lambda bucket, tokens: bucket.force_add_tokens(tokens),
    lambda bucket, _: bucket.reset(),
    lambda bucket, tokens: bucket.replace_configuration(f"{tokens}/minute", TokensInheritance.PROPORTIONALLY),
]
LIMITS = ["10/minute", "5/second; 20/hour intervally", "7/second initial 0", "3/5 seconds burst 9"]
EXPIRATIONS = [
    None,
    Expiration.none(),
    Expiration.fixed(0.001),
    Expiration.fixed(20),
    Expiration.after_refill(),
    Expiration.after_refill(3),
]


class Pair:
    """Two stores with equal buckets: one executes commands, the other is asked by swaps."""

    def __init__(self, limits: str, *, one_clock: bool, **settings: Any) -> None:
        self.stores: list[SwappingMemoryStore] = []
        self.managers: list[ProxyManager] = []
        self.times: list[ManualClock] = []
        self.expiries: list[ManualClock] = []
        for kind in (MemoryStore, SwappingMemoryStore):
            expiry = ManualClock(1_700_000_000 * 10**9, advance_on_sleep=False)
            time = expiry if one_clock else ManualClock(0, advance_on_sleep=False)
            store = kind(clock=expiry)
            self.stores.append(store)
            manager = ProxyManager(store, limits, clock=None if one_clock else time, **settings)
            pipeline_of(manager).sleep = lambda _: None
            self.managers.append(manager)
            self.times.append(time)
            self.expiries.append(expiry)
        self.buckets = [
            [manager.bucket(key, configuration_version=version) for key, version in KEYS] for manager in self.managers
        ]

    def done(self, verb: int, place: int, tokens: int, index: int) -> Any:
        """Do one thing to one of the two."""
        key, _ = KEYS[place]
        if verb < len(VERBS):
            return VERBS[verb](self.buckets[index][place], tokens)
        if verb == len(VERBS):
            return self.managers[index].remove(key)
        return self.stores[index].put(key, FOREIGN if tokens < 12 else b"foreign")

    def both(self, do: Callable[[int], Any]) -> None:
        """Do the same to both, and compare the results."""
        answers = []
        for index in range(2):
            try:
                answers.append(do(index))
            except (RateLimitError, ArithmeticError) as error:
                answers.append((type(error), str(error)))
        assert answers[0] == answers[1]
        for key in {key for key, _ in KEYS}:
            assert self.stores[0].get(key) == self.stores[1].get(key)


@pytest.mark.parametrize("make", [MemoryStore, SwappingMemoryStore])
def test_a_handle_that_replaced_the_configuration_may_insist_on_its_bucket(make: type[MemoryStore]) -> None:
    store = make(clock=ManualClock(0))
    manager = ProxyManager(store, "5/hour", recovery=Recovery.RAISE, configuration_version=2)
    assert ProxyManager(store, "4/hour").try_consume("key")
    assert manager.try_consume("key")
    store.delete(b"key")
    with pytest.raises(BucketNotFoundError):
        manager.try_consume("key")


FOREIGN = codec.encode(BucketState.initial(BucketConfiguration.parse("4/second"), 1, 0))
KEYS = [("a", None), ("b", None), ("b", 1), ("b", 2), ("c", 1)]


@given(
    st.sampled_from(LIMITS),
    st.sampled_from(EXPIRATIONS),
    st.sampled_from(Recovery),
    st.booleans(),
    st.lists(
        st.tuples(
            st.integers(0, len(VERBS) + 1),
            st.integers(0, len(KEYS) - 1),
            st.one_of(st.integers(1, 12), st.just(MAX)),
            st.one_of(st.just(0), st.integers(-2, 10), st.integers(0, 2000), st.integers(-(10**5), 10**8)),
        ),
        max_size=25,
    ),
)
def test_commands_that_the_store_executes_do_what_swaps_do(
    limits: str,
    expiration: Expiration | None,
    recovery: Recovery,
    one_clock: bool,
    steps: list[tuple[int, int, int, int]],
) -> None:
    pair = Pair(limits, one_clock=one_clock, expiration=expiration, recovery=recovery)
    for verb, place, tokens, millis in steps:
        for clock in {*pair.times, *pair.expiries}:
            clock.advance(nanos=millis * MILLISECOND)
        pair.both(partial(pair.done, verb, place, tokens))
