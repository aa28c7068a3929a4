"""One connection for all tasks: what is sent, and which caller gets which reply."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio
import trustme
from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import NoScriptError, ResponseError

from ratelimit import AsyncProxyManager, AsyncRedisStore, StoreUnavailableError
from ratelimit.stores.redis.shared_connection import SharedConnection
from tests.support.scripted_server import CUT, PUSH, ScriptedServer, bulk, echo, echoed, sharing, until, words
from tests.support.servers import RedisServer, wait_until


@pytest.mark.redis
@pytest.mark.parametrize(
    "options",
    [{"protocol": 2}, {"protocol": 3}, {"decode_responses": True}, {"protocol": 2, "parser_class": _AsyncRESP2Parser}],
    ids=["RESP2", "RESP3", "decode_responses", "a parser of Python"],
)
async def test_each_of_many_tasks_gets_its_own_replies(server: RedisServer, options: dict[str, Any]) -> None:
    shared = sharing(server.port, **options)

    async def echo_often(word: bytes) -> None:
        for i in range(20):
            said = b"%s, %d" % (word, i)
            assert await echo(shared, said) == said
            assert await shared.send(word, ((b"ECHO", said), (b"ECHO", word), (b"PING",))) == [said, word, b"PONG"]

    await asyncio.gather(*map(echo_often, words(200)))
    shared.close()


@pytest.mark.redis
@pytest.mark.parametrize("options", [{}, {"parser_class": _AsyncRESP2Parser, "protocol": 2}], ids=["hiredis", "Python"])
async def test_errors_of_the_server_are_replies_with_redis_pys_types(
    server: RedisServer, options: dict[str, Any]
) -> None:
    shared = sharing(server.port, **options)
    unknown, good, wrong = await shared.send(b"", ((b"EVALSHA", b"0" * 40, b"0"), (b"ECHO", b"good"), (b"ECHO",)))
    assert isinstance(unknown, NoScriptError)
    assert good == b"good"
    assert type(wrong) is ResponseError
    shared.close()


async def test_commands_of_one_turn_of_the_loop_leave_in_one_write_and_in_order(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    await echo(shared, b"connected")
    scripted.chunks.clear()
    replies = await asyncio.gather(*(shared.send(b"", ((b"ECHO", word), (b"SAY", word))) for word in words(50)))
    assert replies == [[word, word] for word in words(50)]
    assert scripted.chunks == [[command for word in words(50) for command in ([b"ECHO", word], [b"SAY", word])]]
    await echo(shared, b"another turn")
    assert len(scripted.chunks) == 2
    shared.close()


async def test_commands_that_waited_for_the_connection_leave_in_one_write(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    assert await asyncio.gather(*(echo(shared, word) for word in words(50))) == words(50)
    assert [len(chunk) for chunk in scripted.chunks] == [50]
    assert scripted.connections == 1
    shared.close()


async def test_push_messages_are_not_replies(scripted: ScriptedServer) -> None:
    scripted.after_handshake = PUSH
    scripted.answer = lambda command: PUSH + bulk(command[-1]) + PUSH
    shared = scripted.sharing(protocol=3)
    for _ in range(3):
        assert await asyncio.gather(*(echo(shared, word) for word in words(10))) == words(10)
    assert scripted.connections == 1
    shared.close()


async def test_what_came_right_after_the_handshake_is_not_lost(scripted: ScriptedServer) -> None:
    class Early(redis.asyncio.Connection):
        async def connect(self) -> None:
            await super().connect()  # type: ignore[no-untyped-call]
            assert self._reader is not None
            self._reader.feed_data(PUSH[:9])

    port = scripted.port
    shared = SharedConnection(lambda: Early(host="127.0.0.1", port=port, protocol=3, socket_timeout=1))
    scripted.answer = lambda command: PUSH[9:] + bulk(command[-1])
    assert await echo(shared, b"word") == b"word"
    shared.close()


@pytest.mark.redis
async def test_push_messages_of_a_real_server_are_not_replies(server: RedisServer) -> None:
    shared = sharing(server.port, protocol=3)
    await shared.send(b"", ((b"CLIENT", b"TRACKING", b"ON"), (b"GET", b"tracked")))
    with server.client() as other:
        for i in range(5):
            other.set("tracked", i)
            assert await shared.send(b"", ((b"GET", b"tracked"),)) == [b"%d" % i]
    shared.close()


@pytest.mark.redis
async def test_large_values_go_both_ways(server: RedisServer) -> None:
    shared = sharing(server.port, socket_timeout=10)
    large = [bytes([65 + i]) * 3_000_000 for i in range(5)]
    assert await asyncio.gather(*(echo(shared, word) for word in large)) == large
    shared.close()


async def test_redis_py_does_tls_and_logs_in(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    server = ScriptedServer()
    async with server.listening(ssl=context):
        shared = SharedConnection(
            lambda: redis.asyncio.SSLConnection(
                host="127.0.0.1", port=server.port, ssl_ca_certs=str(tmp_path / "ca.pem"), password="secret"
            )
        )
        assert await asyncio.gather(*(echo(shared, word) for word in words(100))) == words(100)
        server.answer = lambda _: CUT
        with pytest.raises(StoreUnavailableError):
            await echo(shared, b"word")
        server.answer = echoed
        assert await echo(shared, b"again") == b"again"
        shared.close()
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


@pytest.mark.parametrize("protocol", [2, 3])
async def test_fakeredis_serves(protocol: int) -> None:
    async with fakeredis.FakeAsyncRedis(protocol=protocol) as client:
        store = AsyncRedisStore(client)
        manager = AsyncProxyManager(store, "1000/day")
        assert all(await asyncio.gather(*(manager.try_consume(f"user:{i % 7}") for i in range(700))))
        assert await manager.available_tokens("user:3") == 900
        await store.aclose()
        assert await manager.available_tokens("user:3") == 900
