"""A server that is gone, silent, loading or read-only is an error that says so, and is used again once it is back."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import pytest
import redis

from ratelimit import StoreTimeoutError, StoreUnavailableError
from tests.support import servers
from tests.support.both_faces import Face, Manager, closing, settled
from tests.support.servers import RedisServer, ServerBinary, wait_until
from tests.support.verbs import KEY, LIMITS, PREFIX, VERBS, check_failure, every_verb, nothing_written

pytestmark = pytest.mark.redis


@every_verb
async def test_without_a_server_every_verb_says_so(
    face: Face, stopped_server: RedisServer, verb: Callable[[Manager], Any]
) -> None:
    async with closing(face.from_url(stopped_server.url, LIMITS, prefix=PREFIX)) as manager:
        error = await check_failure(manager, StoreUnavailableError, "(?i)connect", verb)
        assert not error.in_doubt


async def test_without_a_socket_the_error_says_so(face: Face) -> None:
    async with closing(face.from_url("unix:///nowhere/redis.sock", LIMITS)) as manager:
        await check_failure(manager, StoreUnavailableError, "/nowhere/redis.sock")


async def test_without_a_cluster_the_error_says_so(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(f"redis+cluster://{server.host}:{server.port}", LIMITS)) as manager:
        await check_failure(manager, StoreUnavailableError, "(?i)cluster")


async def test_without_sentinels_the_error_says_so(face: Face, stopped_server: RedisServer) -> None:
    place = f"{stopped_server.host}:{stopped_server.port}"
    url = f"redis+sentinel://:sesame@{place}/service?sentinel_password=sesame"
    async with closing(face.from_url(url, LIMITS)) as manager:
        error = await check_failure(manager, StoreUnavailableError, "No master found for 'service'")
        assert not error.in_doubt
        assert "sesame" not in str(error)


async def test_silent_sentinels_are_not_asked_over_and_over(face: Face) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        silent.setblocking(False)
        port = silent.getsockname()[1]
        url = f"redis+sentinel://127.0.0.1:{port}/service?socket_timeout=0.05"
        async with closing(face.from_url(url, LIMITS)) as manager:
            await check_failure(manager, StoreUnavailableError, "No master found for 'service'")
        asked = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                asked += 1
    assert 1 <= asked <= 2


async def test_a_server_that_comes_back_is_used_again(face: Face, server_binary: ServerBinary) -> None:
    with RedisServer.start(server_binary) as server:
        async with closing(face.from_url(server.url, LIMITS)) as manager:
            assert await settled(manager.try_consume(KEY, 10))
            server.stop()
            await check_failure(manager, StoreUnavailableError, "(?i)connect")
            server.restart()
            assert await settled(manager.try_consume(KEY, 10))


async def test_a_silent_server_is_a_timeout(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    async with closing(face.from_url(f"{server.url}?socket_timeout=0.3", LIMITS)) as manager:
        server.pause()
        try:
            error = await check_failure(manager, StoreTimeoutError, "(?i)time")
        finally:
            server.resume()
        assert not error.in_doubt
        assert not admin.exists(KEY)
        assert await settled(manager.try_consume(KEY))


async def test_a_server_that_falls_silent_leaves_doubt(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    async with closing(face.from_url(f"{server.url}?socket_timeout=0.3", LIMITS)) as manager:
        assert await settled(manager.try_consume(KEY))
        server.pause()
        try:
            error = await check_failure(manager, StoreTimeoutError, "may have been carried out")
        finally:
            server.resume()
        assert error.in_doubt
        assert await settled(manager.try_consume(KEY))
        assert 2 <= (await settled(manager.snapshot(KEY))).consumed_tokens <= 3
        assert admin.pttl(KEY) > 0


async def test_a_server_that_loads_its_data_is_unavailable(face: Face, server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary, "--rdbcompression", "no") as master,
        RedisServer.start(server_binary, "--key-load-delay", "30000") as loading,  # microseconds for each key
        master.client() as writer,
        loading.client() as reader,
    ):
        writer.config_set("repl-diskless-sync-delay", 0)
        # while it loads, a server looks after its clients every two megabytes
        writer.mset({f"key {i}": bytes(200_000) for i in range(100)})
        async with closing(face.from_url(f"{loading.url}?socket_timeout=10", LIMITS, timeout=10)) as manager:
            assert await settled(manager.try_consume(KEY))
            reader.replicaof(master.host, master.port)
            wait_until(lambda: reader.info("persistence")["loading"] == 1, "it loads what the master has sent")
            # that it is a replica by now is what some look at first when asked to write
            error = await check_failure(manager, StoreUnavailableError, "(?i)loading|read-only")
            assert not error.in_doubt
            await check_failure(manager, StoreUnavailableError, "(?i)loading", VERBS["configuration"])
            wait_until(lambda: reader.info("persistence")["loading"] == 0, "it has loaded")
            reader.replicaof("NO", "ONE")
            assert await settled(manager.try_consume(KEY))


def await_replication(master: RedisServer) -> None:
    with master.client() as client:
        client.set("the last write", "of this connection, which WAIT waits for")
        assert client.wait(1, 5000) == 1


async def test_a_read_only_replica_is_unavailable_for_writing(face: Face, server_binary: ServerBinary) -> None:
    with (
        RedisServer.start(server_binary) as master,
        servers.replica(master) as replica,
        replica.client() as reader,
    ):
        async with (
            closing(face.from_url(master.url, LIMITS)) as manager,
            closing(face.from_url(replica.url, LIMITS)) as misled,
        ):
            with nothing_written(reader):
                await check_failure(misled, StoreUnavailableError, "(?i)read.only replica")
            assert await settled(manager.try_consume(KEY))
            await_replication(master)
            with nothing_written(reader):
                assert await settled(misled.available_tokens(KEY)) == 9
                await check_failure(misled, StoreUnavailableError, "(?i)read.only replica")
                await check_failure(misled, StoreUnavailableError, "(?i)read.only replica", VERBS["remove"])
            reader.replicaof("NO", "ONE")
            assert await settled(misled.try_consume(KEY))


Trouble = Callable[[redis.Redis], AbstractContextManager[None]]


@contextmanager
def setting(client: redis.Redis, name: str, value: int) -> Generator[None]:
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, 0)


def out_of_memory(client: redis.Redis) -> AbstractContextManager[None]:
    return setting(client, "maxmemory", 1)


def out_of_replicas(client: redis.Redis) -> AbstractContextManager[None]:
    return setting(client, "min-replicas-to-write", 1)


@pytest.mark.parametrize("trouble", [out_of_memory, out_of_replicas])
async def test_a_server_that_refuses_to_write_is_unavailable(
    face: Face, server: RedisServer, admin: redis.Redis, trouble: Trouble
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for _ in ("a missing bucket", "a bucket in use"):
            with nothing_written(admin), trouble(admin):
                error = await check_failure(manager, StoreUnavailableError, "(?i)memory|too few replicas")
                assert not error.in_doubt
            assert await settled(manager.try_consume(KEY))
