"""Full buckets between two tests: all keys under a prefix are removed, and no others."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    AsyncRedisStore,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    RedisStore,
    StoreUnavailableError,
)
from ratelimit.integrations.http import AsyncLimiter, HttpRequest, Limiter, Rule
from ratelimit.policy import managers
from ratelimit.testing import ManualClock, areset_all, reset_all
from tests.support.both_faces import Manager, closing, settled

STRANGE = r"a*b?[c-e]\:"
"""A prefix in which every character that a pattern of Redis has means itself."""

FOREIGN = [r"a*b?c\:key", r"aXXbY[c-e]\:key", "ab", "other:key"]


async def reset(manager: Manager) -> None:
    if isinstance(manager, ProxyManager):
        reset_all(manager)
    else:
        await areset_all(manager)


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest) -> Any:
    return ProxyManager if request.param == "sync" else AsyncProxyManager


async def check_reset(manager: Manager, keys: list[str]) -> None:
    """Check that buckets are full after a reset, also those that the manager remembers."""
    for key in keys:
        assert await settled(manager.try_consume(key, 3))
        assert not await settled(manager.try_consume(key))
    await reset(manager)
    for key in keys:
        assert await settled(manager.configuration(key)) is None
        assert await settled(manager.try_consume(key, 3))
    await reset(manager)


async def test_in_memory(make: Any) -> None:
    store = MemoryStore()
    manager = make(store if make is ProxyManager else AsyncMemoryStore(store), "3/hour", prefix="users:")
    other = ProxyManager(store, "3/hour", prefix="others:")
    assert other.try_consume("7")
    await check_reset(manager, ["7", "8"])
    assert store.keys(b"") == [b"others:7"]


@pytest.mark.redis
@pytest.mark.parametrize("prefix", ["users:", STRANGE, b"\xff\x00*"])
async def test_on_a_server(make: Any, prefix: str | bytes, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for key in FOREIGN:
            client.set(key, "kept")
        async with closing(make.from_url(redis_url, "3/hour", prefix=prefix)) as manager:
            await check_reset(manager, [f"user:{number}" for number in range(30)])
            assert sorted(client.keys()) == sorted(key.encode() for key in FOREIGN)
            assert all(client.get(key) == b"kept" for key in FOREIGN)


@pytest.mark.redis
@pytest.mark.parametrize("options", [{}, {"decode_responses": True}], ids=str)
async def test_over_a_client_of_the_callers(make: Any, options: dict[str, Any], redis_url: str) -> None:
    if make is ProxyManager:
        with redis.Redis.from_url(redis_url, **options) as client:
            await check_reset(ProxyManager(RedisStore(client), "3/hour", prefix="u:"), ["ä", "b"])
    else:
        async with redis.asyncio.Redis.from_url(redis_url, **options) as aclient:
            await check_reset(AsyncProxyManager(AsyncRedisStore(aclient), "3/hour", prefix="u:"), ["ä", "b"])


@pytest.mark.redis
def test_in_one_event_loop_after_the_other(redis_url: str) -> None:
    manager = AsyncProxyManager.from_url(redis_url, "3/hour", prefix="users:")
    for _ in range(3):
        asyncio.run(check_reset(manager, ["7"]))


async def test_a_manager_without_a_prefix_is_refused(make: Any) -> None:
    store = MemoryStore()
    manager = make(store if make is ProxyManager else AsyncMemoryStore(store), "3/hour")
    await settled(manager.try_consume("7"))
    with pytest.raises(InvalidArgumentError, match="must have a prefix, or keys would be removed that are not buckets"):
        await reset(manager)
    assert store.keys(b"") == [b"7"]


async def test_what_is_no_manager_of_this_face_is_refused() -> None:
    wrong: Any = AsyncProxyManager(AsyncMemoryStore(), "3/hour", prefix="p:")
    with pytest.raises(InvalidArgumentError, match="manager must be a ProxyManager; got AsyncProxyManager"):
        reset_all(wrong)
    wrong = ProxyManager(MemoryStore(), "3/hour", prefix="p:")
    with pytest.raises(InvalidArgumentError, match="manager must be an AsyncProxyManager; got ProxyManager"):
        await areset_all(wrong)


def test_a_store_that_cannot_list_its_keys_is_refused() -> None:
    class Bare:
        get = swap = delete = now_nanos = close = print

    bare: Any = Bare()
    with pytest.raises(InvalidArgumentError, match=r"the manager's store must have keys\(prefix\); got ProxyManager"):
        reset_all(ProxyManager(bare, "3/hour", prefix="p:"))


async def test_a_server_that_is_gone_is_an_error_of_the_store(make: Any) -> None:
    async with closing(make.from_url("redis://localhost:1/0", "3/hour", prefix="p:")) as manager:
        with pytest.raises(StoreUnavailableError):
            await reset(manager)


class TestManagersOfIntegrations:
    @pytest.fixture(autouse=True)
    def _of_this_test(self, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
        """Begin without managers, as a process does."""
        monkeypatch.setattr(managers, "_made", type(managers._made)())
        monkeypatch.setattr(managers, "_async_made", type(managers._async_made)())
        managers._of_url.cache_clear()
        managers._async_of_url.cache_clear()
        yield
        managers._of_url.cache_clear()
        managers._async_of_url.cache_clear()

    def request(self) -> HttpRequest:
        return HttpRequest("GET", "/", "192.0.2.1", lambda _: None)

    @pytest.mark.redis
    def test_in_sync_tests(self, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.set("other", "kept")
            limiter = Limiter(Rule("1/hour", name="a"), manager=redis_url)
            alimiter = AsyncLimiter(Rule("1/hour", name="b"), manager=redis_url)
            in_memory = AsyncLimiter(Rule("1/hour", name="b"), manager="memory://")
            for _ in range(2):
                assert limiter.decide(self.request())
                assert not limiter.decide(self.request())
                for each in (alimiter, in_memory):
                    assert asyncio.run(each.decide(self.request()))
                    assert not asyncio.run(each.decide(self.request()))
                reset_all()
                assert client.keys() == [b"other"]

    @pytest.mark.redis
    async def test_in_tests_of_asyncio(self, redis_url: str) -> None:
        limiter = Limiter(Rule("1/hour", name="a"), manager="memory://")
        alimiter = AsyncLimiter(Rule("1/hour", name="b"), manager=redis_url)
        for _ in range(2):
            assert limiter.decide(self.request())
            assert await alimiter.decide(self.request())
            assert not await alimiter.decide(self.request())
            await areset_all()
        with pytest.raises(RuntimeError, match=r"await areset_all\(\) there"):
            reset_all()
        await managers.async_manager_of(redis_url).aclose()

    def test_where_there_are_none(self) -> None:
        reset_all()
        asyncio.run(areset_all())

    def test_those_that_a_fixture_has_put_in_their_place(self, ratelimit_clock: ManualClock) -> None:
        limiter = Limiter(Rule("1/hour", name="a"))
        for _ in range(2):
            assert limiter.decide(self.request())
            assert not limiter.decide(self.request())
            reset_all()
        assert ratelimit_clock.slept == []
