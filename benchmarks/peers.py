"""Published libraries, each called as its documentation says, with as little around it as can be.

They are imported when they are opened: where one is missing, it is left out of the results, and all else runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

import redis
import redis.asyncio

from benchmarks.model import ROOMY, AsyncHit, Hit, Setup

Opened = AbstractContextManager[Hit]
AsyncOpened = AbstractAsyncContextManager[AsyncHit]


def limits(strategy: str) -> Callable[[Setup], Opened]:
    """``limits``, with Redis or in memory; it cannot combine limits, so that each of several limits takes a hit."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        storages, strategies = import_module("limits.storage"), import_module("limits.strategies")
        if setup.url == "memory://":
            storage = storages.MemoryStorage()
        else:
            storage = storages.RedisStorage(setup.url, max_connections=setup.connections + 1)
        hit = getattr(strategies, strategy)(storage).hit
        item, *more = items = _limit_items(setup)
        try:
            # A list, because each of them is asked, also after a no.
            yield (lambda key: all([hit(item, key) for item in items])) if more else partial(hit, item)  # noqa: C419
        finally:
            if setup.url != "memory://":
                storage.storage.close()

    return opened


def limits_asyncio(strategy: str) -> Callable[[Setup], AsyncOpened]:
    """``limits.aio``, over redis-py as all others."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        storages, strategies = import_module("limits.aio.storage"), import_module("limits.aio.strategies")
        storage = storages.RedisStorage(
            f"async+{setup.url}", implementation="redispy", max_connections=setup.connections + 1
        )
        (item,) = _limit_items(setup)
        try:
            yield partial(getattr(strategies, strategy)(storage).hit, item)
        finally:
            await storage.bridge.storage.aclose()

    return opened


def _limit_items(setup: Setup) -> list[Any]:
    module = import_module("limits")
    # It knows no bursts.
    return [
        module.RateLimitItemPerSecond(limit.capacity, limit.seconds * limit.capacity // limit.tokens)
        for limit in setup.limits
    ]


def throttled(using: str) -> Callable[[Setup], Opened]:
    """``throttled-py``, with Redis or in memory; each of several limits takes a call."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        module = import_module("throttled")
        if setup.url == "memory://":
            store = module.MemoryStore(options={"MAX_SIZE": 10_000})
        else:
            store = module.RedisStore(server=setup.url, options=_throttled_options(setup))
        one, *more = throttles = _throttles(module, setup, store, using)
        limit = one.limit
        try:
            if more:
                yield lambda key: all([not throttle.limit(key).limited for throttle in throttles])  # noqa: C419
            else:
                yield lambda key: not limit(key).limited
        finally:
            if setup.url != "memory://":
                store._backend.get_client().connection_pool.disconnect()  # noqa: SLF001  # it has no close

    return opened


def throttled_asyncio(using: str) -> Callable[[Setup], AsyncOpened]:
    """``throttled.asyncio``."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        module = import_module("throttled.asyncio")
        store = module.RedisStore(server=setup.url, options=_throttled_options(setup))
        (throttle,) = _throttles(module, setup, store, using)
        limit = throttle.limit

        async def hit(key: str) -> bool:
            return not (await limit(key)).limited

        try:
            yield hit
        finally:
            await store._backend.get_client().connection_pool.disconnect()  # noqa: SLF001  # it has no close

    return opened


def _throttled_options(setup: Setup) -> dict[str, Any]:
    return {"REUSE_CONNECTION": False, "CONNECTION_POOL_KWARGS": {"max_connections": setup.connections + 1}}


def _throttles(module: Any, setup: Setup, store: Any, using: str) -> list[Any]:
    return [
        module.Throttled(
            using=using,
            quota=module.per_duration(timedelta(seconds=limit.seconds), limit.tokens, limit.burst),
            store=store,
            key_prefix=f"b{i}",
        )
        for i, limit in enumerate(setup.limits)
    ]


class _PerKey(dict[str, Any]):
    """An object for each key, made at its first use: for libraries whose limiter is that of one key."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, key: str) -> Any:
        made = self[key] = self._make(key)
        return made


def pyrate(*, log: bool) -> Callable[[Setup], Opened]:
    """``pyrate-limiter``: a limiter for each key, since one for all of them serialises its callers by a lock.

    :param log: its older kind of bucket, which stores an entry for each request that it admits. Nothing is deleted
        while a slice lasts.
    """

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        if setup.url == "memory://":
            yield _pyrate_hit(None, setup, log=log)
            return
        with redis.Redis.from_url(setup.url, max_connections=setup.connections + 1) as client:
            yield _pyrate_hit(client, setup, log=log)

    return opened


@asynccontextmanager
async def pyrate_asyncio(setup: Setup) -> AsyncGenerator[AsyncHit]:
    """Open pyrate-limiter over redis.asyncio. Its log bucket has to be awaited when it is made, and is left out."""
    async with redis.asyncio.Redis.from_url(setup.url, max_connections=setup.connections + 1) as client:
        hit: Any = _pyrate_hit(client, setup, log=False)
        yield hit


def _pyrate_hit(client: Any, setup: Setup, *, log: bool) -> Hit:
    module = import_module("pyrate_limiter")
    factory = import_module("pyrate_limiter.limiter").SingleBucketFactory
    rates = [module.Rate(limit.tokens, limit.seconds * 1_000, limit.burst) for limit in setup.limits]
    # If it does not wait, it also refuses while another thread holds its lock.
    blocking = setup.limits[0] == ROOMY

    def limiter(key: str) -> Any:
        if log:
            bucket = module.InMemoryBucket(rates) if client is None else module.RedisBucket.init(rates, client, key)
        else:
            store = module.InMemoryStateStore() if client is None else module.RedisStateStore(client, key)
            bucket = module.StateBucket(rates, module.TokenBucket(), store)
        return module.Limiter(factory(bucket, schedule_leak=False)).try_acquire

    limiters = _PerKey(limiter)
    return lambda key: limiters[key](key, blocking=blocking)


@asynccontextmanager
async def self_limiters(setup: Setup) -> AsyncGenerator[AsyncHit]:
    """``self-limiters``: gives callers a time to sleep until, and cannot refuse; its shortest interval is 1 ms."""
    module = import_module("self_limiters")
    (limit,) = setup.limits
    tokens = limit.tokens // 1_000

    def bucket(key: str) -> Any:
        return module.TokenBucket(
            key,
            capacity=tokens,
            refill_frequency=0.001,
            refill_amount=tokens,
            redis_url=setup.url.partition("?")[0],
            max_sleep=10.0,
            connection_pool_size=min(setup.connections, 100),
        )

    buckets = _PerKey(bucket)

    async def hit(key: str) -> bool:
        async with buckets[key]:
            return True

    yield hit
    buckets.clear()
    await asyncio.sleep(0)
