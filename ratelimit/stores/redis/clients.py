"""What clients of redis-py are asked besides decisions: the keys under a prefix, and where their servers are."""

from __future__ import annotations

import re
from typing import Any, Final

from ratelimit.errors import StoreError
from ratelimit.stores.redis.errors import translated

_SPECIAL: Final = re.compile(rb"[*?\[\]\\]")
_KEYS_AT_A_TIME: Final = 1_000
_MOST_NODES: Final = 3


def keys_of(client: Any, prefix: bytes) -> list[bytes]:
    """Return the keys that begin with a prefix, on all masters of a cluster.

    :param client: a ``redis.Redis`` or a ``redis.RedisCluster``.
    """
    try:
        return [_bytes(key) for key in client.scan_iter(match=_pattern(prefix), count=_KEYS_AT_A_TIME)]
    except Exception as error:
        raise _not_listed(error, prefix) from error


async def async_keys_of(client: Any, prefix: bytes) -> list[bytes]:
    """Return the keys that begin with a prefix; for a client of ``redis.asyncio``."""
    try:
        return [_bytes(key) async for key in client.scan_iter(match=_pattern(prefix), count=_KEYS_AT_A_TIME)]
    except Exception as error:
        raise _not_listed(error, prefix) from error


def _pattern(prefix: bytes) -> bytes:
    """Return the pattern of ``SCAN`` for a prefix that may hold characters which mean something in a pattern."""
    return _SPECIAL.sub(rb"\\\g<0>", prefix) + b"*"


def _bytes(key: str | bytes) -> bytes:
    # A client of the caller's may decode replies.
    return key.encode() if isinstance(key, str) else key


def _not_listed(error: Exception, prefix: bytes) -> StoreError:
    return translated(error, prefix, in_doubt=False)


def server_of(pool: Any) -> str:
    """Return where a pool connects to, as ``host:port/db``, ``unix:path``, or the service of a Sentinel.

    No user and no password are in it.
    """
    options: dict[str, Any] = pool.connection_kwargs
    database = options.get("db") or 0
    service = getattr(pool, "service_name", None)
    if service is not None:
        sentinels = [server_of(sentinel.connection_pool) for sentinel in pool.sentinel_manager.sentinels]
        at = ",".join(sentinel.removesuffix("/0") for sentinel in sentinels)
        return f"{service}/{database} by Sentinel at {at}"
    if "path" in options:
        return f"unix:{options['path']}/{database}"
    return f"{place(options.get('host', 'localhost'), options.get('port', 6379))}/{database}"


def place(host: str, port: object) -> str:
    """Return ``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def cluster_of(client: Any) -> str:
    """Return the nodes by which a client finds its cluster, or the first of them where there are many."""
    nodes = sorted(client.nodes_manager.startup_nodes)
    return cluster_at(",".join(nodes[:_MOST_NODES]) + ",..." * (len(nodes) > _MOST_NODES))


def cluster_at(nodes: str) -> str:
    """Return the description of a cluster that is found by these nodes."""
    return f"cluster at {nodes}"
