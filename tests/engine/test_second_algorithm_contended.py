"""A second algorithm under contention: exactly the capacity is admitted in each window, by swaps alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from typing import Any

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    ContentionError,
    ProxyManager,
    RedisStore,
    ReservationOverflowError,
    TokensInheritance,
)
from ratelimit.engine.coalescing.threads import ThreadCoalescing
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, SwappingMemoryStore
from tests.engine.conftest import NOW
from tests.support.both_faces import Settled
from tests.support.decision_paths import By, Tap, deciding_by
from tests.support.fixed_window import FIXED_WINDOW, FixedWindow
from tests.support.inside import coalescing_of, pipeline_of
from tests.support.servers import wait_until

LONG = 10**18
"""Nanoseconds of a window that does not end while a test runs."""

LIMITS = FixedWindow(300, LONG)
CALLERS, CALLS = 8, 60  # of each manager


class YieldingStore(SwappingMemoryStore):
    """A store that lets other threads in before each swap."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps = 0
        self.lost = 0

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        time.sleep(0.000_05)
        loss = super().swap(key, before, after, ttl_millis)
        self.swaps += 1
        self.lost += loss is not None
        return loss


class AsyncYieldingStore(AsyncSwappingMemoryStore):
    """A store that lets other tasks in before each swap."""

    def __init__(self) -> None:
        super().__init__()
        self.swaps = 0
        self.lost = 0

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        await asyncio.sleep(0)
        loss = await super().swap(key, before, after, ttl_millis)
        self.swaps += 1
        self.lost += loss is not None
        return loss


def admitted_by_threads(managers: list[ProxyManager]) -> int:
    """Let threads of each manager consume one by one; return how many tokens they have got."""

    def consume(manager: ProxyManager) -> int:
        return sum(manager.try_consume("key") for _ in range(CALLS))

    with ThreadPoolExecutor(CALLERS * len(managers)) as pool:
        return sum(pool.map(consume, managers * CALLERS))


async def admitted_by_tasks(managers: list[AsyncProxyManager]) -> int:
    """Let tasks of each manager consume one by one; return how many tokens they have got."""

    async def consume(manager: AsyncProxyManager) -> int:
        return sum([await manager.try_consume("key") for _ in range(CALLS)])

    return sum(await asyncio.gather(*(consume(manager) for manager in managers * CALLERS)))


# In memory


def test_threads_on_one_key_share_swaps_and_get_exactly_the_capacity() -> None:
    store = YieldingStore()
    manager = ProxyManager(store, LIMITS)
    assert admitted_by_threads([manager]) == 300
    assert (store.lost, manager.snapshot("key").consumed_tokens) == (0, 300)
    assert store.swaps < 300


async def test_tasks_on_one_key_share_swaps_and_get_exactly_the_capacity() -> None:
    store = AsyncYieldingStore()
    manager = AsyncProxyManager(store, LIMITS)
    assert await admitted_by_tasks([manager]) == 300
    assert (store.lost, (await manager.snapshot("key")).consumed_tokens) == (0, 300)
    assert store.swaps < 300


def test_threads_of_several_managers_lose_swaps_and_get_exactly_the_capacity() -> None:
    store = YieldingStore()
    managers = [ProxyManager(store, LIMITS, merging=merging) for merging in (True, False)]
    assert admitted_by_threads(managers) == 300
    assert store.lost
    assert managers[0].snapshot("key").consumed_tokens == 300


async def test_tasks_of_several_managers_lose_swaps_and_get_exactly_the_capacity() -> None:
    store = AsyncYieldingStore()
    managers = [AsyncProxyManager(store, LIMITS, merging=merging) for merging in (True, False)]
    assert await admitted_by_tasks(managers) == 300
    assert store.lost
    assert (await managers[0].snapshot("key")).consumed_tokens == 300


# Batches

VERBS: list[tuple[Any, ...]] = [
    ("try_consume", 4),
    ("try_consume", 4),
    ("try_consume_and_return_remaining", 3),
    ("try_consume_as_much_as_possible", 9),
    ("try_consume", 1),
    ("give_back", 2),
    ("try_consume", 2),
    ("consume_ignoring_rate_limits", 25),
    ("consume_ignoring_rate_limits", 2**63 - 1),
    ("add_tokens", 30),
    ("hold_back", 20),
    ("try_consume", 1),
    ("replace_configuration", "5/second", TokensInheritance.AS_IS),
    ("try_consume_and_return_remaining", 5),
    ("replace_configuration", FixedWindow(8, 10**10), TokensInheritance.AS_IS),
    ("try_consume_and_return_remaining", 6),
    ("force_add_tokens", 7),
    ("reset",),
    ("try_consume", 8),
    ("try_consume", 1),
]


def one_by_one() -> tuple[list[Any], bytes | None]:
    """Return the answers of the verbs without coalescing, and the bytes that they leave."""
    store = SwappingMemoryStore()
    manager = ProxyManager(store, FixedWindow(10, 10**10), clock=ManualClock(NOW), merging=False)
    manager.try_consume("key", 2)
    answers: list[Any] = []
    for verb, *arguments in VERBS:
        try:
            answers.append(getattr(manager.bucket("key"), verb)(*arguments))
        except ReservationOverflowError as error:
            answers.append(type(error))
    return answers, store.get("key")


class GatedStore(SwappingMemoryStore):
    """A store whose swaps wait until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.swaps = 0

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        self.gate.wait()
        return super().swap(key, before, after, ttl_millis)


class AsyncGatedStore(AsyncSwappingMemoryStore):
    """A store for tasks whose swaps wait until they may go on."""

    def __init__(self, inner: SwappingMemoryStore) -> None:
        super().__init__(inner)
        self.gate = asyncio.Event()
        self.swaps = 0

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        await self.gate.wait()
        return await super().swap(key, before, after, ttl_millis)


def test_threads_that_go_together_are_answered_in_order() -> None:
    store = GatedStore()
    manager = ProxyManager(store, FixedWindow(10, 10**10), clock=ManualClock(NOW))
    coalescing = coalescing_of(manager)
    assert isinstance(coalescing, ThreadCoalescing)
    with ThreadPoolExecutor(len(VERBS) + 1) as pool:
        first = pool.submit(manager.try_consume, "key", 2)
        wait_until(lambda: store.swaps == 1, "the first is in flight")
        others = []
        for number, (verb, *arguments) in enumerate(VERBS, start=1):
            others.append(pool.submit(getattr(manager.bucket("key"), verb), *arguments))
            wait_until(lambda: len(coalescing._queues.get(b"key", ())) == number, "it queues")  # noqa: B023
        store.gate.set()
        assert first.result()
        failures = [other.exception() for other in others]
        answers = [
            other.result() if failure is None else type(failure)
            for other, failure in zip(others, failures, strict=True)
        ]
    assert (answers, store.get("key")) == one_by_one()
    assert store.swaps == 2


async def test_tasks_that_go_together_are_answered_in_order() -> None:
    inner = SwappingMemoryStore()
    store = AsyncGatedStore(inner)
    manager = AsyncProxyManager(store, FixedWindow(10, 10**10), clock=ManualClock(NOW))
    first = asyncio.ensure_future(manager.try_consume("key", 2))
    while not store.swaps:
        await asyncio.sleep(0)
    others = [asyncio.ensure_future(getattr(manager.bucket("key"), verb)(*arguments)) for verb, *arguments in VERBS]
    await asyncio.sleep(0)
    store.gate.set()
    assert await first
    answers = await asyncio.gather(*others, return_exceptions=True)
    answers = [type(answer) if isinstance(answer, Exception) else answer for answer in answers]
    assert (answers, inner.get("key")) == one_by_one()
    assert store.swaps == 2


# Redis


class Scene:
    """Managers of one face over one server, and what each of them sends."""

    def __init__(self, make: Callable[[Any], tuple[Any, Tap]]) -> None:
        self._make = make
        self.taps: list[Tap] = []

    def managers(self, limits: Any, count: int = 3) -> list[Any]:
        made = [self._make(limits) for _ in range(count)]
        self.taps += [tap for _, tap in made]
        return [manager for manager, _ in made]

    def swaps(self) -> int:
        """Return how many swaps were sent, after a check that the server was never asked to decide."""
        sent = Counter(kind for tap in self.taps for kind in tap.sent)
        assert "decide" not in sent
        assert all("swap" in tap.sent for tap in self.taps)
        return sent["swap"]


@pytest.fixture
async def threads(url: str) -> AsyncGenerator[Scene]:
    with ExitStack() as stack:

        def make(limits: Any) -> tuple[Any, Tap]:
            store = RedisStore(stack.enter_context(redis.Redis.from_url(url)))
            return ProxyManager(store, limits), Tap(store)

        yield Scene(make)


@pytest.fixture
async def tasks(url: str) -> AsyncGenerator[Scene]:
    async with AsyncExitStack() as stack:

        def make(limits: Any) -> tuple[Any, Tap]:
            client: Any = redis.asyncio.Redis.from_url(url)
            stack.push_async_callback(client.aclose)
            store = AsyncRedisStore(client)
            stack.push_async_callback(store.aclose)
            return AsyncProxyManager(store, limits), Tap(store)

        yield Scene(make)


@pytest.fixture(params=["sync", "asyncio"])
async def scene(request: pytest.FixtureRequest, threads: Scene, tasks: Scene) -> Scene:
    return threads if request.param == "sync" else tasks


def test_there_is_no_script_of_the_second_algorithm() -> None:
    assert FIXED_WINDOW.script is None


@pytest.mark.redis
@pytest.mark.parametrize("by", By)
def test_threads_over_one_server_get_exactly_the_capacity_without_its_script(threads: Scene, by: By) -> None:
    with deciding_by(by):
        managers = threads.managers(LIMITS)
        assert admitted_by_threads(managers) == 300
    assert managers[0].snapshot("key").consumed_tokens == 300
    assert threads.swaps() < 600


@pytest.mark.redis
@pytest.mark.parametrize("by", By)
async def test_tasks_over_one_server_get_exactly_the_capacity_without_its_script(tasks: Scene, by: By) -> None:
    with deciding_by(by):
        managers = tasks.managers(LIMITS)
        assert await admitted_by_tasks(managers) == 300
    assert (await managers[0].snapshot("key")).consumed_tokens == 300
    assert tasks.swaps() < 600


@pytest.mark.redis
def test_in_each_of_many_windows_exactly_the_capacity_is_admitted(threads: Scene) -> None:
    managers = threads.managers(FixedWindow(20, 50_000_000))
    end = time.monotonic() + 30
    answers: list[tuple[int, bool]] = []
    refused: set[int] = set()

    def consume(manager: ProxyManager) -> None:
        bucket = manager.bucket("key").verbose
        while len(refused) < 5 and time.monotonic() < end:
            answer = bucket.try_consume()
            window: Any = answer.bandwidth_states[0]
            answers.append((window.begin, answer.value))
            if not answer.value:
                refused.add(window.begin)
            time.sleep(0.001)

    with ThreadPoolExecutor(9) as pool:
        list(pool.map(consume, managers * 3))
    admitted = Counter(begin for begin, is_admitted in answers if is_admitted)
    assert len(refused) >= 5
    assert max(admitted.values()) <= 20
    assert {admitted[begin] for begin in refused} == {20}
    assert managers[0].snapshot("key").consumed_tokens == admitted.total()
    assert threads.swaps()


@pytest.mark.redis
async def test_a_decision_that_others_get_ahead_of_swaps_on_with_pauses(scene: Scene, url: str) -> None:
    with ProxyManager.from_url(url, LIMITS) as other:
        (manager,) = scene.managers(LIMITS, 1)
        (tap,), face = scene.taps, Settled(manager)
        requests = pipeline_of(manager).requests
        pause, pauses = requests.pause, 0

        def noted(nanos: int) -> Any:
            nonlocal pauses
            pauses += 1
            return pause(nanos)

        requests.pause = noted
        assert await face.try_consume("key")
        tap.taken()
        left = 6

        def disturb(kind: str) -> None:
            nonlocal left
            if kind == "swap" and left:
                left -= 1
                assert other.try_consume("key")

        tap.before = disturb
        assert await face.try_consume("key", 3)
        # After four swaps from the winners' bytes each attempt begins with a pause and a read.
        sent = [kind for kind in tap.taken() if kind != "time"]
        assert sent == ["swap"] * 4 + ["get", "swap"] * 3
        assert pauses == 3
        assert (await face.snapshot("key")).consumed_tokens == 1 + 6 + 3


@pytest.mark.redis
async def test_a_decision_that_others_always_get_ahead_of_ends(url: str) -> None:
    with redis.Redis.from_url(url) as client, ProxyManager.from_url(url, LIMITS) as other:
        store = RedisStore(client)
        manager = ProxyManager(store, LIMITS, max_attempts=7)
        tap = Tap(store)
        tap.before = lambda kind: None if kind != "swap" else other.bucket("key").add_tokens(1)
        with pytest.raises(ContentionError) as caught:
            manager.try_consume("key")
        assert (caught.value.key, caught.value.attempts) == ("key", 7)
        assert Counter(tap.sent)["swap"] == 7
        assert "decide" not in tap.sent
        assert other.snapshot("key").consumed_tokens == 0
