"""This library, as its users call it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

import ratelimit
from benchmarks.model import AsyncHit, Hit, Setup
from ratelimit import AsyncProxyManager, Bandwidth, BucketConfiguration, ProxyManager


def _configuration(setup: Setup) -> BucketConfiguration:
    return BucketConfiguration(
        *(Bandwidth.greedy(limit.tokens, timedelta(seconds=limit.seconds)) for limit in setup.limits)
    )


def has_optimizations() -> bool:
    return hasattr(ratelimit, "Optimization")


def _settings(*, skip_sync: bool) -> dict[str, Any]:
    if not skip_sync:
        return {}
    optimization: Any = getattr(ratelimit, "Optimization", None)
    return {"optimization": optimization.skip_sync_on_zero()}


def sync(*, skip_sync: bool = False) -> Callable[[Setup], AbstractContextManager[Hit]]:
    """A manager as ``from_url`` gives it, with its own pool of connections."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        with ProxyManager.from_url(setup.url, _configuration(setup), **_settings(skip_sync=skip_sync)) as manager:
            yield manager.try_consume

    return opened


def asyncio(*, skip_sync: bool = False) -> Callable[[Setup], Any]:
    """The same for asyncio."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        settings = _settings(skip_sync=skip_sync)
        async with AsyncProxyManager.from_url(setup.url, _configuration(setup), **settings) as manager:
            yield manager.try_consume

    return opened
