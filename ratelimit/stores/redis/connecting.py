"""Connecting by redis-py, without its repetitions.

A client of redis-py connects up to eleven times by default, with pauses that add up to more than a decision may take: a
wrong password, a port that nobody listens at and a host that does not exist would all look like a server that does not
answer. What such a client does for its owner stays as it is, for it is only here that its repetitions do not count. The
clients by which Sentinel is asked have repetitions of their own, which do not count here either.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

CONNECTS_ONCE: Final[ContextVar[bool]] = ContextVar("ratelimit_connects_once", default=False)
"""Whether this thread, greenlet or task connects for a decision."""


class _HeedsContext:
    """Keeps a class of redis-py's, sync or asyncio, from repeating while ``CONNECTS_ONCE`` is set."""

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
    """Return a copy in another class; ``copy.copy`` imports modules, which fails while the interpreter ends."""
    made = kind.__new__(kind)
    # In the slots of redis-py 5.3 for asyncio, else in the dictionary of the object.
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
    """Let no step of connecting take longer than that, whatever the pool is used for."""
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
