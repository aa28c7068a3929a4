"""What the command line asks a server beyond the verbs of a store."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from redis.exceptions import ResponseError

from ratelimit.errors import StoreError
from ratelimit.stores.redis.node import time_nanos
from ratelimit.stores.redis.store import RedisStore


def ttl_millis(store: RedisStore, key: bytes) -> int | None:
    """The time that a key still has, in milliseconds; None where it does not expire, 0 where it is gone."""
    ttl = int(store.ask(key, "PTTL", key))
    return None if ttl == -1 else max(ttl, 0)


def server_nanos(store: RedisStore, key: bytes) -> int:
    """The time of the server that holds a key, as it tells it: nanoseconds since the epoch, rounded down to 1000."""
    return time_nanos(store.ask(key, "TIME"))


def software(store: RedisStore, key: bytes) -> str:
    """The name and version of the server that holds a key."""
    try:
        info = store.ask(key, "INFO", "server")
    except StoreError as error:
        if isinstance(error.__cause__, ResponseError):  # some providers do not allow it
            return "Redis of unknown version"
        raise
    if isinstance(info, bytes):
        info = dict(re.findall(r"(\w+):(.*?)\r?\n", info.decode(errors="replace")))
    if version := info.get("valkey_version"):
        return f"Valkey {version}"
    return f"Redis {info.get('redis_version', 'of unknown version')}"


def location(url: str) -> str:
    """Where a valid URL points to, without the user and the password in it."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path
