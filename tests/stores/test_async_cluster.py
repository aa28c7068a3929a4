"""A cluster in asyncio code: when the table of slots is read again, and redirections that are followed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
import redis.asyncio
from redis.exceptions import ClusterDownError

from ratelimit import StoreError, StoreUnavailableError
from ratelimit.stores.redis.async_cluster import AsyncClusterChannel
from tests.support import servers
from tests.support.servers import RedisServer, ServerBinary
from tests.support.topologies import ask, begin_to_move, end_move, give_all_slots, move_keys


@pytest.mark.redis
async def test_the_table_is_read_again_before_a_failed_node_is_asked(server_binary: ServerBinary) -> None:
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
    """Return a list that grows whenever a client reads the table of slots from now on."""
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
async def test_all_commands_follow_a_slot_that_moves_under_load(server_binary: ServerBinary) -> None:
    with servers.cluster(server_binary) as cluster:
        async with redis.asyncio.RedisCluster.from_url(cluster.url.replace("+cluster", ""), socket_timeout=5) as client:
            channel = AsyncClusterChannel(client)
            await channel.send(b"key", [(b"SET", b"key", b"value")])
            served = next(one for one in cluster.nodes if client.get_node_from_key("key").port == one.port)  # type: ignore[union-attr]
            (other,) = (one for one in cluster.nodes if one is not served)
            slot = client.keyslot("key")
            begin_to_move(served, other, slot)
            move_keys(served, other, "key")
            end_move(served, other, slot)
            readings = counted_readings(client)
            replies = await asyncio.gather(*(channel.send(b"key", [(b"GET", b"key"), (b"PING",)]) for _ in range(500)))
            assert replies == [[b"value", b"PONG"]] * 500
            assert client.get_node_from_key("key").port == other.port  # type: ignore[union-attr]
            assert await channel.send(b"key", [(b"GET", b"key")]) == [b"value"]
            assert readings == []
            await channel.close()


@pytest.mark.redis
async def test_connections_to_a_node_that_left_the_cluster_are_closed(server_binary: ServerBinary) -> None:
    with servers.cluster(server_binary) as cluster:
        leaving, staying = cluster.nodes
        url = cluster.url.replace("+cluster", "")
        async with redis.asyncio.RedisCluster.from_url(url, client_name="limiter") as client:
            channel = AsyncClusterChannel(client)
            keys = [b"%d" % number for number in range(100)]
            keys = [key for key in keys if client.keyslot(key) < servers.SLOTS // 2]
            assert await channel.send(keys[0], [(b"GET", keys[0])]) == [None]
            assert named(leaving, "limiter") >= 1
            give_all_slots(leaving, staying)
            for key in keys:
                assert await channel.send(key, [(b"GET", key)]) == [None]
            assert [node.port for node in client.get_nodes()] == [staying.port]
            async with asyncio.timeout(10):
                while named(leaving, "limiter"):
                    await asyncio.sleep(0.01)
            await channel.close()


def named(server: RedisServer, name: str) -> int:
    """Count the connections of a name."""
    with server.client() as admin:
        return sum(one["name"] == name for one in admin.client_list())


@pytest.mark.redis
async def test_the_table_is_read_again_after_a_node_said_the_cluster_is_down(server_binary: ServerBinary) -> None:
    with servers.cluster(server_binary) as cluster:
        async with redis.asyncio.RedisCluster.from_url(cluster.url.replace("+cluster", "")) as client:
            channel = AsyncClusterChannel(client)
            await channel.send(b"key", [(b"PING",)])
            readings = counted_readings(client)
            served = next(one for one in cluster.nodes if client.get_node_from_key("key").port == one.port)  # type: ignore[union-attr]
            ask(served, "CLUSTER DELSLOTS", client.keyslot("key"))
            assert [type(reply) for reply in await channel.send(b"key", [(b"GET", b"key")])] == [ClusterDownError]
            assert readings == []
            ask(served, "CLUSTER ADDSLOTS", client.keyslot("key"))
            assert await channel.send(b"key", [(b"ECHO", b"up")]) == [b"up"]
            assert len(readings) == 1
            await channel.close()
