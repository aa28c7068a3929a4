"""What the demo asks a server beyond the verbs of a store."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from redis.exceptions import ResponseError

from ratelimit.errors import StoreError
from ratelimit.stores.redis.node import time_nanos
from ratelimit.stores.redis.store import RedisStore


def server_nanos(store: RedisStore, key: bytes) -> int:
    """Return the time of the server that holds a key, in nanoseconds since the epoch, to the microsecond."""
    return time_nanos(store.ask(key, "TIME"))


def software(store: RedisStore, key: bytes) -> str:
    """Return the name and the version of the server that holds a key."""
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
    """Return where a valid URL points to, without the user and the password in it."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path
