"""Tests that freeze time, with freezegun or time-machine, freeze none of the limiter's own clocks."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis.asyncio
import time_machine
from freezegun import freeze_time

from ratelimit import (
    AsyncProxyManager,
    CircuitBreaker,
    CircuitState,
    MemoryStore,
    ProxyManager,
    RedisStore,
    StoreTimeoutError,
    SystemClock,
)
from ratelimit.integrations.http import Answers, Limiter
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.store import AsyncRedisStore
from tests.integrations.requests_of import request_of
from tests.support.servers import RedisServer

ROOT = Path(__file__).parents[2]
NOW = datetime(2030, 1, 1, tzinfo=UTC)
PATIENCE = 60
TIMEOUT = 0.3

Freeze = Callable[[], AbstractContextManager[Any]]

FREEZES: dict[str, Freeze] = {
    "freezegun": partial(freeze_time, NOW),
    "freezegun, real_asyncio": partial(freeze_time, NOW, real_asyncio=True),
    "freezegun, tick": partial(freeze_time, NOW, tick=True),
    "freezegun, auto_tick_seconds": partial(freeze_time, NOW, auto_tick_seconds=15),
    "time-machine": partial(time_machine.travel, NOW),
    "time-machine, frozen": partial(time_machine.travel, NOW, tick=False),
}
REAL_LOOPS = ["freezegun, real_asyncio", "time-machine", "time-machine, frozen"]
"""Those that leave the clock of asyncio alone."""


@pytest.fixture(params=FREEZES)
def freeze(request: pytest.FixtureRequest) -> Freeze:
    return FREEZES[request.param]


@pytest.fixture(params=REAL_LOOPS)
def freeze_beside_loops(request: pytest.FixtureRequest) -> Freeze:
    return FREEZES[request.param]


@contextmanager
def paused(server: RedisServer) -> Generator[None]:
    server.pause()
    try:
        yield
    finally:
        server.resume()


class Elapsed(NamedTuple):
    begun: float

    @property
    def seconds(self) -> float:
        return monotonic() - self.begun


# Decisions


@pytest.mark.redis
def test_decisions_work_in_frozen_time_and_the_server_keeps_its_own(url: str, freeze: Freeze) -> None:
    before = ProxyManager.from_url(url, "7/day", timeout=PATIENCE)
    assert before.try_consume("key")
    with freeze() as frozen:
        for days in (0, 10, -10):
            frozen.move_to(NOW + timedelta(days=days))
            with ProxyManager.from_url(url, "7/day", timeout=PATIENCE) as inside:
                assert before.try_consume("key")
                assert inside.try_consume("key")
        frozen.move_to(NOW + timedelta(days=20))
        assert not before.try_consume("key")
    assert not before.try_consume("key")
    before.close()


@freeze_time(NOW)
def decided_in_a_decorated_function(manager: ProxyManager) -> bool:
    return manager.try_consume("key")


@pytest.mark.redis
def test_a_function_may_be_decorated(url: str) -> None:
    with ProxyManager.from_url(url, "2/day", timeout=PATIENCE) as manager:
        assert [decided_in_a_decorated_function(manager) for _ in range(3)] == [True, True, False]


@pytest.mark.redis
@pytest.mark.parametrize("name", [name for name in FREEZES if "auto_tick" not in name])
async def test_decisions_of_tasks_work_in_frozen_time(url: str, name: str) -> None:
    before = AsyncProxyManager.from_url(url, "6/day", timeout=PATIENCE)
    assert await before.try_consume("key")
    with FREEZES[name]() as frozen:
        frozen.move_to(NOW + timedelta(days=10))
        async with AsyncProxyManager.from_url(url, "6/day", timeout=PATIENCE) as inside:
            assert all(await asyncio.gather(*(one.try_consume("key") for one in (before, inside, before, inside))))
    assert await before.try_consume("key")
    assert not await before.try_consume("key")
    await before.aclose()


def test_the_package_may_be_imported_in_frozen_time() -> None:
    program = """
from freezegun import freeze_time
import time
real = time.monotonic()
with freeze_time("2030-01-01"):
    from ratelimit.runtime.clock import monotonic, monotonic_ns
    assert 0 <= monotonic() - real < 600
assert 0 <= monotonic() - real < 600 and 0 <= monotonic_ns() / 1e9 - real < 600
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=PATIENCE)


# What time does: the time that really passes


@pytest.mark.redis
def test_a_silent_server_is_left_at_the_time_limit(server: RedisServer, freeze: Freeze) -> None:
    with ProxyManager.from_url(server.url, "100/day", timeout=TIMEOUT) as manager:
        assert manager.try_consume("key", timeout=PATIENCE)
        elapsed = Elapsed(monotonic())
        with paused(server), freeze(), pytest.raises(StoreTimeoutError):
            manager.try_consume("key")
        assert TIMEOUT * 0.9 < elapsed.seconds < PATIENCE


@pytest.mark.redis
async def test_a_silent_server_is_left_by_tasks_at_the_time_limit(
    server: RedisServer, freeze_beside_loops: Freeze
) -> None:
    async with AsyncProxyManager.from_url(server.url, "100/day", timeout=TIMEOUT) as manager:
        assert await manager.try_consume("key", timeout=PATIENCE)
        elapsed = Elapsed(monotonic())
        with paused(server), freeze_beside_loops():
            calls = (manager.try_consume("key") for _ in range(3))  # some of them wait for the first
            answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreTimeoutError] * 3
        assert TIMEOUT * 0.9 < elapsed.seconds < PATIENCE


@pytest.mark.redis
@pytest.mark.parametrize("name", ["freezegun", "freezegun, real_asyncio"])
async def test_time_limits_hold_again_once_time_is_not_frozen_any_more(server: RedisServer, name: str) -> None:
    async with AsyncProxyManager.from_url(server.url, "100/day", timeout=TIMEOUT) as manager:
        assert await manager.try_consume("key", timeout=PATIENCE)
        with FREEZES[name]():
            assert await manager.try_consume("key", timeout=TIMEOUT)  # the loop is to end it by its frozen clock
        await asyncio.sleep(2 * TIMEOUT)
        with paused(server), pytest.raises(StoreTimeoutError):
            await asyncio.wait_for(manager.try_consume("key"), PATIENCE)


@pytest.mark.redis
def test_a_circuit_closes_again(server: RedisServer, freeze: Freeze) -> None:
    breaker = CircuitBreaker(failures=1, shortest_pause=0.05, longest_pause=0.1)
    with server.client(socket_timeout=PATIENCE) as client, freeze():
        manager = ProxyManager(RedisStore(client, circuit_breaker=breaker), "100/day", timeout=TIMEOUT)
        assert manager.try_consume("key", timeout=PATIENCE)
        with paused(server), pytest.raises(StoreTimeoutError):
            manager.try_consume("key")
        while manager.circuits()[""].state is CircuitState.OPEN:
            pass
        assert manager.circuits()[""].state is CircuitState.HALF_OPEN
        assert manager.try_consume("key", timeout=PATIENCE)
        assert manager.circuits()[""].state is CircuitState.CLOSED


@pytest.mark.redis
async def test_a_circuit_of_tasks_closes_again(server: RedisServer, freeze_beside_loops: Freeze) -> None:
    breaker = CircuitBreaker(failures=1, shortest_pause=0.05, longest_pause=0.1)
    async with redis.asyncio.Redis(port=server.port, socket_timeout=PATIENCE) as client:
        with freeze_beside_loops():
            store = AsyncRedisStore(client, circuit_breaker=breaker)
            manager = AsyncProxyManager(store, "100/day", timeout=TIMEOUT)
            assert await manager.try_consume("key", timeout=PATIENCE)
            with paused(server), pytest.raises(StoreTimeoutError):
                await manager.try_consume("key")
            while manager.circuits()[""].state is CircuitState.OPEN:
                await asyncio.sleep(0.01)
            assert await manager.try_consume("key", timeout=PATIENCE)
            assert manager.circuits()[""].state is CircuitState.CLOSED
            await store.aclose()


@pytest.mark.redis
def test_consume_waits_for_as_long_as_it_takes(url: str, freeze: Freeze) -> None:
    with ProxyManager.from_url(url, "5/second burst 1", timeout=PATIENCE) as manager, freeze():
        elapsed = Elapsed(monotonic())
        assert all(manager.consume("key") for _ in range(3))
        assert 0.39 < elapsed.seconds < PATIENCE


@pytest.mark.redis
async def test_consume_of_tasks_waits_for_as_long_as_it_takes(url: str, freeze_beside_loops: Freeze) -> None:
    async with AsyncProxyManager.from_url(url, "5/second burst 1", timeout=PATIENCE) as manager:
        with freeze_beside_loops():
            elapsed = Elapsed(monotonic())
            assert all([await manager.consume("key") for _ in range(3)])
            assert 0.39 < elapsed.seconds < PATIENCE


# The bucket's clock


@pytest.mark.parametrize("name", ["freezegun", "time-machine, frozen"])
@pytest.mark.parametrize("made_before", [True, False])
def test_a_bucket_by_the_system_clock_follows_frozen_time(name: str, made_before: bool) -> None:
    make = partial(ProxyManager, clock=SystemClock())
    manager = make(MemoryStore(), "3/minute") if made_before else None
    with FREEZES[name]() as frozen:
        manager = manager or make(MemoryStore(), "3/minute")
        assert [manager.try_consume("key") for _ in range(4)] == [True, True, True, False]
        frozen.move_to(NOW + timedelta(seconds=20))
        assert [manager.try_consume("key") for _ in range(2)] == [True, False]
        frozen.move_to(NOW + timedelta(minutes=5))
        assert manager.available_tokens("key") == 3


@pytest.mark.parametrize("name", ["freezegun", "time-machine, frozen"])
def test_a_store_in_memory_keeps_to_the_monotonic_clock(name: str) -> None:
    manager = ProxyManager(MemoryStore(), "3/day")
    assert manager.try_consume("key", 3)
    with FREEZES[name]() as frozen:
        frozen.move_to(NOW + timedelta(days=10))
        assert manager.available_tokens("key") == 0


def test_the_time_at_which_a_bucket_is_full_follows_frozen_time() -> None:
    limiter = Limiter("3/minute", manager=ProxyManager(MemoryStore()))
    with freeze_time(NOW):
        answers = Answers(x_ratelimit="epoch")
        headers = dict(answers.headers(limiter.decide(request_of())))
    assert 0 <= int(headers["X-RateLimit-Reset"]) - NOW.timestamp() <= 60


# The whole package

READERS = {
    "runtime/clock.py": None,  # all
    "engine/face.py": {"sleep"},
    "stores/redis/shared_connection.py": {"loop.time"},
    "integrations/http/answers.py": {"time"},
}
"""What a module may use of ``time``."""


def used_of_time(tree: ast.AST) -> set[str]:
    """Attributes of the module ``time``, names that are imported from it, and ``time`` of an event loop."""
    used = set[str]()
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    imported = any(alias.name == "time" for node in imports for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            used |= {alias.name for alias in node.names}
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "time"
            and imported
        ):
            used.add(node.attr)
        elif isinstance(node, ast.Attribute) and node.attr == "time" and "loop" in ast.unparse(node.value):
            used.add("loop.time")
    return used


def test_one_module_reads_the_clocks() -> None:
    program = "import time\nfrom time import perf_counter\ntime.monotonic()\nself._loop.time()"
    assert used_of_time(ast.parse(program)) == {"loop.time", "monotonic", "perf_counter"}
    for path in (ROOT / "ratelimit").rglob("*.py"):
        name = path.relative_to(ROOT / "ratelimit").as_posix()
        allowed = READERS.get(name, set())
        if allowed is not None and not name.startswith(("cli/", "demo/")):
            assert used_of_time(ast.parse(path.read_text())) <= allowed, name
