"""Sliding windows behind the verbs of managers: sync and asyncio, in memory, over Redis, and without a store."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ratelimit import (
    AsyncProxyManager,
    BucketConfiguration,
    ConsumptionProbe,
    EstimationProbe,
    InvalidConfigurationError,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    RateLimitExceeded,
    ReservationOverflowError,
    SlidingWindow,
    SlidingWindows,
    TokensInheritance,
    all_of,
)
from ratelimit.cli import main
from ratelimit.core.sliding_window.codec import FORMAT
from ratelimit.engine.observing import Decision
from ratelimit.keys import Key
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, SwappingMemoryStore
from tests.engine.conftest import NOW, SECOND, Make
from tests.engine.unreliable import DOWN, Unreliable
from tests.support.both_faces import Settled, closing, settled
from tests.support.decision_paths import By, deciding_by

LIMITS = SlidingWindow(10, per=10)


@pytest.fixture(params=["applies functions", "swaps"])
def store(request: pytest.FixtureRequest, clock: ManualClock) -> SwappingMemoryStore:
    return MemoryStore(clock=clock) if request.param == "applies functions" else SwappingMemoryStore(clock=clock)


@pytest.fixture
def face(make: Make, store: SwappingMemoryStore, clock: ManualClock) -> Settled:
    return make(store, LIMITS, clock=clock)


async def test_every_verb_answers(face: Settled, store: SwappingMemoryStore, clock: ManualClock) -> None:
    assert await face.try_consume("key", 4)
    clock.advance(3)
    assert await face.try_consume_and_return_remaining("key") == ConsumptionProbe(True, 5, 0, 10 * SECOND)
    assert await face.estimate_ability_to_consume("key", 6) == EstimationProbe(False, 5, 7 * SECOND)
    assert await face.try_consume_as_much_as_possible("key") == 5
    assert not await face.try_consume("key")
    assert await face.consume_ignoring_rate_limits("key", 12) == 20 * SECOND
    assert await face.available_tokens("key") == -12
    await face.add_tokens("key", 2)
    await face.give_back("key", 1)
    assert await face.available_tokens("key") == -9
    await face.reset("key")
    await face.force_add_tokens("key", 5)
    assert await face.available_tokens("key") == 15
    await face.hold_back("key", 20)
    clock.advance(nanos=20 * SECOND - 1)
    assert not await face.try_consume("key")
    clock.advance(nanos=1)
    assert await face.try_consume("key", 10)
    stored = store.get("key")
    assert stored is not None
    assert int.from_bytes(stored[:4], "big") == FORMAT


async def test_limits_are_taken_in_every_form(make: Make, store: SwappingMemoryStore, clock: ManualClock) -> None:
    several = SlidingWindows(SlidingWindow(3, per=1), SlidingWindow(5, per=60))
    plans = {
        "text": "3/second sliding; 5/minute sliding",
        "list": [SlidingWindow(3, per=1), "5/minute sliding"],
        "tuple": ("3/second sliding", SlidingWindow(5, per=60)),
        "itself": several,
    }
    face = make(store, plans.get, clock=clock)
    for key in plans:
        assert [await face.try_consume(key) for _ in range(4)] == [True, True, True, False]
        assert await face.configuration(key) == several
    clock.advance(1)
    assert [await face.try_consume("list") for _ in range(3)] == [True, True, False]


async def test_kinds_are_not_mixed_in_one_bucket_but_combined(
    make: Make, store: SwappingMemoryStore, clock: ManualClock
) -> None:
    with pytest.raises(InvalidConfigurationError, match="combine them by all_of"):
        make(store, ["5/second", SlidingWindow(9, per=60)], clock=clock)
    sliding = make(store, SlidingWindow(4, per=60), clock=clock)
    limit = all_of(sliding.face.bucket("{a}:1"), sliding.face.bucket("{a}:2", "3/second"))
    assert [await settled(limit.try_consume()) for _ in range(4)] == [True, True, True, False]
    clock.advance(1)
    probes = [await settled(limit.try_consume_and_return_remaining()) for _ in range(2)]
    assert [probe.consumed for probe in probes] == [True, False]
    assert (probes[1].refused_by, probes[1].retry_after) == (("{a}:1",), 59.0)
    assert await sliding.available_tokens("{a}:1") == 0


# Waits


async def test_waits_are_as_long_as_it_takes_to_the_nanosecond(face: Settled, clock: ManualClock) -> None:
    assert await face.consume("key", 4)
    clock.advance(3)
    assert await face.consume("key", 6)
    assert clock.slept == []
    assert await face.consume("key", 5)
    assert clock.slept == [10 * SECOND]
    assert not await face.consume("key", 6, max_wait=9.999)
    assert await face.consume("key", 6, max_wait=10)
    assert clock.slept == [10 * SECOND, 10 * SECOND]


async def test_what_a_window_cannot_hold_is_an_error_or_refused(face: Settled, clock: ManualClock) -> None:
    with pytest.raises(ReservationOverflowError):
        await face.consume("key", 11)
    assert not await face.consume("key", 11, max_wait=1000)
    assert clock.slept == []
    assert (await face.snapshot("key")).consumed_tokens == 0


async def test_a_wait_that_is_cancelled_leaves_its_place_to_others_and_theirs_to_them() -> None:
    manager = AsyncProxyManager(AsyncSwappingMemoryStore(), SlidingWindow(10, per=10**6))
    await manager.try_consume("key", 4)
    waits = []
    for tokens, left in ((8, -2), (2, -4), (5, -9)):
        waits.append(asyncio.create_task(manager.consume("key", tokens)))
        while await manager.available_tokens("key") != left:
            await asyncio.sleep(0)
    before: Any = (await manager.snapshot("key")).bandwidth_states[0]
    waits[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits[0]
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (-1, 11)
    after: Any = snapshot.bandwidth_states[0]
    assert after.entries[-1] == before.entries[-1]
    for wait in waits[1:]:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
    snapshot = await manager.snapshot("key")
    assert (snapshot.available_tokens, snapshot.consumed_tokens) == (6, 4)


def test_reservations_settle() -> None:
    clock = ManualClock(NOW)
    manager = ProxyManager(MemoryStore(clock=clock), LIMITS, clock=clock)
    with manager.reserve("key", 6) as reservation:
        reservation.settle(2)
    assert manager.available_tokens("key") == 8
    with manager.reserve("key", 8) as reservation:
        reservation.settle(11)
    assert manager.available_tokens("key") == -3
    with pytest.raises(RateLimitExceeded), manager.reserve("key", 1):
        pass
    clock.advance(10)
    assert manager.available_tokens("key") == 10


# Versions and replacement


async def test_a_newer_version_counts_what_was_used(make: Make, store: SwappingMemoryStore, clock: ManualClock) -> None:
    old = make(store, LIMITS, clock=clock, configuration_version=1)
    settings: dict[str, Any] = {"configuration_version": 2, "inheritance": TokensInheritance.ADDITIVE}
    new = make(store, [SlidingWindow(15, per=10), SlidingWindow(100, per=60)], clock=clock, **settings)
    assert await old.try_consume("key", 7)
    assert await new.available_tokens("key") == 8
    assert await old.try_consume("key", 8)
    clock.advance(10)
    snapshot = await new.snapshot("key")
    assert [window.current_size for window in snapshot.bandwidth_states] == [15, 85]
    assert snapshot.configuration_version == 2


@pytest.mark.parametrize("inheritance", TokensInheritance)
async def test_of_another_algorithm_nothing_is_inherited(
    make: Make, store: SwappingMemoryStore, clock: ManualClock, inheritance: TokensInheritance
) -> None:
    face = make(store, "5/second burst 20", clock=clock)
    assert await face.try_consume("key", 17)
    await face.replace_configuration("key", LIMITS, inheritance)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    await face.replace_configuration("key", "7/day", inheritance)
    assert (await face.snapshot("key")).available_tokens == 7


# Without the store


class Notes:
    """A listener that keeps what it is notified of."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def on_interrupted(self, _key: Key, _tokens: int, _error: BaseException) -> None:
        raise AssertionError("nothing is interrupted")


async def test_a_local_window_holds_its_share_and_is_charged_later(make: Make, clock: ManualClock) -> None:
    store, notes = Unreliable(), Notes()
    face = make(store, SlidingWindow(8, per=60), clock=clock, on_error=OnError.local(1 / 4), listener=notes)
    assert await face.try_consume("key", 5)
    store.down = DOWN
    assert [await face.try_consume("key") for _ in range(3)] == [True, True, False]
    assert (notes.decisions[-1].degraded, notes.decisions[-1].wait_nanos) == (True, 60 * SECOND)
    clock.advance(60)
    assert await face.try_consume("key", 2)
    store.down = None
    # Of five and four tokens, the latter count from now.
    assert await face.try_consume("key", 4)
    assert not await face.try_consume("key")
    assert (await face.snapshot("key")).consumed_tokens == 5 + 4 + 4


@pytest.mark.parametrize(
    "optimization", [Optimization.skip_sync_on_zero(), Optimization.delaying(3, 5), Optimization.predicting(3, 5)]
)
async def test_optimizations_know_when_a_window_is_empty(
    make: Make, clock: ManualClock, optimization: Optimization
) -> None:
    store = Unreliable()
    face = make(store, LIMITS, clock=clock, optimization=optimization)
    admitted = [await face.try_consume("key") for _ in range(12)]
    assert admitted == [True] * 10 + [False] * 2
    store.asked = 0
    assert not await face.try_consume("key")
    assert store.asked == 0
    clock.advance(10)
    assert await face.try_consume("key")


# Over Redis


@pytest.fixture(params=["sync", "asyncio"])
def over_redis(request: pytest.FixtureRequest, redis_url: str) -> Any:
    kind: Any = ProxyManager if request.param == "sync" else AsyncProxyManager

    def manager(limits: Any, **settings: Any) -> Any:
        return closing(kind.from_url(redis_url, limits, **settings))

    return manager


@pytest.mark.redis
@pytest.mark.parametrize("by", By)
async def test_over_redis_whoever_would_decide(over_redis: Any, by: By) -> None:
    with deciding_by(by):
        async with over_redis([SlidingWindow(100, per=3600), SlidingWindow(7, per=60)]) as opened:
            manager = Settled(opened)
            assert [await manager.try_consume("key", 3) for _ in range(3)] == [True, True, False]
            probe = await manager.try_consume_and_return_remaining("key", 2)
            assert (probe.consumed, probe.remaining_tokens) == (False, 1)
            assert 59 < probe.retry_after <= 60
            await manager.replace_configuration("key", "9/minute sliding", TokensInheritance.ADDITIVE)
            assert await manager.available_tokens("key") == 3
            assert await manager.configuration("key") == SlidingWindow(9, per=60)


@pytest.mark.redis
@pytest.mark.parametrize("by", By)
async def test_over_redis_a_window_and_a_bandwidth_are_charged_together(over_redis: Any, by: By) -> None:
    with deciding_by(by):
        async with over_redis(SlidingWindow(70, per=3600)) as manager:
            limit = all_of((manager.bucket("{a}:1"), 30), manager.bucket("{a}:2", "5/hour"))
            assert [await settled(limit.try_consume()) for _ in range(4)] == [True, True, False, False]
            probe = await settled(limit.try_consume_and_return_remaining())
            assert probe.refused_by == ("{a}:1",)
            assert [part.remaining_tokens for part in probe.parts] == [10, 3]


@pytest.mark.redis
async def test_over_redis_waits_keep_within_a_window(over_redis: Any) -> None:
    async with over_redis(SlidingWindow(4, per=0.2)) as opened:
        manager, times = Settled(opened), []
        for _ in range(10):
            assert await manager.consume("key", 2)
            times.append(time.monotonic())
        # Five windows of two calls each: the last begins four lengths after the first.
        assert times[-1] - times[0] > 4 * 0.2 - 0.05


@pytest.mark.redis
def test_over_redis_threads_of_two_managers_get_exactly_the_capacity(redis_url: str) -> None:
    limits = SlidingWindow(150, per=3600)
    with (
        ProxyManager.from_url(redis_url, limits) as one,
        ProxyManager.from_url(redis_url, limits) as other,
        ThreadPoolExecutor(8) as pool,
    ):
        begin = threading.Barrier(8)

        def consume(manager: ProxyManager) -> int:
            begin.wait()
            return sum(manager.try_consume("key") for _ in range(40))

        assert sum(pool.map(consume, [one, other] * 4)) == 150
        assert one.snapshot("key").consumed_tokens == 150


@pytest.mark.redis
def test_the_command_line_shows_each_window(redis_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    limits = "10/hour sliding; 100/day sliding"
    command = ["try", "--url", redis_url, "--limit", limits, "--tokens", "4", "key"]
    assert main(command) == 0
    assert "admitted, 6 left, full after 1 d" in capsys.readouterr().out
    assert main(["inspect", "--url", redis_url, "key"]) == 0
    shown = capsys.readouterr().out
    for words in ("10/hour sliding", "6 of 10, next in", "100/day sliding", "96 of 100", "4 so far", "106 bytes"):
        assert words in shown
    assert main(["inspect", "--json", "--url", redis_url, "key"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["limits"], answer["tokens"]) == (limits, 6)
    assert [level["tokens"] for level in answer["bandwidths"]] == [6, 96]
    assert main(["try", "--url", redis_url, "--limit", "5/s sliding; 6/s", "key"]) == 2
    assert "must be all sliding or none" in capsys.readouterr().err
    assert main(["reset", "--url", redis_url, "key"]) == 0
    with ProxyManager.from_url(redis_url, limits) as manager:
        assert manager.available_tokens("key") == 10
        assert isinstance(manager.configuration("key"), SlidingWindows)
        assert not isinstance(manager.configuration("key"), BucketConfiguration)
