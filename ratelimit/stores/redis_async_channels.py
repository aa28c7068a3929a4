"""How commands reach a server in asyncio code: over one connection to each server, which all tasks share.

They are sent once, as :mod:`ratelimit.stores.redis_channels` says why. The connections are none of the client's pool,
which stays as the caller left it, but made as the pool makes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import redis.asyncio
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError, TryAgainError

from ratelimit.errors import StoreError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.circuit import Circuit, CircuitBreaker, CircuitStatus
from ratelimit.stores.connecting import limit_retries
from ratelimit.stores.multiplexer import Multiplexer
from ratelimit.stores.redis_channels import Command, Replies, check_time_left, options_of
from ratelimit.stores.redis_errors import FOREIGN, translated

T = TypeVar("T")

_NOT_HERE: Final = (MovedError, AskError, TryAgainError)
"""What a node answers that has not done what it was asked for; redis-py knows whom to ask instead."""


class AsyncPoolChannel:
    """``redis.asyncio.Redis``: a single server, or the master that Sentinel names.

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
        self._multiplexer = Multiplexer(self._make_connection, Circuit(breaker))

    def node(self, key: bytes) -> str:
        """There is one server at a time."""
        return ""

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Awaitable[Replies]:
        """Send commands in one write."""
        return self._multiplexer.send(key, commands, deadline)

    def circuits(self) -> dict[str, CircuitStatus]:
        """There is one."""
        return {"": self._multiplexer.circuit.status()}

    def _make_connection(self) -> Any:
        client, *sentinels = self._clients
        limit_retries(client.connection_pool)
        connection = client.connection_pool.make_connection()
        if sentinels:
            connection.register_connect_callback(self._leave_sentinels)
        return connection

    async def _leave_sentinels(self, _connection: Any) -> None:
        """They have named the master; their connections belong to this event loop, and the next may be another."""
        for sentinel in self._clients[1:]:
            await sentinel.connection_pool.disconnect()

    async def close(self) -> None:
        """Close the connections, and the client where it is owned."""
        self._multiplexer.close()
        if self._owned:
            for client in self._clients:
                await client.aclose()
                await client.connection_pool.disconnect()
        await asyncio.sleep(0)  # a transport closes its socket one turn of the loop later


class AsyncClusterChannel:
    """``redis.asyncio.RedisCluster``, which says what node has a key, and follows redirections.

    Naming the node keeps redis-py from repeating, and leaves it MOVED and ASK. What a node refused, redis-py asks for
    again, and so it learns what has moved. Of nodes that are gone, and of a cluster that is down, it learns by asking
    in vain, so that it is given the next command for a node that has failed. It gets one command at a time: when it
    renews its table it closes its connections, whoever uses them.

    :param owned: whether closing closes the client as well.
    """

    def __init__(
        self, client: redis.asyncio.RedisCluster, *, breaker: CircuitBreaker | None = None, owned: bool = False
    ) -> None:
        self.spans_nodes = True
        self._client = client
        self._owned = owned
        self._circuits: defaultdict[str, Circuit] = defaultdict(lambda: Circuit(breaker))
        self._multiplexers: dict[str, Multiplexer] = {}
        self._failed: set[str] = set()
        self._renewing: asyncio.Task[None] | None = None
        self._working: set[asyncio.Task[Any]] = set()  # what the client is doing
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turn = asyncio.Lock()
        fork_safety.call_in_child(self._forget)

    def _forget(self) -> None:
        """Let go of what belongs to the parent, and to a loop of it, in a forked process."""
        self._loop = self._renewing = None
        fork_safety.leave(self._multiplexers, self._working)
        self._multiplexers, self._working = {}, set()
        for node in self._known_nodes():  # a sync client compares process ids by itself
            fork_safety.leave(node._connections, node._free)  # noqa: SLF001
            node._connections, node._free = [], deque(maxlen=node.max_connections)  # noqa: SLF001

    def node(self, key: bytes) -> str:
        """The name of the node that serves the key's slot; empty before the cluster is known."""
        try:
            node = self._node(key)
        except FOREIGN:
            return ""
        return "" if node is None else str(node.name)

    def _node(self, key: bytes) -> Any:
        return self._client.get_node_from_key(key)  # type: ignore[arg-type]  # takes bytes as well

    async def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Replies:
        """Send commands to the node of the key in one write, and again one by one what it refuses as not its own."""
        check_time_left(key, deadline)
        if self._loop is not asyncio.get_running_loop():
            await self._enter_loop()
        try:
            if getattr(self._client, "_initialize", True):
                await self._within(deadline, self._initialize(key, deadline))
            node = self._node(key)
        except FOREIGN as error:
            raise translated(error, key, in_doubt=False) from error
        if node.name in self._failed:
            self._failed.discard(node.name)
            async with self._in_turn(key, deadline):
                return [await self._sent_by_client(key, node, command, deadline) for command in commands]
        replies = await self._sent(key, node, commands, deadline)
        for place, reply in enumerate(replies):
            if type(reply) is AskError:  # MovedError is one, too
                replies[place] = await self._asking(key, node, reply, commands[place], deadline)
            elif isinstance(reply, _NOT_HERE):
                replies[place] = await self._redirected(key, node, commands[place], deadline)
            elif isinstance(reply, ClusterDownError):
                self._failed.add(node.name)
        return replies

    async def _within(self, deadline: float | None, work: Coroutine[Any, Any, T]) -> T:
        """Await some work of the client until the deadline, and no longer: to be cancelled may take it a second.

        :raises TimeoutError: where it has not ended by then. It is being cancelled.
        """
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._ended)
        try:
            done, _ = await asyncio.wait((task,), timeout=None if deadline is None else deadline - monotonic())
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            raise TimeoutError
        return task.result()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._working.discard(task)
        if not task.cancelled():
            task.exception()  # who waited for it has heard of it

    async def _initialize(self, key: bytes, deadline: float | None) -> None:
        circuit = self._circuits[""]
        if circuit.is_open:
            circuit.admit(key, deadline)
        try:
            async with self._turn:
                await self._client.initialize()
        except FOREIGN as error:
            circuit.failed(error)
            raise
        except asyncio.CancelledError:
            if deadline is not None and monotonic() >= deadline:  # else it is the caller who was cancelled
                circuit.failed(TimeoutError("the cluster did not answer in time"))
            raise
        circuit.succeeded()

    async def _sent(
        self, key: bytes, node: ClusterNode, commands: Sequence[Command], deadline: float | None
    ) -> Replies:
        multiplexer = self._multiplexers.get(node.name)
        if multiplexer is None:
            multiplexer = Multiplexer(lambda: _connection_to(node), self._circuits[node.name])
            self._multiplexers[node.name] = multiplexer
        try:
            return await multiplexer.send(key, commands, deadline)
        except StoreError:
            self._failed.add(node.name)
            raise

    async def _redirected(self, key: bytes, asked: ClusterNode, command: Command, deadline: float | None) -> Any:
        async with self._in_turn(key, deadline):
            node = self._node(key)
            if node.name == asked.name:
                reply = await self._sent_by_client(key, node, command, deadline)
                self._leave_nodes_that_left()
                return reply
        (reply,) = await self._sent(key, node, (command,), deadline)  # as another one was told meanwhile
        return await self._redirected(key, node, command, deadline) if isinstance(reply, _NOT_HERE) else reply

    async def _asking(
        self, key: bytes, asked: ClusterNode, error: AskError, command: Command, deadline: float | None
    ) -> Any:
        """Ask another node, for this once: in one write, as redis-py may send the two over different connections."""
        node = self._client.get_node(host=error.host, port=error.port)
        if node is not None:
            _, reply = await self._sent(key, node, (("ASKING",), command), deadline)
            if not isinstance(reply, _NOT_HERE):
                return reply
        return await self._redirected(key, asked, command, deadline)

    async def _sent_by_client(self, key: bytes, node: ClusterNode, command: Command, deadline: float | None) -> Any:
        circuit = self._circuits[node.name]
        if circuit.is_open:
            circuit.admit(key, deadline)
        asking: Any = self._client.execute_command(*command, target_nodes=node, **options_of(command))
        try:
            reply = await self._within(deadline, asking)
        except ResponseError as error:
            reply = error
        except FOREIGN as error:
            self._failed.add(node.name)
            circuit.failed(error)
            if type(error) is TimeoutError and (self._renewing is None or self._renewing.done()):
                self._renewing = asyncio.create_task(self._renew(node.name))
            raise translated(error, key, in_doubt=True) from error
        circuit.succeeded()
        return reply

    async def _renew(self, failed: str) -> None:
        """Learn who serves what, beside the decisions: a deadline that cuts redis-py short keeps it from learning."""
        with contextlib.suppress(*FOREIGN):
            async with self._turn:
                initialize: Any = self._client.nodes_manager.initialize
                knows_failures = "last_failed_node_name" in inspect.signature(initialize).parameters
                await initialize(**({"last_failed_node_name": failed} if knows_failures else {}))
                self._leave_nodes_that_left()

    @asynccontextmanager
    async def _in_turn(self, key: bytes, deadline: float | None) -> AsyncGenerator[None]:
        turn = self._turn
        try:
            async with _until(deadline):
                await turn.acquire()
        except TimeoutError as error:
            raise translated(error, key, in_doubt=False) from error
        try:
            yield
        finally:
            turn.release()

    def circuits(self) -> dict[str, CircuitStatus]:
        """One for each node that has been asked, and one without a name, for when no node was known."""
        return {name: circuit.status() for name, circuit in self._circuits.items()}

    def _leave_nodes_that_left(self) -> None:
        present = {node.name for node in self._client.get_nodes()}
        for name in self._multiplexers.keys() - present:
            self._multiplexers.pop(name).close()
        self._failed &= present

    def _known_nodes(self) -> list[Any]:
        return [*self._client.get_nodes(), *self._client.nodes_manager.startup_nodes.values()]

    async def _enter_loop(self) -> None:
        before, self._loop = self._loop, asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        if before is not None and before.is_closed():
            async with self._turn:  # or it would close what others of this loop have opened meanwhile
                for node in self._known_nodes():
                    with contextlib.suppress(RuntimeError):  # for the loop is closed that its connections belonged to
                        await node.disconnect()

    async def close(self) -> None:
        """Close the connections, and the client where it is owned."""
        for multiplexer in self._multiplexers.values():
            multiplexer.close()
        self._multiplexers.clear()
        ending = [task for task in self._working if task.cancelling()]
        if ending and self._loop is asyncio.get_running_loop():
            await asyncio.wait(ending)
        if self._owned:
            await self._client.aclose()
        await asyncio.sleep(0)  # a transport closes its socket one turn of the loop later


def _until(deadline: float | None) -> asyncio.Timeout:
    """Cancel what is awaited in it at the deadline, and raise ``TimeoutError`` then."""
    return asyncio.timeout(None if deadline is None else deadline - monotonic())


def _connection_to(node: ClusterNode) -> Any:
    """A connection as the node itself makes them: retries are for the cluster, which may have left that node."""
    options: dict[str, Any] = {**node.connection_kwargs, "retry": Retry(NoBackoff(), 0)}
    return node.connection_class(**options)
