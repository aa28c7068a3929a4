"""How a store reaches its servers: commands go out as bytes, and replies come back undecoded.

A channel holds the connections of one client of redis-py. There are four: for one server (``pool``, ``async_pool``) and
for a cluster (``cluster``, ``async_cluster``), each for sync and for asyncio code. This module has what they share.

A client's own ``execute_command`` silently sends a command again when its reply was lost. A compare-and-swap that is
repeated without the caller's knowledge takes its own success for the success of another writer. That is why every
channel sends a command once. It leaves connecting to redis-py with all its settings, reports a lost reply as such
(``in_doubt``), and leaves repeating to the caller, which knows what to look for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import hiredis
from redis import exceptions

from ratelimit.errors import StoreTimeoutError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic
from ratelimit.stores.redis.circuit import CircuitStatus

Command = tuple[bytes, ...]
"""A command and its arguments, as they are sent; :func:`pack` says why they must be bytes."""
Replies = list[Any]
"""One reply for each command, in order: as the server sent it, undecoded, or the ``ResponseError`` that it sent."""


class Channel(Protocol):
    """The connections of a client.

    :ivar spans_nodes: whether different keys may be on different servers.
    :ivar post: sends one command for a waiter, see :meth:`.SharedConnection.post`; None where that is not possible.
    """

    spans_nodes: bool

    @property
    def post(self) -> Callable[[bytes, Command, Any, float | None], bool] | None: ...

    def node(self, key: bytes) -> str:
        """Return the name of the server that holds a key; two servers have two clocks."""
        ...

    def send(self, key: bytes, commands: Sequence[Command], deadline: float | None = None) -> Any:
        """Send commands to the server of a key, in one round trip if possible, and return their replies.

        :param deadline: on the clock of ``time.monotonic``; None: only the timeouts of the client count.
        """
        ...

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the state of the circuits to the servers, by the names of the nodes."""
        ...

    @property
    def server(self) -> str:
        """Where the connections lead, for logs: without user and password."""
        ...

    def keys(self, prefix: bytes) -> Any:
        """List the keys that begin with a prefix; the client itself asks for them."""
        ...

    def close(self) -> Any:
        """Close the connections, and the client where the store owns it."""
        ...


class NodeReplies(Replies):
    """The replies of a cluster.

    :ivar node: the node of redis-py that was asked. Where that node has redirected a command, the reply is another
        node's; but nodes never redirect commands without a key, such as ``TIME``.
    """

    __slots__ = ("node",)

    def __init__(self, replies: Replies, node: Any) -> None:
        super().__init__(replies)
        self.node = node


def check_time_left(key: bytes, deadline: float | None, monotonic: Callable[[], float] = monotonic) -> float:
    """Return the present time, for callers that would have to read the clock otherwise.

    :raises StoreTimeoutError: where the deadline has passed. Nothing was sent, so this says nothing of the server.
    """
    fork_safety.check()
    now = monotonic()
    if deadline is not None and now >= deadline:
        raise StoreTimeoutError(key, "there was no time left to ask Redis")
    return now


def pack(commands: Sequence[Command]) -> bytes:
    """Return commands as they are sent, one after the other.

    Their parts must be bytes. Other types work as well, until a signal arrives: Python looks for signals while it
    prints an ``int``, and where a handler raises then, hiredis uses the text that it did not get, and crashes.
    """
    if len(commands) == 1:
        return pack_one(commands[0])
    return b"".join([pack_one(command) for command in commands])


# The stub of hiredis allows tuples of one length only.
pack_one: Final[Callable[[Command], bytes]] = hiredis.pack_command  # type: ignore[assignment]


def as_bytes(arguments: Sequence[Any]) -> Command:
    """Return the arguments of a command as they are sent."""
    return tuple(argument if isinstance(argument, bytes) else str(argument).encode() for argument in arguments)


class BytesPacker:
    """Packs what redis-py itself sends (numbers of databases and protocols) in place of redis-py's own packer."""

    @staticmethod
    def pack(command: Any, *arguments: Any) -> list[bytes]:
        """Return a command as it is sent; a name of several words is sent as several arguments."""
        (name,) = as_bytes((command,))
        return [pack((as_bytes((*name.split(), *arguments)),))]


PushNotification: Final = getattr(hiredis, "PushNotification", None)
"""The type of messages that a server sends unasked; None before hiredis 3.2."""


def is_outdated(error: Exception) -> bool:
    """Return whether an error of the server says that a new connection would lead elsewhere, or log in differently.

    The server is not a master any more, or it no longer knows the user of the connection. A master that its replicas
    have left may have been replaced, too; Sentinel knows, and connecting asks Sentinel.
    """
    # An older server puts words of its own before the code of an error inside a script.
    return isinstance(error, _OUTDATED) or "READONLY" in str(error) or "NOREPLICAS" in str(error)


_OUTDATED: Final = (exceptions.AuthenticationError, exceptions.ReadOnlyError)
