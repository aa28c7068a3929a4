"""Calls that run at the same time keep the bound, and lose no token."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit import (
    AsyncProxyManager,
    Expiration,
    Optimization,
    ProxyManager,
    StoreError,
    StoreUnavailableError,
)
from ratelimit.core.commands import ConsumeAsMuchAsPossible, TryConsume
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore
from tests.engine.local_decisions.doubles import (
    DELAYING,
    LIMITS,
    NOW,
    SECOND,
    CountingStore,
    TickingClock,
    admitted_by,
    budgets,
    counts,
    limits,
    stored,
)
from tests.support.inside import local_decisions_of, proxy_of, steps_of


class Interleaved:
    """Calls of some managers, which a test moves on by hand, one step at a time."""

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
    """A manager that is held while it reports 2 of its 3 tokens to the store."""

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
