"""Commands that reach a real Redis, counted by its own MONITOR."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator

import pytest
import redis

from ratelimit import AsyncProxyManager, ProxyManager
from ratelimit.stores.redis.server_time import FIRST_REPLIES
from tests.support.both_faces import Settled
from tests.support.redis_monitor import Monitor, monitored

pytestmark = pytest.mark.redis

LIMITS = "3/day"


@pytest.fixture
def monitor(redis_url: str) -> Generator[Monitor]:
    with monitored(redis_url) as monitor:
        yield monitor


@pytest.fixture
def swap(native_swaps: bool) -> str:
    """The command that swaps, once the server has been tried."""
    return "SET" if native_swaps else "EVALSHA"


@pytest.fixture(params=["sync", "asyncio"])
async def face(request: pytest.FixtureRequest, redis_url: str, monitor: Monitor) -> AsyncGenerator[Settled]:
    """A manager that is in use: connected, its scripts known to the server, and the server's time to it."""
    async with AsyncProxyManager.from_url(redis_url, LIMITS) as amanager:
        with ProxyManager.from_url(redis_url, LIMITS) as manager:
            face = Settled(manager if request.param == "sync" else amanager)
            for _ in range(max(3, FIRST_REPLIES)):
                await face.try_consume("warm up")
            # By the script that decides about keys of which nothing is known.
            await face.try_consume("warm up as well")
            monitor.sent()
            yield face


@pytest.fixture
def other(redis_url: str) -> Generator[ProxyManager]:
    with ProxyManager.from_url(redis_url, LIMITS) as manager:
        manager.try_consume("warm up")
        yield manager


async def test_a_fresh_key_costs_one(face: Settled, monitor: Monitor) -> None:
    assert await face.try_consume("key")
    assert monitor.sent() == ["EVALSHA"]


async def test_a_key_that_only_this_process_uses_costs_one(face: Settled, monitor: Monitor, swap: str) -> None:
    await face.try_consume("key")
    monitor.sent()
    for _ in range(2):
        assert await face.try_consume("key")
        assert monitor.sent() == [swap]


async def test_a_key_that_another_process_has_changed_costs_two(
    face: Settled, monitor: Monitor, other: ProxyManager, swap: str
) -> None:
    await face.try_consume("key")
    assert other.try_consume("key")
    monitor.sent()
    assert await face.try_consume("key")
    assert monitor.sent() == [swap, "EVALSHA"]


async def test_a_key_that_another_process_keeps_changing_costs_one(
    face: Settled, monitor: Monitor, other: ProxyManager, swap: str
) -> None:
    await face.try_consume("key")
    for number in range(10):
        other.bucket("key").force_add_tokens(1)
        monitor.sent()
        assert await face.try_consume("key")
        assert monitor.sent() == ["EVALSHA"] if number else [swap, "EVALSHA"]


async def test_a_rejection_costs_one_on_top_of_what_is_known(
    face: Settled, monitor: Monitor, other: ProxyManager
) -> None:
    await face.try_consume("key", 3)
    monitor.sent()
    for _ in range(3):
        assert not await face.try_consume("key")
        assert monitor.sent() == ["GETRANGE"]
    other.try_consume("full", 3)
    monitor.sent()
    assert not await face.try_consume("full")  # never seen
    assert monitor.sent() == ["EVALSHA"]


async def test_reading_costs_one(face: Settled, monitor: Monitor) -> None:
    await face.try_consume("key")
    monitor.sent()
    await face.available_tokens("key")
    await face.snapshot("key")
    await face.configuration("key")
    assert monitor.sent() == ["GETRANGE"] * 3


async def test_a_first_decision_asks_for_the_time_and_tries_the_native_swap(
    monitor: Monitor, redis_url: str, native_swaps: bool
) -> None:
    with ProxyManager.from_url(redis_url, LIMITS) as manager:
        manager.try_consume("key")
        assert monitor.sent() == ["TIME", "GETRANGE", "TIME", "SET", "EVAL"]  # two round trips
        manager.try_consume("key")
        swap = "SET" if native_swaps else "EVAL"  # of another script than the first
        assert monitor.sent() == ["TIME", swap]  # as long as few replies have told the time


async def test_a_server_that_forgot_its_scripts_is_taught_them_again(
    face: Settled, monitor: Monitor, redis_url: str, native_swaps: bool, swap: str
) -> None:
    await face.try_consume("key")
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    monitor.sent()
    assert await face.try_consume("key")
    assert monitor.sent() == ([swap] if native_swaps else ["EVALSHA", "EVAL"])
    assert await face.try_consume("key")
    assert monitor.sent() == [swap]
