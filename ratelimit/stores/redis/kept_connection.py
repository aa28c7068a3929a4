"""One connection of redis-py that a store keeps from one request to the next.

Around each request redis-py does work that takes most of the request's time, and it knows no deadline for a request of
several reads. Where its parser is hiredis, requests go directly over the connection's socket and through its parser:

- The packed commands are written, and replies are read, with one system call each in the common case.
- A socket of the operating system is put into blocking mode, and the system keeps the timeout (``SO_RCVTIMEO``).
  Otherwise Python would ask the system before each call whether the socket is ready.
- Sockets of TLS, gevent and eventlet keep time by themselves, so that their own timeouts are used.

Other connections, such as those of fakeredis, are used by redis-py's own methods. A connection that goes back to its
pool is left as redis-py made it (:meth:`KeptConnection.restore`).
"""

from __future__ import annotations

import _socket
import os
import socket
import struct
import weakref
from collections.abc import Callable
from typing import Any, Final, TypeGuard

from redis import exceptions
from redis._parsers import _HiredisParser
from redis._parsers.hiredis import NOT_ENOUGH_DATA

from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.channel import PushNotification, Replies, is_outdated
from ratelimit.stores.redis.errors import client_errors

SHORTEST_TIMEOUT: Final = 0.001  # seconds; a timeout of 0 would be none
_LONGEST_KEPT: Final = 1.0  # seconds
_LONGEST_PAUSE: Final = 0.01  # seconds after which the server may have closed a connection
_UNLIMITED: Final = 1e8  # seconds
_READ_SIZE: Final = 16_384  # bytes
_CALLS: Final = ("recv", "recv_into", "sendall", "settimeout")


class KeptConnection:
    """A connection that was taken from its pool.

    :ivar lease: what gives the connection back to its pool.
    :ivar taken_at: when the connection came from its pool.
    :ivar used_at: when the connection was last used.
    :ivar outdated: whether the connection must be given up, because a new one would lead to another server or log in
        differently, or because the server has sent a reply too many.
    """

    __slots__ = (
        *("_buffer", "_is_plain", "_longest", "_monotonic", "_patience", "_reader", "_socket"),
        *("connection", "lease", "outdated", "taken_at", "used_at"),
        "__weakref__",
    )
    lease: Lease

    def __init__(self, connection: Any, monotonic: Callable[[], float] = monotonic) -> None:
        self.connection = connection
        self._monotonic = monotonic
        self.taken_at = self.used_at = monotonic()
        self.outdated = False
        self._socket: socket.socket | None = None
        self._is_plain = False
        self._reader: Any = None
        self._longest: float = connection.socket_timeout or _UNLIMITED
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
        """Return whether this may serve another request; otherwise its pool has to look after it."""
        own = self._socket
        if now - self.taken_at >= _LONGEST_KEPT or (own is not None and self.connection._sock is not own):  # noqa: SLF001
            return False
        if now - self.used_at < _LONGEST_PAUSE:
            return True
        return own is not None and not self._has_something_to_read(own)

    def is_old(self, now: float) -> bool:
        """Return whether this was kept for as long as allowed."""
        return now - self.taken_at >= _LONGEST_KEPT

    def request(self, packed: bytes, replies: int, deadline: float | None, now: float) -> Replies:
        """Send commands, and return this number of replies.

        :param now: a reading of the deadline's clock that was taken a moment ago.
        """
        if self._socket is None:
            with client_errors():
                return self._request_by_client(packed, replies, deadline)
        left = self._left(deadline, now)
        # A difference of a tenth is not worth a system call.
        if not 0.9 < left / self._patience < 1.1:
            self._be_patient(left)
        try:
            self._socket.sendall(packed)
            self._receive()
            received = [self._reply(deadline)]
            while len(received) < replies:
                received.append(self._reply(deadline))
            if self._reader.has_data() and self._has_reply():
                # Nobody has asked for this reply. The next request would take it for its own.
                self.outdated = True
        except (BlockingIOError, TimeoutError) as error:
            raise exceptions.TimeoutError("Timeout reading from socket") from error
        except (OSError, EOFError, ValueError) as error:
            # Where the socket was closed meanwhile, eventlet raises EOFError, and TLS ValueError.
            raise exceptions.ConnectionError(f"Error while reading from socket: {error}") from error
        return received

    def restore(self) -> None:
        """Leave the connection as its pool knows it."""
        # redis-py may have closed the socket meanwhile.
        if self._socket is not None and self.connection._sock is self._socket:  # noqa: SLF001
            self._socket.settimeout(self.connection.socket_timeout)
            if self._is_plain:
                # To the system, 0 means that it waits without an end.
                _let_system_time_out(self._socket, 0.0)

    def _has_something_to_read(self, own: socket.socket) -> bool:
        """Return whether the server has closed the connection, or has sent what nobody has asked for."""
        try:
            if self._is_plain:
                own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
                return True
            # gevent and eventlet would wait in spite of MSG_DONTWAIT, and Windows has no such flag.
            own.settimeout(0.0)
            try:
                own.recv(1, socket.MSG_PEEK)
            finally:
                own.settimeout(self._patience)
        except BlockingIOError:
            return False
        except (OSError, ValueError, TypeError):
            # A TLS socket refuses to peek with a ValueError, a socket of eventlet with a TypeError.
            return True
        return True

    def _left(self, deadline: float | None, now: float) -> float:
        """Return how long to wait at most."""
        if deadline is None or deadline - now >= self._longest:
            return self._longest
        return max(deadline - now, SHORTEST_TIMEOUT)

    def _be_patient(self, left: float) -> None:
        """Set the socket's timeout, which takes a system call of its own."""
        if self._is_plain:
            _let_system_time_out(self._socket, left)  # type: ignore[arg-type]  # callers have checked it
        else:
            self._socket.settimeout(left)  # type: ignore[union-attr]
        self._patience = left

    def _receive(self) -> None:
        received = self._socket.recv_into(self._buffer)  # type: ignore[union-attr]  # callers have checked it
        if not received:
            raise exceptions.ConnectionError("Connection closed by server.")
        self._reader.feed(self._buffer, 0, received)

    def _reply(self, deadline: float | None) -> Any:
        while True:
            reply = self._reader.gets(False)
            if reply is NOT_ENOUGH_DATA:
                if deadline is not None:
                    now = self._monotonic()
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
        """Return whether another reply has come; messages that a server sends unasked do not count."""
        while (reply := self._reader.gets(False)) is not NOT_ENOUGH_DATA:
            if type(reply) is not PushNotification:
                return True
            self.connection._parser.handle_push_response(reply)  # noqa: SLF001
        return False

    def _request_by_client(self, packed: bytes, replies: int, deadline: float | None) -> Replies:
        own = getattr(self.connection, "_sock", None)
        if deadline is None or not _is_socket(own):
            self.connection.send_packed_command([packed])
            return [_read(self.connection) for _ in range(replies)]
        # redis-py's check of health would connect again, and wait for that.
        self.connection.send_packed_command([packed], check_health=False)
        received = []
        for _ in range(replies):
            own.settimeout(self._left(deadline, self._monotonic()))
            received.append(_read(self.connection))
        own.settimeout(self.connection.socket_timeout)
        return received


class Lease(weakref.ref[KeptConnection]):
    """Says which :class:`KeptConnection` has a connection of a pool; once that object is gone, nobody has it.

    :ivar whole: whether the pool may give the connection to others as it is.
    """

    __slots__ = ("connection", "whole")

    connection: Any
    whole: bool


def _read(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except exceptions.ResponseError as error:
        return error


def _is_socket(own: Any) -> TypeGuard[socket.socket]:
    """Return whether this is a socket: of the standard library, or of a library that has replaced that one's."""
    return isinstance(own, (socket.socket, _socket.socket))


def _is_of_system(own: socket.socket) -> bool:
    """Return whether a socket's calls are those of the system, which stop the thread; libraries replace the class."""
    return all(getattr(type(own), name, None) is getattr(_socket.socket, name) for name in _CALLS)


def _let_system_time_out(own: socket.socket, timeout: float) -> bool:
    """Let the system end the calls of a blocking socket after this time; return whether it can."""
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
