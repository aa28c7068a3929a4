"""Buckets in Redis or Valkey: one key each, which is changed by compare-and-swap only.

From the outside to the inside:

1. :class:`RedisStore` and :class:`AsyncRedisStore` are what a manager uses. They run the same steps.
2. ``steps`` has these steps: which commands a verb sends, and what the replies mean. ``node`` has what is known of each
   server: its time, its scripts, and whether it swaps without one.
3. ``channel`` says how commands reach the servers. ``pool``, ``cluster``, ``async_pool`` and ``async_cluster`` do that,
   under a ``circuit``, over ``kept_connections`` or a ``shared_connection``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis
import redis.asyncio

from ratelimit.errors import InvalidArgumentError
from ratelimit.runtime.clock import elapsed_ns
from ratelimit.runtime.steps import arun, run
from ratelimit.stores.protocol import Decided, DecidedAll, Lost, Swap
from ratelimit.stores.redis.async_cluster import AsyncClusterChannel
from ratelimit.stores.redis.async_pool import AsyncPoolChannel
from ratelimit.stores.redis.channel import Channel, as_bytes
from ratelimit.stores.redis.circuit import CircuitBreaker
from ratelimit.stores.redis.clients import cluster_of
from ratelimit.stores.redis.cluster import ClusterChannel
from ratelimit.stores.redis.pool import PoolChannel
from ratelimit.stores.redis.steps import RedisSteps


class RedisStore(RedisSteps):
    """Buckets in Redis, over a client that the caller made and closes.

    :param client: a ``redis.Redis`` (also one that Sentinel's ``master_for`` returns) or a ``redis.RedisCluster``. Its
        settings count (timeouts, TLS, authentication), except for ``decode_responses``, which changes nothing here. Its
        retries are not used: retries of commands would charge twice, those of connecting would outlast a decision.
    :param circuit_breaker: when a server that fails is left alone; None: never.
    :param monotonic: the local clock that follows the server's, in nanoseconds; for tests.
    """

    def __init__(
        self,
        client: redis.Redis | redis.RedisCluster,
        *,
        circuit_breaker: CircuitBreaker | None = CircuitBreaker(),  # noqa: B008  # it is frozen
        monotonic: Callable[[], int] = elapsed_ns,
    ) -> None:
        super().__init__(_channel(client, circuit_breaker), monotonic)

    @classmethod
    def over(cls, channel: Channel, *, monotonic: Callable[[], int] = elapsed_ns) -> RedisStore:
        """Return a store over a channel, which it closes when it is closed."""
        store = cls.__new__(cls)
        RedisSteps.__init__(store, channel, monotonic)
        return store

    def get(self, key: bytes, *, deadline: float | None = None) -> bytes | None:
        """Return the state under a key; None where there is none."""
        return run(self._getting(key, deadline))

    def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Lost | None:
        """Replace ``before`` (None: nothing) by ``after``; return None when done, otherwise what is stored."""
        return run(self.swapping(key, before, after, ttl_millis, deadline))

    def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Decided | int:
        """Let the server decide; see ``ratelimit.stores.protocol.DecidingStore``."""
        return run(self.deciding(key, arguments, deadline))

    def swap_all(self, swaps: Sequence[Swap], *, deadline: float | None = None) -> list[Lost | None] | None:
        """Carry out all of the swaps, or none; see ``ratelimit.stores.protocol.AtomicStore``."""
        return run(self._swapping_all(swaps, deadline))

    def decide_all(
        self, keys: Sequence[bytes], arguments: tuple[bytes, ...], *, deadline: float | None = None
    ) -> DecidedAll:
        """Let the server decide about several buckets; see ``ratelimit.stores.protocol.AtomicDecidingStore``."""
        return run(self._deciding_all(keys, arguments, deadline))

    def delete(self, key: bytes, *, deadline: float | None = None) -> None:
        """Delete what is stored under a key, if anything."""
        run(self._deleting(key, deadline))

    def keys(self, prefix: bytes) -> list[bytes]:
        """List the keys that begin with a prefix: for tests, since the server looks at all that it has."""
        return self._channel.keys(prefix)  # type: ignore[no-any-return]  # a sync channel returns a list

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> int:
        """Return the time of the server that holds a key; ask for it where no recent estimate is known."""
        now = self.known_now(key)
        return run(self._asking_time(key, deadline)) if now is None else now

    def ask(self, key: bytes, *command: Any) -> Any:
        """Send a command to the server that holds a key, and return its reply undecoded."""
        return run(self._asking(key, as_bytes(command), None))

    def close(self) -> None:
        """Give all connections back, and close the client that a URL has made; a client of the caller's stays open."""
        self._channel.close()


class AsyncRedisStore(RedisSteps):
    """Buckets in Redis, over an asyncio client that the caller made and closes.

    All tasks share one connection to each server. It is made as the client makes its own, and is not in the client's
    pool.

    :param client: a ``redis.asyncio.Redis`` (also one that Sentinel's ``master_for`` returns) or a
        ``redis.asyncio.RedisCluster``; for its settings see :class:`RedisStore`.
    :param circuit_breaker: when a server that fails is left alone; None: never.
    :param monotonic: the local clock that follows the server's, in nanoseconds; for tests.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster,
        *,
        circuit_breaker: CircuitBreaker | None = CircuitBreaker(),  # noqa: B008  # it is frozen
        monotonic: Callable[[], int] = elapsed_ns,
    ) -> None:
        super().__init__(_async_channel(client, circuit_breaker), monotonic)

    @classmethod
    def over(cls, channel: Channel, *, monotonic: Callable[[], int] = elapsed_ns) -> AsyncRedisStore:
        """Return a store over a channel, which it closes when it is closed."""
        store = cls.__new__(cls)
        RedisSteps.__init__(store, channel, monotonic)
        return store

    async def get(self, key: bytes, *, deadline: float | None = None) -> bytes | None:
        """Return the state under a key; None where there is none."""
        return await arun(self._getting(key, deadline))

    async def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Lost | None:
        """Replace ``before`` (None: nothing) by ``after``; return None when done, otherwise what is stored."""
        return await arun(self.swapping(key, before, after, ttl_millis, deadline))

    async def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Decided | int:
        """Let the server decide; see ``ratelimit.stores.protocol.DecidingStore``."""
        return await arun(self.deciding(key, arguments, deadline))

    async def swap_all(self, swaps: Sequence[Swap], *, deadline: float | None = None) -> list[Lost | None] | None:
        """Carry out all of the swaps, or none; see ``ratelimit.stores.protocol.AtomicStore``."""
        return await arun(self._swapping_all(swaps, deadline))

    async def decide_all(
        self, keys: Sequence[bytes], arguments: tuple[bytes, ...], *, deadline: float | None = None
    ) -> DecidedAll:
        """Let the server decide about several buckets; see ``ratelimit.stores.protocol.AtomicDecidingStore``."""
        return await arun(self._deciding_all(keys, arguments, deadline))

    async def delete(self, key: bytes, *, deadline: float | None = None) -> None:
        """Delete what is stored under a key, if anything."""
        await arun(self._deleting(key, deadline))

    async def keys(self, prefix: bytes) -> list[bytes]:
        """List the keys that begin with a prefix: for tests, since the server looks at all that it has."""
        return await self._channel.keys(prefix)  # type: ignore[no-any-return]  # an asyncio channel returns a list

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> int | Awaitable[int]:
        """Return the time of the server that holds a key; ask for it where no recent estimate is known."""
        now = self.known_now(key)
        return arun(self._asking_time(key, deadline)) if now is None else now

    async def aclose(self) -> None:
        """Close the store's connections, and the client that a URL has made; a client of the caller's stays open."""
        await self._channel.close()


def _channel(client: redis.Redis | redis.RedisCluster, breaker: CircuitBreaker | None) -> Channel:
    if isinstance(client, redis.RedisCluster):
        return ClusterChannel(lambda: client, server=cluster_of(client), breaker=breaker)
    if isinstance(client, redis.Redis):
        return PoolChannel(client, breaker=breaker)
    raise _refusal("a redis.Redis or a redis.RedisCluster", client, "AsyncRedisStore takes a client of redis.asyncio")


def _async_channel(client: redis.asyncio.Redis | redis.asyncio.RedisCluster, breaker: CircuitBreaker | None) -> Channel:
    if isinstance(client, redis.asyncio.RedisCluster):
        return AsyncClusterChannel(client, breaker=breaker)
    if isinstance(client, redis.asyncio.Redis):
        return AsyncPoolChannel(client, breaker=breaker)
    raise _refusal(
        "a redis.asyncio.Redis or a redis.asyncio.RedisCluster", client, "RedisStore takes a client of redis itself"
    )


def _refusal(allowed: str, client: object, hint: str) -> InvalidArgumentError:
    """Return the error for a client of another type, and show its type only: what it prints may hold a password."""
    return InvalidArgumentError(f"client must be {allowed}; got {type(client)} ({hint})")
