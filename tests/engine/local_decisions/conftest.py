"""Managers over one store, by an optimization."""

from __future__ import annotations

from typing import Any

import pytest

from ratelimit import AsyncProxyManager, Optimization, ProxyManager
from ratelimit.testing import ManualClock
from tests.engine.local_decisions.doubles import LIMITS, NOW, CountingStore, Make
from tests.support.both_faces import Settled, for_asyncio


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def store() -> CountingStore:
    return CountingStore()


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest, store: CountingStore, clock: ManualClock) -> Make:
    """Give a function that makes managers over one store, by an optimization."""

    def made(optimization: Optimization | None, limits: Any = LIMITS, **keywords: Any) -> Settled:
        keywords = {"clock": clock, "optimization": optimization, **keywords}
        if request.param == "sync":
            return Settled(ProxyManager(store, limits, **keywords))
        return Settled(AsyncProxyManager(for_asyncio(store), limits, **keywords))

    return made
