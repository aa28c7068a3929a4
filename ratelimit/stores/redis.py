"""Buckets in Redis or Valkey: one key each, changed by Lua scripts that compare and swap."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import redis
import redis.asyncio
from redis.exceptions import NoScriptError, ResponseError

from ratelimit.core.duration import NANOS_PER_SECOND
from ratelimit.drive import Steps, adrive, drive
from ratelimit.errors import InvalidArgumentError
from ratelimit.stores.protocol import Lost
from ratelimit.stores.redis_async_channels import AsyncClusterChannel, AsyncPoolChannel
from ratelimit.stores.redis_channels import Channel, ClusterChannel, Command, PoolChannel, Replies
from ratelimit.stores.redis_errors import translated
from ratelimit.stores.scripts import Script, load
from ratelimit.stores.server_time import STALE_NANOS, UNUSABLE_NANOS, ServerTime

_SET_NX: Final = load("set_nx")
_SET_NX_PX: Final = load("set_nx_px")
_COMPARE_AND_SWAP: Final = load("compare_and_swap")
_COMPARE_AND_SWAP_PX: Final = load("compare_and_swap_px")

_LONGEST_TTL_MILLIS: Final = 2**53  # servers add it to the present time and refuse, or wrap, what gets too large


class _RedisSteps:
    """The conversation with a server, for both faces: what is sent, and what the replies mean."""

    def __init__(self, channel: Channel, monotonic: Callable[[], int], *, owns_client: bool = False) -> None:
        self._channel = channel
        self._monotonic = monotonic
        self._times: dict[str, ServerTime] = {}
        self._sent_once: set[str] = set()  # scripts that servers should know by now
        self._owns_client = owns_client

    def _read(self, key: bytes) -> Steps[bytes | None]:
        sent = self._monotonic()
        age = self._time_of(key).age(sent)
        if age is not None and age < STALE_NANOS:
            state = yield from self._asked(key, "GET", key)
            return state  # type: ignore[no-any-return]  # as the server sent it
        state, now = yield from self._send(key, ("GET", key), ("TIME",))
        self._learn_time(key, _checked(now, key), sent)
        return _checked(state, key)  # type: ignore[no-any-return]  # as the server sent it

    def _swapped(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Steps[Lost | None]:
        ttl = () if ttl_millis <= 0 else (min(ttl_millis, _LONGEST_TTL_MILLIS),)
        if before is None:
            script, arguments = (_SET_NX_PX if ttl else _SET_NX), (after, *ttl)
        else:
            script, arguments = (_COMPARE_AND_SWAP_PX if ttl else _COMPARE_AND_SWAP), (before, after, *ttl)
        sent = self._monotonic()
        state, *now = yield from self._run(script, key, arguments)
        self._learn_time(key, now, sent)
        return None if state == 1 else Lost(state)

    def _run(self, script: Script, key: bytes, arguments: tuple[Any, ...]) -> Steps[Any]:
        """By its SHA where the server should know the script; else as text, after which it does."""
        if script.sha in self._sent_once:
            (reply,) = yield from self._send(key, ("EVALSHA", script.sha, 1, key, *arguments))
            if not isinstance(reply, NoScriptError):
                return _checked(reply, key)
        reply = yield from self._asked(key, "EVAL", script.text, 1, key, *arguments)
        self._sent_once.add(script.sha)
        return reply

    def _deleted(self, key: bytes) -> Steps[None]:
        yield from self._asked(key, "DEL", key)

    def _usable_time(self, key: bytes) -> int | None:
        """The server's time by the estimate, where that is good enough for a decision."""
        local = self._monotonic()
        times = self._time_of(key)
        age = times.age(local)
        return times.estimate(local) if age is not None and age < UNUSABLE_NANOS else None

    def _asked_time(self, key: bytes) -> Steps[int]:
        sent = self._monotonic()
        reply = yield from self._asked(key, "TIME")
        self._learn_time(key, reply, sent)
        estimate = self._usable_time(key)
        return time_nanos(reply) if estimate is None else estimate

    def _learn_time(self, key: bytes, time_reply: Any, sent: int) -> None:
        received = self._monotonic()
        self._time_of(key).observe(time_nanos(time_reply), sent, received)  # of the node that has answered: keys move

    def clock_error_nanos(self, key: bytes) -> int | None:
        """How wrong the estimate of the server's time may be at present, either way; None before the first reply."""
        return self._time_of(key).error_bound(self._monotonic())

    def _asked(self, key: bytes, *command: Any) -> Steps[Any]:
        (reply,) = yield from self._send(key, command)
        return _checked(reply, key)

    def _send(self, key: bytes, *commands: Command) -> Steps[Replies]:
        return (yield self._channel.send(key, *commands))  # type: ignore[no-any-return]

    def _time_of(self, key: bytes) -> ServerTime:
        return self._times.setdefault(self._channel.node(key), ServerTime())


def _checked(reply: Any, key: bytes) -> Any:
    if isinstance(reply, ResponseError):
        raise translated(reply, key, in_doubt=False) from reply
    return reply


def time_nanos(time_reply: Any) -> int:
    """Nanoseconds since the epoch from a reply to ``TIME``."""
    seconds, microseconds = time_reply
    return int(seconds) * NANOS_PER_SECOND + int(microseconds) * 1_000


def _channel(client: redis.Redis | redis.RedisCluster) -> Channel:
    if isinstance(client, redis.RedisCluster):
        return ClusterChannel(lambda: client)
    if isinstance(client, redis.Redis):
        return PoolChannel(client)
    raise InvalidArgumentError(
        f"RedisStore takes a redis.Redis or redis.RedisCluster, not {client!r}"
        " (for a client of redis.asyncio there is AsyncRedisStore)"
    )


def _async_channel(client: redis.asyncio.Redis | redis.asyncio.RedisCluster) -> Channel:
    if isinstance(client, redis.asyncio.RedisCluster):
        return AsyncClusterChannel(client)
    if isinstance(client, redis.asyncio.Redis):
        return AsyncPoolChannel(client)
    raise InvalidArgumentError(
        f"AsyncRedisStore takes a client of redis.asyncio, not {client!r} (for others there is RedisStore)"
    )


class RedisStore(_RedisSteps):
    """Buckets in Redis, over a client that the caller made and closes.

    :param client: a ``redis.Redis`` (also one that Sentinel's ``master_for`` gives) or a ``redis.RedisCluster``. Its
        settings count (timeouts, TLS, authentication, retries while connecting), but for ``decode_responses``, which
        does not matter, and for retries of commands, which would charge twice: those are done here.
    :param monotonic: the local clock that follows the server's, in nanoseconds; for tests.
    """

    def __init__(
        self, client: redis.Redis | redis.RedisCluster, *, monotonic: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(_channel(client), monotonic)

    @classmethod
    def owning(cls, channel: Channel) -> RedisStore:
        """A store that closes the client behind this channel when it is closed itself."""
        store = cls.__new__(cls)
        _RedisSteps.__init__(store, channel, time.monotonic_ns, owns_client=True)
        return store

    def get(self, key: bytes) -> bytes | None:
        """The state under the key; None where there is none."""
        return drive(self._read(key))

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); None when done, else what is there."""
        return drive(self._swapped(key, before, after, ttl_millis))

    def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        drive(self._deleted(key))

    def now_nanos(self, key: bytes) -> int:
        """The time of the server that holds this key; asked for when nothing is known of it, or nothing recent."""
        now = self._usable_time(key)
        return drive(self._asked_time(key)) if now is None else now

    def ask(self, key: bytes, *command: Any) -> Any:
        """Send a command to the server that holds this key, and give its reply as it comes."""
        return drive(self._asked(key, *command))

    def close(self) -> None:
        """Close what a URL has opened; a client of the caller's stays open."""
        if self._owns_client:
            self._channel.close()


class AsyncRedisStore(_RedisSteps):
    """Buckets in Redis, over an asyncio client that the caller made and closes.

    All tasks share one connection to each server, which is made as the client makes them, and is none of its pool.

    :param client: a ``redis.asyncio.Redis`` (also one that Sentinel's ``master_for`` gives) or a
        ``redis.asyncio.RedisCluster``; for its settings see :class:`RedisStore`.
    :param monotonic: the local clock that follows the server's, in nanoseconds; for tests.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis | redis.asyncio.RedisCluster,
        *,
        monotonic: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        super().__init__(_async_channel(client), monotonic)

    @classmethod
    def over(cls, channel: Channel) -> AsyncRedisStore:
        """A store over a channel, which it closes with itself."""
        store = cls.__new__(cls)
        _RedisSteps.__init__(store, channel, time.monotonic_ns)
        return store

    async def get(self, key: bytes) -> bytes | None:
        """The state under the key; None where there is none."""
        return await adrive(self._read(key))

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); None when done, else what is there."""
        return await adrive(self._swapped(key, before, after, ttl_millis))

    async def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        await adrive(self._deleted(key))

    def now_nanos(self, key: bytes) -> int | Awaitable[int]:
        """The time of the server that holds this key; asked for when nothing is known of it, or nothing recent."""
        now = self._usable_time(key)
        return adrive(self._asked_time(key)) if now is None else now

    async def aclose(self) -> None:
        """Close the store's own connections, and the client that a URL has made; one of the caller's stays open."""
        await self._channel.close()
