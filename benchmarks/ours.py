"""This library, as its users call it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

from benchmarks.model import AsyncHit, Hit, Setup
from ratelimit import AsyncProxyManager, Bandwidth, BucketConfiguration, Optimization, ProxyManager
from ratelimit.settings import SettingsByName


def configuration_of(setup: Setup) -> BucketConfiguration:
    """The limits, as this library has them."""
    return BucketConfiguration(
        *(
            Bandwidth.greedy(limit.capacity, timedelta(seconds=limit.seconds), refill_tokens=limit.tokens)
            for limit in setup.limits
        )
    )


def _settings(setup: Setup, *, skip_sync: bool, remembering: bool) -> SettingsByName:
    settings = SettingsByName(timeout=setup.timeout)
    if skip_sync:
        settings["optimization"] = Optimization.skip_sync_on_zero()
    if not remembering:
        settings["memory_limit_bytes"] = 0
    return settings


def sync(*, skip_sync: bool = False, remembering: bool = True) -> Callable[[Setup], AbstractContextManager[Hit]]:
    """Return how to open a manager as ``from_url`` gives it, with its own pool of connections."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        settings = _settings(setup, skip_sync=skip_sync, remembering=remembering)
        with ProxyManager.from_url(setup.url, configuration_of(setup), **settings) as manager:
            yield manager.try_consume

    return opened


def asyncio(*, skip_sync: bool = False, remembering: bool = True) -> Callable[[Setup], Any]:
    """Return how to open a manager for asyncio."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        settings = _settings(setup, skip_sync=skip_sync, remembering=remembering)
        async with AsyncProxyManager.from_url(setup.url, configuration_of(setup), **settings) as manager:
            yield manager.try_consume

    return opened
