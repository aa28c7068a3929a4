"""Sync commands to one server: over the client's own connections, and under a circuit.

A request passes through three layers, from the outside to the inside:

1. :meth:`PoolChannel.send` is what a store calls.
2. :func:`send_under` asks the circuit whether the server may be asked, and notes what the outcome says of the server.
3. :func:`send_over` takes a kept connection, sends the commands in one write, reads the replies, and gives the
   connection back, whatever comes in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import redis

from ratelimit.errors import StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.channel import Command, Replies, check_time_left, pack
from ratelimit.stores.redis.circuit import Circuit, CircuitBreaker, CircuitStatus
from ratelimit.stores.redis.clients import keys_of, server_of
from ratelimit.stores.redis.errors import EXPECTED, concerns_server, translated
from ratelimit.stores.redis.kept_connection import KeptConnection
from ratelimit.stores.redis.kept_connections import KeptConnections


class PoolChannel:
    """The connections of a ``redis.Redis``: to a single server, or to the master that Sentinel names.

    :param sentinels: clients that belong to this one.
    :param owned: whether closing closes the clients as well.
    :param monotonic: the clock of deadlines; for tests.
    """

    def __init__(
        self,
        client: redis.Redis,
        sentinels: Sequence[redis.Redis] = (),
        *,
        breaker: CircuitBreaker | None = None,
        owned: bool = False,
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        self.post = None
        self.spans_nodes = False
        self._clients = (client, *sentinels)
        self._owned = owned
        self._circuit = Circuit(breaker, monotonic)
        pool = client.connection_pool
        self._connections = KeptConnections(pool, most_kept(pool, owned=owned), monotonic)
        self._send = partial(send_over, self._connections)

    def node(self, key: bytes) -> str:
        """Return an empty name: there is one server at a time."""
        return ""

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Replies:
        """Send commands over one connection, in one write, and return their replies."""
        return send_under(self._circuit, self._send, key, commands, deadline)

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the state of the one circuit."""
        return {"": self._circuit.status()}

    @property
    def server(self) -> str:
        """See :attr:`Channel.server`."""
        return server_of(self._clients[0].connection_pool)

    def keys(self, prefix: bytes) -> list[bytes]:
        """See :meth:`Channel.keys`."""
        return keys_of(self._clients[0], prefix)

    def close(self) -> None:
        """Give all connections back to the pool, and close the client where it is owned."""
        self._connections.close()
        if self._owned:
            for client in self._clients:
                client.close()
                client.connection_pool.disconnect()


def most_kept(pool: Any, *, owned: bool) -> float:
    """Return how many connections of a pool are kept: at most half where the caller uses the pool as well."""
    return float("inf") if owned else pool.max_connections // 2


def send_under(
    circuit: Circuit,
    send: Callable[[bytes, Sequence[Command], float | None, float], Replies],
    key: bytes,
    commands: Sequence[Command],
    deadline: float | None,
) -> Replies:
    """Send commands if the circuit admits them, and let it know what the outcome says of the server."""
    begun = check_time_left(key, deadline, circuit.monotonic)
    if circuit.is_open:
        circuit.admit(key, deadline)
    try:
        replies = send(key, commands, deadline, begun)
    except (StoreUnavailableError, StoreTimeoutError) as error:
        if concerns_server(error) and not circuit.excuses(error, begun):
            circuit.failed(error)
        raise
    except StoreError:
        # The server has answered.
        circuit.succeeded()
        raise
    except EXPECTED as error:
        # It came from giving back a connection, where nothing else translates it.
        ours = translated(error, key, in_doubt=True)
        circuit.failed(ours)
        raise ours from error
    except BaseException:
        # The caller was interrupted, which says nothing of the server.
        if circuit.is_open:
            circuit.left()
        raise
    circuit.heard_at = begun
    if circuit.failures:
        circuit.succeeded()
    return replies


def send_over(
    connections: KeptConnections, key: bytes, commands: Sequence[Command], deadline: float | None, now: float
) -> Replies:
    """Send commands over one connection, in one write, and return their replies.

    :param now: a reading of the deadline's clock that was taken a moment ago.
    """
    kept: KeptConnection | None = None
    try:
        try:
            kept = connections.take(now, deadline)
        except EXPECTED as error:
            raise translated(error, key, in_doubt=False) from error
        if kept.taken_at >= now:
            # The connection is new. Connecting may have taken all the time that there was.
            try:
                now = check_time_left(key, deadline, connections.monotonic)
            except StoreTimeoutError:
                connections.give_back(kept)
                raise
        # Unless all replies were read, the next request would read those that are outstanding.
        broken = True
        try:
            replies = kept.request(pack(commands), len(commands), deadline, now)
            broken = kept.outdated
        except EXPECTED as error:
            raise translated(error, key, in_doubt=True) from error
        finally:
            connections.give_back(kept, broken=broken)
    except StoreError:
        raise
    except BaseException as error:
        # Whatever handles an interruption may keep it, with its traceback the frames, and in them the connection.
        kept = error.__traceback__ = None
        raise
    return replies
