"""Clients of clusters that connect although a node is down.

When redis-py's own clients connect, they ask the first master in the table of slots for the names of all commands, and
fail if that master is down. So no process could begin to use the slots of the other masters until another server takes
over. The store does not need the names: it sends commands only to nodes that it has chosen itself.
"""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio


class SyncCluster(redis.RedisCluster):
    """A ``redis.RedisCluster`` that connects without the names of commands."""

    def command(self, **_: Any) -> dict[str, Any]:
        """Return no names, without asking a node."""
        return {}


class _NoNames:
    """Stands in for redis-py's parser of commands."""

    async def initialize(self, node: Any = None) -> None:
        """Ask no node."""


class AsyncCluster(redis.asyncio.RedisCluster):
    """A ``redis.asyncio.RedisCluster`` that connects without the names of commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands_parser: Any = _NoNames()
