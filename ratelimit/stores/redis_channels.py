"""How commands reach a server: one way for a client with a connection pool, one for a cluster; sync and asyncio.

A client's own ``execute_command`` sends a command again when its reply was lost, without a word. A compare-and-swap
that is repeated unknowingly takes its own success for somebody else's, so that the commands here are sent once, over
the client's own connections; connecting is left to redis-py with all its settings. A lost reply is reported as such
(``in_doubt``), and repeating is up to the caller, who knows what to look for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import redis
from redis.exceptions import ResponseError

from ratelimit.stores.redis_errors import FOREIGN, translated

Command = tuple[Any, ...]
Replies = list[Any]
"""One reply for each command, in order: as the server sent it, undecoded, or the ``ResponseError`` that it sent."""

RAW: dict[str, Any] = {"NEVER_DECODE": True}  # redis-py's option that spares us ``decode_responses`` of the client


class Channel(Protocol):
    """The connections of a client."""

    def node(self, key: bytes) -> str:
        """The name of the server that holds this key; two servers have two clocks."""
        ...

    def send(self, key: bytes, *commands: Command) -> Any:
        """Send commands to the server of this key, in one round trip if it can be, and give their replies."""
        ...

    def close(self) -> Any:
        """Close the client."""
        ...


class PoolChannel:
    """``redis.Redis``: a single server, or the master that Sentinel names.

    :param sentinels: clients to close together with this one.
    """

    def __init__(self, client: redis.Redis, sentinels: Sequence[redis.Redis] = ()) -> None:
        self._client = client
        self._sentinels = sentinels

    def node(self, key: bytes) -> str:
        """There is one server at a time."""
        return ""

    def send(self, key: bytes, *commands: Command) -> Replies:
        """Send commands over one connection, in one write."""
        pool = self._client.connection_pool
        try:
            connection = pool.get_connection()
        except FOREIGN as error:
            raise translated(error, key, in_doubt=False) from error
        try:
            connection.send_packed_command(connection.pack_commands(commands))
            return [_read(connection) for _ in commands]
        except BaseException as error:
            connection.disconnect()  # with a reply outstanding it would serve it to somebody else
            if isinstance(error, FOREIGN):
                raise translated(error, key, in_doubt=True) from error
            raise
        finally:
            pool.release(connection)

    def close(self) -> None:
        """Close the client and its connections."""
        for client in (self._client, *self._sentinels):
            client.close()
            client.connection_pool.disconnect()


def _read(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except ResponseError as error:
        return error


class ClusterChannel:
    """``redis.RedisCluster``; naming the node keeps redis-py from repeating, and leaves it MOVED and ASK.

    :param connect: gives the client when it is first needed: making one asks the servers already.
    """

    def __init__(self, connect: Callable[[], redis.RedisCluster]) -> None:
        self._connect = connect
        self._connected: redis.RedisCluster | None = None
        self._lock = threading.Lock()

    def _client(self) -> redis.RedisCluster:
        with self._lock:
            if self._connected is None:
                self._connected = self._connect()
            return self._connected

    def node(self, key: bytes) -> str:
        """The name of the node that serves the key's slot, as far as the client knows."""
        try:
            node = self._client().get_node_from_key(key)
        except FOREIGN as error:
            raise translated(error, key, in_doubt=False) from error
        return "" if node is None else str(node.name)

    def send(self, key: bytes, *commands: Command) -> Replies:
        """Send commands one by one."""
        try:
            client = self._client()
            node = client.get_node_from_key(key)
        except FOREIGN as error:
            raise translated(error, key, in_doubt=False) from error
        replies: Replies = []
        for command in commands:
            try:
                replies.append(client.execute_command(*command, target_nodes=node, **RAW))
            except ResponseError as error:
                replies.append(error)
            except FOREIGN as error:
                raise translated(error, key, in_doubt=True) from error
        return replies

    def close(self) -> None:
        """Close the client, if it was ever made."""
        if self._connected is not None:
            self._connected.close()
