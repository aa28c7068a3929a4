"""Buckets in Redis or Valkey: one key each, changed by Lua scripts that compare and swap."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import redis
import redis.asyncio
from redis.exceptions import NoScriptError, ResponseError

from ratelimit.core.algorithm import LONGEST_STATE
from ratelimit.core.numbers import NANOS_PER_SECOND
from ratelimit.errors import InvalidArgumentError, StoreError, StoreUnavailableError
from ratelimit.runtime.clock import MONOTONIC_IS_FINE, elapsed_ns
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run
from ratelimit.stores.protocol import Decided, Lost
from ratelimit.stores.redis.async_channels import AsyncClusterChannel, AsyncPoolChannel
from ratelimit.stores.redis.channels import Channel, ClusterChannel, Command, PoolChannel, as_bytes
from ratelimit.stores.redis.circuit import CircuitBreaker, CircuitStatus
from ratelimit.stores.redis.clients import cluster_of
from ratelimit.stores.redis.errors import translated
from ratelimit.stores.redis.scripts import Script, load
from ratelimit.stores.redis.server_time import ServerTime

_SET_NX: Final = load("set_nx")
_SET_NX_PX: Final = load("set_nx_px")
_COMPARE_AND_SWAP: Final = load("compare_and_swap")
_COMPARE_AND_SWAP_PX: Final = load("compare_and_swap_px")

_DECIDE: Final = load("decide")

_LAST_BYTE_READ: Final = b"%d" % LONGEST_STATE
"""The last byte that is read: one more than a state may have, so that a server never sends 512 MB."""

_TIME: Final = (b"TIME",)
_PROBE: Final = (b"", b"IFEQ", secrets.token_bytes(32), b"GET")  # of what follows SET and the key

_LONGEST_TTL_MILLIS: Final = 2**53  # servers add it to the present time and refuse, or wrap, what gets too large


class _Node:
    """What is known of a server: its time, the scripts that it should know, and whether it swaps without one."""

    __slots__ = ("scripts", "swaps_natively", "time")

    def __init__(self) -> None:
        self.time = ServerTime()
        self.scripts: set[str] = set()
        self.swaps_natively: bool | None = None  # None: not tried yet

    def learn_from_probe(self, answer: Any) -> None:
        if not isinstance(answer, ResponseError):
            self.swaps_natively = True
        elif _is_refused_as_unknown(answer):
            self.swaps_natively = False


class _RedisSteps(OfThisProcess):
    """The conversation with a server, for both faces: what is sent, and what the replies mean.

    A swap is one command: ``SET`` with ``IFEQ`` and ``GET`` where a server has that, a script where it has not. The
    first swap brings along a probe that can change nothing, and that a server without ``IFEQ`` refuses. The server's
    time is asked for in the same round trip, when what is known of it is a second old.

    :ivar unique_readings: whether no two readings of the server's time are alike: each is an estimate of this process,
        as fine as the local clock.
    """

    _advice = "make it in each process, over a client of its own, or pickle a manager that from_url has made"
    unique_readings = MONOTONIC_IS_FINE

    def __init__(self, channel: Channel, monotonic: Callable[[], int]) -> None:
        self._channel = channel
        self._monotonic = monotonic
        self._nodes: dict[str, _Node] = {}
        self._only = None if channel.spans_nodes else _Node()

    def _read(self, key: bytes, deadline: float | None) -> Steps[bytes | None]:
        node = self._node_of(key)
        questions = (_TIME,) * (self._monotonic() >= node.time.stale_at)  # a probe would be a write
        command = (b"GETRANGE", key, b"0", _LAST_BYTE_READ)
        # Empty where there is none. A value that is empty is found when a bucket is not made there.
        return _state((yield from self._accompanied(questions, node, key, command, deadline)), key) or None

    def swapping(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]:
        """Return the steps of ``swap`` for callers that are steps themselves."""
        node = self._only or self._node_of(key)
        ttl = min(ttl_millis, _LONGEST_TTL_MILLIS)
        if node.swaps_natively:
            condition = (b"NX",) if before is None else (b"IFEQ", before)
            expiry = (b"PX", b"%d" % ttl) if ttl > 0 else ()
            command = (b"SET", key, after, *condition, b"GET", *expiry)
            if self._monotonic() < node.time.stale_at:
                (reply,) = yield self._channel.send(key, (command,), deadline)
            else:
                reply = yield from self._accompanied((_TIME,), node, key, command, deadline)
            if reply == before:  # or else an error, perhaps
                return None
            if not _is_refused_as_unknown(reply):
                return Lost(_state(reply, key))
            node.swaps_natively = False  # another server has taken its place
        arguments: Command
        if before is None:
            script, arguments = (_SET_NX_PX, (key, after, b"%d" % ttl)) if ttl > 0 else (_SET_NX, (key, after))
        elif ttl > 0:
            script, arguments = _COMPARE_AND_SWAP_PX, (key, before, after, b"%d" % ttl)
        else:
            script, arguments = _COMPARE_AND_SWAP, (key, before, after)
        asks_nothing_else = node.swaps_natively is False and self._monotonic() < node.time.stale_at
        if asks_nothing_else and script.sha in node.scripts:  # as _run does it then, at less cost
            (reply,) = yield self._channel.send(key, (script.call + arguments,), deadline)
            if reply == 1:
                return None
            if not isinstance(reply, NoScriptError):
                return Lost(_state(reply, key))
            node.scripts.clear()
        reply = yield from self._run(node, script, key, arguments[1:], deadline)
        return None if reply == 1 else Lost(_state(reply, key))

    def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided]:
        """The steps of ``decide``."""
        reply = yield from self._run(self._node_of(key), _DECIDE, key, arguments, deadline)
        if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[0], int):
            raise _senseless(reply, key)
        return Decided(reply[0] == 1, _state(reply[1], key))

    def _run(self, node: _Node, script: Script, key: bytes, arguments: Command, deadline: float | None) -> Steps[Any]:
        """By its SHA where the server should know the script; else as text, after which it does."""
        if script.sha in node.scripts:
            command = (*script.call, key, *arguments)
            questions = self._questions(node, key)
            if questions:
                reply = yield from self._accompanied(questions, node, key, command, deadline)
            else:
                (reply,) = yield self._channel.send(key, (command,), deadline)
            if not isinstance(reply, NoScriptError):
                return _checked(reply, key)
            # A server that was restarted has forgotten all of them. Trying each would cost a round trip for each.
            node.scripts.clear()
        reply = yield from self._accompanied(
            self._questions(node, key), node, key, (b"EVAL", script.text, b"1", key, *arguments), deadline
        )
        _checked(reply, key)
        node.scripts.add(script.sha)
        return reply

    def _questions(self, node: _Node, key: bytes) -> tuple[Command, ...]:
        """What else has to be asked, and can go along: mostly nothing."""
        stale = self._monotonic() >= node.time.stale_at
        if not stale and node.swaps_natively is not None:
            return ()
        return (_TIME,) * stale + ((b"SET", key, *_PROBE),) * (node.swaps_natively is None)

    def _accompanied(
        self, questions: tuple[Command, ...], node: _Node, key: bytes, command: Command, deadline: float | None
    ) -> Steps[Any]:
        """The reply to a command, which goes together with questions."""
        sent = self._monotonic()
        replies = yield self._channel.send(key, (*questions, command), deadline)
        *answers, reply = replies
        for question, answer in zip(questions, answers, strict=True):
            # A command that was carried out does not fail because of an error among the answers.
            if question is not _TIME:
                node.learn_from_probe(answer)
            elif not isinstance(answer, ResponseError):
                self._learn_time(key, answer, sent, replies)
        return reply

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._channel.server})"

    def _deleted(self, key: bytes, deadline: float | None) -> Steps[None]:
        yield from self._asked(key, (b"DEL", key), deadline)

    def known_now(self, key: bytes) -> int | None:
        """The server's time by the estimate; None where it is too old for a decision."""
        node = self._only or self._node_of(key)
        return node.time.estimate(self._monotonic())

    def _asked_time(self, key: bytes, deadline: float | None) -> Steps[int]:
        sent = self._monotonic()
        replies = yield self._channel.send(key, (_TIME,), deadline)
        (reply,) = replies
        if isinstance(reply, ResponseError):
            raise _without_time(reply, key) from reply
        self._learn_time(key, reply, sent, replies)
        estimate = self.known_now(key)
        return time_nanos(reply) if estimate is None else estimate

    def _learn_time(self, key: bytes, time_reply: Any, sent: int, replies: Any) -> None:
        """Learn the time of the server that was asked, which need not be the one that the key is with by now."""
        received = self._monotonic()
        try:
            now = time_nanos(time_reply)
        except (TypeError, ValueError):
            raise _senseless(time_reply, key) from None
        node = self._only or self._node_named(replies.node.name)
        node.time.observe(now, sent, received)

    def clock_error_nanos(self, key: bytes) -> int | None:
        """How far the estimate of the server's time may be behind at present; None before the first reply."""
        return self._node_of(key).time.error_bound(self._monotonic())

    def circuits(self) -> dict[str, CircuitStatus]:
        """How the circuits to the servers are at present, by node (``host:port``; empty where there is one server)."""
        return self._channel.circuits()

    def _asked(self, key: bytes, command: Command, deadline: float | None) -> Steps[Any]:
        (reply,) = yield self._channel.send(key, (command,), deadline)
        return _checked(reply, key)

    def _node_of(self, key: bytes) -> _Node:
        if self._only is not None:
            return self._only
        return self._node_named(self._channel.node(key))

    def _node_named(self, name: str) -> _Node:
        node = self._nodes.get(name)
        return self._nodes.setdefault(name, _Node()) if node is None else node


def _is_refused_as_unknown(reply: Any) -> bool:
    """Whether a server has refused a command whose options it does not know."""
    return isinstance(reply, ResponseError) and "syntax error" in str(reply)


def _checked(reply: Any, key: bytes) -> Any:
    if isinstance(reply, ResponseError):
        raise translated(reply, key, in_doubt=False) from reply
    return reply


def _without_time(refusal: ResponseError, key: bytes) -> StoreError:
    """Return the error for a server that works but refuses ``TIME``, with what to do about it."""
    error = translated(refusal, key, in_doubt=False)
    if type(error) is not StoreError:  # it will serve again
        return error
    return StoreError(key, f"Redis refuses TIME; give the manager a clock, as clock=SystemClock(): {error.message}")


def _state(reply: Any, key: bytes) -> bytes | None:
    """What is stored, from a reply that should tell it."""
    if reply is None or isinstance(reply, bytes):
        return reply
    _checked(reply, key)
    raise _senseless(reply, key)


def _senseless(reply: Any, key: bytes) -> StoreUnavailableError:
    """Whoever has sent this, it is no answer to what was asked; that may have been carried out."""
    kind = type(reply).__name__
    return StoreUnavailableError(key, f"Redis sent a reply of a kind that was not asked for ({kind})", in_doubt=True)


def time_nanos(time_reply: Any) -> int:
    """Nanoseconds since the epoch from a reply to ``TIME``."""
    seconds, microseconds = time_reply
    return int(seconds) * NANOS_PER_SECOND + int(microseconds) * 1_000


def _channel(client: redis.Redis | redis.RedisCluster, breaker: CircuitBreaker | None) -> Channel:
    if isinstance(client, redis.RedisCluster):
        return ClusterChannel(lambda: client, server=cluster_of(client), breaker=breaker)
    if isinstance(client, redis.Redis):
        return PoolChannel(client, breaker=breaker)
    raise InvalidArgumentError(
        f"RedisStore takes a redis.Redis or redis.RedisCluster, not {type(client).__name__}"
        " (for a client of redis.asyncio there is AsyncRedisStore)"
    )


def _async_channel(client: redis.asyncio.Redis | redis.asyncio.RedisCluster, breaker: CircuitBreaker | None) -> Channel:
    if isinstance(client, redis.asyncio.RedisCluster):
        return AsyncClusterChannel(client, breaker=breaker)
    if isinstance(client, redis.asyncio.Redis):
        return AsyncPoolChannel(client, breaker=breaker)
    raise InvalidArgumentError(
        f"AsyncRedisStore takes a client of redis.asyncio, not {type(client).__name__} (for others there is RedisStore)"
    )


class RedisStore(_RedisSteps):
    """Buckets in Redis, over a client that the caller made and closes.

    :param client: a ``redis.Redis`` (also one that Sentinel's ``master_for`` gives) or a ``redis.RedisCluster``. Its
        settings count (timeouts, TLS, authentication), but for ``decode_responses``, which does not matter. Its retries
        are not used: those of commands would charge twice, those of connecting outlast a decision.
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
    def over(cls, channel: Channel) -> RedisStore:
        """A store over a channel, which it closes with itself."""
        store = cls.__new__(cls)
        _RedisSteps.__init__(store, channel, elapsed_ns)
        return store

    def get(self, key: bytes, *, deadline: float | None = None) -> bytes | None:
        """The state under the key; None where there is none."""
        return run(self._read(key, deadline))

    def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); None when done, else what is there."""
        return run(self.swapping(key, before, after, ttl_millis, deadline))

    def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Decided:
        """Let the server decide; see :class:`ratelimit.stores.protocol.DecidingStore`."""
        return run(self.deciding(key, arguments, deadline))

    def delete(self, key: bytes, *, deadline: float | None = None) -> None:
        """Forget what is stored under the key, if anything."""
        run(self._deleted(key, deadline))

    def keys(self, prefix: bytes) -> list[bytes]:
        """List the keys that begin with a prefix: for tests, since the server looks at all that it has."""
        return self._channel.keys(prefix)  # type: ignore[no-any-return]  # that of a channel of this face

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> int:
        """The time of the server that holds this key; asked for when nothing is known of it, or nothing recent."""
        now = self.known_now(key)
        return run(self._asked_time(key, deadline)) if now is None else now

    def ask(self, key: bytes, *command: Any) -> Any:
        """Send a command to the server that holds this key, and give its reply as it comes."""
        return run(self._asked(key, as_bytes(command), None))

    def close(self) -> None:
        """Give all connections back, and close the client that a URL has made; one of the caller's stays open."""
        self._channel.close()


class AsyncRedisStore(_RedisSteps):
    """Buckets in Redis, over an asyncio client that the caller made and closes.

    All tasks share one connection to each server, which is made as the client makes them, and is none of its pool.

    :param client: a ``redis.asyncio.Redis`` (also one that Sentinel's ``master_for`` gives) or a
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
    def over(cls, channel: Channel) -> AsyncRedisStore:
        """A store over a channel, which it closes with itself."""
        store = cls.__new__(cls)
        _RedisSteps.__init__(store, channel, elapsed_ns)
        return store

    async def get(self, key: bytes, *, deadline: float | None = None) -> bytes | None:
        """The state under the key; None where there is none."""
        return await arun(self._read(key, deadline))

    async def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); None when done, else what is there."""
        return await arun(self.swapping(key, before, after, ttl_millis, deadline))

    async def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Decided:
        """Let the server decide; see :class:`ratelimit.stores.protocol.DecidingStore`."""
        return await arun(self.deciding(key, arguments, deadline))

    async def delete(self, key: bytes, *, deadline: float | None = None) -> None:
        """Forget what is stored under the key, if anything."""
        await arun(self._deleted(key, deadline))

    async def keys(self, prefix: bytes) -> list[bytes]:
        """List the keys that begin with a prefix: for tests, since the server looks at all that it has."""
        return await self._channel.keys(prefix)  # type: ignore[no-any-return]  # that of a channel of this face

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> int | Awaitable[int]:
        """The time of the server that holds this key; asked for when nothing is known of it, or nothing recent."""
        now = self.known_now(key)
        return arun(self._asked_time(key, deadline)) if now is None else now

    async def aclose(self) -> None:
        """Close the store's own connections, and the client that a URL has made; one of the caller's stays open."""
        await self._channel.close()
