"""The estimate of a server's time: never further from the truth than it says."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit.stores.redis.server_time import FIRST_REPLIES, STALE_NANOS, UNUSABLE_NANOS, ServerTime

SECOND = 10**9
MILLISECOND = 10**6


def test_nothing_is_known_before_the_first_reply() -> None:
    times = ServerTime()
    assert times.estimate(5) is None
    assert times.stale_at <= 5
    assert times.error_bound(5) is None


def test_one_reply_tells_the_time_to_within_its_round_trip() -> None:
    times = ServerTime()
    times.observe(1000 * SECOND, sent=10 * MILLISECOND, received=12 * MILLISECOND)
    estimate, bound = times.estimate(12 * MILLISECOND), times.error_bound(12 * MILLISECOND)
    assert estimate is not None
    assert bound is not None
    assert 0 <= 1000 * SECOND + MILLISECOND - estimate <= bound
    assert 2 * MILLISECOND <= bound <= 2 * MILLISECOND + 5000  # resolution, and drift under way
    assert times.estimate(12 * MILLISECOND + UNUSABLE_NANOS - 1) is not None
    assert times.estimate(12 * MILLISECOND + UNUSABLE_NANOS) is None


def test_it_is_asked_for_until_there_are_some_replies_and_then_once_a_second() -> None:
    times = ServerTime()
    assert times.stale_at > 10**9 * SECOND  # nobody has wanted to know it
    assert times.estimate(0) is None
    for reply in range(FIRST_REPLIES):
        assert reply * MILLISECOND >= times.stale_at
        times.observe(1000 * SECOND + reply * MILLISECOND, sent=reply * MILLISECOND, received=reply * MILLISECOND)
    last = (FIRST_REPLIES - 1) * MILLISECOND
    assert last + STALE_NANOS - 1 < times.stale_at
    assert last + STALE_NANOS >= times.stale_at
    times.observe(2000 * SECOND, sent=last, received=last)  # by another server
    assert last >= times.stale_at


def test_a_quick_reply_makes_a_slow_one_exact_and_a_slow_one_spoils_nothing() -> None:
    times = ServerTime()
    times.observe(1000 * SECOND, sent=0, received=100 * MILLISECOND)
    times.observe(1000 * SECOND + 150 * MILLISECOND, sent=150 * MILLISECOND, received=151 * MILLISECOND)
    quick = times.error_bound(151 * MILLISECOND)
    assert quick is not None
    assert quick <= 4 * MILLISECOND
    times.observe(1000 * SECOND + 300 * MILLISECOND, sent=200 * MILLISECOND, received=400 * MILLISECOND)
    slow = times.error_bound(400 * MILLISECOND)
    assert slow is not None
    assert slow <= quick + MILLISECOND


def test_a_server_whose_clock_was_set_is_believed_at_once() -> None:
    times = ServerTime()
    times.observe(1000 * SECOND, sent=0, received=MILLISECOND)
    for hours in (1, -1):
        server = (1000 + hours * 3600) * SECOND
        times.observe(server, sent=SECOND, received=SECOND + MILLISECOND)
        estimate = times.estimate(SECOND + MILLISECOND)
        assert estimate is not None
        assert 0 <= server - estimate <= 2 * MILLISECOND


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux says how long it was suspended")
def test_the_estimate_keeps_its_bound_while_the_host_is_suspended() -> None:
    """The monotonic clock stands still then, and the clock since the boot goes on, as the server's does."""
    program = """
import time

since_boot, awake, server = 50 * 10**9, 20 * 10**9, 1000 * 10**9
time.clock_gettime_ns = lambda clock: since_boot if clock == time.CLOCK_BOOTTIME else awake
time.monotonic_ns = lambda: awake

import redis, redis.asyncio
from ratelimit import AsyncRedisStore, ProxyManager, RedisStore
from ratelimit.stores.redis.server_time import ServerTime

by_url = ProxyManager.from_url("redis://localhost:1/0").store
for store in (RedisStore(redis.Redis()), AsyncRedisStore(redis.asyncio.Redis()), by_url):
    local, times = store._monotonic, ServerTime()
    times.observe(server, local(), local())
    since_boot += 3 * 10**9
    server += 3 * 10**9
    print(server - times.estimate(local()), times.error_bound(local()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        behind, bound = map(int, line.split())
        assert 0 <= behind <= bound <= 10 * MILLISECOND


@given(
    offset=st.integers(-(10**18), 10**18),
    drift_per_million=st.integers(-999, 999),
    replies=st.lists(st.tuples(st.integers(0, 10**11), st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1),
    silence=st.integers(0, 10**12),
)
def test_the_estimate_is_behind_by_its_bound_at_most_and_never_ahead(
    offset: int, drift_per_million: int, replies: list[tuple[int, int, int]], silence: int
) -> None:
    def server_at(local: int) -> int:
        return local + offset + local * drift_per_million // 1_000_000

    times, local = ServerTime(), 0
    for pause, there, back in replies:
        sent = local + pause
        local = sent + there + back
        times.observe(server_at(sent + there) // 1000 * 1000, sent, local)
        estimate, bound = times.estimate(local), times.error_bound(local)
        assert estimate is not None
        assert bound is not None
        assert -2 <= server_at(local) - estimate <= bound + 2
    local += silence
    estimate, bound = times.estimate(local), times.error_bound(local)
    assert (estimate is None) == (silence >= UNUSABLE_NANOS)
    assert bound is not None
    assert estimate is None or -2 <= server_at(local) - estimate <= bound + 2
