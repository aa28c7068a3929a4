"""Commands that reach a real Redis, counted by its own MONITOR."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

import pytest
import redis

from ratelimit import AsyncProxyManager, ProxyManager
from tests.faces import Settled

pytestmark = pytest.mark.redis

LIMITS = "3/day"


class Counter:
    """What clients have sent since it was last asked; not what scripts called, and not the handshakes."""

    def __init__(self, client: redis.Redis, monitor: Any) -> None:
        self._client = client
        self._monitor = monitor

    def sent(self) -> list[str]:
        self._client.echo("end of count")
        commands: list[str] = []
        while True:
            seen = self._monitor.next_command()
            name = seen["command"].split(" ")[0].upper()
            if name == "ECHO":
                return commands
            if seen["client_type"] != "lua":
                commands.append(name)


@pytest.fixture
def counter(redis_url: str) -> Generator[Counter]:
    with redis.Redis.from_url(redis_url) as client, client.monitor() as monitor:
        yield Counter(client, monitor)


@pytest.fixture(params=["sync", "asyncio"])
async def face(request: pytest.FixtureRequest, redis_url: str, counter: Counter) -> AsyncGenerator[Settled]:
    """A manager that is in use: connected, its scripts known to the server, and the server's time to it."""
    async with AsyncProxyManager.from_url(redis_url, LIMITS) as amanager:
        with ProxyManager.from_url(redis_url, LIMITS) as manager:
            face = Settled(manager if request.param == "sync" else amanager)
            for _ in range(3):
                await face.try_consume("warm up")
            counter.sent()
            yield face


@pytest.fixture
def other(redis_url: str) -> Generator[ProxyManager]:
    with ProxyManager.from_url(redis_url, LIMITS) as manager:
        manager.try_consume("warm up")
        yield manager


async def test_a_fresh_key_costs_one(face: Settled, counter: Counter) -> None:
    assert await face.try_consume("key")
    assert counter.sent() == ["EVALSHA"]


async def test_a_key_that_only_this_process_uses_costs_one(face: Settled, counter: Counter) -> None:
    await face.try_consume("key")
    counter.sent()
    for _ in range(2):
        assert await face.try_consume("key")
        assert counter.sent() == ["EVALSHA"]


async def test_a_key_that_another_process_has_changed_costs_two(
    face: Settled, counter: Counter, other: ProxyManager
) -> None:
    await face.try_consume("key")
    assert other.try_consume("key")
    counter.sent()
    assert await face.try_consume("key")
    assert counter.sent() == ["EVALSHA"] * 2


async def test_a_key_that_another_process_has_made_costs_two(
    face: Settled, counter: Counter, other: ProxyManager
) -> None:
    assert other.try_consume("key")
    counter.sent()
    assert await face.try_consume("key")
    assert counter.sent() == ["EVALSHA"] * 2


async def test_a_rejection_costs_one_on_top_of_what_is_known(
    face: Settled, counter: Counter, other: ProxyManager
) -> None:
    await face.try_consume("key", 3)
    counter.sent()
    for _ in range(3):
        assert not await face.try_consume("key")
        assert counter.sent() == ["GET"]
    other.try_consume("full", 3)
    counter.sent()
    assert not await face.try_consume("full")  # never seen: tried as absent, and the reply shows that it is empty
    assert counter.sent() == ["EVALSHA"]


async def test_reading_costs_one(face: Settled, counter: Counter) -> None:
    await face.try_consume("key")
    counter.sent()
    await face.available_tokens("key")
    await face.snapshot("key")
    await face.configuration("key")
    assert counter.sent() == ["GET"] * 3


async def test_a_first_decision_asks_for_the_time_and_sends_the_script(counter: Counter, redis_url: str) -> None:
    with ProxyManager.from_url(redis_url, LIMITS) as manager:
        manager.try_consume("key")
        sent = [name for name in counter.sent() if name not in ("HELLO", "CLIENT", "SELECT")]
        assert sent == ["TIME", "EVAL"]


async def test_a_server_that_forgot_its_scripts_is_taught_them_again(
    face: Settled, counter: Counter, redis_url: str
) -> None:
    await face.try_consume("key")
    with redis.Redis.from_url(redis_url) as client:
        client.script_flush()
    counter.sent()
    assert await face.try_consume("key")
    assert counter.sent() == ["EVALSHA", "EVAL"]
    assert await face.try_consume("key")
    assert counter.sent() == ["EVALSHA"]
