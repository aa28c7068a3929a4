"""How commands reach a server: one way for a client with a connection pool, one for a cluster; sync and asyncio.

A client's own ``execute_command`` sends a command again when its reply was lost, without a word. A compare-and-swap
that is repeated unknowingly takes its own success for somebody else's, so that the commands here are sent once, over
the client's own connections; connecting is left to redis-py with all its settings. A lost reply is reported as such
(``in_doubt``), and repeating is up to the caller, who knows what to look for.
"""

from __future__ import annotations

import _socket
import contextlib
import math
import os
import socket
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeGuard

import hiredis
import redis
from redis import exceptions
from redis._parsers import _HiredisParser
from redis._parsers.hiredis import NOT_ENOUGH_DATA
from redis.cluster import ClusterNode

from ratelimit.errors import StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import run
from ratelimit.stores.redis.circuit import Circuit, CircuitBreaker, CircuitStatus
from ratelimit.stores.redis.clients import keys_of, server_of
from ratelimit.stores.redis.cluster_table import REDIRECTIONS, ClusterTable, follow
from ratelimit.stores.redis.connecting import CONNECTS_ONCE, limit_retries, shorten_timeouts
from ratelimit.stores.redis.deadlines import within
from ratelimit.stores.redis.errors import EXPECTED, UnexpectedError, client_errors, tells_of_server, translated

Command = tuple[bytes, ...]
"""A command and its arguments, as they are sent: :func:`pack` says why they are nothing else."""
Replies = list[Any]
"""One reply for each command, in order: as the server sent it, undecoded, or the ``ResponseError`` that it sent."""


class NodeReplies(Replies):
    """Replies of a cluster.

    :ivar node: the node of redis-py that was asked. Where it has redirected a command, the reply is another node's; but
        commands without a key, as ``TIME``, are never redirected.
    """

    __slots__ = ("node",)

    def __init__(self, replies: Replies, node: Any) -> None:
        super().__init__(replies)
        self.node = node


class Channel(Protocol):
    """The connections of a client.

    :ivar spans_nodes: whether different keys may be on different servers.
    """

    spans_nodes: bool

    def node(self, key: bytes) -> str:
        """The name of the server that holds this key; two servers have two clocks."""
        ...

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Any:
        """Send commands to the server of this key, in one round trip if it can be, and give their replies.

        :param deadline: on the clock of ``time.monotonic``; None: the timeouts of the client are all there is.
        """
        ...

    def circuits(self) -> dict[str, CircuitStatus]:
        """How the circuits to the servers are, by the names of the nodes."""
        ...

    @property
    def server(self) -> str:
        """Where the connections lead, for logs: without user and password."""
        ...

    def keys(self, prefix: bytes) -> Any:
        """List the keys that begin with a prefix, by way of the client."""
        ...

    def close(self) -> Any:
        """Close the connections, and the client where it is the store's own."""
        ...


class _Lease(weakref.ref["_Kept"]):
    """Says who has a connection of a pool: the :class:`_Kept` that it refers to; when that is gone, nobody.

    :ivar whole: whether the pool may give the connection to others as it is.
    """

    __slots__ = ("connection", "whole")

    connection: Any
    whole: bool


class _KeptConnections:
    """Connections of a pool that are kept from one request to the next.

    To take a connection from redis-py's pool and to give it back costs as much as the request. The pool does what a
    connection needs, though (connect, renew credentials, find the master again), so that a connection is kept for a
    second at most, and goes back at once where somebody waits for the pool and it is empty. The order of the list makes
    threads reuse what was used last.

    The handler of a signal may raise between any two steps of a caller, also in a ``finally``, and so may an exception
    that is set on its thread. No connection is lost by that, because none is held by a step:

    - Only threads of the store's own ask the pool, and give back to it
      (:func:`~ratelimit.stores.redis.deadlines.within`).
      An interruption inside redis-py's pool would lose a connection, or leave its lock locked.
    - ``_out`` has a lease for each connection that is not in the pool, whatever a caller does with it. A caller who
      is done says so in ``_ended``. One who is interrupted says nothing, but drops the ``_Kept``; then the interpreter
      itself appends the lease. Either is one step. The next thread that asks the pool gives back what has ended, first.
    - A connection is given back as it is where its caller has said that it is whole, and closed otherwise: a reply that
      is outstanding would be read by somebody else.
    """

    def __init__(self, pool: Any, most: float) -> None:
        self.pool = pool
        self._most = most
        self._process_id = os.getpid()
        self._kept: list[_Kept] = []
        self._out: set[_Lease] = set()
        self._ended: list[_Lease] = []
        self._connecting = 0  # threads that ask the pool; some were left by those who waited for them
        self._closed = 0  # how often
        self._lock = fork_safety.lock()  # taken by the store's own threads only
        fork_safety.call_in_child(self.forget)

    def take(self, now: float, deadline: float | None) -> _Kept:
        """A connection that is ready for a request."""
        try:
            kept = self._kept.pop()
        except IndexError:
            return self._from_pool(deadline)
        if kept.is_usable(now):
            return kept
        self._end(kept)
        self._end_old(now)
        return self._from_pool(deadline)

    def give_back(self, kept: _Kept, *, broken: bool = False) -> None:
        """After the request; a broken connection may have a reply outstanding."""
        if broken or len(self._kept) >= self._most:
            self._end(kept, whole=not broken)
            self._release()
            return
        kept.used_at = monotonic()
        self._kept.append(kept)
        if self._connecting and _is_exhausted(self.pool):  # looked at last, as those who wait look here last
            self._end_all()
            threads.beside(self._release_ended)

    def clear(self) -> None:
        """Give all that is kept back to the pool."""
        self._end_all()
        if self._ended:
            self._release()

    def close(self) -> None:
        """As clear, at the end; connections that are being made for somebody are closed when they are there."""
        fork_safety.check()
        self._closed += 1
        self.clear()

    def __del__(self) -> None:
        try:
            # There may be no weak reference left by which forget was to be called.
            if self._process_id == os.getpid():
                self.clear()
        except Exception:  # noqa: BLE001, S110  # the interpreter may be about to end, and have no names any more
            pass

    def forget(self) -> None:
        """In a forked process these are the parent's; the pool notices that by itself."""
        self._process_id = os.getpid()
        self._kept, self._out, self._ended = [], set(), []
        self._connecting = 0

    def _end(self, kept: _Kept, *, whole: bool = True) -> None:
        """Let a connection go back, once the pool is asked or :meth:`_release` is called."""
        if whole:
            kept.restore()
            kept.lease.whole = True
        self._ended.append(kept.lease)

    def _end_all(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._end(self._kept.pop())

    def _end_old(self, now: float) -> None:
        """Let those go that were kept for long enough, and that a smaller crowd does not come to."""
        for kept in [kept for kept in self._kept if kept.is_old(now)]:
            with contextlib.suppress(ValueError):  # another thread has just taken it
                self._kept.remove(kept)
                self._end(kept)

    def _release(self) -> None:
        """Give back what has ended: others may ask for it as soon as the caller is answered."""
        threads.beside(self._release_ended, _LONGEST_RELEASE)

    def _from_pool(self, deadline: float | None) -> _Kept:
        if self._connecting >= _MOST_CONNECTING:
            raise exceptions.ConnectionError(f"No connection available, and {self._connecting} are waited for")
        try:
            work = partial(self._connect, deadline)
            late = partial(self._take_back, self._closed)
            kept: _Kept = within(deadline, work, late=late, at_end=self._connect_at_end)
        except TimeoutError as error:
            if isinstance(self.pool, redis.BlockingConnectionPool) and _is_exhausted(self.pool):
                raise exceptions.TimeoutError("No connection available") from error
            raise exceptions.TimeoutError("no connection by the deadline") from error
        return kept

    # What follows runs in threads of the store's own, or in greenlets.

    def _connect(self, deadline: float | None) -> _Kept:
        with self._lock:
            self._connecting += 1
        once = CONNECTS_ONCE.set(True)
        try:
            with client_errors():
                limit_retries(self.pool)
                self._await_room(deadline)
                return self._leased(self._connected())
        finally:
            CONNECTS_ONCE.reset(once)
            with self._lock:
                self._connecting -= 1

    def _await_room(self, deadline: float | None) -> None:
        """Give the pool what it can have back; wait where its queue would stop the greenlets that are to do so."""
        while True:
            self._release_ended()
            if not _is_exhausted(self.pool):  # else perhaps of what is kept here
                return
            self._end_all()
            self._release_ended()
            if not self._stops_greenlets():
                return
            if deadline is not None and monotonic() >= deadline:
                raise TimeoutError
            threads.pause()

    def _stops_greenlets(self) -> bool:
        """Return whether to ask the pool for a connection now would stop all greenlets."""
        return (
            isinstance(self.pool, redis.BlockingConnectionPool)
            and _is_exhausted(self.pool)
            and threads.block_greenlets()
        )

    def _connected(self) -> Any:
        try:
            return self.pool.get_connection()
        except exceptions.RedisError:
            raise
        except Exception:
            # It came in the midst of the handshake, from a credential provider perhaps: redis-py has put back an open
            # connection, which would be used without a password and in database 0.
            _disconnect_idle(self.pool)
            raise

    def _connect_at_end(self, deadline: float) -> _Kept:
        """Connect in this thread, with timeouts for each step.

        The shortened timeouts stay, because the process is about to end.
        """
        shorten_timeouts(self.pool, max(deadline - monotonic(), _SHORTEST))
        try:
            return self._connect(deadline)
        except UnexpectedError as error:
            # redis-py imports modules while it connects, which fails once the interpreter takes them apart.
            raise exceptions.ConnectionError("the interpreter is about to end") from error

    def _leased(self, connection: Any) -> _Kept:
        try:
            kept = _Kept(connection)
        except BaseException:
            connection.disconnect()
            self.pool.release(connection)
            raise
        kept.lease = lease = _Lease(kept, self._ended.append)
        lease.connection, lease.whole = connection, False
        self._out.add(lease)
        return kept

    def _take_back(self, closed: int, kept: _Kept) -> None:
        """A connection that comes when nobody waits for it any more."""
        self._end(kept, whole=closed == self._closed)
        threads.beside(self._release_ended)

    def _release_ended(self) -> None:
        """Give back what has ended, each once, however often it has been said."""
        with threads.taken(self._lock), client_errors():
            while self._ended:
                lease = self._ended.pop()
                if lease in self._out:
                    self._out.discard(lease)
                    try:
                        if not lease.whole:
                            lease.connection.disconnect()
                    finally:
                        self.pool.release(lease.connection)


def _disconnect_idle(pool: Any) -> None:
    """Close the connections of a pool that nobody uses."""
    if not isinstance(pool, redis.BlockingConnectionPool):
        pool.disconnect(inuse_connections=False)
        return
    # redis-py 5 and 6 can only close all connections of such a pool.
    for connection in list(pool.pool.queue):
        if connection is not None:
            connection.disconnect()


def _is_exhausted(pool: Any) -> bool:
    """Whether a pool has nothing left to give, as far as can be told.

    Where it has, nothing that is kept must go back for somebody who asks it: others would have to ask it as well then,
    and so on, until nobody kept anything any more.
    """
    if isinstance(pool, redis.BlockingConnectionPool):
        # Its method would take a lock of the queue, which may be locked in a forked process until the pool notices.
        return not pool.pool.queue
    made, most = getattr(pool, "_created_connections", math.inf), getattr(pool, "max_connections", 0)
    return not getattr(pool, "_available_connections", ()) and bool(made >= most)


class _Kept:
    """A connection, when it came from its pool, and when it was last used.

    Two requests in a row go over the connection's socket and through its parser without what redis-py has around them,
    which is most of its time, and which knows no deadline for several reads, where the parser is hiredis. A socket of
    the system blocks meanwhile, with the timeout in the hands of the system, as Python would otherwise ask it before
    each call whether the socket is ready. Those of TLS, gevent and eventlet have timeouts of their own.
    """

    __slots__ = (
        *("_buffer", "_is_plain", "_longest", "_patience", "_reader", "_socket"),
        *("connection", "lease", "outdated", "taken_at", "used_at"),
        "__weakref__",
    )
    lease: _Lease

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.taken_at = self.used_at = monotonic()
        self.outdated = False  # whether to connect again would be to connect to another server, or as another user
        self._socket: socket.socket | None = None
        self._is_plain = False
        self._reader: Any = None
        self._longest: float = connection.socket_timeout or _FOR_EVER
        self._patience = self._longest
        self._buffer = bytearray(_READ_SIZE)
        parser = getattr(connection, "_parser", None)
        if type(parser) is _HiredisParser and not connection.health_check_interval:
            own = getattr(connection, "_sock", None)
            if _is_socket(own):
                self._socket, self._reader = own, parser._reader  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
                self._is_plain = _is_of_system(own) and _let_system_time_out(own, self._patience)
                own.settimeout(None if self._is_plain else self._patience)

    def is_usable(self, now: float) -> bool:
        """Whether it may serve another request; else its pool has to look at it, and does what it needs."""
        own = self._socket
        if now - self.taken_at >= _LONGEST_KEPT or (own is not None and self.connection._sock is not own):  # noqa: SLF001
            return False
        if now - self.used_at < _LONGEST_PAUSE:
            return True
        return own is not None and not self._has_something_to_read(own)

    def _has_something_to_read(self, own: socket.socket) -> bool:
        """Return whether the server has closed the connection, or has sent what nobody has asked for."""
        try:
            if self._is_plain:
                own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                return True
            # gevent and eventlet would wait in spite of MSG_DONTWAIT, and Windows has none.
            own.settimeout(0.0)
            try:
                own.recv(1, socket.MSG_PEEK)
            finally:
                own.settimeout(self._patience)
        except BlockingIOError:
            return False
        except (OSError, ValueError, TypeError):
            # A socket with TLS refuses to peek, by a ValueError; that of eventlet, by a TypeError.
            return True
        return True

    def is_old(self, now: float) -> bool:
        """Whether it was kept for as long as may be."""
        return now - self.taken_at >= _LONGEST_KEPT

    def request(self, packed: bytes, replies: int, deadline: float | None, now: float) -> Replies:
        """Send commands, and read as many replies.

        :param now: what time it was a moment ago, on the clock of the deadline.
        """
        if self._socket is None:
            with client_errors():
                return self._request_by_client(packed, replies, deadline)
        left = self._left(deadline, now)
        if not 0.9 < left / self._patience < 1.1:  # a tenth does not matter
            self._be_patient(left)
        try:
            self._socket.sendall(packed)
            self._receive()
            received = [self._reply(deadline)]
            while len(received) < replies:
                received.append(self._reply(deadline))
            if self._reader.has_data() and self._has_reply():
                self.outdated = True  # nobody has asked for it, and the next one would take it for his own
        except (BlockingIOError, TimeoutError) as error:
            raise exceptions.TimeoutError("Timeout reading from socket") from error
        except (OSError, EOFError, ValueError) as error:
            # Where the socket was closed meanwhile, eventlet raises EOFError, and TLS ValueError.
            raise exceptions.ConnectionError(f"Error while reading from socket: {error}") from error
        return received

    def _request_by_client(self, packed: bytes, replies: int, deadline: float | None) -> Replies:
        own = getattr(self.connection, "_sock", None)
        if deadline is None or not _is_socket(own):
            self.connection.send_packed_command([packed])
            return [_read(self.connection) for _ in range(replies)]
        # Its check of health would connect again, and wait for that.
        self.connection.send_packed_command([packed], check_health=False)
        received = []
        for _ in range(replies):
            own.settimeout(self._left(deadline, monotonic()))
            received.append(_read(self.connection))
        own.settimeout(self.connection.socket_timeout)
        return received

    def _left(self, deadline: float | None, now: float) -> float:
        """How long to wait at most."""
        if deadline is None or deadline - now >= self._longest:
            return self._longest
        return max(deadline - now, _SHORTEST)

    def _be_patient(self, left: float) -> None:
        """Let the system wait no longer than that, which is a call of its own."""
        if self._is_plain:
            _let_system_time_out(self._socket, left)  # type: ignore[arg-type]  # there is one
        else:
            self._socket.settimeout(left)  # type: ignore[union-attr]
        self._patience = left

    def _receive(self) -> None:
        received = self._socket.recv_into(self._buffer)  # type: ignore[union-attr]  # there is one
        if not received:
            raise exceptions.ConnectionError("Connection closed by server.")
        self._reader.feed(self._buffer, 0, received)

    def _reply(self, deadline: float | None) -> Any:
        while True:
            reply = self._reader.gets(False)
            if reply is NOT_ENOUGH_DATA:
                if deadline is not None:
                    now = monotonic()
                    if now >= deadline:
                        raise exceptions.TimeoutError("Timeout reading from socket")
                    self._be_patient(self._left(deadline, now))
                self._receive()
            elif isinstance(reply, Exception):
                if not isinstance(reply, exceptions.ResponseError):
                    raise reply
                self.outdated |= is_outdated(reply)
                return reply
            elif type(reply) is not PushNotification:
                return reply
            else:
                self.connection._parser.handle_push_response(reply)  # noqa: SLF001

    def _has_reply(self) -> bool:
        """Whether there is another one; what the server tells unasked is none."""
        while (reply := self._reader.gets(False)) is not NOT_ENOUGH_DATA:
            if type(reply) is not PushNotification:
                return True
            self.connection._parser.handle_push_response(reply)  # noqa: SLF001
        return False

    def restore(self) -> None:
        """Leave the connection as the pool knows it."""
        if self._socket is not None and self.connection._sock is self._socket:  # noqa: SLF001  # still
            self._socket.settimeout(self.connection.socket_timeout)
            if self._is_plain:
                _let_system_time_out(self._socket, 0.0)  # never


def _is_socket(own: Any) -> TypeGuard[socket.socket]:
    """Return whether it is a socket: of the standard library, or of a library that has replaced that one's."""
    return isinstance(own, (socket.socket, _socket.socket))


def _is_of_system(own: socket.socket) -> bool:
    """Return whether its calls are those of the system, which stop the thread; ``socket.socket`` may be replaced."""
    return all(getattr(type(own), name, None) is getattr(_socket.socket, name) for name in _CALLS)


def _let_system_time_out(own: socket.socket, timeout: float) -> bool:
    if os.name != "posix":
        return False
    seconds, part = divmod(timeout, 1)
    interval = struct.pack("@ll", int(seconds), int(part * 1_000_000))
    try:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            own.setsockopt(socket.SOL_SOCKET, option, interval)
    except OSError:
        return False
    return True


OUTDATED: Final = (exceptions.AuthenticationError, exceptions.ReadOnlyError)
"""Replies of a server that one would not be connected to, or not so, if one connected now: it is no master any more, or
does not know any longer who this is."""


def is_outdated(error: Exception) -> bool:
    """Also a master whose replicas have left it may be none any more: Sentinel knows, which is asked to connect.

    By the text, too: an older server puts the code of an error inside a script behind words of its own.
    """
    return isinstance(error, OUTDATED) or "READONLY" in str(error) or "NOREPLICAS" in str(error)


_READ_SIZE: Final = 16_384
PushNotification: Final = getattr(hiredis, "PushNotification", None)  # None before hiredis 3.2

_LONGEST_PAUSE: Final = 0.01  # seconds after which the server may have closed a connection
_LONGEST_KEPT: Final = 1.0
_MOST_CONNECTING: Final = 1_000
_LONGEST_RELEASE: Final = 0.05  # seconds
_FOR_EVER: Final = 1e8  # seconds
_SHORTEST: Final = 0.001  # seconds; 0 would mean for ever
_CALLS: Final = ("recv", "recv_into", "sendall", "settimeout")


def _send_over(
    connections: _KeptConnections, key: bytes, commands: Sequence[Command], deadline: float | None, now: float
) -> Replies:
    """Send commands in one write, and read their replies."""
    kept: _Kept | None = None
    try:
        try:
            kept = connections.take(now, deadline)
        except EXPECTED as error:
            raise translated(error, key, in_doubt=False) from error
        if kept.taken_at >= now:  # just now, which may have taken its time
            try:
                now = check_time_left(key, deadline)
            except StoreTimeoutError:
                connections.give_back(kept)
                raise
        broken = True  # whatever comes in between: with a reply outstanding it would serve it to somebody else
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
        # Who handles an interruption may keep it, and with its traceback the frames above, and the connection in them.
        kept = error.__traceback__ = None
        raise
    return replies


def _watched(
    circuit: Circuit,
    send: Callable[[bytes, Sequence[Command], float | None, float], Replies],
    key: bytes,
    commands: Sequence[Command],
    deadline: float | None,
) -> Replies:
    """Send, if the circuit is not open, and let it know what that says of the server."""
    begun = check_time_left(key, deadline)
    if circuit.is_open:
        circuit.admit(key, deadline)
    try:
        replies = send(key, commands, deadline, begun)
    except (StoreUnavailableError, StoreTimeoutError) as error:
        if tells_of_server(error) and not circuit.excuses(error, begun):
            circuit.failed(error)
        raise
    except StoreError:  # it has answered
        circuit.succeeded()
        raise
    except EXPECTED as error:
        # It came from giving back a connection, where nothing else translates it.
        ours = translated(error, key, in_doubt=True)
        circuit.failed(ours)
        raise ours from error
    except BaseException:  # it was the caller who was interrupted
        if circuit.is_open:
            circuit.left()
        raise
    circuit.heard_at = begun
    if circuit.failures:
        circuit.succeeded()
    return replies


def check_time_left(key: bytes, deadline: float | None) -> float:
    """What time it is; refuses what comes too late to be sent: not the server's failure, and no trial of it.

    :raises StoreTimeoutError: where it does.
    """
    fork_safety.check()
    now = monotonic()
    if deadline is not None and now >= deadline:
        raise StoreTimeoutError(key, "there was no time left to ask Redis")
    return now


def pack(commands: Sequence[Command]) -> bytes:
    """Commands as they are sent, next to each other.

    They must be bytes. Other types work as well, until a signal arrives: Python looks for signals while it writes an
    ``int`` out, and where the handler of one raises, hiredis goes on with the text that it did not get, and crashes.
    """
    if len(commands) == 1:
        return _pack_one(commands[0])
    return b"".join([_pack_one(command) for command in commands])


_pack_one: Final[Callable[[Command], bytes]] = hiredis.pack_command  # type: ignore[assignment]  # it takes any length


def as_bytes(arguments: Sequence[Any]) -> Command:
    """Return the arguments of a command as they are sent."""
    return tuple(argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments)


class BytesPacker:
    """Packs what redis-py sends by itself, in the place of its own packer: numbers of databases and protocols."""

    @staticmethod
    def pack(command: Any, *arguments: Any) -> list[bytes]:
        """Return a command as it is sent; a name of several words is several arguments."""
        (name,) = as_bytes((command,))
        return [pack((as_bytes((*name.split(), *arguments)),))]


def _read(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except exceptions.ResponseError as error:
        return error


class PoolChannel:
    """``redis.Redis``: a single server, or the master that Sentinel names.

    :param sentinels: clients that belong to this one.
    :param owned: whether closing closes the clients as well.
    """

    def __init__(
        self,
        client: redis.Redis,
        sentinels: Sequence[redis.Redis] = (),
        *,
        breaker: CircuitBreaker | None = None,
        owned: bool = False,
    ) -> None:
        self.spans_nodes = False
        self._clients = (client, *sentinels)
        self._owned = owned
        self._circuit = Circuit(breaker)
        self._connections = _KeptConnections(client.connection_pool, _most_kept(client.connection_pool, owned=owned))
        self._send = partial(_send_over, self._connections)

    def node(self, key: bytes) -> str:
        """There is one server at a time."""
        return ""

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Replies:
        """Send commands over one connection, in one write."""
        return _watched(self._circuit, self._send, key, commands, deadline)

    def circuits(self) -> dict[str, CircuitStatus]:
        """There is one."""
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


def _most_kept(pool: Any, *, owned: bool) -> float:
    """Of a pool that the caller uses as well, at most half is kept."""
    return float("inf") if owned else pool.max_connections // 2


class ClusterChannel:
    """``redis.RedisCluster``: over the connections of the node that serves the key, as far as the client knows.

    :param connect: gives the client when it is first needed: making one asks the servers already.
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
        self.spans_nodes = True
        self.server = server
        self._connect = connect
        self._given = given
        self._owned = owned
        self._table: ClusterTable | None = None
        self._connections: dict[str, _KeptConnections] = {}
        self._closed = 0  # how often
        self._readings = 0  # of the table, how often
        self._circuits: defaultdict[str, Circuit] = defaultdict(lambda: Circuit(breaker))
        self._connecting = fork_safety.lock()
        self._reading = fork_safety.lock()
        fork_safety.call_in_child(self._forget)

    def _forget(self) -> None:
        """Connect again in a forked process, where locks of the parent's client may be locked.

        The client of a caller is kept, as there is no way to make another one.
        """
        if self._owned:
            fork_safety.leave(self._table)
            self._table = None

    def _connected(self, deadline: float | None) -> ClusterTable:
        if self._table is not None:
            return self._table
        late = partial(self._take_back, self._closed)
        table: ClusterTable = within(deadline, partial(self._connect_once, deadline), late=late)
        return table

    def _take_back(self, closed: int, table: ClusterTable) -> None:
        """Close a client that is ready after the store was closed; otherwise keep it for later callers."""
        if self._owned and closed != self._closed:
            table.client.close()

    def _connect_once(self, deadline: float | None) -> ClusterTable:
        with threads.taken(self._connecting), client_errors():
            if self._table is None:
                if deadline is not None and monotonic() >= deadline:
                    # Nobody waits any more, and callers may come that do.
                    raise TimeoutError
                self._table = ClusterTable(self._connect(), ClusterNode, self._given)
            return self._table

    def _read_once(self, table: ClusterTable, failed: str, readings: int, deadline: float | None) -> None:
        """Read the table again, unless another thread has, since there were so many readings."""
        with threads.taken(self._reading), client_errors():
            if readings == self._readings:
                if deadline is not None and monotonic() >= deadline:
                    raise TimeoutError  # the same
                stale = set(table.stale)
                table.reading(failed)
                table.stale.difference_update(stale)
                self._readings += 1
                self._leave_nodes_that_left(table)

    def _leave_nodes_that_left(self, table: ClusterTable) -> None:
        present = {node.name for node in table.client.get_nodes()}
        for name in set(self._connections) - present:
            with contextlib.suppress(*EXPECTED):
                self._connections.pop(name).close()
        table.stale.intersection_update(present)

    def node(self, key: bytes) -> str:
        """The name of the node that serves the key's slot, as far as the client knows; empty where it does not."""
        fork_safety.check()
        node = None if self._table is None else self._table.node_of(key)
        return "" if node is None else str(node.name)

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> NodeReplies:
        """Send commands to the node of the key in one write, and one by one to others what it redirects."""
        node = None if self._table is None else self._table.node_of(key)
        name = "" if node is None else node.name
        try:
            replies: NodeReplies = _watched(  # type: ignore[assignment]
                self._circuits[name], partial(self._send, node), key, commands, deadline
            )
        except StoreError:
            self._suspect(name)
            raise
        for place, reply in enumerate(replies):
            if isinstance(reply, exceptions.ResponseError):
                replies[place] = self._followed(key, commands[place], replies.node, reply, deadline)
        return replies

    def _followed(
        self, key: bytes, command: Command, asked: Any, reply: exceptions.ResponseError, deadline: float | None
    ) -> Any:
        table = self._connected(deadline)
        if isinstance(reply, REDIRECTIONS):
            return run(follow(table, self._sent, threads.sleep, key, command, asked, reply, deadline))
        if isinstance(reply, exceptions.ClusterDownError):
            table.stale.add(asked.name)
        return reply

    def _suspect(self, name: str) -> None:
        """Note that a node has failed, unless it was the caller that had no time: another may be in its place."""
        if self._table is not None and name and self._circuits[name].failures:
            self._table.stale.add(name)

    def _send(
        self, node: Any, key: bytes, commands: Sequence[Command], deadline: float | None, now: float
    ) -> NodeReplies:
        """Send commands to a node.

        :param node: None: it is not known yet, or no more.
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
        return NodeReplies(_send_over(connections, key, commands, deadline, now), node)

    def _found(self, table: ClusterTable, stale: Any, key: bytes, deadline: float | None) -> Any:
        """Return the node of a key, after reading the table again unless it has just been read for the first time."""
        node = table.node_of(key)
        if node is None or node.name in table.stale:
            failed = "" if stale is None else stale.name
            within(deadline, partial(self._read_once, table, failed, self._readings, deadline))
            node = table.serving(key)
        return node

    def _sent(self, node: Any, key: bytes, commands: Sequence[Command], deadline: float | None) -> Replies:
        """Send commands to a node that another one has named."""
        try:
            connections = self._connections_to(self._connected(deadline), node)
        except EXPECTED as error:
            raise translated(error, key, in_doubt=False) from error
        try:
            return _watched(self._circuits[node.name], partial(_send_over, connections), key, commands, deadline)
        except StoreError:
            self._suspect(node.name)
            raise

    def circuits(self) -> dict[str, CircuitStatus]:
        """One for each node that has been asked, and one without a name, for when no node was known."""
        return {name: circuit.status() for name, circuit in list(self._circuits.items())}

    def keys(self, prefix: bytes) -> list[bytes]:
        """See :meth:`Channel.keys`."""
        try:
            table = self._connected(None)
        except Exception as error:
            raise translated(error, prefix, in_doubt=False) from error
        return keys_of(table.client, prefix)

    def _connections_to(self, table: ClusterTable, node: Any) -> _KeptConnections:
        with client_errors():
            pool = table.client.get_redis_connection(node).connection_pool
        connections = self._connections.get(node.name)
        if connections is None or connections.pool is not pool:
            connections = _KeptConnections(pool, _most_kept(pool, owned=self._owned))
            self._connections[node.name] = connections
        return connections

    def close(self) -> None:
        """Give all connections back to their pools, and close the client where it is owned, if it was ever made."""
        fork_safety.check()
        for connections in list(self._connections.values()):
            connections.close()
        self._closed += 1
        if self._owned and self._table is not None:
            self._table.client.close()
