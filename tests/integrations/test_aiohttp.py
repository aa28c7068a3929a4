"""The middleware of aiohttp's client over real HTTP, under a limit."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    InvalidArgumentError,
    MemoryStore,
    ProxyManager,
    RateLimitExceeded,
)
from ratelimit.testing import ManualClock

pytest.importorskip("http_sf")
aiohttp = pytest.importorskip("aiohttp")

from aiohttp import ClientSession, web  # noqa: E402
from aiohttp.test_utils import TestServer  # noqa: E402

from ratelimit.integrations.aiohttp import rate_limit_middleware  # noqa: E402
from ratelimit.integrations.outbound import OutboundLimit, host_of  # noqa: E402

NOW = 1_700_000_000 * 10**9
SECOND = 10**9


class Api:
    """Answers with the path, and as it is scripted."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.script: deque[tuple[int, list[tuple[str, str]]]] = deque()
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.paths.append(request.path)
        status, fields = self.script.popleft() if self.script else (200, [])
        response = web.Response(status=status, text=request.path)
        for name, value in fields:
            response.headers.add(name, value)
        return response


@pytest.fixture
async def api() -> AsyncGenerator[Api]:
    api = Api()
    app = web.Application()
    app.router.add_get("/{path:.*}", api.handle)
    async with TestServer(app) as server:
        api.url = str(server.make_url("/"))
        yield api


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


Open = Callable[..., Any]


@pytest.fixture
def open_session(clock: ManualClock) -> Open:
    @asynccontextmanager
    async def open_session(**settings: Any) -> AsyncGenerator[ClientSession]:
        manager = AsyncProxyManager(AsyncMemoryStore(), clock=clock)
        settings = {"key": "api", "jitter": lambda: 0, "clock": clock, "manager": manager, **settings}
        limit = OutboundLimit("1/second burst 2", **settings)
        async with ClientSession(middlewares=(rate_limit_middleware(limit),)) as session:
            yield session

    return open_session


async def get(session: ClientSession, url: str) -> tuple[int, str]:
    async with session.get(url) as response:
        return response.status, await response.text()


async def test_requests_wait_for_their_turns(open_session: Open, api: Api, clock: ManualClock) -> None:
    async with open_session() as session:
        for number in range(4):
            assert await get(session, f"{api.url}{number}") == (200, f"/{number}")
    assert clock.slept == [SECOND] * 2


async def test_an_answer_is_given_back_as_it_is_and_learned_from(
    open_session: Open, api: Api, clock: ManualClock
) -> None:
    api.script.append((429, [("Retry-After", "30")]))
    async with open_session() as session:
        assert await get(session, f"{api.url}x") == (429, "/x")
        assert await get(session, api.url) == (200, "/")
    assert clock.slept == [30 * SECOND]


async def test_fields_that_are_sent_twice_are_learned_from(open_session: Open, api: Api, clock: ManualClock) -> None:
    api.script.append((200, [("RateLimit", '"a";r=0;t=30'), ("RateLimit", '"b";r=0;t=40')]))
    async with open_session() as session:
        await get(session, api.url)
        await get(session, api.url)
    assert clock.slept == [40 * SECOND]


async def test_a_redirect_wants_a_turn_of_its_own(open_session: Open, api: Api, clock: ManualClock) -> None:
    api.script.append((302, [("Location", "/there")]))
    async with open_session() as session:
        assert await get(session, api.url) == (200, "/there")
        await get(session, api.url)
    assert clock.slept == [SECOND]


async def test_a_turn_that_is_too_far_off_sends_nothing(open_session: Open, api: Api) -> None:
    async with open_session(max_wait=0.5, key=host_of) as session:
        await get(session, api.url)
        await get(session, api.url)
        with pytest.raises(RateLimitExceeded) as refusal:
            await get(session, api.url)
    assert (refusal.value.key, refusal.value.retry_after) == ("127.0.0.1", 1.0)
    assert len(api.paths) == 2


async def test_a_cancelled_request_gives_its_turn_back(api: Api) -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "1/hour")
    limit = OutboundLimit("1/hour", key="api", max_wait=None, manager=manager)
    bucket = manager.bucket("outbound:api")
    async with ClientSession(middlewares=(rate_limit_middleware(limit),)) as session:
        await get(session, api.url)
        waiting = asyncio.create_task(get(session, api.url))
        while await bucket.available_tokens() != -1:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await bucket.available_tokens() == 0
    assert len(api.paths) == 1


async def test_an_answer_that_nobody_gets_is_closed(open_session: Open, api: Api) -> None:
    def interrupt() -> float:
        raise asyncio.CancelledError

    api.script.append((429, []))
    async with open_session(jitter=interrupt) as session:
        with pytest.raises(asyncio.CancelledError):
            await get(session, api.url)
        assert not session.connector._acquired


def test_a_manager_for_sync_code_is_refused() -> None:
    limit = OutboundLimit("1/second", key="api", manager=ProxyManager(MemoryStore()))
    with pytest.raises(InvalidArgumentError, match="AsyncProxyManager"):
        rate_limit_middleware(limit)
