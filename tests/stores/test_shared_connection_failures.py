"""One connection for all tasks: what happens to the callers when it breaks, hangs or closes."""

from __future__ import annotations

import asyncio
import select
import time
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio
from redis._parsers import _AsyncRESP2Parser
from redis.exceptions import ReadOnlyError

from ratelimit import AsyncProxyManager, AsyncRedisStore, StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.shared_connection import SharedConnection
from tests.support.scripted_server import CUT, ScriptedServer, bulk, echo, echoed, sharing, until, words
from tests.support.servers import RedisServer


@pytest.mark.parametrize(
    ("broken", "message"),
    [(b"$10\r\nhalf" + CUT, "losed"), (CUT, "losed"), (b"garbage\r\n", "Protocol")],
    ids=["half a reply", "an end", "garbage"],
)
@pytest.mark.parametrize("options", [{}, {"parser_class": _AsyncRESP2Parser, "protocol": 2}], ids=["hiredis", "Python"])
async def test_a_connection_that_breaks_fails_all_waiters_and_is_replaced(
    scripted: ScriptedServer, broken: bytes, message: str, options: dict[str, Any]
) -> None:
    shared = scripted.sharing(**options)
    scripted.answer = lambda command: broken if command[-1] == b"word 2" else bulk(command[-1])
    calls = [asyncio.create_task(echo(shared, word)) for word in words(6)]
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
    assert await echo(shared, b"again") == b"again"
    assert scripted.connections == 2
    shared.close()
    await until(lambda: scripted.open == 0)


async def test_too_many_replies_break_the_connection_for_those_who_come_next(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    assert await echo(shared, b"one") == b"one"
    scripted.answer = lambda command: bulk(command[-1]) * 2
    assert await echo(shared, b"two") == b"two"
    scripted.answer = echoed
    assert await echo(shared, b"three") == b"three"
    assert scripted.connections == 2
    shared.close()


async def test_a_late_reply_of_a_busy_server_is_dropped_in_its_turn(scripted: ScriptedServer) -> None:
    shared = scripted.sharing(socket_timeout=0.5)
    await echo(shared, b"connected")
    scripted.silent.clear()
    calls = [asyncio.create_task(echo(shared, word)) for word in words(6)]

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
    assert await echo(shared, b"after all") == b"after all"
    assert scripted.connections == 1
    shared.close()


async def test_a_silent_connection_is_left_at_its_first_waiters_deadline(scripted: ScriptedServer) -> None:
    shared = scripted.sharing(socket_timeout=0.5)
    await echo(shared, b"connected")
    scripted.silent.clear()
    early = asyncio.create_task(echo(shared, b"early"))
    await asyncio.sleep(0.25)
    late = asyncio.create_task(echo(shared, b"late"))
    with pytest.raises(StoreTimeoutError, match=r"no reply within 0\.5 s") as caught:
        await early
    assert caught.value.in_doubt
    assert not late.done()
    scripted.silent.set()
    assert await echo(shared, b"another connection") == b"another connection"
    assert await late == b"late"
    assert scripted.connections == 2
    await until(lambda: scripted.open == 1)
    assert await echo(shared, b"and on") == b"and on"
    assert scripted.connections == 2
    shared.close()
    await until(lambda: scripted.open == 0)


async def test_a_silent_connection_ends_with_its_last_waiter(scripted: ScriptedServer) -> None:
    shared = scripted.sharing(socket_timeout=0.1)
    await echo(shared, b"connected")
    scripted.silent.clear()
    calls = [asyncio.create_task(echo(shared, b"early"))]
    await asyncio.sleep(0.05)
    calls.append(asyncio.create_task(echo(shared, b"late")))
    await asyncio.wait(calls)
    assert all(isinstance(call.exception(), StoreTimeoutError) for call in calls)
    (link,) = shared._links.values()
    assert link.ended
    scripted.silent.set()
    await until(lambda: scripted.open == 0)
    assert await echo(shared, b"another connection") == b"another connection"
    shared.close()


async def test_closing_ends_a_connection_that_was_left(scripted: ScriptedServer) -> None:
    shared = scripted.sharing(socket_timeout=0.5)
    await echo(shared, b"connected")
    scripted.silent.clear()
    early = asyncio.create_task(echo(shared, b"early"))
    await asyncio.sleep(0.25)
    late = asyncio.create_task(echo(shared, b"late"))
    await asyncio.wait([early])
    later = asyncio.create_task(echo(shared, b"another connection"))
    await until(lambda: scripted.open == 2)
    shared.close()
    await asyncio.wait([late, later])
    for call in (late, later):
        assert "the store was closed" in str(call.exception())
    assert early.exception()
    scripted.silent.set()
    await until(lambda: scripted.open == 0)


async def test_a_connection_that_is_retired_ends_with_its_last_waiter(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    await echo(shared, b"connected")
    scripted.silent.clear()
    waiting = asyncio.create_task(echo(shared, b"waiting"))
    await until(lambda: len(scripted.chunks) == 2)
    shared.retire()
    await asyncio.sleep(0.05)
    assert (scripted.open, waiting.done()) == (1, False)
    scripted.silent.set()
    assert await waiting == b"waiting"
    await until(lambda: scripted.open == 0)


async def test_without_a_timeout_a_waiter_waits(scripted: ScriptedServer) -> None:
    shared = scripted.sharing(socket_timeout=None)
    scripted.silent.clear()
    call = asyncio.create_task(echo(shared, b"patient"))
    await asyncio.sleep(0.2)
    scripted.silent.set()
    assert await call == b"patient"
    shared.close()


async def test_a_reply_that_nobody_waits_for_any_more_is_dropped_in_its_turn(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    await echo(shared, b"connected")
    scripted.silent.clear()
    calls = [asyncio.create_task(echo(shared, word)) for word in words(5)]
    await until(lambda: len(scripted.chunks) == 2)
    calls[1].cancel()
    calls[3].cancel()
    scripted.silent.set()
    replies = await asyncio.gather(*calls, return_exceptions=True)
    assert replies[0::2] == words(5)[0::2]
    assert all(isinstance(reply, asyncio.CancelledError) for reply in replies[1::2])
    assert await echo(shared, b"next") == b"next"
    assert scripted.connections == 1
    shared.close()


class Slow(redis.asyncio.Connection):
    """A connection that takes its time."""

    async def connect(self) -> None:
        await asyncio.sleep(0.6)
        await super().connect()  # type: ignore[no-untyped-call]


async def test_what_was_given_up_while_connecting_is_never_sent(scripted: ScriptedServer) -> None:
    port = scripted.port
    shared = SharedConnection(lambda: Slow(host="127.0.0.1", port=port, socket_timeout=0.3, socket_connect_timeout=0.1))
    late = asyncio.create_task(echo(shared, b"too late"))
    cancelled = asyncio.create_task(echo(shared, b"cancelled"))
    await asyncio.sleep(0.35)
    cancelled.cancel()
    assert await echo(shared, b"in time") == b"in time"
    error = late.exception()
    assert isinstance(error, StoreTimeoutError)
    assert "no connection within 0.4 s" in str(error)
    assert not error.in_doubt
    assert scripted.commands == [b"in time"]
    shared.close()


async def test_the_time_for_a_reply_begins_when_there_is_a_connection(scripted: ScriptedServer) -> None:
    port = scripted.port
    shared = SharedConnection(lambda: Slow(host="127.0.0.1", port=port, socket_timeout=0.2, socket_connect_timeout=2))
    scripted.silent.clear()
    begin = time.monotonic()
    with pytest.raises(StoreTimeoutError, match=r"no reply within 0\.2 s") as caught:
        await echo(shared, b"word")
    assert caught.value.in_doubt
    assert 0.8 <= time.monotonic() - begin + 0.01 < 2
    shared.close()


async def test_what_was_not_sent_is_not_in_doubt_when_the_connection_breaks(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    await echo(shared, b"connected")
    scripted.silent.clear()
    sent = asyncio.create_task(echo(shared, b"sent"))
    await until(lambda: len(scripted.chunks) == 2)
    unsent = asyncio.create_task(echo(shared, b"unsent"))
    await asyncio.sleep(0)
    shared.close()
    await asyncio.wait([sent, unsent])
    for call, in_doubt in ((sent, True), (unsent, False)):
        error = call.exception()
        assert isinstance(error, StoreUnavailableError)
        assert error.in_doubt is in_doubt
    scripted.silent.set()
    assert await echo(shared, b"again") == b"again"
    assert b"unsent" not in scripted.commands
    shared.close()


async def test_all_waiters_share_one_attempt_to_connect_and_its_failure() -> None:
    server = ScriptedServer()
    async with server.listening():
        pass
    attempts = 0

    def make_connection() -> Any:
        nonlocal attempts
        attempts += 1
        return redis.asyncio.Connection(host="127.0.0.1", port=server.port)

    shared = SharedConnection(make_connection)
    errors = await asyncio.gather(*(echo(shared, word) for word in words(20)), return_exceptions=True)
    assert attempts == 1
    assert len(set(map(id, errors))) == 20
    for error, word in zip(errors, words(20), strict=True):
        assert isinstance(error, StoreUnavailableError)
        assert not error.in_doubt
        assert error.key == word
    async with server.listening():
        assert await echo(shared, b"up") == b"up"
        shared.close()
        await until(lambda: server.open == 0)


async def test_whatever_makes_connecting_fail_is_an_error_of_the_store(scripted: ScriptedServer) -> None:
    class Provider(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str, str]:
            raise LookupError("no token today")

    shared = scripted.sharing(credential_provider=Provider())
    with pytest.raises(StoreUnavailableError, match="no token today") as caught:
        await echo(shared, b"word")
    assert not caught.value.in_doubt
    await until(lambda: scripted.connections == 1 and scripted.open == 0)


async def test_closing_while_connecting_fails_the_waiter_and_leaves_nothing_open(scripted: ScriptedServer) -> None:
    port = scripted.port
    shared = SharedConnection(lambda: Slow(host="127.0.0.1", port=port))
    call = asyncio.create_task(echo(shared, b"word"))
    await asyncio.sleep(0.01)
    shared.close()
    with pytest.raises(StoreUnavailableError, match="the store was closed"):
        await call
    await asyncio.sleep(0.65)
    assert scripted.connections == 0


@pytest.mark.parametrize(
    "refusal", [b"-READONLY You can't write against a read only replica.\r\n", b"-NOAUTH Authentication required.\r\n"]
)
async def test_a_server_that_was_demoted_or_forgot_the_user_is_reconnected(
    scripted: ScriptedServer, refusal: bytes
) -> None:
    shared = scripted.sharing()
    scripted.answer = lambda command: refusal if command[-1] == b"word 1" else bulk(command[-1])
    replies = await asyncio.gather(*(echo(shared, word) for word in words(4)), return_exceptions=True)
    assert replies[::2] == words(4)[::2]
    assert isinstance(replies[1], ReadOnlyError | StoreError)
    assert replies[3] == b"word 3"
    assert await echo(shared, b"elsewhere") == b"elsewhere"
    assert scripted.connections == 2
    await until(lambda: scripted.open == 1)
    shared.close()


async def test_a_refusal_that_redis_py_takes_for_a_broken_connection_fails_one_waiter(
    scripted: ScriptedServer,
) -> None:
    shared = scripted.sharing()
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    scripted.answer = lambda command: loading if command[-1] == b"word 1" else bulk(command[-1])
    calls = [
        echo(shared, b"word 0"),
        shared.send(b"two", ((b"ECHO", b"word 1"), (b"ECHO", b"word 2"))),
        echo(shared, b"word 3"),
        echo(shared, b"word 1"),
        echo(shared, b"word 4"),
    ]
    replies: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    assert replies[::2] == [b"word 0", b"word 3", b"word 4"]
    for error, key in ((replies[1], b"two"), (replies[3], b"word 1")):
        assert isinstance(error, StoreUnavailableError)
        assert (error.key, error.in_doubt) == (key, False)
    assert scripted.connections == 1
    shared.close()


async def test_an_end_right_after_the_handshake_is_noticed(scripted: ScriptedServer) -> None:
    class Over(redis.asyncio.Connection):
        async def connect(self) -> None:
            await super().connect()  # type: ignore[no-untyped-call]
            assert self._reader is not None
            self._reader.feed_eof()

    port = scripted.port
    shared = SharedConnection(lambda: Over(host="127.0.0.1", port=port))
    with pytest.raises(StoreUnavailableError, match="the server closed the connection") as caught:
        await echo(shared, b"word")
    assert not caught.value.in_doubt
    await until(lambda: (scripted.connections, scripted.open) == (1, 0))


@pytest.mark.redis
async def test_replies_that_came_while_the_loop_was_blocked_are_still_read(
    server: RedisServer,
) -> None:
    shared = sharing(server.port, socket_timeout=60)
    await echo(shared, b"connected")
    (link,) = shared._links.values()
    transport: Any = link.transport
    first = asyncio.ensure_future(shared.send(b"first", ((b"ECHO", b"first"),), deadline=monotonic() + 0.1))
    # The next turn of the loop writes the command. The turn after that takes longer than the deadline.
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251
    assert select.select([transport.get_extra_info("socket").fileno()], [], [], 60)[0]
    second = asyncio.ensure_future(shared.send(b"second", ((b"ECHO", b"second"),)))  # in that very turn
    assert (await first, await second) == ([b"first"], [b"second"])
    shared.close()


@pytest.mark.redis
async def test_a_connection_that_the_server_kills_is_replaced(server: RedisServer) -> None:
    shared = sharing(server.port)
    with server.client() as admin:
        for word in words(5):
            assert await echo(shared, word) == word
            assert admin.client_kill_filter(_type="normal", skipme=True)
            await asyncio.sleep(0.05)  # it is noticed while nobody waits
    shared.close()


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
