"""Why no connection can be made, over clients whose repetitions take longer than a decision may."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Generator
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.asyncio.sentinel
import redis.sentinel
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

from ratelimit import AsyncProxyManager, AsyncRedisStore, ProxyManager, RedisStore, StoreError, StoreTimeoutError
from tests.support import servers

TIMEOUT = 20
"""Seconds: in them no client below is done with its repetitions, before each of which it pauses for a minute."""

PLACES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "refused": ({"port": "refused"}, redis.ConnectionError, "Connect"),
    "unknown": ({"host": "no.such.host.invalid", "port": "refused"}, redis.ConnectionError, "no.such.host.invalid"),
    "password": (
        {"port": "server", "username": "a", "password": "b"},
        redis.AuthenticationError,
        "user name or password",
    ),
    "database": ({"port": "server", "db": 99}, redis.ResponseError, "DB index"),
    "plain-to-tls": ({"port": "tls"}, redis.ConnectionError, "(?i)clos|reset"),
}
"""Options of clients that cannot connect, with the name of a port; the cause of the error, and its words."""

FACES: dict[str, tuple[Any, Any, Any]] = {
    "sync": (redis, redis.sentinel.Sentinel, Retry),
    "asyncio": (redis.asyncio, redis.asyncio.sentinel.Sentinel, redis.asyncio.retry.Retry),
}


@pytest.fixture
def refused() -> Generator[int]:
    """Return a port that nobody listens at, and that nobody else gets."""
    with contextlib.closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


class HangingUp:
    """A server that closes each connection, and counts them."""

    def __init__(self) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                connection.close()

    def counted(self) -> int:
        """Return how many connections were made since the last time."""
        counted, self.connections = self.connections, 0
        return counted

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def hanging_up() -> Generator[HangingUp]:
    with contextlib.closing(HangingUp()) as server:
        yield server


async def failure(client: Any) -> StoreError:
    """Return the error of a decision over a client of either face."""
    with pytest.raises(StoreError) as caught:
        if isinstance(client, redis.Redis):
            ProxyManager(RedisStore(client), "5/minute", timeout=TIMEOUT).try_consume("anyone")
        else:
            await AsyncProxyManager(AsyncRedisStore(client), "5/minute", timeout=TIMEOUT).try_consume("anyone")
    assert not isinstance(caught.value, StoreTimeoutError)
    assert not caught.value.in_doubt
    return caught.value


@pytest.mark.redis
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("face", FACES)
async def test_the_reason_is_raised_at_once(
    face: str, place: str, refused: int, server: servers.RedisServer, request: pytest.FixtureRequest
) -> None:
    options, kind, words = PLACES[place]
    port: Any = {"refused": refused, "server": server.port}.get(options["port"])
    if options["port"] == "tls":
        tls: servers.TlsServer = request.getfixturevalue("tls_server")
        port = int(tls.address.split(":")[1])
    options = {"host": "127.0.0.1", **options, "port": port}
    api, _, repeating = FACES[face]
    error = await failure(api.Redis(**options, retry=repeating(ConstantBackoff(60), 10)))
    assert isinstance(error.__cause__, kind)
    assert re.search(words, str(error))


@pytest.mark.parametrize("face", FACES)
async def test_sentinels_that_cannot_be_reached_are_each_asked_once(face: str, refused: int) -> None:
    _, sentinel, repeating = FACES[face]
    options = {"retry": repeating(ConstantBackoff(60), 10)}
    addresses = [("127.0.0.1", refused), ("no.such.host.invalid", 26379)]
    error = await failure(sentinel(addresses, sentinel_kwargs=options, **options).master_for("main"))
    assert isinstance(error.__cause__, redis.sentinel.MasterNotFoundError | redis.asyncio.sentinel.MasterNotFoundError)


@pytest.mark.parametrize("face", FACES)
async def test_a_client_repeats_for_its_owner_as_before(face: str, hanging_up: HangingUp) -> None:
    api, _, repeating = FACES[face]
    client: Any = api.Redis(host="127.0.0.1", port=hanging_up.port, retry=repeating(NoBackoff(), 3))
    retry = client.get_retry()
    for _ in range(2):  # the second time over a connection that the client has made
        await failure(client)
        assert hanging_up.counted() == 1
        with pytest.raises(redis.ConnectionError):
            ping = client.ping()
            await ping
        assert hanging_up.counted() == 4
    assert client.get_retry() == retry


def test_repetitions_of_a_class_of_the_owner_s_stay_what_they_are(hanging_up: HangingUp) -> None:
    class Counting(Retry):
        calls = 0

        def call_with_retry(self, *args: Any, **options: Any) -> Any:
            Counting.calls += 1
            return super().call_with_retry(*args, **options)

    client = redis.Redis(host="127.0.0.1", port=hanging_up.port, retry=Counting(NoBackoff(), 3))
    manager = ProxyManager(RedisStore(client), "5/minute", timeout=TIMEOUT)
    with pytest.raises(StoreError):
        manager.try_consume("anyone")
    assert (hanging_up.counted(), Counting.calls) == (1, 1)
    with pytest.raises(redis.ConnectionError):
        client.ping()
    assert hanging_up.counted() == 4
    assert isinstance(client.get_retry(), Counting)
