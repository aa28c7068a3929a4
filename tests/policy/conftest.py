"""Limiters of both faces for the tests of policies."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    """Whether a limiter is that of asyncio."""
    return bool(request.param)
