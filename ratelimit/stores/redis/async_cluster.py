"""Asyncio commands to a cluster: all tasks share one connection to each node.

redis-py connects to the cluster and reads the table that says which node serves which slot
(:mod:`~ratelimit.stores.redis.cluster_table`). The table is read, for the first time and again, by one task at a time,
which goes on where its caller has no time to wait for it: a later command finds the table ready.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import redis.asyncio
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError

from ratelimit.errors import StoreError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import arun
from ratelimit.stores.redis.channel import Command, NodeReplies, Replies, check_time_left
from ratelimit.stores.redis.circuit import Circuit, CircuitBreaker, CircuitStatus
from ratelimit.stores.redis.clients import async_keys_of, cluster_of
from ratelimit.stores.redis.cluster_table import REDIRECTIONS, ClusterTable, follow
from ratelimit.stores.redis.errors import translated
from ratelimit.stores.redis.shared_connection import SharedConnection


class AsyncClusterChannel:
    """The connections of a ``redis.asyncio.RedisCluster``.

    :param given: hosts and ports by which the cluster is found; empty: those of the client.
    :param owned: whether closing closes the client as well.
    """

    def __init__(
        self,
        client: redis.asyncio.RedisCluster,
        given: Sequence[tuple[str, int]] = (),
        *,
        breaker: CircuitBreaker | None = None,
        owned: bool = False,
    ) -> None:
        self.post = None
        self.spans_nodes = True
        self._client = client
        self._owned = owned
        self._table = ClusterTable(client, partial(ClusterNode, **client.nodes_manager.connection_kwargs), given)
        self._circuits: defaultdict[str, Circuit] = defaultdict(lambda: Circuit(breaker))
        self._connections: dict[str, SharedConnection] = {}
        self._reading: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        fork_safety.call_in_child(self._forget)

    def node(self, key: bytes) -> str:
        """Return the name of the node that serves a key's slot; empty before the cluster is known."""
        node = self._table.node_of(key)
        return "" if node is None else str(node.name)

    async def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> NodeReplies:
        """Send commands to the node of a key in one write, and those that it redirects to other nodes one by one."""
        check_time_left(key, deadline)
        if self._loop is not asyncio.get_running_loop():
            self._enter_loop()
        known = None if getattr(self._client, "_initialize", True) else self._table.node_of(key)
        is_stale = known is None or known.name in self._table.stale
        node = await self._found(key, known, deadline) if is_stale else known
        replies = NodeReplies(await self._sent(node, key, commands, deadline, admitted=is_stale), node)
        for place, reply in enumerate(replies):
            if isinstance(reply, REDIRECTIONS):
                steps = follow(self._table, self._sent, asyncio.sleep, key, commands[place], node, reply, deadline)
                replies[place] = await arun(steps)
            elif isinstance(reply, ClusterDownError):
                self._table.stale.add(replies.node.name)
        return replies

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the state of the circuit of each node that was asked; an empty name stands for no known node."""
        return {name: circuit.status() for name, circuit in self._circuits.items()}

    @property
    def server(self) -> str:
        """See :attr:`Channel.server`."""
        return cluster_of(self._client)

    async def keys(self, prefix: bytes) -> list[bytes]:
        """See :meth:`Channel.keys`."""
        if self._loop is not asyncio.get_running_loop():
            self._enter_loop()
        if self._reading is not None:
            await asyncio.wait((self._reading,))
        return await async_keys_of(self._client, prefix)

    async def close(self) -> None:
        """Close the connections, and the client where it is owned."""
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        if self._reading is not None and self._loop is asyncio.get_running_loop() and not self._reading.done():
            self._reading.cancel()
            await asyncio.wait((self._reading,))
        if self._owned:
            await self._client.aclose()
        # A transport closes its socket one turn of the loop later.
        await asyncio.sleep(0)

    # Sending to one node

    async def _sent(
        self,
        node: Any,
        key: bytes,
        commands: Sequence[Command],
        deadline: float | None,
        *,
        admitted: bool = False,
    ) -> Replies:
        connection = self._connections.get(node.name)
        if connection is None:
            connection = SharedConnection(lambda: _connection_to(node), self._circuits[node.name])
            self._connections[node.name] = connection
        try:
            return await connection.send(key, commands, deadline, admitted=admitted)
        except StoreError:
            if connection.circuit.failures:
                self._table.stale.add(node.name)
            raise

    # Reading the table

    async def _found(self, key: bytes, stale: Any, deadline: float | None) -> Any:
        """Read the table again, and return the node that serves a key.

        :param stale: the node by the present table, which has failed; None where there is none.
        """
        name = "" if stale is None else stale.name
        circuit = self._circuits[name]
        if circuit.is_open:
            circuit.admit(key, deadline)
        try:
            await self._read_again(name, deadline)
            node = self._table.serving(key)
        except Exception as error:
            circuit.failed(error)
            raise translated(error, key, in_doubt=False) from error
        if stale is None:
            circuit.succeeded()
        return node

    async def _read_again(self, failed: str, deadline: float | None) -> None:
        """Wait until the table was read again, or until the deadline."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(failed))
            self._reading.add_done_callback(_forget_error)
        reading = self._reading
        await asyncio.wait((reading,), timeout=None if deadline is None else deadline - monotonic())
        if not reading.done():
            raise TimeoutError("the cluster did not answer in time")
        if reading.cancelled():
            raise ConnectionError("the store was closed")
        reading.result()

    async def _read(self, failed: str) -> None:
        stale = set(self._table.stale)
        await self._table.reading(failed)
        self._table.stale.difference_update(stale)
        self._leave_nodes_that_left()

    def _leave_nodes_that_left(self) -> None:
        """Close the connections to nodes that are no longer in the table."""
        present = {node.name for node in self._client.get_nodes()}
        for name in self._connections.keys() - present:
            self._connections.pop(name).retire()
        self._table.stale.intersection_update(present)

    # Changing the event loop, or the process

    def _enter_loop(self) -> None:
        before, self._loop = self._loop, asyncio.get_running_loop()
        self._reading = None
        if before is not None and before.is_closed():
            # This runs beside the decisions; a decision that needs the table waits for it.
            self._reading = asyncio.create_task(self._leave_loop())
            self._reading.add_done_callback(_forget_error)

    async def _leave_loop(self) -> None:
        """Close the connections that belong to a loop that is closed, and read the table over new ones."""
        for node in self._known_nodes():
            # Disconnecting may fail where the loop is closed, because it uses that loop.
            with contextlib.suppress(RuntimeError):
                await node.disconnect()
        await self._read("")

    def _forget(self) -> None:
        """Let go, in a forked process, of what belongs to the parent and to its event loop."""
        fork_safety.leave(self._connections, self._reading)
        self._loop = self._reading = None
        self._connections = {}
        # A sync client compares process ids by itself.
        for node in self._known_nodes():
            fork_safety.leave(node._connections, node._free)  # noqa: SLF001
            node._connections, node._free = [], deque(maxlen=node.max_connections)  # noqa: SLF001

    def _known_nodes(self) -> list[Any]:
        return [*self._client.get_nodes(), *self._client.nodes_manager.startup_nodes.values()]


def _forget_error(task: asyncio.Task[None]) -> None:
    """Keep asyncio from reporting an error of a task; those that wait for the task, if any, raise the error."""
    if not task.cancelled():
        task.exception()


def _connection_to(node: ClusterNode) -> Any:
    """Return a connection as the node itself makes them, without retries, since the node may have left the cluster."""
    options: dict[str, Any] = {**node.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
    return node.connection_class(**options)
