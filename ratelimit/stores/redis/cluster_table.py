"""Find the node of a cluster that serves a key: by redis-py's table of slots, and by following redirections.

redis-py connects to the cluster and reads the table. Redirections are followed here, for sync and asyncio code alike,
because redis-py knows no deadline, may send ``ASKING`` and the command over two connections, and cannot follow to a
node that is not in its table, such as one that has just been added to the cluster.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from redis.exceptions import AskError, MovedError, NoPermissionError, SlotNotCoveredError, TryAgainError

from ratelimit.errors import StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import Steps
from ratelimit.stores.redis.errors import translated

# A MovedError is an AskError.
REDIRECTIONS: Final = (AskError, TryAgainError)
"""Replies of a node that has not carried out a command, and that names the node that may."""

_ASKING: Final = (b"ASKING",)
_MOST_REDIRECTIONS: Final = 16
_IMMEDIATE_REDIRECTIONS: Final = 3
_SHORTEST_PAUSE: Final = 0.002  # seconds; doubled each time
_LONGEST_PAUSE: Final = 0.1  # seconds
_MOVES_BEFORE_RENEWAL: Final = 5


class ClusterTable:
    """The table of slots, which belongs to a client of redis-py.

    The host by which the cluster was first found stays among the ways to find it. redis-py replaces it by the addresses
    of the nodes, all of which may change at once, while the name of that host then leads to the new ones.

    :param client: a ``RedisCluster`` of ``redis`` or ``redis.asyncio``.
    :param make_node: makes a node as that client does, from host and port.
    :param given: hosts and ports by which the cluster was first found; empty: those that the client still knows.
    :ivar stale: names of nodes that have failed, or that have answered that other nodes serve their slots. Before the
        next command for one of them the table has to be read again.
    """

    def __init__(self, client: Any, make_node: Callable[[str, int], Any], given: Iterable[tuple[str, int]]) -> None:
        self.client = client
        self._make_node = make_node
        self.stale: set[str] = set()
        self._manager: Any = client.nodes_manager
        known = getattr(client, "startup_nodes", None) or self._manager.startup_nodes.values()
        self._given = tuple(given) or tuple((node.host, node.port) for node in known)
        self._moves = 0

    def node_of(self, key: bytes) -> Any:
        """Return the node that serves the slot of a key by the present table; None where the table has none."""
        try:
            return self.client.get_node_from_key(key)
        except SlotNotCoveredError:
            return None
        except Exception as error:
            raise translated(error, key, in_doubt=False) from error

    def serving(self, key: bytes) -> Any:
        """Return the node that serves the slot of a key; raise redis-py's ``SlotNotCoveredError`` if none does."""
        return self.client.get_node_from_key(key)

    def reading(self, failed: str) -> Any:
        """Read the table from any node that can be reached; to be awaited where the client is an asyncio one.

        :param failed: the name of a node that is asked last; it may be empty.
        """
        found = dict(self._manager.startup_nodes)
        for host, port in self._given:
            node = self._make_node(host, port)
            found.setdefault(node.name, node)
        self._manager.startup_nodes = found
        read = self._manager.initialize
        if getattr(self.client, "_initialize", False):
            read = self.client.initialize
        knows_failures = failed and "last_failed_node_name" in inspect.signature(read).parameters
        return read(**({"last_failed_node_name": failed} if knows_failures else {}))

    def redirected(self, error: AskError, asked: str) -> Any:
        """Return the node that a redirection names, and add it to redis-py's nodes where it is new.

        :param asked: the name of the node that has sent the redirection; such a node may name itself without a host.
        """
        host, port = self._manager.remap_host_port(error.host or asked.rpartition(":")[0], error.port)
        node = self.client.get_node(host=host, port=port)
        if node is not None:
            return node
        node = self._make_node(host, port)
        with getattr(self._manager, "_lock", contextlib.nullcontext()):
            return self._manager.nodes_cache.setdefault(node.name, node)

    def moved(self, error: MovedError, asked: str) -> Any:
        """Note and return the node that serves a slot now; after several such changes the whole table is due."""
        node = self.redirected(error, asked)
        table = self._manager.slots_cache
        known = table.get(error.slot_id, [])
        if known[:1] != [node]:
            # Where a replica has taken over, the other replicas stay. The list must not be changed in place, because
            # other slots share it.
            table[error.slot_id] = [node, *(one for one in known if one != node)] if node in known else [node]
            self._moves += 1
            if self._moves % _MOVES_BEFORE_RENEWAL == 0:
                self.stale.add(asked)
        return node


def follow(  # noqa: PLR0917  # what was sent, and how to send it again
    table: ClusterTable,
    send: Callable[[Any, bytes, Sequence[Any], float | None], Any],
    sleep: Callable[[float], Any],
    key: bytes,
    command: tuple[bytes, ...],
    asked: Any,
    reply: Any,
    deadline: float | None,
) -> Steps[Any]:
    """Send a command to the node that a redirection names, and on to the next one, until a node has carried it out.

    :param send: sends commands in one write to a node.
    :param asked: the node that has answered with the redirection ``reply``.
    A node answers ``TRYAGAIN`` to a command of several keys while their slot moves, since some of them are on another
    node. The command is then sent again until the slot has moved.

    :raises StoreTimeoutError: where the nodes redirect until the deadline; nothing was carried out.
    :raises StoreUnavailableError: where they redirect very often.
    """
    node = asked
    commands: tuple[tuple[bytes, ...], ...] = (command,)
    followed = 0
    for count in itertools.count():
        if followed >= _MOST_REDIRECTIONS:
            break
        # A slot may move for as long as it takes, but there is a deadline.
        followed += deadline is None or not isinstance(reply, TryAgainError)
        if count >= _IMMEDIATE_REDIRECTIONS or isinstance(reply, TryAgainError):
            pause = min(_SHORTEST_PAUSE * 2 ** min(count, 10), _LONGEST_PAUSE)
            if deadline is not None and monotonic() + pause >= deadline:
                raise StoreTimeoutError(key, f"the nodes of the Redis cluster still redirect ({reply})") from reply
            yield sleep(pause)
        try:
            if isinstance(reply, MovedError):
                node, commands = table.moved(reply, node.name), (command,)
            elif isinstance(reply, AskError):
                node, commands = table.redirected(reply, node.name), (_ASKING, command)
        except Exception as error:
            raise translated(error, key, in_doubt=False) from error
        replies = yield send(node, key, commands, deadline)
        reply = replies[-1]
        if isinstance(replies[0], NoPermissionError):
            # Where the node refuses ASKING, the next reply is a MovedError, which does not name the permission.
            return replies[0]
        if not isinstance(reply, REDIRECTIONS):
            return reply
    raise StoreUnavailableError(key, f"the nodes of the Redis cluster redirect without end ({reply})") from reply
