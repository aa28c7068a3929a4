"""Let redis-py connect for a decision without repeating.

A client of redis-py connects up to eleven times by default, with pauses that add up to more than a decision may take. A
wrong password, a port without a listener and a host that does not exist would all look like a server that does not
answer. What such a client does for its owner stays as it is: only connecting for a decision does without repetitions.
The clients by which Sentinel is asked repeat as well, and are limited alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

CONNECTS_ONCE: Final[ContextVar[bool]] = ContextVar("ratelimit_connects_once", default=False)
"""Whether this thread, greenlet or task connects for a decision."""


class _HeedsContext:
    """Keeps redis-py's ``Retry``, sync or asyncio, from repeating while ``CONNECTS_ONCE`` is set."""

    _retries: int

    def call_with_retry(self, *args: Any, **options: Any) -> Any:
        heeding: Any = super()
        if CONNECTS_ONCE.get():
            once = _as(type(self), self)
            once._retries = 0  # noqa: SLF001
            heeding = super(_HeedsContext, once)
        return heeding.call_with_retry(*args, **options)


@lru_cache
def _heeding(kind: Any) -> Any:
    return type(kind.__name__, (_HeedsContext, kind), {})


def _as(kind: Any, retry: Any) -> Any:
    """Return a copy of another class; ``copy.copy`` imports modules, which fails while the interpreter ends."""
    made = kind.__new__(kind)
    # redis-py 5.3 for asyncio has them in slots, all others in the object's dictionary.
    for name in {"_backoff", "_retries", "_supported_errors", *getattr(retry, "__dict__", ())}:
        setattr(made, name, getattr(retry, name))
    return made


def _limited(retry: Any) -> Any:
    kind: Any = type(retry)
    return retry if retry is None or issubclass(kind, _HeedsContext) else _as(_heeding(kind), retry)


def limit_retries(pool: Any) -> None:
    """Let a pool, and those of the clients by which it asks Sentinel, heed ``CONNECTS_ONCE``."""
    for each in _pools(pool):
        retry = each.connection_kwargs.get("retry")
        limited = _limited(retry)
        if limited is not retry:
            each.connection_kwargs["retry"] = limited
            for connection in _connections(each):
                connection.retry = _limited(connection.retry)


def shorten_timeouts(pool: Any, longest: float) -> None:
    """Let no step of connecting take longer than this number of seconds, whatever the pool is used for."""
    for each in _pools(pool):
        for name in ("socket_connect_timeout", "socket_timeout"):
            each.connection_kwargs[name] = min(each.connection_kwargs.get(name) or longest, longest)
            for connection in _connections(each):
                setattr(connection, name, min(getattr(connection, name, None) or longest, longest))


def _pools(pool: Any) -> Iterator[Any]:
    yield pool
    for sentinel in getattr(getattr(pool, "sentinel_manager", None), "sentinels", ()):
        yield sentinel.connection_pool


def _connections(pool: Any) -> list[Any]:
    """Return the connections that a pool has made so far."""
    names = ("_connections", "_available_connections", "_in_use_connections")
    return [connection for name in names for connection in list(getattr(pool, name, ()))]
