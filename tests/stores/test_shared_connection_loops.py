"""One connection for all tasks of an event loop: other loops, and loops and stores that end."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import redis
import redis.asyncio
from redis._parsers import _AsyncRESP2Parser

from ratelimit import AsyncProxyManager, AsyncRedisStore
from tests.support import servers
from tests.support.scripted_server import ScriptedServer, echo, sharing, until
from tests.support.servers import RedisServer, ServerBinary


@pytest.mark.redis
async def test_a_store_that_is_forgotten_closes_its_connection(server: RedisServer) -> None:
    def named() -> int:
        with server.client() as admin:
            return sum(one["name"] == "forgotten" for one in admin.client_list())

    for options in ({}, {"protocol": 2, "parser_class": _AsyncRESP2Parser}):
        shared = sharing(server.port, client_name="forgotten", socket_timeout=0.05, **options)
        await echo(shared, b"word")
        assert named() == 1
        await asyncio.sleep(0.1)
        gc.disable()
        try:
            del shared
            await until(lambda: named() == 0)
        finally:
            gc.enable()


async def test_a_connection_that_was_closed_leaves_no_task_behind(scripted: ScriptedServer) -> None:
    shared = scripted.sharing()
    await echo(shared, b"word")
    before = asyncio.all_tasks()
    shared.close()
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
        # redis-py's cluster client has to be closed in the loop that it was used in.
        if topology == "cluster":
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


@pytest.mark.redis
def test_a_cluster_client_left_open_in_a_closed_loop_is_used_in_another(
    server_binary: ServerBinary,
) -> None:
    program = """
    import asyncio, sys, redis.asyncio
    from ratelimit.stores.redis.async_cluster import AsyncClusterChannel

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
