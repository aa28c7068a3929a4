"""A listener hears of each decision, of errors, and of waits that are cut short."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from ratelimit import (
    NEVER,
    AsyncMemoryStore,
    AsyncProxyManager,
    CountingListener,
    Decision,
    InvalidArgumentError,
    MemoryStore,
    OnError,
    ProxyManager,
    StoreUnavailableError,
)
from ratelimit.keys import Key
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.both_faces import Settled, for_asyncio, settled
from tests.support.inside import pipeline_of

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
LIMITS = "10/minute"


class Recorder:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.interruptions: list[tuple[Key, int, BaseException]] = []

    def on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
        self.interruptions.append((key, tokens, error))

    def told(self) -> Decision:
        """Return the only decision since the last call, without how long it took."""
        (decision,) = self.decisions
        self.decisions.clear()
        assert decision.duration_nanos >= 0
        return decision._replace(duration_nanos=0)


Make = Callable[..., Settled]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def listener() -> Recorder:
    return Recorder()


@pytest.fixture(params=["sync", "asyncio", "sync in process", "asyncio in process"])
def make(request: pytest.FixtureRequest, clock: ManualClock, listener: Recorder) -> Make:
    def make(limits: Any = LIMITS, store: Any = None, **settings: Any) -> Settled:
        settings = {"clock": clock, "listener": listener, **settings}
        in_process = "process" in request.param
        if "asyncio" in request.param:
            own: Any = AsyncMemoryStore() if in_process else AsyncSwappingMemoryStore()
            return Settled(AsyncProxyManager(own if store is None else for_asyncio(store), limits, **settings))
        own = MemoryStore() if in_process else SwappingMemoryStore()
        return Settled(ProxyManager(own if store is None else store, limits, **settings))

    return make


async def test_it_is_told_of_each_decision(make: Make, listener: Recorder) -> None:
    face = make()
    asynchronous = isinstance(face.face, AsyncProxyManager)
    at_once = pipeline_of(face).coalescing is None

    def decision(verb: str, tokens: int, consumed: int, remaining: int, wait: int) -> Decision:
        trips = 0 if at_once else 1
        return Decision("key", verb, tokens, consumed, remaining, wait, 0, trips, False, None, asynchronous)

    assert await face.try_consume("key", 3)
    assert listener.told() == decision("try_consume", 3, 3, 7, 0)
    assert not await face.try_consume("key", 8)
    assert listener.told() == decision("try_consume", 8, 0, 7, 6 * SECOND)
    assert await face.try_consume_and_return_remaining("key", 2)
    assert listener.told() == decision("try_consume_and_return_remaining", 2, 2, 5, 0)
    assert await face.try_consume_as_much_as_possible("key", 4) == 4
    assert listener.told() == decision("try_consume_as_much_as_possible", 4, 4, 1, 0)
    assert await face.consume_ignoring_rate_limits("key", 2) == 6 * SECOND
    assert listener.told() == decision("consume_ignoring_rate_limits", 2, 2, -1, 6 * SECOND)
    assert not await face.estimate_ability_to_consume("key", 1)
    assert listener.told() == decision("estimate_ability_to_consume", 1, 0, 0, 12 * SECOND)
    assert not await face.consume("key", max_wait=5)
    assert listener.told() == decision("consume", 1, 0, -1, NEVER)
    assert await face.consume("key")
    assert listener.told() == decision("consume", 1, 1, -2, 12 * SECOND)
    result = await settled(face.face.bucket("key").verbose.try_consume(2))
    assert not result.value
    assert listener.told() == decision("try_consume", 2, 0, 0, 0)
    await face.available_tokens("key")
    await face.add_tokens("key", 1)
    await face.reset("key")
    await face.snapshot("key")
    assert listener.decisions == []


async def test_it_is_told_of_errors(make: Make, listener: Recorder) -> None:
    store = ScriptedStore()
    face = make(store=store)
    store.fail()
    with pytest.raises(StoreUnavailableError) as caught:
        await face.try_consume("key")
    told = listener.told()
    assert (told.error, told.degraded, told.consumed, told.remaining) == (caught.value, False, 0, None)
    face = make(store=store, on_error=OnError.DENY)
    store.fail()
    assert not await face.try_consume("key", 2)
    told = listener.told()
    assert (type(told.error), told.degraded, told.consumed) == (StoreUnavailableError, True, 0)
    assert (told.tokens, told.wait_nanos) == (2, SECOND)


async def test_it_is_told_of_waits_that_are_cut_short(make: Make, listener: Recorder) -> None:
    face = make()
    await face.try_consume("key", 10)

    def interrupt(_nanos: int) -> None:
        raise KeyboardInterrupt

    pipeline_of(face).sleep = interrupt
    with pytest.raises(KeyboardInterrupt) as caught:
        await face.consume("key", 2)
    assert listener.interruptions == [("key", 2, caught.value)]


async def test_one_that_fails_is_logged_and_changes_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def on_decision(self, decision: Decision) -> None:
            raise ValueError(decision.verb)

        def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
            raise ValueError(key)

    face = make(listener=Failing())
    assert await face.try_consume("key")
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.ERROR, "a listener has failed")]


async def test_something_else_is_refused(make: Make) -> None:
    class Awaited:
        async def on_decision(self, decision: Decision) -> None: ...

        async def on_interrupted(self, key: Key, tokens: int, error: BaseException) -> None: ...

    for listener in (print, Awaited()):
        with pytest.raises(InvalidArgumentError, match=r"listener must have on_decision\(\) and on_interrupted\(\)"):
            make(listener=listener)


async def test_tasks_that_share_a_swap_are_told_of_one_by_one() -> None:
    listener = Recorder()
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), "5/hour", clock=ManualClock(NOW), listener=listener)
    await asyncio.gather(*(manager.try_consume("key") for _ in range(8)))
    assert sorted(decision.consumed for decision in listener.decisions) == [0] * 3 + [1] * 5
    assert sorted(decision.remaining or 0 for decision in listener.decisions) == [0, 0, 0, 0, 1, 2, 3, 4]
    assert all(1 <= decision.round_trips <= 2 for decision in listener.decisions)


async def test_counters(make: Make, clock: ManualClock) -> None:
    counters = CountingListener()
    store = ScriptedStore()
    face = make(store=store, listener=counters)
    await face.try_consume("key", 4)
    await face.try_consume("key", 7)
    await face.estimate_ability_to_consume("key", 100)
    await face.try_consume_as_much_as_possible("key")
    await face.consume("key", 2)
    assert (counters.consumed, counters.rejected) == (12, 7)
    waited = (counters.parked_nanos, counters.delayed_nanos)
    assert waited == ((0, 12 * SECOND) if isinstance(face.face, AsyncProxyManager) else (12 * SECOND, 0))
    store.fail()
    clock.advance(60)
    with pytest.raises(StoreUnavailableError):
        await face.try_consume("key")
    bucket = face.face.bucket("key", on_error=OnError.ALLOW)
    store.fail()
    assert await settled(bucket.try_consume(3))
    assert (counters.failed, counters.degraded, counters.consumed, counters.rejected) == (1, 1, 15, 7)

    def interrupt(_nanos: int) -> None:
        raise KeyboardInterrupt

    pipeline_of(face).sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        await face.consume("key", 100)
    assert counters.interrupted == 1
