"""One connection for all tasks: what is sent, who gets which reply, and what becomes of all when it breaks."""

from __future__ import annotations

import asyncio
import gc
import select
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fakeredis
import hiredis
import pytest
import redis
import redis.asyncio
import trustme
from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import ClusterDownError, NoScriptError, ReadOnlyError, ResponseError

from ratelimit import AsyncProxyManager, AsyncRedisStore, StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.async_channels import AsyncClusterChannel
from ratelimit.stores.redis.shared_connection import Multiplexer
from tests.support import servers
from tests.support.servers import RedisServer, ServerBinary, wait_until

CUT = b"cut"
"""In the place of a reply: the connection is closed."""

HELLO = b"%1\r\n+proto\r\n:3\r\n"
LAST_OF_HANDSHAKE = [b"CLIENT", b"SETINFO", b"LIB-VER"]
PUSH = b">2\r\n+invalidate\r\n*1\r\n+key\r\n"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def echoed(command: list[bytes]) -> bytes:
    return bulk(command[-1])


class Scripted:
    """A server that says what it is told to: by default, the last word of each command.

    ``chunks`` are the commands as they came in, without those of handshakes.
    """

    def __init__(self) -> None:
        self.answer: Callable[[list[bytes]], bytes] = echoed
        self.after_handshake = b""
        self.chunks: list[list[list[bytes]]] = []
        self.connections = 0
        self.open = 0
        self.silent = asyncio.Event()  # while it is clear
        self.silent.set()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        commands = hiredis.Reader(notEnoughData=self)
        try:
            while data := await reader.read(1 << 20):
                commands.feed(data)
                chunk: list[list[bytes]] = []
                while (command := commands.gets()) is not self:
                    if command[0] in (b"HELLO", b"CLIENT", b"AUTH", b"SELECT"):
                        writer.write(HELLO if command[0] == b"HELLO" else b"+OK\r\n")
                        writer.write(self.after_handshake if command[:3] == LAST_OF_HANDSHAKE else b"")
                    else:
                        chunk.append(command)
                if chunk:
                    self.chunks.append(chunk)
                for command in chunk:
                    await self.silent.wait()
                    reply = self.answer(command)
                    writer.write(reply.removesuffix(CUT))
                    if reply.endswith(CUT):
                        return
        finally:
            self.open -= 1
            writer.close()

    @property
    def commands(self) -> list[bytes]:
        """The last word of each command."""
        return [command[-1] for chunk in self.chunks for command in chunk]

    @asynccontextmanager
    async def listening(self, **options: Any) -> AsyncGenerator[None]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", self.port, **options)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            self.silent.set()

    def multiplexer(self, **options: Any) -> Multiplexer:
        return multiplexer(self.port, **options)


def multiplexer(port: int, **options: Any) -> Multiplexer:
    return Multiplexer(lambda: redis.asyncio.Connection(host="127.0.0.1", port=port, **options))


@pytest.fixture
async def scripted() -> AsyncGenerator[Scripted]:
    server = Scripted()
    async with server.listening():
        yield server


async def echo(multiplexer: Multiplexer, word: bytes) -> Any:
    (reply,) = await multiplexer.send(word, ((b"ECHO", word),))
    return reply


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def words(number: int) -> list[bytes]:
    return [b"word %d" % i for i in range(number)]


@pytest.mark.redis
@pytest.mark.parametrize(
    "options",
    [{"protocol": 2}, {"protocol": 3}, {"decode_responses": True}, {"protocol": 2, "parser_class": _AsyncRESP2Parser}],
    ids=["RESP2", "RESP3", "decode_responses", "a parser of Python"],
)
async def test_each_of_many_tasks_gets_its_own_replies(server: RedisServer, options: dict[str, Any]) -> None:
    many = multiplexer(server.port, **options)

    async def echo_often(word: bytes) -> None:
        for i in range(20):
            said = b"%s, %d" % (word, i)
            assert await echo(many, said) == said
            assert await many.send(word, ((b"ECHO", said), (b"ECHO", word), (b"PING",))) == [said, word, b"PONG"]

    await asyncio.gather(*map(echo_often, words(200)))
    many.close()


@pytest.mark.redis
@pytest.mark.parametrize("options", [{}, {"parser_class": _AsyncRESP2Parser, "protocol": 2}], ids=["hiredis", "Python"])
async def test_errors_of_the_server_are_replies_and_of_redis_pys_kinds(
    server: RedisServer, options: dict[str, Any]
) -> None:
    many = multiplexer(server.port, **options)
    unknown, good, wrong = await many.send(b"", ((b"EVALSHA", b"0" * 40, b"0"), (b"ECHO", b"good"), (b"ECHO",)))
    assert isinstance(unknown, NoScriptError)
    assert good == b"good"
    assert type(wrong) is ResponseError
    many.close()


async def test_commands_of_one_turn_of_the_loop_leave_in_one_write_and_in_order(scripted: Scripted) -> None:
    many = scripted.multiplexer()
    await echo(many, b"connected")
    scripted.chunks.clear()
    replies = await asyncio.gather(*(many.send(b"", ((b"ECHO", word), (b"SAY", word))) for word in words(50)))
    assert replies == [[word, word] for word in words(50)]
    assert scripted.chunks == [[command for word in words(50) for command in ([b"ECHO", word], [b"SAY", word])]]
    await echo(many, b"another turn")
    assert len(scripted.chunks) == 2
    many.close()


async def test_commands_that_waited_for_the_connection_leave_in_one_write(scripted: Scripted) -> None:
    many = scripted.multiplexer()
    assert await asyncio.gather(*(echo(many, word) for word in words(50))) == words(50)
    assert [len(chunk) for chunk in scripted.chunks] == [50]
    assert scripted.connections == 1
    many.close()


@pytest.mark.parametrize(
    ("broken", "message"),
    [(b"$10\r\nhalf" + CUT, "losed"), (CUT, "losed"), (b"garbage\r\n", "Protocol")],
    ids=["half a reply", "an end", "garbage"],
)
@pytest.mark.parametrize("options", [{}, {"parser_class": _AsyncRESP2Parser, "protocol": 2}], ids=["hiredis", "Python"])
async def test_a_connection_that_breaks_fails_all_who_wait_and_the_next_call_works(
    scripted: Scripted, broken: bytes, message: str, options: dict[str, Any]
) -> None:
    many = scripted.multiplexer(**options)
    scripted.answer = lambda command: broken if command[-1] == b"word 2" else bulk(command[-1])
    calls = [asyncio.create_task(echo(many, word)) for word in words(6)]
    await asyncio.wait(calls)
    assert [call.result() for call in calls[:2]] == [b"word 0", b"word 1"]
    errors = [call.exception() for call in calls[2:]]
    assert len(set(map(id, errors))) == 4
    for error, word in zip(errors, words(6)[2:], strict=True):
        assert isinstance(error, StoreUnavailableError)
        assert error.in_doubt
        assert error.key == word
        assert message in str(error)
        assert isinstance(error.__cause__, redis.RedisError)
    assert await echo(many, b"again") == b"again"
    assert scripted.connections == 2
    many.close()
    await until(lambda: scripted.open == 0)


async def test_too_many_replies_break_the_connection_for_those_who_come_next(scripted: Scripted) -> None:
    many = scripted.multiplexer()
    assert await echo(many, b"one") == b"one"
    scripted.answer = lambda command: bulk(command[-1]) * 2
    assert await echo(many, b"two") == b"two"
    scripted.answer = echoed
    assert await echo(many, b"three") == b"three"
    assert scripted.connections == 2
    many.close()


async def test_a_late_reply_of_a_busy_server_is_dropped_in_its_turn(scripted: Scripted) -> None:
    many = scripted.multiplexer(socket_timeout=0.5)
    await echo(many, b"connected")
    scripted.silent.clear()
    calls = [asyncio.create_task(echo(many, word)) for word in words(6)]

    def one_at_a_time(command: list[bytes]) -> bytes:
        scripted.silent.clear()
        asyncio.get_running_loop().call_later(0.2, scripted.silent.set)
        return bulk(command[-1])

    scripted.answer = one_at_a_time
    scripted.silent.set()
    await asyncio.wait(calls)
    assert [call.result() for call in calls[:2]] == [b"word 0", b"word 1"]
    for call in calls[-2:]:
        error = call.exception()
        assert isinstance(error, StoreTimeoutError)
        assert error.in_doubt
    scripted.answer = echoed
    await until(scripted.silent.is_set)
    assert await echo(many, b"after all") == b"after all"
    assert scripted.connections == 1
    many.close()


async def test_a_silent_connection_is_left_with_the_deadline_of_the_first_who_waits(scripted: Scripted) -> None:
    many = scripted.multiplexer(socket_timeout=0.5)
    await echo(many, b"connected")
    scripted.silent.clear()
    early = asyncio.create_task(echo(many, b"early"))
    await asyncio.sleep(0.25)
    late = asyncio.create_task(echo(many, b"late"))
    with pytest.raises(StoreTimeoutError, match=r"no reply within 0\.5 s") as caught:
        await early
    assert caught.value.in_doubt
    assert not late.done()
    scripted.silent.set()
    assert await echo(many, b"anew") == b"anew"
    assert await late == b"late"
    assert scripted.connections == 2
    await until(lambda: scripted.open == 1)
    assert await echo(many, b"and on") == b"and on"
    assert scripted.connections == 2
    many.close()
    await until(lambda: scripted.open == 0)


async def test_a_silent_connection_that_was_left_ends_with_the_last_who_waits(scripted: Scripted) -> None:
    many = scripted.multiplexer(socket_timeout=0.1)
    await echo(many, b"connected")
    scripted.silent.clear()
    calls = [asyncio.create_task(echo(many, b"early"))]
    await asyncio.sleep(0.05)
    calls.append(asyncio.create_task(echo(many, b"late")))
    await asyncio.wait(calls)
    assert all(isinstance(call.exception(), StoreTimeoutError) for call in calls)
    (link,) = many._links.values()
    assert link.ended
    scripted.silent.set()
    await until(lambda: scripted.open == 0)
    assert await echo(many, b"anew") == b"anew"
    many.close()


async def test_closing_ends_a_connection_that_was_left(scripted: Scripted) -> None:
    many = scripted.multiplexer(socket_timeout=0.5)
    await echo(many, b"connected")
    scripted.silent.clear()
    early = asyncio.create_task(echo(many, b"early"))
    await asyncio.sleep(0.25)
    late = asyncio.create_task(echo(many, b"late"))
    await asyncio.wait([early])
    anew = asyncio.create_task(echo(many, b"anew"))
    await until(lambda: scripted.open == 2)
    many.close()
    await asyncio.wait([late, anew])
    for call in (late, anew):
        assert "the store was closed" in str(call.exception())
    assert early.exception()
    scripted.silent.set()
    await until(lambda: scripted.open == 0)


async def test_without_a_timeout_one_waits(scripted: Scripted) -> None:
    many = scripted.multiplexer(socket_timeout=None)
    scripted.silent.clear()
    call = asyncio.create_task(echo(many, b"patient"))
    await asyncio.sleep(0.2)
    scripted.silent.set()
    assert await call == b"patient"
    many.close()


async def test_a_reply_that_nobody_waits_for_any_more_is_dropped_in_its_turn(scripted: Scripted) -> None:
    many = scripted.multiplexer()
    await echo(many, b"connected")
    scripted.silent.clear()
    calls = [asyncio.create_task(echo(many, word)) for word in words(5)]
    await until(lambda: len(scripted.chunks) == 2)
    calls[1].cancel()
    calls[3].cancel()
    scripted.silent.set()
    replies = await asyncio.gather(*calls, return_exceptions=True)
    assert replies[0::2] == words(5)[0::2]
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[1::2])
    assert await echo(many, b"next") == b"next"
    assert scripted.connections == 1
    many.close()


class Slow(redis.asyncio.Connection):
    """A connection that takes its time."""

    async def connect(self) -> None:
        await asyncio.sleep(0.6)
        await super().connect()  # type: ignore[no-untyped-call]


async def test_what_was_given_up_while_connecting_is_never_sent(scripted: Scripted) -> None:
    port = scripted.port
    many = Multiplexer(lambda: Slow(host="127.0.0.1", port=port, socket_timeout=0.3, socket_connect_timeout=0.1))
    late = asyncio.create_task(echo(many, b"too late"))
    cancelled = asyncio.create_task(echo(many, b"cancelled"))
    await asyncio.sleep(0.35)
    cancelled.cancel()
    assert await echo(many, b"in time") == b"in time"
    error = late.exception()
    assert isinstance(error, StoreTimeoutError)
    assert "no connection within 0.4 s" in str(error)
    assert not error.in_doubt
    assert scripted.commands == [b"in time"]
    many.close()


async def test_the_time_for_a_reply_begins_when_there_is_a_connection(scripted: Scripted) -> None:
    port = scripted.port
    many = Multiplexer(lambda: Slow(host="127.0.0.1", port=port, socket_timeout=0.2, socket_connect_timeout=2))
    scripted.silent.clear()
    begin = time.monotonic()
    with pytest.raises(StoreTimeoutError, match=r"no reply within 0\.2 s") as caught:
        await echo(many, b"word")
    assert caught.value.in_doubt
    assert 0.8 <= time.monotonic() - begin + 0.01 < 2
    many.close()


async def test_what_was_not_sent_is_not_in_doubt_when_the_connection_breaks(scripted: Scripted) -> None:
    many = scripted.multiplexer()
    await echo(many, b"connected")
    scripted.silent.clear()
    sent = asyncio.create_task(echo(many, b"sent"))
    await until(lambda: len(scripted.chunks) == 2)
    unsent = asyncio.create_task(echo(many, b"unsent"))
    await asyncio.sleep(0)
    many.close()
    await asyncio.wait([sent, unsent])
    for call, in_doubt in ((sent, True), (unsent, False)):
        error = call.exception()
        assert isinstance(error, StoreUnavailableError)
        assert error.in_doubt is in_doubt
    scripted.silent.set()
    assert await echo(many, b"again") == b"again"
    assert b"unsent" not in scripted.commands
    many.close()


async def test_all_share_an_attempt_to_connect_and_its_failure_and_the_next_call_tries_again() -> None:
    server = Scripted()
    async with server.listening():
        pass
    attempts = 0

    def make_connection() -> Any:
        nonlocal attempts
        attempts += 1
        return redis.asyncio.Connection(host="127.0.0.1", port=server.port)

    many = Multiplexer(make_connection)
    errors = await asyncio.gather(*(echo(many, word) for word in words(20)), return_exceptions=True)
    assert attempts == 1
    assert len(set(map(id, errors))) == 20
    for error, word in zip(errors, words(20), strict=True):
        assert isinstance(error, StoreUnavailableError)
        assert not error.in_doubt
        assert error.key == word
    async with server.listening():
        assert await echo(many, b"up") == b"up"
        many.close()
        await until(lambda: server.open == 0)


async def test_whatever_makes_connecting_fail_is_an_error_of_the_store(scripted: Scripted) -> None:
    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            raise LookupError("no token today")

    many = scripted.multiplexer(credential_provider=Provider())
    with pytest.raises(StoreUnavailableError, match="no token today") as caught:
        await echo(many, b"word")
    assert not caught.value.in_doubt
    await until(lambda: scripted.connections == 1 and scripted.open == 0)


async def test_closing_while_connecting_fails_who_waits_and_leaves_nothing_open(scripted: Scripted) -> None:
    port = scripted.port
    many = Multiplexer(lambda: Slow(host="127.0.0.1", port=port))
    call = asyncio.create_task(echo(many, b"word"))
    await asyncio.sleep(0.01)
    many.close()
    with pytest.raises(StoreUnavailableError, match="the store was closed"):
        await call
    await asyncio.sleep(0.65)
    assert scripted.connections == 0


@pytest.mark.parametrize(
    "refusal", [b"-READONLY You can't write against a read only replica.\r\n", b"-NOAUTH Authentication required.\r\n"]
)
async def test_a_server_that_is_another_by_now_is_connected_to_anew(scripted: Scripted, refusal: bytes) -> None:
    many = scripted.multiplexer()
    scripted.answer = lambda command: refusal if command[-1] == b"word 1" else bulk(command[-1])
    replies = await asyncio.gather(*(echo(many, word) for word in words(4)), return_exceptions=True)
    assert replies[::2] == words(4)[::2]
    assert isinstance(replies[1], ReadOnlyError | StoreError)
    assert replies[3] == b"word 3"
    assert await echo(many, b"elsewhere") == b"elsewhere"
    assert scripted.connections == 2
    await until(lambda: scripted.open == 1)
    many.close()


async def test_a_refusal_that_redis_py_has_as_an_error_of_the_connection_is_that_of_one_waiter(
    scripted: Scripted,
) -> None:
    many = scripted.multiplexer()
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    scripted.answer = lambda command: loading if command[-1] == b"word 1" else bulk(command[-1])
    calls = [
        echo(many, b"word 0"),
        many.send(b"two", ((b"ECHO", b"word 1"), (b"ECHO", b"word 2"))),
        echo(many, b"word 3"),
        echo(many, b"word 1"),
        echo(many, b"word 4"),
    ]
    replies: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    assert replies[::2] == [b"word 0", b"word 3", b"word 4"]
    for error, key in ((replies[1], b"two"), (replies[3], b"word 1")):
        assert isinstance(error, StoreUnavailableError)
        assert (error.key, error.in_doubt) == (key, False)
    assert scripted.connections == 1
    many.close()


async def test_push_messages_are_nobodys_replies(scripted: Scripted) -> None:
    scripted.after_handshake = PUSH
    scripted.answer = lambda command: PUSH + bulk(command[-1]) + PUSH
    many = scripted.multiplexer(protocol=3)
    for _ in range(3):
        assert await asyncio.gather(*(echo(many, word) for word in words(10))) == words(10)
    assert scripted.connections == 1
    many.close()


async def test_what_came_right_after_the_handshake_is_not_lost(scripted: Scripted) -> None:
    class Early(redis.asyncio.Connection):
        async def connect(self) -> None:
            await super().connect()  # type: ignore[no-untyped-call]
            assert self._reader is not None
            self._reader.feed_data(PUSH[:9])

    port = scripted.port
    many = Multiplexer(lambda: Early(host="127.0.0.1", port=port, protocol=3, socket_timeout=1))
    scripted.answer = lambda command: PUSH[9:] + bulk(command[-1])
    assert await echo(many, b"word") == b"word"
    many.close()


async def test_an_end_right_after_the_handshake_is_noticed(scripted: Scripted) -> None:
    class Over(redis.asyncio.Connection):
        async def connect(self) -> None:
            await super().connect()  # type: ignore[no-untyped-call]
            assert self._reader is not None
            self._reader.feed_eof()

    port = scripted.port
    many = Multiplexer(lambda: Over(host="127.0.0.1", port=port))
    with pytest.raises(StoreUnavailableError, match="the server closed the connection") as caught:
        await echo(many, b"word")
    assert not caught.value.in_doubt
    await until(lambda: (scripted.connections, scripted.open) == (1, 0))


@pytest.mark.redis
async def test_push_messages_of_a_real_server_are_nobodys_replies(server: RedisServer) -> None:
    many = multiplexer(server.port, protocol=3)
    await many.send(b"", ((b"CLIENT", b"TRACKING", b"ON"), (b"GET", b"tracked")))
    with server.client() as other:
        for i in range(5):
            other.set("tracked", i)
            assert await many.send(b"", ((b"GET", b"tracked"),)) == [b"%d" % i]
    many.close()


@pytest.mark.redis
async def test_replies_that_came_while_the_loop_was_blocked_are_read_before_anybody_gives_up(
    server: RedisServer,
) -> None:
    many = multiplexer(server.port, socket_timeout=60)
    await echo(many, b"connected")
    (link,) = many._links.values()
    transport: Any = link._transport
    first = asyncio.ensure_future(many.send(b"first", ((b"ECHO", b"first"),), deadline=monotonic() + 0.1))
    await asyncio.sleep(0)  # which writes it
    time.sleep(0.2)  # noqa: ASYNC251  # a turn that takes longer than the deadline
    assert select.select([transport.get_extra_info("socket").fileno()], [], [], 60)[0]
    second = asyncio.ensure_future(many.send(b"second", ((b"ECHO", b"second"),)))  # in that very turn
    assert (await first, await second) == ([b"first"], [b"second"])
    many.close()


@pytest.mark.redis
async def test_a_connection_that_the_server_kills_is_replaced(server: RedisServer) -> None:
    many = multiplexer(server.port)
    with server.client() as admin:
        for word in words(5):
            assert await echo(many, word) == word
            assert admin.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.05)  # it is noticed while nobody waits
    many.close()


@pytest.mark.redis
async def test_large_values_go_both_ways(server: RedisServer) -> None:
    many = multiplexer(server.port, socket_timeout=10)
    large = [bytes([65 + i]) * 3_000_000 for i in range(5)]
    assert await asyncio.gather(*(echo(many, word) for word in large)) == large
    many.close()


async def test_tls_and_a_password_are_redis_pys(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    server = Scripted()
    async with server.listening(ssl=context):
        many = Multiplexer(
            lambda: redis.asyncio.SSLConnection(
                host="127.0.0.1", port=server.port, ssl_ca_certs=str(tmp_path / "ca.pem"), password="secret"
            )
        )
        assert await asyncio.gather(*(echo(many, word) for word in words(100))) == words(100)
        server.answer = lambda _: CUT
        with pytest.raises(StoreUnavailableError):
            await echo(many, b"word")
        server.answer = echoed
        assert await echo(many, b"again") == b"again"
        many.close()
        await until(lambda: server.open == 0)


@pytest.mark.redis
async def test_a_thousand_decisions_at_once_take_one_connection_and_none_of_the_pool(server: RedisServer) -> None:
    async with redis.asyncio.Redis(port=server.port, client_name="limiter", max_connections=1) as client:
        store = AsyncRedisStore(client)
        manager = AsyncProxyManager(store, "1000/day")
        with server.client() as admin:
            answers = await asyncio.gather(*(manager.try_consume(f"user:{i % 100}") for i in range(1000)))
            named = [one for one in admin.client_list() if one["name"] == "limiter"]
        assert all(answers)
        assert len(named) == 1
        assert client.connection_pool._in_use_connections == set()
        assert client.connection_pool._available_connections == []
        assert await client.exists("user:7")
        await store.aclose()
        with server.client() as admin:
            wait_until(
                lambda: sum(one["name"] == "limiter" for one in admin.client_list()) == 1, "the store's is closed", 5
            )
        assert await client.exists("user:8")
        assert await manager.try_consume("user:9")
        await store.aclose()


@pytest.mark.redis
async def test_a_store_that_is_forgotten_closes_its_connection(server: RedisServer) -> None:
    def named() -> int:
        with server.client() as admin:
            return sum(one["name"] == "forgotten" for one in admin.client_list())

    for options in ({}, {"protocol": 2, "parser_class": _AsyncRESP2Parser}):
        many = multiplexer(server.port, client_name="forgotten", socket_timeout=0.05, **options)
        await echo(many, b"word")
        assert named() == 1
        await asyncio.sleep(0.1)
        gc.disable()
        try:
            del many
            await until(lambda: named() == 0)
        finally:
            gc.enable()


async def test_a_connection_that_was_closed_leaves_no_task_behind(scripted: Scripted) -> None:
    many = scripted.multiplexer()
    await echo(many, b"word")
    before = asyncio.all_tasks()
    many.close()
    for _ in range(5):
        assert asyncio.all_tasks() <= before
        await asyncio.sleep(0)


@pytest.mark.redis
def test_each_event_loop_has_a_connection_of_its_own(server: RedisServer) -> None:
    for manager in (
        AsyncProxyManager.from_url(server.url, "1000/day"),
        AsyncProxyManager(AsyncRedisStore(redis.asyncio.Redis(port=server.port)), "1000/day"),
    ):

        async def consume(manager: AsyncProxyManager = manager) -> list[bool]:
            return await asyncio.gather(*(manager.try_consume("several loops") for _ in range(5)))

        for _ in range(3):
            assert all(asyncio.run(consume()))

        async def beside_another_loop(consume: Any = consume) -> None:
            for _ in range(5):
                assert all(await consume())
                assert all(await asyncio.to_thread(asyncio.run, consume()))

        asyncio.run(beside_another_loop())


@pytest.mark.redis
@pytest.mark.parametrize("topology", ["cluster", "sentinel"])
def test_a_manager_of_many_servers_serves_one_loop_after_another(server_binary: ServerBinary, topology: str) -> None:
    async def consume(manager: AsyncProxyManager) -> None:
        await asyncio.gather(*(manager.try_consume(f"user:{i}") for i in range(20)))
        if topology == "cluster":  # redis-py's client wants to be closed in the loop that it was used in
            await manager.store.aclose()

    with getattr(servers, topology)(server_binary) as setup:
        manager = AsyncProxyManager.from_url(setup.url, "100/day")
        for _ in range(3):
            asyncio.run(consume(manager))


ENDS = {
    "idle": "await manager.try_consume('key')",
    "closed": "await manager.try_consume('key'); await store.aclose()",
    "kept": "await manager.try_consume('key'); keep.append(manager)",
    "waiting": "tasks.append(asyncio.create_task(many(manager))); await asyncio.sleep(0.01)",
    "connecting": "tasks.append(asyncio.create_task(many(manager))); await asyncio.sleep(0)",
}


@pytest.mark.redis
@pytest.mark.parametrize("timeout", [0.001, 5])
@pytest.mark.parametrize("end", ENDS)
def test_a_loop_that_ends_complains_of_nothing(server: RedisServer, end: str, timeout: float) -> None:
    program = f"""
    import asyncio, redis.asyncio
    from ratelimit import AsyncProxyManager, AsyncRedisStore

    keep, tasks = [], []

    async def many(manager):
        calls = (manager.try_consume(f"user:{{i}}") for i in range(100))
        await asyncio.gather(*calls, return_exceptions=True)

    async def main():
        asyncio.get_running_loop().slow_callback_duration = 10
        async with redis.asyncio.Redis(port={server.port}, socket_timeout={timeout}) as client:
            store = AsyncRedisStore(client)
            manager = AsyncProxyManager(store, "100/day")
            {end_of_main(end, timeout)}

    asyncio.run(main())
    print("ended")
    """
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("ended\n", "")


def end_of_main(end: str, timeout: float) -> str:
    if timeout < 1 and end != "waiting":
        return f"""try:
                {ENDS[end]}
            except Exception:
                pass
            await asyncio.sleep({timeout * 3})"""
    return ENDS[end]


@pytest.mark.parametrize("protocol", [2, 3])
async def test_fakeredis_serves(protocol: int) -> None:
    async with fakeredis.FakeAsyncRedis(protocol=protocol) as client:
        store = AsyncRedisStore(client)
        manager = AsyncProxyManager(store, "1000/day")
        assert all(await asyncio.gather(*(manager.try_consume(f"user:{i % 7}") for i in range(700))))
        assert await manager.available_tokens("user:3") == 900
        await store.aclose()
        assert await manager.available_tokens("user:3") == 900


async def test_a_fakeredis_that_is_disconnected_is_unavailable_until_it_is_back() -> None:
    fake = fakeredis.FakeServer()
    async with fakeredis.FakeAsyncRedis(server=fake) as client:
        manager = AsyncProxyManager(AsyncRedisStore(client), "1000/day")
        assert await manager.try_consume("key")
        fake.connected = False
        for _ in range(2):
            with pytest.raises(StoreUnavailableError):
                await manager.try_consume("key")
        fake.connected = True
        assert await manager.try_consume("key")


@pytest.mark.redis
async def test_the_table_of_a_cluster_is_read_again_before_a_node_that_failed_is_asked(
    server_binary: ServerBinary,
) -> None:
    with servers.cluster(server_binary) as cluster:
        node = cluster.nodes[0]
        async with redis.asyncio.RedisCluster(host=node.host, port=node.port, socket_timeout=1) as client:
            channel = AsyncClusterChannel(client)
            assert await channel.send(b"key", [(b"ECHO", b"one"), (b"GET", b"key")]) == [b"one", None]
            readings = counted_readings(client)
            served = next(one for one in cluster.nodes if client.get_node_from_key("key").port == one.port)  # type: ignore[union-attr]
            served.kill()
            with pytest.raises(StoreError):
                await channel.send(b"key", [(b"GET", b"key")])
            assert readings == []
            with pytest.raises(StoreUnavailableError):
                await channel.send(b"key", [(b"GET", b"key")])
            assert len(readings) == 1
            served.restart()
            await until_none_fails(channel)
            readings.clear()
            assert await channel.send(b"key", [(b"ECHO", b"three")]) == [b"three"]
            assert readings == []
            await channel.close()


def counted_readings(client: redis.asyncio.RedisCluster) -> list[None]:
    """A list that grows whenever a client reads the table of the slots, from now on."""
    readings: list[None] = []
    initialize = client.nodes_manager.initialize

    class Counting(type(client.nodes_manager)):  # type: ignore[misc]
        __slots__ = ()

        async def initialize(self, *arguments: Any, **options: Any) -> None:
            readings.append(None)
            await initialize(*arguments, **options)

    client.nodes_manager.__class__ = Counting
    return readings


async def until_none_fails(channel: AsyncClusterChannel) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await channel.send(b"key", [(b"ECHO", b"up")])
            except StoreError:
                await asyncio.sleep(0.02)
            else:
                return


@pytest.mark.redis
async def test_a_slot_that_moves_under_load_is_followed_by_all_who_were_sent_to_its_old_node(
    server_binary: ServerBinary,
) -> None:
    with servers.cluster(server_binary) as cluster:
        async with redis.asyncio.RedisCluster.from_url(cluster.url.replace("+cluster", ""), socket_timeout=5) as client:
            channel = AsyncClusterChannel(client)
            await channel.send(b"key", [(b"SET", b"key", b"value")])
            served = next(one for one in cluster.nodes if client.get_node_from_key("key").port == one.port)  # type: ignore[union-attr]
            (other,) = (one for one in cluster.nodes if one is not served)
            move(served, other, "key")
            readings = counted_readings(client)
            replies = await asyncio.gather(*(channel.send(b"key", [(b"GET", b"key"), (b"PING",)]) for _ in range(500)))
            assert replies == [[b"value", b"PONG"]] * 500
            assert client.get_node_from_key("key").port == other.port  # type: ignore[union-attr]
            assert await channel.send(b"key", [(b"GET", b"key")]) == [b"value"]
            assert readings == []
            await channel.close()


def move(source: RedisServer, target: RedisServer, key: str) -> None:
    with source.client() as leaving, target.client() as coming:
        slot = leaving.execute_command("CLUSTER KEYSLOT", key)
        ids: list[Any] = [client.execute_command("CLUSTER MYID") for client in (leaving, coming)]
        source_id, target_id = (one.decode() for one in ids)
        coming.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", source_id)
        leaving.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", target_id)
        leaving.execute_command("MIGRATE", target.host, target.port, key, 0, 5000)
        for client in (coming, leaving):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)


@pytest.mark.redis
async def test_what_is_known_of_a_node_that_left_the_cluster_is_dropped(server_binary: ServerBinary) -> None:
    with servers.cluster(server_binary) as cluster:
        async with redis.asyncio.RedisCluster.from_url(cluster.url.replace("+cluster", "")) as client:
            channel = AsyncClusterChannel(client)
            await channel.send(b"key", [(b"GET", b"key")])
            ((name, many),) = channel._multiplexers.items()
            (link,) = many._links.values()
            channel._table.stale = {name}
            node = client.nodes_manager.nodes_cache.pop(name)
            waiting = many.send(b"key", [(b"GET", b"key")])
            channel._leave_nodes_that_left()
            assert (channel._multiplexers, channel._table.stale, link.ended) == ({}, set(), False)
            assert await waiting == [None]
            assert link.ended
            client.nodes_manager.nodes_cache[name] = node
            await channel.close()


@pytest.mark.redis
async def test_after_an_answer_that_the_cluster_is_down_its_table_is_read_again(server_binary: ServerBinary) -> None:
    class Down(Multiplexer):
        def send(self, *arguments: Any, **options: Any) -> asyncio.Future[Any]:
            future = asyncio.get_running_loop().create_future()
            future.set_result([ClusterDownError("CLUSTERDOWN The cluster is down")])
            return future

    with servers.cluster(server_binary) as cluster:
        async with redis.asyncio.RedisCluster.from_url(cluster.url.replace("+cluster", "")) as client:
            channel = AsyncClusterChannel(client)
            await channel.send(b"key", [(b"PING",)])
            readings = counted_readings(client)
            ((name, real),) = channel._multiplexers.items()
            channel._multiplexers[name] = Down(list)
            assert [type(reply) for reply in await channel.send(b"key", [(b"PING",)])] == [ClusterDownError]
            assert readings == []
            channel._multiplexers[name] = real
            assert await channel.send(b"key", [(b"ECHO", b"up")]) == [b"up"]
            assert len(readings) == 1
            await channel.close()


@pytest.mark.redis
def test_a_cluster_client_that_was_left_open_in_a_loop_that_is_closed_is_used_in_another(
    server_binary: ServerBinary,
) -> None:
    program = """
    import asyncio, sys, redis.asyncio
    from ratelimit.stores.redis.async_channels import AsyncClusterChannel

    async def by_client(close):
        await channel.send(b"key", [(b"PING",)])
        channel._table.stale = {channel.node(b"key")}
        print(await channel.send(b"key", [(b"ECHO", b"again")]))
        if close:
            await channel.close()

    channel = AsyncClusterChannel(redis.asyncio.RedisCluster(host="127.0.0.1", port=int(sys.argv[1])), owned=True)
    for close in (False, False, True):
        asyncio.run(by_client(close))
    """
    with servers.cluster(server_binary) as cluster:
        command = [sys.executable, "-c", textwrap.dedent(program), str(cluster.nodes[0].port)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[b'again']\n" * 3, done.stderr
