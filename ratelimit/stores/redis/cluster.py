"""Sync commands to a cluster: each goes to the node that serves its key, over that node's own pool of connections.

redis-py connects to the cluster and reads the table that says which node serves which slot
(:mod:`~ratelimit.stores.redis.cluster_table`). What is known here of each node: the connections that are kept, and the
circuit. The table is read again before the next command for a node that has failed, because another node may serve its
slots by then. Only one thread at a time connects or reads the table, and it goes on where its caller gives up waiting:
later callers find the table ready.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import redis
from redis import exceptions
from redis.cluster import ClusterNode

from ratelimit.errors import StoreError
from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import run
from ratelimit.stores.redis.channel import Command, NodeReplies, Replies
from ratelimit.stores.redis.circuit import Circuit, CircuitBreaker, CircuitStatus
from ratelimit.stores.redis.clients import keys_of
from ratelimit.stores.redis.cluster_table import REDIRECTIONS, ClusterTable, follow
from ratelimit.stores.redis.deadlines import within
from ratelimit.stores.redis.errors import EXPECTED, client_errors, translated
from ratelimit.stores.redis.kept_connections import KeptConnections
from ratelimit.stores.redis.pool import most_kept, send_over, send_under


class ClusterChannel:
    """The connections of a ``redis.RedisCluster``.

    :param connect: returns the client; called when it is first needed, because making a client asks the servers.
    :param given: hosts and ports by which the cluster is found; empty: those of the client.
    :param server: where the cluster is, for logs.
    :param owned: whether closing closes the client as well.
    """

    def __init__(
        self,
        connect: Callable[[], redis.RedisCluster],
        given: Sequence[tuple[str, int]] = (),
        *,
        server: str,
        breaker: CircuitBreaker | None = None,
        owned: bool = False,
    ) -> None:
        self.post = None
        self.spans_nodes = True
        self.server = server
        self._connect = connect
        self._given = given
        self._owned = owned
        self._table: ClusterTable | None = None
        self._connections: dict[str, KeptConnections] = {}
        self._circuits: defaultdict[str, Circuit] = defaultdict(lambda: Circuit(breaker))
        # How often this was closed, and how often the table was read.
        self._closed = 0
        self._readings = 0
        self._connecting = fork_safety.lock()
        self._reading = fork_safety.lock()
        fork_safety.call_in_child(self._forget)

    def node(self, key: bytes) -> str:
        """Return the name of the node that serves a key's slot; empty where the client does not know it."""
        fork_safety.check()
        node = None if self._table is None else self._table.node_of(key)
        return "" if node is None else str(node.name)

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> NodeReplies:
        """Send commands to the node of a key in one write, and those that it redirects to other nodes one by one."""
        node = None if self._table is None else self._table.node_of(key)
        name = "" if node is None else node.name
        try:
            replies: NodeReplies = send_under(  # type: ignore[assignment]
                self._circuits[name], partial(self._send, node), key, commands, deadline
            )
        except StoreError:
            self._suspect(name)
            raise
        for place, reply in enumerate(replies):
            if isinstance(reply, exceptions.ResponseError):
                replies[place] = self._followed(key, commands[place], replies.node, reply, deadline)
        return replies

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the state of the circuit of each node that was asked; an empty name stands for no known node."""
        return {name: circuit.status() for name, circuit in list(self._circuits.items())}

    def keys(self, prefix: bytes) -> list[bytes]:
        """See :meth:`Channel.keys`."""
        try:
            table = self._connected(None)
        except Exception as error:
            raise translated(error, prefix, in_doubt=False) from error
        return keys_of(table.client, prefix)

    def close(self) -> None:
        """Give all connections back to their pools, and close the client where it is owned and was made."""
        fork_safety.check()
        for connections in list(self._connections.values()):
            connections.close()
        self._closed += 1
        if self._owned and self._table is not None:
            self._table.client.close()

    # Sending to one node

    def _send(
        self, node: Any, key: bytes, commands: Sequence[Command], deadline: float | None, now: float
    ) -> NodeReplies:
        """Send commands to the node of a key, after connecting or reading the table where that is due.

        :param node: the node by the present table; None where the table has no node for the key.
        """
        try:
            table = self._table
            if table is None or node is None or node.name in table.stale:
                table = self._connected(deadline)
                node = self._found(table, node, key, deadline)
                now = monotonic()
            connections = self._connections_to(table, node)
        except EXPECTED as error:
            raise translated(error, key, in_doubt=False) from error
        return NodeReplies(send_over(connections, key, commands, deadline, now), node)

    def _followed(
        self, key: bytes, command: Command, asked: Any, reply: exceptions.ResponseError, deadline: float | None
    ) -> Any:
        """Return the reply to a command in whose place a node has sent an error.

        A redirection is followed; any other error is itself the reply.
        """
        table = self._connected(deadline)
        if isinstance(reply, REDIRECTIONS):
            return run(follow(table, self._sent, threads.sleep, key, command, asked, reply, deadline))
        if isinstance(reply, exceptions.ClusterDownError):
            table.stale.add(asked.name)
        return reply

    def _sent(self, node: Any, key: bytes, commands: Sequence[Command], deadline: float | None) -> Replies:
        """Send commands to a node that another one has named."""
        try:
            connections = self._connections_to(self._connected(deadline), node)
        except EXPECTED as error:
            raise translated(error, key, in_doubt=False) from error
        try:
            return send_under(self._circuits[node.name], partial(send_over, connections), key, commands, deadline)
        except StoreError:
            self._suspect(node.name)
            raise

    def _suspect(self, name: str) -> None:
        """Note that another node may be in the place of one that has failed, unless only the caller had no time."""
        if self._table is not None and name and self._circuits[name].failures:
            self._table.stale.add(name)

    def _connections_to(self, table: ClusterTable, node: Any) -> KeptConnections:
        with client_errors():
            pool = table.client.get_redis_connection(node).connection_pool
        connections = self._connections.get(node.name)
        if connections is None or connections.pool is not pool:
            connections = KeptConnections(pool, most_kept(pool, owned=self._owned))
            self._connections[node.name] = connections
        return connections

    # Connecting, and reading the table

    def _connected(self, deadline: float | None) -> ClusterTable:
        if self._table is not None:
            return self._table
        late = partial(self._take_back, self._closed)
        table: ClusterTable = within(deadline, partial(self._connect_once, deadline), late=late)
        return table

    def _connect_once(self, deadline: float | None) -> ClusterTable:
        with threads.taken(self._connecting), client_errors():
            if self._table is None:
                if deadline is not None and monotonic() >= deadline:
                    # The caller has given up. Those that come next connect with a deadline of their own.
                    raise TimeoutError
                self._table = ClusterTable(self._connect(), ClusterNode, self._given)
            return self._table

    def _take_back(self, closed: int, table: ClusterTable) -> None:
        """Close a client that is ready after the store was closed; otherwise keep it for later callers."""
        if self._owned and closed != self._closed:
            table.client.close()

    def _found(self, table: ClusterTable, stale: Any, key: bytes, deadline: float | None) -> Any:
        """Return the node of a key, after reading the table again where that is due.

        :param stale: the node that is no longer trusted; None where there is none.
        """
        node = table.node_of(key)
        if node is None or node.name in table.stale:
            failed = "" if stale is None else stale.name
            within(deadline, partial(self._read_once, table, failed, self._readings, deadline))
            node = table.serving(key)
        return node

    def _read_once(self, table: ClusterTable, failed: str, readings: int, deadline: float | None) -> None:
        """Read the table again, unless another thread has read it meanwhile.

        :param failed: the name of a node that is asked last; it may be empty.
        :param readings: how often the table had been read when the caller looked at it.
        """
        with threads.taken(self._reading), client_errors():
            if readings == self._readings:
                if deadline is not None and monotonic() >= deadline:
                    # The caller has given up. Those that come next read with a deadline of their own.
                    raise TimeoutError
                stale = set(table.stale)
                table.reading(failed)
                table.stale.difference_update(stale)
                self._readings += 1
                self._leave_nodes_that_left(table)

    def _leave_nodes_that_left(self, table: ClusterTable) -> None:
        """Close the connections to nodes that are no longer in the table."""
        present = {node.name for node in table.client.get_nodes()}
        for name in set(self._connections) - present:
            with contextlib.suppress(*EXPECTED):
                self._connections.pop(name).close()
        table.stale.intersection_update(present)

    def _forget(self) -> None:
        """Connect again in a forked process, where locks of the parent's client may be locked.

        The client of a caller is kept, as there is no way to make another one.
        """
        if self._owned:
            fork_safety.leave(self._table)
            self._table = None
