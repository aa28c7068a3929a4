"""Asyncio commands to one server: all tasks share one connection to it (:mod:`.shared_connection`).

That connection does not belong to the client's pool, which stays as the caller left it; it is made as the pool makes
its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import redis.asyncio

from ratelimit.stores.redis.channel import Command, Replies
from ratelimit.stores.redis.circuit import Circuit, CircuitBreaker, CircuitStatus
from ratelimit.stores.redis.clients import async_keys_of, server_of
from ratelimit.stores.redis.connecting import limit_retries
from ratelimit.stores.redis.shared_connection import SharedConnection


class AsyncPoolChannel:
    """The connection of a ``redis.asyncio.Redis``: to a single server, or to the master that Sentinel names.

    :param sentinels: clients that belong to this one.
    :param owned: whether closing closes the clients as well.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        sentinels: Sequence[redis.asyncio.Redis] = (),
        *,
        breaker: CircuitBreaker | None = None,
        owned: bool = False,
    ) -> None:
        self.spans_nodes = False
        self._clients = (client, *sentinels)
        self._owned = owned
        self._connection = SharedConnection(self._make_connection, Circuit(breaker))
        self.post = self._connection.post

    def node(self, key: bytes) -> str:
        """Return an empty name: there is one server at a time."""
        return ""

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Awaitable[Replies]:
        """Send commands in one write; to be awaited for their replies."""
        return self._connection.send(key, commands, deadline)

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the state of the one circuit."""
        return {"": self._connection.circuit.status()}

    @property
    def server(self) -> str:
        """See :attr:`Channel.server`."""
        return server_of(self._clients[0].connection_pool)

    async def keys(self, prefix: bytes) -> list[bytes]:
        """See :meth:`Channel.keys`."""
        try:
            return await async_keys_of(self._clients[0], prefix)
        finally:
            if self._owned:
                # The connections belong to this event loop, and the next caller may be in another.
                for client in self._clients:
                    await client.connection_pool.disconnect()

    async def close(self) -> None:
        """Close the connections, and the client where it is owned."""
        self._connection.close()
        if self._owned:
            for client in self._clients:
                await client.aclose()
                await client.connection_pool.disconnect()
        # A transport closes its socket one turn of the loop later.
        await asyncio.sleep(0)

    def _make_connection(self) -> Any:
        client, *sentinels = self._clients
        limit_retries(client.connection_pool)
        connection = client.connection_pool.make_connection()
        if sentinels:
            connection.register_connect_callback(self._leave_sentinels)
        return connection

    async def _leave_sentinels(self, _connection: Any) -> None:
        """Close the connections to the sentinels once these have named the master.

        The connections belong to this event loop, and the next one that asks may be another.
        """
        for sentinel in self._clients[1:]:
            await sentinel.connection_pool.disconnect()
