"""Calls that want the same bucket at once share a swap, and each has the answer it would have had alone."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import (
    AsyncProxyManager,
    ProxyManager,
    ReservationOverflowError,
    StoreUnavailableError,
    TokensInheritance,
)
from ratelimit.core.commands import Batch, ConsumeIgnoringRateLimits, TryConsume
from ratelimit.engine.coalescing.tasks import TaskCoalescing
from ratelimit.engine.coalescing.threads import ThreadCoalescing
from ratelimit.engine.question import Course
from ratelimit.engine.store_requests import _WithDeadlines
from ratelimit.keys import Key
from ratelimit.runtime.steps import arun
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.inside import coalescing_of, pipeline_of, steps_of
from tests.support.servers import wait_until

NOW = 1_700_000_000 * 10**9 + 1
LIMITS = "100/hour"


class GatedStore(ScriptedStore):
    """Whose swaps wait in a thread until they may go on; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.swaps = 0
        self.reads = 0

    def get(self, key: Key) -> bytes | None:
        self.reads += 1
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        self.gate.wait()
        return super().swap(key, before, after, ttl_millis)


class AsyncGatedStore(AsyncSwappingMemoryStore):
    """A store of tasks that does last what it was asked first."""

    def __init__(self) -> None:
        self.inner = ScriptedStore()
        super().__init__(self.inner)
        self.gate = asyncio.Event()
        self.gate.set()
        self.closes_behind_a_swap = False
        self.swaps = 0
        self.reads = 0

    async def get(self, key: Key) -> bytes | None:
        self.reads += 1
        await self.gate.wait()
        return self.inner.get(key)

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        await self.gate.wait()
        if self.closes_behind_a_swap:
            self.closes_behind_a_swap = False
            self.gate.clear()
        return self.inner.swap(key, before, after, ttl_millis)


tokens = st.integers(1, 60)
calls = st.one_of(
    tokens.map(lambda n: ("try_consume", n)),
    tokens.map(lambda n: ("try_consume_and_return_remaining", n)),
    tokens.map(lambda n: ("try_consume_as_much_as_possible", n)),
    tokens.map(lambda n: ("consume_ignoring_rate_limits", n)),
    tokens.map(lambda n: ("add_tokens", n)),
    tokens.map(lambda n: ("force_add_tokens", n)),
    tokens.map(lambda n: ("give_back", n)),
    tokens.map(lambda n: ("hold_back", n)),
    st.just(("consume_ignoring_rate_limits", 2**63 - 1)),
    st.just(("reset",)),
    st.sampled_from(TokensInheritance).map(lambda how: ("replace_configuration", "50/minute; 80/hour id h", how)),
)


@given(st.lists(calls, min_size=1, max_size=12), st.booleans())
def test_merged_calls_answer_and_store_what_single_calls_would(wanted: list[tuple[Any, ...]], known: bool) -> None:
    alone = ProxyManager(SwappingMemoryStore(), LIMITS, clock=ManualClock(NOW), merging=False)
    if known:
        alone.try_consume("key")
    alone.try_consume("key", 30)
    expected = []
    for verb, *arguments in wanted:
        try:
            expected.append(getattr(alone.bucket("key"), verb)(*arguments))
        except ReservationOverflowError as error:
            expected.append(type(error))

    async def merged() -> tuple[list[Any], bytes | None, int]:
        store = AsyncGatedStore()
        manager = AsyncProxyManager(store, LIMITS, clock=ManualClock(NOW))
        if known:
            await manager.try_consume("key")
        store.gate.clear()
        first = asyncio.create_task(manager.try_consume("key", 30))
        while not store.swaps - known:
            await asyncio.sleep(0)
        others = [
            asyncio.ensure_future(getattr(manager.bucket("key"), verb)(*arguments)) for verb, *arguments in wanted
        ]
        await asyncio.sleep(0)
        store.gate.set()
        assert await first
        answers = await asyncio.gather(*others, return_exceptions=True)
        answers = [type(answer) if isinstance(answer, Exception) else answer for answer in answers]
        return answers, store.inner.get("key"), store.swaps - known

    answers, data, swaps = asyncio.run(merged())
    assert answers == expected
    assert data == alone._store.get(b"key")
    assert swaps <= 2


def queues(manager: Any) -> dict[Any, Any]:
    merger = coalescing_of(manager)
    assert isinstance(merger, ThreadCoalescing | TaskCoalescing)
    if isinstance(merger, ThreadCoalescing):
        return merger._leaders
    return {(loop, key): queue for loop, line in merger._lines.items() for key, queue in line.queues.items()}


def followers(manager: Any) -> dict[bytes, list[Any]]:
    merger = coalescing_of(manager)
    assert isinstance(merger, ThreadCoalescing)
    return merger._queues


@contextmanager
def held(store: GatedStore) -> Generator[None]:
    store.gate.clear()
    try:
        yield
    finally:
        store.gate.set()


def test_threads_share_one_swap() -> None:
    store = GatedStore()
    manager = ProxyManager(store, LIMITS, clock=ManualClock(NOW))
    with ThreadPoolExecutor(32) as threads:
        with held(store):
            first = threads.submit(manager.try_consume, "key", 80)
            wait_until(lambda: store.swaps == 1, "the first is in flight")
            others = [threads.submit(manager.try_consume, "key") for _ in range(30)]
            wait_until(lambda: len(followers(manager).get(b"key", ())) == 30, "the others queue")
        assert first.result()
        assert [other.result() for other in others].count(True) == 20
    assert (store.swaps, store.reads) == (2, 0)


def test_without_merging_each_has_its_own() -> None:
    store = GatedStore()
    manager = ProxyManager(store, LIMITS, clock=ManualClock(NOW), merging=False)
    with ThreadPoolExecutor(4) as threads, held(store):
        answers = [threads.submit(manager.try_consume, "key") for _ in range(4)]
        wait_until(lambda: store.swaps == 4, "all are in flight")
        store.gate.set()
        assert all(answer.result() for answer in answers)


def test_keys_do_not_wait_for_each_other() -> None:
    store = GatedStore()
    manager = ProxyManager(store, LIMITS, clock=ManualClock(NOW))
    with ThreadPoolExecutor(2) as threads, held(store):
        answers = [threads.submit(manager.try_consume, key) for key in ("a", "b")]
        wait_until(lambda: store.swaps == 2, "both are in flight")
        store.gate.set()
        assert all(answer.result() for answer in answers)


class Tasks:
    """A manager whose first swap is in flight, and tasks that queue behind it."""

    def __init__(self) -> None:
        self.store = AsyncGatedStore()
        self.manager = AsyncProxyManager(self.store, LIMITS, clock=ManualClock(NOW))

    async def hold(self, tokens: int = 1) -> asyncio.Task[bool]:
        """The first, whose swap does not end before the gate is opened."""
        await self.manager.try_consume("key")
        self.store.gate.clear()
        swaps = self.store.swaps
        first = asyncio.create_task(self.manager.try_consume("key", tokens))
        while self.store.swaps == swaps:
            await asyncio.sleep(0)
        return first

    async def queue(self, count: int, key: Key = "key", **settings: Any) -> list[asyncio.Task[bool]]:
        bucket = self.manager.bucket(key, **settings)
        tasks = [asyncio.create_task(bucket.try_consume()) for _ in range(count)]
        await asyncio.sleep(0)
        return tasks

    async def consumed(self) -> int:
        return (await self.manager.snapshot("key")).consumed_tokens

    def idle(self) -> bool:
        return not queues(self.manager)


@pytest.fixture
async def tasks() -> Tasks:
    return Tasks()


async def ended(tasks: list[asyncio.Task[bool]]) -> list[Any]:
    async with asyncio.timeout(10):
        return await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_error_is_everybodys_and_names_everybodys_key(tasks: Tasks) -> None:
    first = await tasks.hold()
    others = await tasks.queue(2) + await tasks.queue(1, b"key")
    tasks.store.inner._script.append(tasks.store.inner._do)  # the one in flight
    tasks.store.inner.fail()
    tasks.store.gate.set()
    assert await first
    errors = await ended(others)
    assert [type(error) for error in errors] == [StoreUnavailableError] * 3
    assert len(set(map(id, errors))) == 3
    assert [error.key for error in errors] == ["key", "key", b"key"]
    assert await tasks.manager.try_consume("key")
    assert await tasks.consumed() == 3
    assert tasks.idle()


async def test_one_that_is_cancelled_in_the_queue_is_not_charged(tasks: Tasks) -> None:
    first = await tasks.hold()
    others = await tasks.queue(5)
    for index in (0, 3):
        others[index].cancel()
    await asyncio.sleep(0)
    tasks.store.gate.set()
    assert await first
    results = await ended(others)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, False, False, True, False]
    assert await tasks.consumed() == 5
    assert tasks.idle()


async def test_a_call_cancelled_in_flight_is_charged_and_disturbs_none(tasks: Tasks) -> None:
    first = await tasks.hold()
    others = await tasks.queue(4)
    tasks.store.closes_behind_a_swap = True
    tasks.store.gate.set()
    assert await first
    while tasks.store.swaps < 3:
        await asyncio.sleep(0)
    others[0].cancel()
    await asyncio.sleep(0)
    assert not any(task.done() for task in others[1:])
    tasks.store.gate.set()
    cancelled, *answers = await ended(others)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert answers == [True] * 3
    assert await tasks.consumed() == 2 + 4  # its swap was on its way
    assert tasks.idle()


async def test_a_call_cancelled_during_the_read_holds_up_no_other(tasks: Tasks) -> None:
    first = await tasks.hold(tokens=99)
    others = await tasks.queue(3)
    reads = tasks.store.reads
    tasks.store.closes_behind_a_swap = True
    tasks.store.gate.set()
    assert await first
    while tasks.store.reads == reads:  # it is empty, says memory; the store has to confirm that
        await asyncio.sleep(0)
    others[1].cancel()  # in flight, so that it leaves a place that nobody may lead from
    others[0].cancel()
    await asyncio.sleep(0)
    tasks.store.gate.set()
    results = await ended(others)
    assert [isinstance(result, asyncio.CancelledError) for result in results] == [True, True, False]
    assert results[2] is False
    assert tasks.idle()


async def test_a_call_cancelled_before_its_exchange_holds_up_no_other(tasks: Tasks) -> None:
    first = await tasks.hold()
    others = await tasks.queue(3)
    first.add_done_callback(lambda _: others[0].cancel())  # it has been woken by then, and has not run yet
    tasks.store.gate.set()
    assert await first
    results = await ended(others)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [True, True]
    assert tasks.idle()


async def test_a_waiter_cancelled_in_a_shared_swap_returns_its_tokens(tasks: Tasks) -> None:
    first = await tasks.hold()
    (leader,) = await tasks.queue(1)
    waiting = asyncio.create_task(tasks.manager.consume("key", 200))
    await asyncio.sleep(0)
    tasks.store.closes_behind_a_swap = True
    tasks.store.gate.set()
    assert await first
    while tasks.store.swaps < 3:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.sleep(0)
    tasks.store.gate.set()
    assert await leader
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await tasks.consumed() == 3
    assert tasks.idle()


async def test_other_limits_go_in_a_swap_of_their_own(tasks: Tasks) -> None:
    first = await tasks.hold()
    others = await tasks.queue(2) + await tasks.queue(2, configuration="7/hour", configuration_version=1)
    others += await tasks.queue(2)
    tasks.store.gate.set()
    assert await first
    assert await ended(others) == [True] * 6
    assert tasks.store.swaps == 2 + 3
    snapshot = await tasks.manager.snapshot("key")
    assert (str(snapshot.configuration), snapshot.consumed_tokens) == ("7/hour", 8)


@pytest.mark.parametrize(("limits", "different"), [("9/hour", 256), ("9/hour; 80/day", 128)])
async def test_different_commands_go_in_parts_and_equal_ones_at_once(tasks: Tasks, limits: str, different: int) -> None:
    first = await tasks.hold()
    bucket = tasks.manager.bucket("key", configuration=limits)
    calls = [asyncio.ensure_future(bucket.consume_ignoring_rate_limits(1)) for _ in range(2 * different + 1)]
    calls += [asyncio.ensure_future(bucket.try_consume(1000)) for _ in range(1000)]
    await asyncio.sleep(0)
    tasks.store.gate.set()
    assert await first
    async with asyncio.timeout(10):
        await asyncio.gather(*calls)
    assert tasks.store.swaps == 2 + 3
    assert await tasks.consumed() == 2 + 2 * different + 1
    assert tasks.idle()


async def test_a_batch_counts_as_the_commands_in_it(tasks: Tasks) -> None:
    first = await tasks.hold()
    bucket = tasks.manager.bucket("key")
    batches = [Batch((ConsumeIgnoringRateLimits(1),) * 100) for _ in range(5)]
    calls = [asyncio.ensure_future(arun(steps_of(bucket, batch, 10))) for batch in batches]
    await asyncio.sleep(0)
    tasks.store.gate.set()
    assert await first
    await asyncio.gather(*calls)
    assert tasks.store.swaps == 2 + 3
    assert await tasks.consumed() == 2 + 500


async def test_reads_do_not_queue(tasks: Tasks) -> None:
    first = await tasks.hold()
    reading = asyncio.create_task(tasks.manager.available_tokens("key"))
    while not tasks.store.reads:
        await asyncio.sleep(0)
    tasks.store.gate.set()
    await reading
    assert await first


async def test_thousands_of_tasks_cancelled_anywhere_leave_nothing_behind(tasks: Tasks) -> None:
    chance = random.Random(7)
    tasks.manager = AsyncProxyManager(tasks.store, "100000/day intervally")
    stop = asyncio.create_task(asyncio.sleep(0))

    async def churn() -> None:
        while not stop.done() or any(not task.done() for task in running):
            tasks.store.gate.clear()
            await asyncio.sleep(0)
            tasks.store.gate.set()
            await asyncio.sleep(0)

    running = [asyncio.create_task(tasks.manager.try_consume(f"{chance.randrange(3)}")) for _ in range(3000)]
    churning = asyncio.create_task(churn())
    for task in chance.sample(running, 1000):
        if chance.random() < 0.05:
            await asyncio.sleep(0)
        task.cancel()
    results = await ended(running)
    await churning
    admitted = results.count(True)
    cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
    assert admitted + cancelled == 3000
    consumed = sum([(await tasks.manager.snapshot(f"{key}")).consumed_tokens for key in range(3)])
    assert admitted <= consumed <= 3000
    assert tasks.idle()


class InterruptedStore(GatedStore):
    """During whose first swap, before it is carried out, somebody interrupts the thread."""

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        self.gate.wait()
        if self.swaps == 1:
            raise KeyboardInterrupt
        return ScriptedStore.swap(self, key, before, after, ttl_millis)


def test_a_leader_that_is_interrupted_lets_the_next_thread_lead() -> None:
    store = InterruptedStore()
    manager = ProxyManager(store, LIMITS, clock=ManualClock(NOW))
    with ThreadPoolExecutor(8) as threads:
        with held(store):
            first = threads.submit(manager.try_consume, "key")
            wait_until(lambda: store.swaps == 1, "the first is in flight")
            answers = [threads.submit(manager.try_consume, "key") for _ in range(5)]
            wait_until(lambda: len(followers(manager).get(b"key", ())) == 5, "the others queue")
        with pytest.raises(KeyboardInterrupt):
            first.result()
        assert all(answer.result(10) for answer in answers)
    assert manager.snapshot("key").consumed_tokens == 5


def test_a_key_whose_leader_is_gone_is_free_at_once() -> None:
    """A signal may raise an exception in the very moment in which the leader gives its place up."""
    store = GatedStore()
    manager = ProxyManager(store, LIMITS, clock=ManualClock(NOW), timeout=3600)
    leaders: Any = queues(manager)
    leaders[b"key"] = ref(Course())
    assert manager.try_consume("key")
    assert not leaders


def test_a_thread_that_waits_for_a_leader_that_is_gone_goes_on_in_a_moment() -> None:
    store = GatedStore()
    manager = ProxyManager(store, LIMITS, clock=ManualClock(NOW), timeout=3600)
    leaders, gone = queues(manager), [Course()]
    leaders[b"key"] = ref(gone[0])
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(manager.try_consume, "key") for _ in range(3)]
        wait_until(lambda: len(followers(manager).get(b"key", ())) == 3, "they queue")
        gone.clear()
        assert all(answer.result(10) for answer in answers)
    assert not leaders
    assert not followers(manager)


def test_several_loops_share_a_manager() -> None:
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), "100000/day intervally")

    async def hammer() -> int:
        return sum(await asyncio.gather(*(manager.try_consume("key") for _ in range(500))))

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(lambda _: asyncio.run(hammer()), range(4))) == 2000
    assert asyncio.run(manager.snapshot("key")).consumed_tokens == 2000


def test_a_loop_that_was_left_in_the_middle_holds_up_no_other() -> None:
    store = AsyncSwappingMemoryStore()
    manager = AsyncProxyManager(store, LIMITS, clock=ManualClock(NOW))
    loop = asyncio.new_event_loop()

    class Never(AsyncSwappingMemoryStore):
        async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
            never: asyncio.Future[Lost | None] = asyncio.get_running_loop().create_future()
            return await never

    requests = pipeline_of(manager).requests
    swapping, requests.swapping = requests.swapping, _WithDeadlines(Never()).swapping
    left = [loop.create_task(manager.try_consume("key")) for _ in range(3)]
    loop.run_until_complete(asyncio.sleep(0.001))
    requests.swapping = swapping
    assert asyncio.run(manager.try_consume("key"))
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()
    assert not queues(manager)


def test_a_loop_that_ends_takes_its_calls_with_it() -> None:
    tasks = Tasks()

    async def leave() -> list[asyncio.Task[bool]]:
        first = await tasks.hold()
        others = await tasks.queue(3)
        tasks.store.closes_behind_a_swap = True
        tasks.store.gate.set()
        assert await first
        while tasks.store.swaps < 3:
            await asyncio.sleep(0)
        return others + await tasks.queue(2)

    left = asyncio.run(leave())
    assert all(task.cancelled() for task in left)
    assert tasks.idle()


def test_a_call_collected_outside_the_loop_holds_up_no_other() -> None:
    tasks = Tasks()
    loop = asyncio.new_event_loop()
    steps = loop.run_until_complete(_left_in_flight(tasks))
    others = loop.run_until_complete(tasks.queue(3))
    tasks.store.gate.set()
    steps.close()
    assert loop.run_until_complete(ended(others)) == [True] * 3
    assert tasks.idle()
    steps = loop.run_until_complete(_left_in_flight(tasks))
    for task in loop.run_until_complete(tasks.queue(1)):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    steps.close()
    assert tasks.idle()


async def _left_in_flight(tasks: Tasks) -> Any:
    """The steps of a decision that has sent its swap, in the hands of nobody."""
    steps = steps_of(tasks.manager.bucket("key"), TryConsume(1))
    swap = next(steps)
    while hasattr(swap, "__next__") or not hasattr(swap, "__await__"):
        swap = steps.send(await swap if hasattr(swap, "__await__") else swap)
    swap.close()
    return steps


async def test_a_wait_that_is_cancelled_in_the_queue_is_not_charged(tasks: Tasks) -> None:
    first = await tasks.hold()
    waiting = [asyncio.create_task(tasks.manager.consume("key", 5)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    tasks.store.gate.set()
    assert await first
    results = await ended(waiting)
    assert [results[0], type(results[1]), results[2]] == [True, asyncio.CancelledError, True]
    assert await tasks.consumed() == 2 + 10
    assert tasks.idle()


def test_a_crowd_of_threads_does_not_fight() -> None:
    manager = ProxyManager(SwappingMemoryStore(), "1000/day intervally", max_attempts=1)
    with ThreadPoolExecutor(16) as threads:
        assert sum(threads.map(lambda _: manager.try_consume("key"), range(2000))) == 1000
