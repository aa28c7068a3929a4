"""Which manager an integration asks, the one that it is given or one that the process shares; and for which bucket."""

from __future__ import annotations

from functools import lru_cache

from ratelimit.errors import InvalidArgumentError, Key
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.stores.urls import default_url


def manager_of(manager: ProxyManager | str | None) -> ProxyManager:
    """The manager itself, or the process's own for a URL; None: that in the variable ``RATELIMIT_URL``, or localhost.

    :raises InvalidArgumentError: for what is neither.
    :raises InvalidConfigurationError: for a URL that is not valid.
    """
    if isinstance(manager, ProxyManager):
        return manager
    if manager is None or isinstance(manager, str):
        return _of_url(manager or default_url())
    raise InvalidArgumentError(f"a ProxyManager is wanted, or its URL, not {type(manager).__name__}")


def async_manager_of(manager: AsyncProxyManager | str | None) -> AsyncProxyManager:
    """The same for asyncio."""
    if isinstance(manager, AsyncProxyManager):
        return manager
    if manager is None or isinstance(manager, str):
        return _async_of_url(manager or default_url())
    raise InvalidArgumentError(f"an AsyncProxyManager is wanted, or its URL, not {type(manager).__name__}")


def bucket_key(name: str, key: Key) -> Key:
    """The key of a bucket: the name of a limit, and after it whose tokens they are."""
    return f"{name}:{key}" if isinstance(key, str) else name.encode() + b":" + key


@lru_cache(maxsize=64)
def _of_url(url: str) -> ProxyManager:
    return ProxyManager.from_url(url)


@lru_cache(maxsize=64)
def _async_of_url(url: str) -> AsyncProxyManager:
    return AsyncProxyManager.from_url(url)
