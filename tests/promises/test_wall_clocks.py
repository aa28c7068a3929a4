"""Whose time counts: Redis's, whatever the clocks of its clients show."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from datetime import UTC, datetime
from typing import Any

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    Bandwidth,
    BucketConfiguration,
    Clock,
    MemoryStore,
    ProxyManager,
    RedisStore,
    StoreError,
    SystemClock,
)
from ratelimit.runtime.clock import MonotonicSleep
from ratelimit.stores.redis.server_time import FIRST_REPLIES, STALE_NANOS, UNUSABLE_NANOS
from ratelimit.testing import ManualClock
from tests.support.both_faces import Settled, closing, settled
from tests.support.inside import pipeline_of
from tests.support.redis_monitor import monitored
from tests.support.scripted_proxy import ScriptedProxy
from tests.support.servers import RedisServer

SECOND = 10**9
HOUR = 3600 * SECOND

AN_HOUR_AHEAD = """
import time

wall, wall_ns = time.time, time.time_ns
time.time = lambda: wall() + 3600
time.time_ns = lambda: wall_ns() + 3600 * 10**9

from ratelimit import ProxyManager, SystemClock
from tests.support.inside import pipeline_of

manager = ProxyManager.from_url({url!r}, {limits!r}, clock={clock})
print([manager.try_consume("key") for _ in range({calls})])
"""


def an_hour_ahead(url: str, limits: str, calls: int, clock: str = "None") -> list[bool]:
    """What another process is answered whose wall clock is an hour ahead."""
    program = AN_HOUR_AHEAD.format(url=url, limits=limits, calls=calls, clock=clock)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    answers: list[bool] = eval(done.stdout)
    return answers


def redis_now(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return int(seconds) * SECOND + int(microseconds) * 1000


@pytest.fixture
def client(redis_url: str) -> Generator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


class Monotonic:
    """A local monotonic clock that begins anywhere, and can be moved on."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def __call__(self) -> int:
        return time.monotonic_ns() + self.ahead


@pytest.fixture(params=["sync", "asyncio"])
async def stores(request: pytest.FixtureRequest, redis_url: str, client: redis.Redis) -> AsyncGenerator[Any]:
    """A function that makes a store over a local clock."""
    async with redis.asyncio.Redis.from_url(redis_url) as aclient:
        if request.param == "sync":
            yield lambda monotonic: Settled(RedisStore(client, monotonic=monotonic))
        else:
            yield lambda monotonic: Settled(AsyncRedisStore(aclient, monotonic=monotonic))


@pytest.mark.redis
def test_a_process_an_hour_ahead_shares_a_bucket_correctly(redis_url: str, client: redis.Redis) -> None:
    with ProxyManager.from_url(redis_url, "5/hour") as manager:
        assert [manager.try_consume("key") for _ in range(2)] == [True] * 2
        assert an_hour_ahead(redis_url, "5/hour", 4) == [True] * 3 + [False]
        assert not manager.try_consume("key")
        assert manager.try_consume_and_return_remaining("key").nanos_to_wait_for_refill <= HOUR // 5
        (state,) = manager.bucket("key").snapshot().bandwidth_states
        assert abs(state.last_refill_time_nanos - redis_now(client)) < 60 * SECOND


@pytest.mark.redis
def test_with_the_system_clock_it_does_not_as_with_bucket4j(redis_url: str) -> None:
    with ProxyManager.from_url(redis_url, "5/hour", clock=SystemClock()) as manager:
        assert [manager.try_consume("key") for _ in range(6)] == [True] * 5 + [False]
        assert an_hour_ahead(redis_url, "5/hour", 6, "SystemClock()") == [True] * 5 + [False]
        (state,) = manager.bucket("key").verbose.available_tokens().bandwidth_states
        assert state.last_refill_time_nanos > time.time_ns() + HOUR - 60 * SECOND  # nobody gets a token until then


@pytest.mark.redis
def test_setting_the_wall_clock_changes_nothing(
    redis_url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ProxyManager.from_url(redis_url, "5/hour") as manager:
        assert manager.try_consume("key", 5)
        real = time.time_ns
        for hours in (1, -1):
            monkeypatch.setattr(time, "time_ns", lambda hours=hours: real() + hours * HOUR)
            monkeypatch.setattr(time, "time", lambda hours=hours: real() / SECOND + hours * 3600)
            assert not manager.try_consume("key")
            assert abs(pipeline_of(manager).requests.now(b"key") - redis_now(client)) < 10 * SECOND


@pytest.mark.redis
async def test_hosts_agree_to_within_what_they_say(stores: Any, client: redis.Redis) -> None:
    hosts = [stores(Monotonic(ahead)) for ahead in (0, 10**15, -HOUR)]
    for host in hosts:
        await host.now_nanos(b"key")
    for _ in range(50):
        for host in hosts:
            before = redis_now(client)
            estimate = await host.now_nanos(b"key")
            after = redis_now(client)
            bound = host.face.clock_error_nanos(b"key")
            assert before - bound <= estimate <= after + 1000  # whole microseconds, rounded down


@pytest.mark.redis
async def test_the_time_is_asked_for_along_with_something_else_once_a_second(stores: Any, redis_url: str) -> None:
    clock = Monotonic(0)
    host = stores(clock)
    assert host.face.known_now(b"key") is None
    state = None
    with monitored(redis_url) as monitor:
        for number in range(10):
            new = b"%d" % number
            assert await host.swap(b"key", state, new, 10_000) is None
            state = new
        assert monitor.sent().count("TIME") == FIRST_REPLIES
        bound = host.face.clock_error_nanos(b"key")
        clock.ahead += SECOND
        assert host.face.clock_error_nanos(b"key") > bound
        assert await host.swap(b"key", state, b"at last", 10_000) is None
        assert "TIME" in monitor.sent()


@pytest.mark.redis
async def test_a_read_renews_a_stale_estimate_in_the_same_round_trip(stores: Any, redis_url: str) -> None:
    monotonic = Monotonic(0)
    host = stores(monotonic)
    assert host.face.known_now(b"key") is None
    await host.swap(b"key", None, b"state", -1)
    for _ in range(FIRST_REPLIES):
        await host.get(b"key")
    with monitored(redis_url) as monitor:
        sent = []
        for passed in (0, STALE_NANOS):
            monotonic.ahead += passed
            assert await host.get(b"key") == b"state"
            sent.append(monitor.sent())
    assert sent == [["GETRANGE"], ["TIME", "GETRANGE"]]


@pytest.mark.parametrize("face", [ProxyManager, AsyncProxyManager], ids=["sync", "asyncio"])
@pytest.mark.redis
async def test_with_a_clock_of_ones_own_the_server_is_never_asked_for_its_time(redis_url: str, face: Any) -> None:
    """Proxies that share connections refuse ``TIME``, or close the connection that it came over."""
    async with closing(face.from_url(redis_url, "100/minute", clock=SystemClock())) as manager:
        with monitored(redis_url) as monitor:
            for _ in range(8):
                assert await settled(manager.try_consume("key"))
            assert await settled(manager.available_tokens("key")) == 92
            assert await settled(manager.configuration("key"))
            sent = monitor.sent()
    assert len(sent) >= 10
    assert "TIME" not in sent


@pytest.mark.parametrize("face", [ProxyManager, AsyncProxyManager], ids=["sync", "asyncio"])
@pytest.mark.parametrize("refusal", ["ERR unknown command 'TIME'", "ERR unsupported command 'time'"])
@pytest.mark.redis
async def test_where_the_time_is_refused_the_error_says_to_give_a_clock(
    server: RedisServer, face: Any, refusal: str
) -> None:
    with ScriptedProxy(server) as front:
        front.answer = lambda command: f"-{refusal}\r\n".encode() if command[0].upper() == b"TIME" else None
        url = f"redis://127.0.0.1:{front.port}"
        async with (
            closing(face.from_url(url, "100/minute")) as manager,
            closing(face.from_url(url, "100/minute", clock=SystemClock())) as other,
        ):
            with pytest.raises(StoreError, match=f"clock=SystemClock.*{refusal[4:]}") as caught:
                await settled(manager.try_consume("key"))
            assert not caught.value.in_doubt
            assert await settled(other.try_consume("key"))


@pytest.mark.redis
async def test_after_a_long_silence_the_time_is_asked_for_first(stores: Any, client: redis.Redis) -> None:
    monotonic = Monotonic(0)
    host = stores(monotonic)
    await host.now_nanos(b"key")
    monotonic.ahead += UNUSABLE_NANOS - 10 * SECOND  # a local clock that ran ahead: off by its own fault, within reason
    assert await host.now_nanos(b"key") > redis_now(client) + 30 * SECOND
    monotonic.ahead += 20 * SECOND
    assert abs(await host.now_nanos(b"key") - redis_now(client)) < 10 * SECOND


@pytest.mark.redis
async def test_aligned_refills_come_by_the_wall_time_of_redis(redis_url: str, client: redis.Redis) -> None:
    midnight = datetime(2020, 1, 1, tzinfo=UTC)
    daily = Bandwidth.intervally_aligned(5, 86_400, first_refill=midnight)
    async with AsyncProxyManager.from_url(redis_url, daily) as manager:
        await manager.try_consume("key", 5)
        probe = await manager.try_consume_and_return_remaining("key")
    now = redis_now(client)
    at = (now + probe.nanos_to_wait_for_refill) % (86_400 * SECOND)
    assert min(at, 86_400 * SECOND - at) < 60 * SECOND


def test_the_system_clock_shows_whole_milliseconds_as_bucket4j_does() -> None:
    clock = SystemClock()
    now = clock.now_nanos()
    assert now % 10**6 == 0
    assert abs(now - time.time_ns()) < 60 * SECOND
    assert isinstance(clock, Clock)
    assert isinstance(ManualClock(0), Clock)


def test_the_store_in_memory_does_not_follow_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    before = store.now_nanos(b"key")
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + HOUR)
    assert before <= store.now_nanos(b"key") < before + HOUR // 2


def test_a_clock_of_the_callers_serves_both_faces() -> None:
    clock = ManualClock(1_700_000_000 * SECOND)
    limits = BucketConfiguration.parse("1/second")
    manager = ProxyManager(MemoryStore(), limits, clock=clock)
    assert [manager.try_consume("key") for _ in range(2)] == [True, False]
    clock.advance(seconds=1)
    assert manager.try_consume("key")
    clock.set(1_700_000_000 * SECOND)
    assert not manager.try_consume("key")
    assert manager.consume("key")
    assert clock.slept == [SECOND]


def test_sleeping_takes_at_least_as_long_as_asked() -> None:
    begin = time.monotonic_ns()
    MonotonicSleep().sleep(3_000_000)
    assert time.monotonic_ns() - begin >= 3_000_000
    begin = time.monotonic_ns()
    asyncio.run(MonotonicSleep().asleep(3_000_000))
    assert time.monotonic_ns() - begin >= 3_000_000 - 1_000  # the resolution of the loop's clock


def test_a_sleep_of_centuries_begins() -> None:
    async def begin() -> None:
        await asyncio.wait_for(MonotonicSleep().asleep(2**63 - 1), 0.001)

    with pytest.raises(TimeoutError):
        asyncio.run(begin())
