"""What decisions without the store send to a real server."""

from __future__ import annotations

import pytest

from ratelimit import AsyncProxyManager, Optimization, ProxyManager
from tests.engine.local_decisions.doubles import MANUAL, SKIP
from tests.support.redis_monitor import monitored


@pytest.mark.redis
def test_what_is_sent(redis_url: str) -> None:
    with monitored(redis_url) as monitor:
        with ProxyManager.from_url(redis_url, "5/hour", optimization=SKIP) as manager:
            for _ in range(6):
                manager.try_consume("refused")
            monitor.sent()
            for _ in range(20):
                assert not manager.try_consume("refused")
            assert monitor.sent() == []
        with ProxyManager.from_url(redis_url, "1000/hour", optimization=Optimization.delaying(9, 60)) as manager:
            assert manager.try_consume("delayed")
            monitor.sent()
            for _ in range(100):
                assert manager.try_consume("delayed")
            assert len(without_time(monitor.sent())) == 10
            for _ in range(20):
                manager.available_tokens("delayed")
                manager.snapshot("delayed")
            assert monitor.sent() == []
            assert manager.try_consume("delayed", 3)
        assert len(without_time(monitor.sent())) == 1
        with ProxyManager.from_url(redis_url, "1000/hour") as manager:
            assert manager.snapshot("delayed").consumed_tokens == 104


def without_time(sent: list[str]) -> list[str]:
    """Leave out what goes along with the first commands."""
    return [command for command in sent if command != "TIME"]


@pytest.mark.redis
async def test_what_is_sent_by_asyncio(redis_url: str) -> None:
    with monitored(redis_url) as monitor:
        async with AsyncProxyManager.from_url(redis_url, "1000/hour", optimization=MANUAL) as manager:
            assert await manager.try_consume("key")
            monitor.sent()
            for _ in range(100):
                assert await manager.try_consume("key")
            assert monitor.sent() == []
        assert len(without_time(monitor.sent())) == 1
        async with AsyncProxyManager.from_url(redis_url, "1000/hour") as manager:
            assert (await manager.snapshot("key")).consumed_tokens == 101
