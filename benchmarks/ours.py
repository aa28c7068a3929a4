"""This library, as its users call it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

from benchmarks.model import AsyncHit, Hit, Setup
from ratelimit import AsyncProxyManager, Bandwidth, BucketConfiguration, Optimization, ProxyManager

PATIENCE = 30.0  # seconds, as for the peers: a crowd on a busy machine takes its time


def configuration_of(setup: Setup) -> BucketConfiguration:
    """The limits, as this library has them."""
    return BucketConfiguration(
        *(Bandwidth.greedy(limit.tokens, timedelta(seconds=limit.seconds)) for limit in setup.limits)
    )


def _optimization(*, skip_sync: bool) -> Optimization | None:
    return Optimization.skip_sync_on_zero() if skip_sync else None


def sync(*, skip_sync: bool = False) -> Callable[[Setup], AbstractContextManager[Hit]]:
    """A manager as ``from_url`` gives it, with its own pool of connections."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        optimization = _optimization(skip_sync=skip_sync)
        with ProxyManager.from_url(
            setup.url, configuration_of(setup), timeout=PATIENCE, optimization=optimization
        ) as manager:
            yield manager.try_consume

    return opened


def asyncio(*, skip_sync: bool = False) -> Callable[[Setup], Any]:
    """Return how to open a manager for asyncio."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        optimization = _optimization(skip_sync=skip_sync)
        async with AsyncProxyManager.from_url(
            setup.url, configuration_of(setup), timeout=PATIENCE, optimization=optimization
        ) as manager:
            yield manager.try_consume

    return opened
