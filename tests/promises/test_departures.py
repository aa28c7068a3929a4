"""Whichever calls wait or are cancelled: those that go on, taken together, keep within each limit by itself.

Worlds at random, in virtual time: calls that wait, calls that do not, and waits that are cancelled. All goes through
the public verbs. What is held to the bounds is when each call goes on.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine, Generator
from datetime import UTC, datetime
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    Bandwidth,
    BucketConfiguration,
    Expiration,
    MemoryStore,
    OnError,
    ProxyManager,
    StoreUnavailableError,
)
from ratelimit.core.commands import Cancel
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.cancelled_waits import CancelledWaits, Place
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, SwappingMemoryStore
from tests.support.both_faces import for_asyncio
from tests.support.inside import pipeline_of

SECOND = 10**9
BEGIN = 1_700_000_000 * SECOND + 1
WORLDS = 1_000  # of each kind, twice as many of the first
DECISIONS = 30


class Departure(NamedTuple):
    at: int
    tokens: int


def check(limits: BucketConfiguration, departures: list[Departure]) -> None:
    """Hold each span between two departures against each limit by itself.

    A wait is rounded down to a nanosecond. A call for more than the capacity is as good as a capacity of that size.
    Where one limit waits by itself for a refill, what was left before it goes along with what it brings.
    """
    departures = sorted(departures)
    alone = len(limits.bandwidths) == 1
    for limit in limits:
        period = limit.refill_period_nanos
        first = limit.first_refill_millis
        phase = BEGIN if first is None else first * 10**6
        for i, begin in enumerate(departures):
            tokens, most = 0, limit.capacity
            for end in departures[i:]:
                tokens += end.tokens
                most = max(most, end.tokens)
                if limit.refill_intervally:
                    refills = (end.at - phase) // period - (begin.at - alone - phase) // period
                    allowed = most + refills * limit.refill_tokens
                else:
                    allowed = most + (end.at - begin.at + 1) * limit.refill_tokens // period
                assert tokens <= allowed, f"{limits!r}: {tokens} within {end.at - begin.at} ns, {allowed} by {limit!r}"


def some_limit(rng: random.Random, id: str) -> Bandwidth:
    period = rng.choice((SECOND, 3 * SECOND, 10 * SECOND, 7 * SECOND // 3)) / SECOND
    refill, capacity = rng.choice((1, 1, 2, 5, 7, 20)), rng.choice((1, 1, 2, 3, 5, 20))
    kind = rng.random()
    if kind < 0.5:
        return Bandwidth.greedy(capacity, period, refill_tokens=refill, id=id)
    if kind < 0.8:
        return Bandwidth.intervally(capacity, period, refill_tokens=refill, id=id)
    first = datetime.fromtimestamp(BEGIN // SECOND - rng.randint(0, 20), UTC)
    return Bandwidth.intervally_aligned(capacity, period, first_refill=first, refill_tokens=refill, id=id)


def some_limits(rng: random.Random) -> BucketConfiguration:
    return BucketConfiguration(*[some_limit(rng, id) for id in "abc"[: rng.choice((1, 1, 2, 2, 3))]])


def some_tokens(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 1, 2, 3, 5))


def some_gap(rng: random.Random) -> int:
    return rng.choice((0, 0, 0, 1, SECOND // 10, SECOND // 3, SECOND, 5 * SECOND)) * rng.randint(1, 3) // 2


class Wait:
    """A sleep of a virtual clock: whoever drives the coroutine ends it."""

    def __init__(self, until: int) -> None:
        self.until = until

    def __await__(self) -> Generator[Wait]:
        yield self


class DrivenClock(ManualClock):
    async def asleep(self, nanos: int) -> None:
        await Wait(self.now_nanos() + nanos)


class World:
    """Calls of one asyncio manager, driven without an event loop."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.limits = some_limits(self.random)
        self.clock = DrivenClock(BEGIN)
        store = AsyncMemoryStore(clock=self.clock)
        self.manager = AsyncProxyManager(store, self.limits, clock=self.clock, expiration=Expiration.none())
        self.waits: list[tuple[int, int, int, Coroutine[Any, Any, bool]]] = []
        self.departures: list[Departure] = []

    def resume(self, tokens: int, call: Coroutine[Any, Any, bool], send: Callable[[Any], Any]) -> None:
        try:
            wait = send(None)
        except StopIteration as end:
            if end.value:
                self.departures.append(Departure(self.clock.now_nanos(), tokens))
        except asyncio.CancelledError:
            pass
        else:
            heappush(self.waits, (wait.until, self.random.getrandbits(60), tokens, call))

    def advance(self, until: int) -> None:
        while self.waits and self.waits[0][0] <= until:
            due, _, tokens, call = heappop(self.waits)
            self.clock.set(due)
            self.resume(tokens, call, call.send)
        self.clock.set(until)

    def cancel(self) -> None:
        if self.waits:
            _, _, tokens, call = self.waits.pop(self.random.randrange(len(self.waits)))
            self.waits.sort()
            self.resume(tokens, call, lambda _: call.throw(asyncio.CancelledError()))

    def run(self) -> None:
        self.begin(self.manager.try_consume("key"), 1)
        for _ in range(DECISIONS):
            self.advance(self.clock.now_nanos() + some_gap(self.random))
            tokens, kind = some_tokens(self.random), self.random.random()
            if kind < 0.35:
                for _ in range(self.random.choice((1, 1, 3))):
                    self.cancel()
            elif kind < 0.5:
                self.begin(self.manager.try_consume("key", tokens), tokens)
            elif kind < 0.6:
                self.begin(self.manager.consume("key", tokens, max_wait=self.random.choice((0.5, 3))), tokens)
            else:
                for _ in range(self.random.choice((1, 1, 1, 6))):
                    self.begin(self.manager.consume("key", tokens), tokens)
        self.advance(BEGIN + 10**6 * SECOND)
        assert not self.waits
        check(self.limits, self.departures)

    def begin(self, call: Any, tokens: int) -> None:
        call = call.__await__()
        self.resume(tokens, call, call.send)


def free(state: BucketState, tokens: int, *_: Any) -> BucketState:
    return state.given_back(tokens)


def up_to_the_capacity(state: BucketState, tokens: int, noted: int, *_: Any) -> BucketState | None:
    return None if state.consumed_tokens > noted and state.available_tokens < 0 else state.given_back(tokens)


def in_debt_only(state: BucketState, tokens: int, *_: Any) -> Any:
    return state.consumed(tokens), ()


@pytest.mark.parametrize(
    ("method", "mutant"), [("cancelled", free), ("cancelled", up_to_the_capacity), ("reserved", in_debt_only)]
)
def test_what_gives_back_too_much_or_takes_too_little_is_noticed(
    method: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BucketState, method, mutant)
    with pytest.raises(AssertionError, match=r"within \d+ ns"):
        for seed in range(500):
            World(seed).run()


@pytest.mark.parametrize("first", range(0, 2 * WORLDS, 500))
def test_tasks_in_any_world_keep_within_each_limit(first: int) -> None:
    for seed in range(first, first + 500):
        World(seed).run()


class NestedClock(ManualClock):
    """A clock at whose sleeps a call lets other calls be made, and is interrupted at times."""

    def __init__(self, world: SyncWorld) -> None:
        super().__init__(BEGIN)
        self.world = world

    def sleep(self, nanos: int) -> None:
        self.world.slept(self.now_nanos() + nanos)


class SyncWorld:
    """Calls of one sync manager, each made while those before it sleep."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.limits = some_limits(self.random)
        self.clock = NestedClock(self)
        store = (MemoryStore if seed % 2 else SwappingMemoryStore)(clock=self.clock)
        self.bucket = ProxyManager(store, self.limits, clock=self.clock, expiration=Expiration.none()).bucket("key")
        self.left = DECISIONS
        self.due = BEGIN
        self.departures: list[Departure] = []

    def slept(self, until: int) -> None:
        while self.left and self.random.random() < 0.9:
            self.decide(until)
        if self.random.random() < 0.5 and self.clock.now_nanos() <= until:
            raise KeyboardInterrupt
        self.due = until

    def decide(self, until: int) -> None:
        self.left -= 1
        now = self.clock.now_nanos()
        self.clock.set(max(now, min(now + some_gap(self.random), until)))
        self.due = self.clock.now_nanos()
        tokens, kind = some_tokens(self.random), self.random.random()
        try:
            if kind < 0.2:
                went = self.bucket.try_consume(tokens)
            elif kind < 0.6:
                went = self.bucket.verbose.consume(tokens).value
            else:
                went = self.bucket.consume(tokens)
        except KeyboardInterrupt:
            return
        if went:
            self.departures.append(Departure(self.due, tokens))
            self.clock.set(max(self.due, self.clock.now_nanos()))

    def run(self) -> None:
        self.bucket.try_consume()
        self.departures.append(Departure(BEGIN, 1))
        while self.left:
            self.decide(BEGIN + 10**6 * SECOND)
        check(self.limits, self.departures)


@pytest.mark.parametrize("first", range(0, WORLDS, 500))
def test_sync_calls_in_any_world_keep_within_each_limit(first: int) -> None:
    for seed in range(first, first + 500):
        SyncWorld(seed).run()


class LoopClock(ManualClock):
    """A clock whose sleeps end in the order of their times, once nothing else is left to do."""

    def __init__(self) -> None:
        super().__init__(BEGIN)
        self.sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self.numbers = count()

    async def asleep(self, nanos: int) -> None:
        woken = asyncio.get_running_loop().create_future()
        heappush(self.sleepers, (self.now_nanos() + nanos, next(self.numbers), woken))
        await woken

    async def until(self, end: int) -> None:
        await settle()
        while self.sleepers and self.sleepers[0][0] <= end:
            due, _, woken = heappop(self.sleepers)
            if not woken.done():
                self.set(due)
                woken.set_result(None)
                await settle()
        self.set(end)


async def settle() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


class SlowStore(AsyncSwappingMemoryStore):
    """Is asked by swaps, and takes some turns of the event loop, so that calls are merged and cancelled in flight."""

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        await asyncio.sleep(0)
        loss = await super().swap(key, before, after, ttl_millis)
        await asyncio.sleep(0)
        return loss


@pytest.mark.parametrize("managers", [1, 2])
async def test_tasks_of_several_managers_keep_within_each_limit(managers: int) -> None:
    for seed in range(60):
        rng, clock = random.Random(seed), LoopClock()
        limits, memory = some_limits(rng), SwappingMemoryStore(clock=clock)
        handles = [
            AsyncProxyManager(SlowStore(memory), limits, clock=clock, expiration=Expiration.none()).bucket("key")
            for _ in range(managers)
        ]
        departures: list[Departure] = []

        async def call(verb: Callable[[int], Any], tokens: int) -> None:
            if await verb(tokens):
                departures.append(Departure(clock.now_nanos(), tokens))  # noqa: B023  # all end within the round

        tasks = [asyncio.create_task(call(handles[0].try_consume, 1))]
        for _ in range(DECISIONS):
            await clock.until(clock.now_nanos() + some_gap(rng))
            if rng.random() < 0.35:
                for task in rng.sample(tasks, min(len(tasks), 5)):
                    task.cancel()
            else:
                handle, tokens = rng.choice(handles), some_tokens(rng)
                verb = rng.choice((handle.consume, handle.consume, handle.consume, handle.try_consume))
                tasks += [asyncio.create_task(call(verb, tokens)) for _ in range(rng.choice((1, 1, 6)))]
                for _ in range(rng.choice((0, 0, 3))):
                    await asyncio.sleep(0)
        await clock.until(BEGIN + 10**6 * SECOND)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, asyncio.CancelledError) for end in ends), ends
        check(limits, departures)


@pytest.mark.parametrize("limits", ["2/second burst 3", "2/second burst 3; 100/hour intervally; 10/minute"])
async def test_when_all_waiters_leave_no_trace_is_left(limits: str) -> None:
    for seed in range(10):
        rng, clock = random.Random(seed), LoopClock()
        memory = SwappingMemoryStore(clock=clock)
        manager = AsyncProxyManager(SlowStore(memory), limits, clock=clock)
        begin = monotonic()
        pipeline_of(manager).monotonic = partial(float, begin)  # or places would be forgotten on a busy machine
        bucket = manager.bucket("key")
        alone = AsyncProxyManager(AsyncMemoryStore(clock=clock), limits, clock=clock).bucket("key")
        assert await bucket.try_consume(3) == await alone.try_consume(3)
        tasks = [asyncio.create_task(bucket.consume(rng.choice((1, 2, 7)))) for _ in range(130)]
        await settle()
        assert await bucket.available_tokens() < -100
        rng.shuffle(tasks)
        for task in tasks:
            task.cancel()
            if rng.random() < 0.2:
                await clock.until(clock.now_nanos() + rng.randrange(SECOND // 100))
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
        assert await bucket.snapshot() == await alone.snapshot()


class Broken(SwappingMemoryStore):
    """A store that can be reached or not."""

    down = False

    def get(self, key: Any) -> bytes | None:
        self.fail()
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.fail()
        return super().swap(key, before, after, ttl_millis)

    def fail(self) -> None:
        if self.down:
            raise StoreUnavailableError(b"", "the store is down")


@pytest.mark.parametrize("recovers", [False, True])
async def test_a_wait_for_a_local_bucket_is_cancelled_there(recovers: bool) -> None:
    clock = LoopClock()
    store = Broken(clock=clock)
    store.down = True
    manager = AsyncProxyManager(for_asyncio(store), "1/second", clock=clock, on_error=OnError.local(1))
    tasks = [asyncio.create_task(manager.consume("key", tokens)) for tokens in (1, 2, 3)]
    await settle()
    first, second, third = tasks
    assert await first
    second.cancel()  # before the third, which keeps its time
    await settle()
    await clock.until(BEGIN + 5 * SECOND - 1)
    assert not third.done()
    store.down = not recovers
    third.cancel()
    await settle()
    assert [task.cancelled() for task in tasks] == [False, True, True]
    store.down = False
    assert not await manager.try_consume("key")  # charges what was used, and only that
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (0, 1)


def test_places_that_stay_empty_are_bounded_and_asked_for_from_the_last() -> None:
    waits = CancelledWaits()
    places = [Place(Cancel(1, noted), until=5.0) for noted in range(10_000)]
    for place in places:
        assert waits.end(b"key", waits.moved(), [place], [False], now=0.0) == []
    last = Place(Cancel(1, 10_000), until=5.0)
    asked = waits.end(b"key", waits.moved(), [last], [True], now=0.0)
    assert asked == places[: -100 - 1 : -1]
    assert waits.end(b"key", waits.moved(), asked, [False] * 100, now=0.0) == []
    assert waits.end(b"other", waits.moved(), [last], [False], now=0.0) == []  # one too many: all is forgotten
    assert waits.end(b"key", waits.moved(), [last], [True], now=0.0) == []


def test_places_that_take_several_steps_are_asked_for_in_smaller_parts() -> None:
    waits = CancelledWaits()
    places = [Place(Cancel(1, noted, surplus=((1, 0),) * 30), until=5.0) for noted in range(9)]
    for place in places[:-1]:
        assert waits.end(b"key", waits.moved(), [place], [False], now=0.0) == []
    assert waits.end(b"key", waits.moved(), places[-1:], [True], now=0.0) == [places[7], places[6], places[5]]


async def test_empty_places_go_with_their_bucket() -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "2/hour")
    await manager.bucket("key").consume_ignoring_rate_limits(20)
    tasks = [asyncio.create_task(manager.consume("key")) for _ in range(2)]
    await settle()
    tasks[0].cancel()  # before the second, which keeps its time
    await settle()
    await manager.remove("key")
    assert await manager.try_consume("key", 2)
    tasks += [asyncio.create_task(manager.consume("key")) for _ in range(2)]
    await settle()
    assert await manager.available_tokens("key") == -2
    tasks[3].cancel()
    await settle()
    assert await manager.available_tokens("key") == -1  # the third waits, and nobody has left for good before it
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


def test_a_place_is_asked_for_again_after_another_task_left() -> None:
    waits = CancelledWaits()
    first, second = (Place(Cancel(1, noted), until=5.0) for noted in (1, 2))
    begun = waits.moved()
    assert waits.end(b"key", begun, [second], [True], now=0.0) == []
    assert waits.end(b"key", begun, [first], [False], now=0.0) == [first]
    assert waits.end(b"key", waits.moved(), [first], [False], now=0.0) == []
    assert waits.end(b"key", waits.moved(), [second], [True], now=6.0) == []  # the time of the first is over
