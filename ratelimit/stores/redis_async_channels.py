"""The asyncio twins of the channels in :mod:`ratelimit.stores.redis_channels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis.asyncio
from redis.exceptions import ResponseError

from ratelimit.stores.redis_channels import RAW, Command, Replies
from ratelimit.stores.redis_errors import FOREIGN, translated


class AsyncPoolChannel:
    """``redis.asyncio.Redis``: a single server, or the master that Sentinel names.

    :param sentinels: clients to close together with this one.
    """

    def __init__(self, client: redis.asyncio.Redis, sentinels: Sequence[redis.asyncio.Redis] = ()) -> None:
        self._client = client
        self._sentinels = sentinels

    def node(self, key: bytes) -> str:
        """There is one server at a time."""
        return ""

    async def send(self, key: bytes, *commands: Command) -> Replies:
        """Send commands over one connection, in one write."""
        pool = self._client.connection_pool
        try:
            connection = await pool.get_connection()
        except FOREIGN as error:
            raise translated(error, key, in_doubt=False) from error
        try:
            await connection.send_packed_command(connection.pack_commands(commands))
            return [await _aread(connection) for _ in commands]
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if isinstance(error, FOREIGN):
                raise translated(error, key, in_doubt=True) from error
            raise
        finally:
            await pool.release(connection)

    async def release(self) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Close the client and its connections."""
        for client in (self._client, *self._sentinels):
            await client.aclose()
            await client.connection_pool.disconnect()


async def _aread(connection: Any) -> Any:
    try:
        return await connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


class AsyncClusterChannel:
    """``redis.asyncio.RedisCluster``; naming the node keeps redis-py from repeating, and leaves it MOVED and ASK."""

    def __init__(self, client: redis.asyncio.RedisCluster) -> None:
        self._client = client

    def node(self, key: bytes) -> str:
        """The name of the node that serves the key's slot; empty before the cluster is known."""
        try:
            node = self._client.get_node_from_key(key)  # type: ignore[arg-type]  # takes bytes as well
        except FOREIGN:
            return ""
        return "" if node is None else str(node.name)

    async def send(self, key: bytes, *commands: Command) -> Replies:
        """Send commands one by one."""
        client = self._client
        try:
            await client.initialize()
            node = client.get_node_from_key(key)  # type: ignore[arg-type]  # takes bytes as well
        except FOREIGN as error:
            raise translated(error, key, in_doubt=False) from error
        replies: Replies = []
        for command in commands:
            try:
                replies.append(await client.execute_command(*command, target_nodes=node, **RAW))
            except ResponseError as error:
                replies.append(error)
            except FOREIGN as error:
                raise translated(error, key, in_doubt=True) from error
        return replies

    async def release(self) -> None:
        """Nothing is held."""

    async def close(self) -> None:
        """Close the client."""
        await self._client.aclose()
