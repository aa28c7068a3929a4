"""This library, as its users call it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any

from benchmarks.model import AsyncHit, Hit, Setup
from ratelimit import AsyncProxyManager, Bandwidth, BucketConfiguration, Optimization, ProxyManager, all_of
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


@contextmanager
def _managers(setup: Setup, buckets: int) -> Generator[list[ProxyManager]]:
    """Open so many managers over one store."""
    limits = configuration_of(setup)
    with ProxyManager.from_url(setup.url, limits, prefix="0:", timeout=setup.timeout) as first:
        others = [
            ProxyManager(first.store, limits, prefix=f"{number}:", timeout=setup.timeout)
            for number in range(1, buckets)
        ]
        yield [first, *others]


def together(buckets: int) -> Callable[[Setup], AbstractContextManager[Hit]]:
    """Return how to charge so many buckets in one decision."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        with _managers(setup, buckets) as managers:
            yield lambda key: all_of(*[manager.bucket(key) for manager in managers]).try_consume()

    return opened


def one_after_the_other(buckets: int) -> Callable[[Setup], AbstractContextManager[Hit]]:
    """Return how to charge so many buckets by a decision each."""

    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        with _managers(setup, buckets) as managers:
            yield lambda key: all(manager.try_consume(key) for manager in managers)

    return opened


def asyncio(*, skip_sync: bool = False, remembering: bool = True) -> Callable[[Setup], Any]:
    """Return how to open a manager for asyncio."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        settings = _settings(setup, skip_sync=skip_sync, remembering=remembering)
        async with AsyncProxyManager.from_url(setup.url, configuration_of(setup), **settings) as manager:
            yield manager.try_consume

    return opened
