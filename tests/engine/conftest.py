from __future__ import annotations

from typing import Any, Protocol

import pytest

from ratelimit import AsyncProxyManager, ProxyManager
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.support.both_faces import Settled, for_asyncio

NOW = 1_700_000_000 * 10**9
SECOND = 10**9


class Make(Protocol):
    """Makes a manager of one face over a store in memory."""

    def __call__(self, store: SwappingMemoryStore, limits: Any, **settings: Any) -> Settled: ...


@pytest.fixture
def clock() -> ManualClock:
    """A clock that shows the beginning of a window of ten seconds, or of a divisor of these."""
    return ManualClock(NOW)


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest) -> Make:
    def made(store: SwappingMemoryStore, limits: Any, **settings: Any) -> Settled:
        if request.param == "sync":
            return Settled(ProxyManager(store, limits, **settings))
        return Settled(AsyncProxyManager(for_asyncio(store), limits, **settings))

    return made
