"""Keys are chosen by strangers: what they cost, what they can reach, and what nobody is told. See docs/SECURITY.md."""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import re
import traceback
import tracemalloc
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    CorruptStateError,
    InvalidArgumentError,
    MemoryStore,
    Optimization,
    ProxyManager,
    RateLimitError,
    RedisStore,
    StoreError,
    UnsupportedStateError,
)
from ratelimit.stores.protocol import Lost
from ratelimit.stores.redis.errors import translated
from ratelimit.testing import ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.decision_paths import By, deciding_by
from tests.support.permissions import ACL_COMMANDS
from tests.support.servers import RedisServer, ServerBinary

PAGE = Path(__file__).parents[2] / "docs" / "SECURITY.md"
MEGABYTE = 2**20
SECRET = "sesame"

# What a key costs in the process


class ForgetfulStore(SwappingMemoryStore):
    """Another machine's memory: takes everything, and costs nothing here."""

    def get(self, key: Any) -> bytes | None:
        return None

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        return None


class Distinct:
    """Keys that no two calls have in common, of about the same length."""

    def __init__(self, length: int) -> None:
        self.count = 0
        self._rest = "x" * length

    def take(self, manager: ProxyManager, times: int) -> None:
        for _ in range(times):
            self.count += 1
            manager.try_consume(f"{self.count}:{self._rest}")


@pytest.fixture
def traced() -> Generator[Callable[[], int]]:
    """Bytes that are allocated by Python since the test began."""
    gc.collect()
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()


MANAGERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "delaying": {"optimization": Optimization.delaying(1, 1)},
}


@pytest.mark.parametrize("options", MANAGERS.values(), ids=MANAGERS)
def test_memory_does_not_grow_with_the_number_of_keys(options: dict[str, Any], traced: Callable[[], int]) -> None:
    limit = MEGABYTE
    manager = ProxyManager(
        ForgetfulStore(), "10/minute", clock=ManualClock(0), memory_limit_bytes=limit, prefix="rl:", **options
    )
    keys = Distinct(0)
    keys.take(manager, 11_000)  # more than any of its tables holds
    before = traced()
    keys.take(manager, 6_000)
    assert traced() - before < MEGABYTE
    assert traced() < 2 * limit + 12 * MEGABYTE  # with the handles


def test_what_is_remembered_of_long_keys_is_bounded(traced: Callable[[], int]) -> None:
    limit = 4 * MEGABYTE
    manager = ProxyManager(ForgetfulStore(), "10/minute", clock=ManualClock(0), memory_limit_bytes=limit)
    for number in range(100):
        manager.bucket(f"{number}" + "x" * MEGABYTE).try_consume()
    assert traced() < 2 * limit + MEGABYTE


def test_no_handle_is_kept_for_a_long_key(traced: Callable[[], int]) -> None:
    manager = ProxyManager(ForgetfulStore(), "10/minute", clock=ManualClock(0), memory_limit_bytes=0)
    Distinct(MEGABYTE).take(manager, 20)
    assert traced() < MEGABYTE


# What a key can reach

NASTY = [
    b"\r\nFLUSHALL\r\n",
    b"*1\r\n$8\r\nFLUSHALL\r\n",
    b'"]] redis.call("FLUSHALL") --[[',
    b"') redis.call('FLUSHALL') --",
    b"%s%n{}{0}${jndi:ldap://x}",
    b"*",
    b"?[a-z]",
    b"../../etc/passwd",
    b"\x00\xff\x1b[2J",
    b"{}{user}",
    b"IFEQ",
    b"",
]


@pytest.fixture
def admin(server: RedisServer) -> Generator[redis.Redis]:
    with server.client() as client:
        client.flushall()
        client.set("somebody else's", "kept")
        yield client


def check_reach(server: RedisServer, admin: redis.Redis, keys: list[bytes]) -> None:
    """Each key is one bucket under the prefix, and nothing else is touched, whoever decides."""
    for by in By:
        with deciding_by(by), ProxyManager.from_url(server.url, "5/365d", prefix="rl:") as manager:
            for key in keys:
                assert manager.try_consume(key, 2)
                assert manager.try_consume_and_return_remaining(key).remaining_tokens == 2
            assert set(admin.keys()) == {b"somebody else's", *(b"rl:" + key for key in keys)}
            for key in keys:
                manager.remove(key)
    assert admin.keys() == [b"somebody else's"]


@pytest.mark.redis
def test_a_key_is_no_command_no_script_and_no_pattern(server: RedisServer, admin: redis.Redis) -> None:
    check_reach(server, admin, NASTY)


@pytest.mark.redis
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5, unique=True))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_key_reaches_its_own_bucket_only(server: RedisServer, admin: redis.Redis, keys: list[bytes]) -> None:
    check_reach(server, admin, keys)


@pytest.mark.redis
def test_tasks_reach_their_own_bucket_only(server: RedisServer, admin: redis.Redis) -> None:
    async def consume() -> list[bool]:
        async with AsyncProxyManager.from_url(server.url, "5/365d", prefix="rl:") as manager:
            return await asyncio.gather(*(manager.try_consume(key) for key in NASTY))

    assert all(asyncio.run(consume()))
    assert set(admin.keys()) == {b"somebody else's", *(b"rl:" + key for key in NASTY)}


# What is told

KEYS = ["k" * MEGABYTE, b"\xff" * MEGABYTE, "\n" * MEGABYTE, "\x1b[2J\r\nERROR forged"]


def check_told(told: str) -> None:
    assert len(told) < 1_000
    assert not re.search(r"[\x00-\x1f]", told)


def failures(key: Any) -> Generator[RateLimitError]:
    """Every error that is about a key."""
    yield StoreError(key, "refused")
    yield CorruptStateError(key, b"\n" * MEGABYTE, "not the state of a bucket")
    yield UnsupportedStateError(key, b"\n" * MEGABYTE, "a state in format 9", 9)
    store = ScriptedStore()
    store.fail()
    with pytest.raises(StoreError) as caught:
        ProxyManager(store, "1/s").try_consume(key)
    yield caught.value
    swapping = SwappingMemoryStore()
    swapping.put(key, b"\n" * MEGABYTE)
    with pytest.raises(CorruptStateError) as corrupt:
        ProxyManager(swapping, "1/s").try_consume(key)
    yield corrupt.value


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[:8]!r}")
def test_an_error_is_one_short_line_in_a_log_whatever_the_key(key: str | bytes) -> None:
    for error in failures(key):
        check_told(str(error))
        check_told(repr(error))
        assert error.__dict__["key"] == key
        assert repr(pickle.loads(pickle.dumps(error))) == repr(error)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key[:8]!r}")
def test_a_warning_is_one_short_line_whatever_the_key(key: str | bytes, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupting(ManualClock):
        def sleep(self, nanos: int) -> None:
            store.fail()
            raise KeyboardInterrupt

    clock = Interrupting(0)
    store = ScriptedStore()
    manager = ProxyManager(store, "1/hour", clock=clock)
    assert manager.try_consume(key)
    with caplog.at_level(logging.DEBUG), pytest.raises(KeyboardInterrupt):
        manager.consume(key)
    (record,) = [record for record in caplog.records if record.name == "ratelimit"]
    check_told(record.getMessage())


def test_what_a_server_answers_is_told_in_short() -> None:
    for kind in (redis.ResponseError, redis.ConnectionError, redis.TimeoutError, OSError):
        check_told(str(translated(kind("quoted \r\n" * 10_000), b"key", in_doubt=True)))


def test_a_key_that_is_none_is_told_in_short() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        ProxyManager(MemoryStore(), "1/s").try_consume("\ud800" * MEGABYTE)
    check_told(str(caught.value))


def parts(error: BaseException | None) -> Generator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.redis
@pytest.mark.parametrize("make", [ProxyManager, AsyncProxyManager])
def test_nobody_is_told_a_password(server_binary: ServerBinary, make: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with RedisServer.start(server_binary, "--requirepass", "another") as server:
        place = f"127.0.0.1:{server.port}"
        for url in (
            f"redis://:{SECRET}@{place}",
            f"redis://user:{SECRET}@{place}/0",
            f"redis://{place}?password={SECRET}",
            f"redis+cluster://:{SECRET}@{place}",
            f"redis+sentinel://:{SECRET}@{place}/service?sentinel_password={SECRET}",
            f"redis://:{SECRET}@127.0.0.1:1",
            f"unix://:{SECRET}@/nowhere",
        ):
            manager = make.from_url(url, "1/s")

            async def consume(manager: Any = manager) -> None:
                answer = manager.try_consume("user:42")
                if make is AsyncProxyManager:
                    await answer

            with pytest.raises(StoreError) as caught:
                asyncio.run(consume())
            told = [repr(manager), str(manager), repr(manager.bucket("key")), repr(manager._store)]
            told += [f"{part!r} {part}" for part in parts(caught.value)]
            told += traceback.format_exception(caught.value)
            told += [record.getMessage() for record in caplog.records]
            assert not [one for one in told if SECRET in one], url


@pytest.mark.parametrize("store", [RedisStore, AsyncRedisStore])
def test_a_url_that_is_given_for_a_client_is_not_shown(store: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^client must be .*; got <class 'str'>") as caught:
        store(f"redis://:{SECRET}@localhost")
    assert SECRET not in f"{caught.value!r} {caught.value}"


# What the page promises


def test_the_permissions_of_the_page_are_those_that_are_tested() -> None:
    for command in ACL_COMMANDS:
        assert f"+{command}" in PAGE.read_text()
