"""The limiters that are written in an afternoon: one script, sent by redis-py for every decision."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

import redis
import redis.asyncio

from benchmarks.model import AsyncHit, Hit, Limit, Setup

TOKEN_BUCKET = """
local capacity, rate = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local bucket = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = tonumber(bucket[1]) or capacity
local at = tonumber(bucket[2]) or now
tokens = math.min(capacity, tokens + math.max(0, now - at) * rate)
local granted = 0
if tokens >= 1 then
  tokens = tokens - 1
  granted = 1
end
redis.call('HSET', KEYS[1], 'tokens', tostring(tokens), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil(capacity / rate * 1000) + 1000)
return granted
"""

GCRA = """
local burst, interval = tonumber(ARGV[1]), 1000000 / tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local arrival = math.max(now, tonumber(redis.call('GET', KEYS[1])) or now) + interval
if arrival - burst * interval > now then
  return 0
end
redis.call('SET', KEYS[1], string.format('%.3f', arrival), 'PX', math.ceil((arrival - now) / 1000) + 1000)
return 1
"""


def _arguments(limits: tuple[Limit, ...]) -> list[tuple[str, int, float]]:
    """For each limit: what its key ends with, its capacity, its tokens per second."""
    return [(f":{i}" if i else "", limit.capacity, limit.tokens / limit.seconds) for i, limit in enumerate(limits)]


def sync(script: str) -> Callable[[Setup], AbstractContextManager[Hit]]:
    """A limiter of this script; each of several limits takes a call."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        with redis.Redis.from_url(setup.url, max_connections=setup.connections + 1) as client:
            sha = client.script_load(script)
            evalsha: Any = client.evalsha
            (_, capacity, rate), *more = limits = _arguments(setup.limits)

            def one(key: str) -> object:
                return evalsha(sha, 1, key, capacity, rate)

            def several(key: str) -> object:
                return all([evalsha(sha, 1, key + end, capacity, rate) for end, capacity, rate in limits])  # noqa: C419

            yield several if more else one

    return opened


def asyncio(script: str) -> Callable[[Setup], AbstractAsyncContextManager[AsyncHit]]:
    """Return how to open a script for asyncio."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        async with redis.asyncio.Redis.from_url(setup.url, max_connections=setup.connections + 1) as client:
            sha = await client.script_load(script)
            evalsha: Any = client.evalsha
            ((_, capacity, rate),) = _arguments(setup.limits)

            async def hit(key: str) -> object:
                return await evalsha(sha, 1, key, capacity, rate)

            yield hit

    return opened
