"""Quotas of the calendar as services have them: at the turn of a period, from several managers, and without a store."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    BucketConfiguration,
    InvalidArgumentError,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    RedisStore,
    TokensInheritance,
    all_of,
)
from ratelimit.testing import ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.decision_paths import By, deciding_by

QUOTA = "1000/month tz Europe/Berlin"
DAY = 86_400


def nanos(*moment: int) -> int:
    """Return a moment of UTC in nanoseconds since the epoch."""
    return int(datetime(*moment, tzinfo=UTC).timestamp()) * 10**9  # type: ignore[misc,arg-type]


TURN = nanos(2026, 10, 31, 23)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(TURN - 10**9)


@pytest.fixture(params=["in memory", "by swaps"])
def store(request: pytest.FixtureRequest, clock: ManualClock) -> MemoryStore | SwappingMemoryStore:
    return MemoryStore(clock=clock) if request.param == "in memory" else SwappingMemoryStore()


def test_a_plan_of_rate_burst_and_quota(store: Any, clock: ManualClock) -> None:
    plan = ProxyManager(store, f"100/second burst 200; {QUOTA}", clock=clock)
    acme = plan.bucket("acme")
    assert acme.try_consume_as_much_as_possible() == 200
    assert acme.consume_ignoring_rate_limits(800) == 8 * 10**9
    assert acme.try_consume_and_return_remaining().nanos_to_wait_for_refill == 8 * 10**9 + 10**7
    clock.advance(1)
    assert acme.verbose.available_tokens().available_tokens_per_bandwidth == (-700, 1000)
    clock.advance(9)
    assert acme.try_consume_as_much_as_possible() == 200
    assert acme.snapshot().consumed_tokens == 1200


def test_the_stored_limits_name_the_period(store: Any, clock: ManualClock) -> None:
    manager = ProxyManager(store, QUOTA, clock=clock)
    manager.try_consume("acme")
    for ends in ("745 hours aligned 2026-10-31T23:00:00Z", "30 days aligned 2026-11-30T23:00:00Z"):
        name = "2026-10" if ends.startswith("745") else "2026-11"
        stored = manager.snapshot("acme").configuration
        assert str(stored) == f'1000/{ends} id "month {name} Europe/Berlin"'
        assert BucketConfiguration.parse(str(stored)) == stored == manager.configuration("acme")
        clock.advance(1)


async def test_asyncio_has_the_same_quotas(clock: ManualClock) -> None:
    async with AsyncProxyManager(AsyncMemoryStore(clock=clock), QUOTA, clock=clock) as manager:
        assert await manager.try_consume("acme", 1000)
        assert not await manager.try_consume("acme")
        clock.advance(1)
        assert await manager.try_consume("acme", 1000)


def test_a_callable_gives_each_key_its_own_quota(store: Any, clock: ManualClock) -> None:
    plans = {"small": "5/day calendar", "large": "50/day tz Europe/Berlin", "old": "7/day"}
    manager = ProxyManager(store, plans.get, clock=clock, configuration_version=2)
    taken = {key: manager.try_consume_as_much_as_possible(key, 60) for key in ("small", "large", "old")}
    assert taken == {"small": 5, "large": 50, "old": 7}
    clock.advance(1)
    assert not manager.try_consume("small")
    assert manager.try_consume("large")
    assert manager.snapshot("old").configuration_version == 2
    assert manager.snapshot("large").configuration_version == 2 * 2**24 + TURN // 10**9 // 900
    plans["small"] = "9/day calendar"
    clock.advance(3600)
    assert manager.try_consume_as_much_as_possible("small", 60) == 9


@pytest.mark.parametrize("version", [-1, 2**39])
def test_a_version_without_room_for_the_period_is_refused(version: int) -> None:
    manager = ProxyManager(MemoryStore(), QUOTA, configuration_version=version)
    with pytest.raises(InvalidArgumentError, match="configuration_version must be from 0"):
        manager.bucket("acme")


def test_a_replaced_quota_lasts_until_the_period_ends(store: Any, clock: ManualClock) -> None:
    manager = ProxyManager(store, QUOTA, clock=clock)
    manager.try_consume("acme", 600)
    manager.replace_configuration("acme", "5000/month tz Europe/Berlin", TokensInheritance.ADDITIVE)
    assert manager.available_tokens("acme") == 4400
    clock.advance(1)
    assert manager.available_tokens("acme") == 1000


def test_a_quota_is_not_put_in_place_where_nothing_begins_its_next_period(store: Any) -> None:
    for limits, allowed in (("5/minute", False), ("5/day calendar", True), (lambda _: "5/minute", True)):
        bucket = ProxyManager(store, limits).bucket("acme")
        for verbs in (bucket, bucket.verbose):
            if allowed:
                verbs.replace_configuration(QUOTA, TokensInheritance.RESET)
            else:
                with pytest.raises(InvalidArgumentError, match="configuration must have no calendar quota"):
                    verbs.replace_configuration(QUOTA, TokensInheritance.RESET)


def test_several_buckets_turn_together(store: Any, clock: ManualClock) -> None:
    users = ProxyManager(store, "3/day tz Europe/Berlin", prefix="user:", clock=clock)
    tenants = ProxyManager(store, f"1/second burst 100; {QUOTA}", prefix="tenant:", clock=clock)
    both = all_of(users.bucket("{acme}"), (tenants.bucket("{acme}"), 20))
    assert [both.try_consume() for _ in range(4)] == [True, True, True, False]
    assert both.try_consume_and_return_remaining().nanos_to_wait_for_refill == 10**9
    clock.advance(1)
    assert [both.try_consume() for _ in range(4)] == [True, True, False, False]
    day, month = both.snapshot()
    assert (day.available_tokens, month.available_tokens) == (1, 1)
    assert month.bandwidth_states[1].current_size == 960


def test_a_local_bucket_has_a_share_of_each_period(clock: ManualClock) -> None:
    store = ScriptedStore()
    manager = ProxyManager(store, QUOTA, clock=clock, on_error=OnError.local(0.1))
    assert manager.try_consume("acme", 60)
    store.fail(times=10**6)
    assert manager.try_consume_as_much_as_possible("acme") == 100
    assert not manager.try_consume("acme")
    clock.advance(1)
    assert manager.try_consume_as_much_as_possible("acme") == 100


@pytest.mark.parametrize("optimization", [Optimization.skip_sync_on_zero(), Optimization.delaying(50, 60)])
def test_what_is_decided_without_the_store_ends_with_the_period(clock: ManualClock, optimization: Optimization) -> None:
    manager = ProxyManager(SwappingMemoryStore(), QUOTA, clock=clock, optimization=optimization)
    assert sum(manager.try_consume("acme", 10) for _ in range(150)) == 100
    clock.advance(1)
    # What is reported after the turn counts in the new period: 50 tokens at most.
    assert 95 <= sum(manager.try_consume("acme", 10) for _ in range(150)) <= 100
    manager.close()


class RoundTrips:
    """Notes how often each decision asks the store."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_decision(self, decision: Any) -> None:
        self.seen.append(decision.round_trips)

    def on_interrupted(self, *_: Any) -> None:
        pass


@pytest.fixture
def managers(redis_url: str, clock: ManualClock) -> Iterator[Callable[..., list[Any]]]:
    with ExitStack() as stack:

        def make(limits: str, **settings: Any) -> list[Any]:
            clients = [stack.enter_context(redis.Redis.from_url(redis_url)) for _ in range(4)]
            return [ProxyManager(RedisStore(client), limits, clock=clock, **settings) for client in clients]

        yield make


@pytest.mark.redis
@pytest.mark.parametrize("version", [None, 7])
@pytest.mark.parametrize("by", [By.EITHER, By.SCRIPT], ids=lambda by: by.name.lower())
def test_at_the_turn_many_managers_get_the_new_quota_once(
    managers: Callable[..., list[Any]], clock: ManualClock, by: By, version: int | None
) -> None:
    trips = RoundTrips()
    made = managers(f"{QUOTA}; 100000/second burst 100000", listener=trips, configuration_version=version)
    with deciding_by(by, *made), ThreadPoolExecutor(16) as threads:
        for _ in range(3):
            asking = [made[number % 4] for number in range(1200)]
            answers = list(threads.map(lambda manager: manager.try_consume("acme"), asking))
            assert sum(answers) == 1000
            clock.set(made[0].snapshot("acme").configuration.bandwidths[0].first_refill_millis * 10**6)
    assert max(trips.seen) <= 3
    assert made[0].snapshot("acme").consumed_tokens == 3000


@pytest.mark.redis
async def test_tasks_at_the_turn_get_the_new_quota_once(redis_url: str, clock: ManualClock) -> None:
    async with AsyncProxyManager.from_url(redis_url, QUOTA, clock=clock) as manager:
        assert await manager.try_consume("acme", 990)
        for expected in (10, 1000):
            answers = await asyncio.gather(*(manager.try_consume("acme") for _ in range(1100)))
            assert sum(answers) == expected
            clock.advance(1)
