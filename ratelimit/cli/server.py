"""What the command line asks a server beyond the verbs of a store."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from redis.exceptions import ResponseError

from ratelimit.core.duration import NANOS_PER_SECOND
from ratelimit.errors import StoreError
from ratelimit.stores.redis import RedisStore
from ratelimit.stores.redis_errors import translated


def ttl_millis(store: RedisStore, key: bytes) -> int | None:
    """The time that a key still has, in milliseconds; None where it does not expire, 0 where it is gone."""
    ttl = int(_ask(store, key, "PTTL", key))
    return None if ttl == -1 else max(ttl, 0)


def time_nanos(store: RedisStore, key: bytes) -> int:
    """The time of the server that holds a key, as it tells it: nanoseconds since the epoch, rounded down to 1000."""
    seconds, microseconds = _ask(store, key, "TIME")
    return int(seconds) * NANOS_PER_SECOND + int(microseconds) * 1_000


def software(store: RedisStore, key: bytes) -> str:
    """The name and version of the server that holds a key."""
    try:
        info = _ask(store, key, "INFO", "server")
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


def _ask(store: RedisStore, key: bytes, *command: Any) -> Any:
    (reply,) = store._channel.send(key, command)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    if isinstance(reply, ResponseError):
        raise translated(reply, key, in_doubt=False) from reply
    return reply
