"""Transports of httpx and httpx2 over real HTTP, under a limit."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator, Generator
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
from tests.integrations.api_server import ApiServer

pytest.importorskip("http_sf")

from ratelimit.integrations.outbound import OutboundLimit, host_of

NOW = 1_700_000_000 * 10**9
SECOND = 10**9


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


@pytest.fixture
def integration(library: Any) -> Any:
    return importlib.import_module(f"ratelimit.integrations.{library.__name__}")


@pytest.fixture
def api() -> Generator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


class Client:
    """A client of either face, under a limit."""

    def __init__(self, library: Any, integration: Any, kind: str, **settings: Any) -> None:
        self.is_async = kind == "asyncio"
        self.clock = ManualClock(NOW)
        settings = {"key": "api", "jitter": lambda: 0, "clock": self.clock, "manager": self._manager(), **settings}
        self.limit = OutboundLimit("1/second burst 2", **settings)
        if self.is_async:
            self.client = library.AsyncClient(transport=integration.AsyncRateLimitTransport(self.limit))
        else:
            self.client = library.Client(transport=integration.RateLimitTransport(self.limit))

    def _manager(self) -> Any:
        if self.is_async:
            return AsyncProxyManager(AsyncMemoryStore(), clock=self.clock)
        return ProxyManager(MemoryStore(), clock=self.clock)

    async def get(self, url: str, **options: Any) -> Any:
        return await self.client.get(url, **options) if self.is_async else self.client.get(url, **options)


@pytest.fixture
def opened(library: Any, integration: Any, kind: str) -> Any:
    @asynccontextmanager
    async def open_client(**settings: Any) -> AsyncGenerator[Client]:
        client = Client(library, integration, kind, **settings)
        if client.is_async:
            async with client.client:
                yield client
        else:
            with client.client:
                yield client

    return open_client


async def test_requests_wait_for_their_turns(opened: Any, api: ApiServer) -> None:
    async with opened() as client:
        for number in range(4):
            assert (await client.get(f"{api.url}/{number}")).text == f"/{number}"
    assert client.clock.slept == [SECOND] * 2


async def test_an_answer_is_given_back_as_it_is_and_learned_from(opened: Any, api: ApiServer) -> None:
    api.answer(429, {"Retry-After": "30"})
    async with opened() as client:
        refused = await client.get(api.url)
        assert (refused.status_code, refused.headers["retry-after"], refused.text) == (429, "30", "/")
        await client.get(api.url)
        await client.get(api.url)
    assert client.clock.slept == [30 * SECOND, SECOND]
    assert len(api.paths) == 3


async def test_fields_that_are_sent_twice_are_learned_from(opened: Any, api: ApiServer) -> None:
    api.answer(200, [("RateLimit", '"a";r=0;t=30'), ("RateLimit", '"b";r=0;t=40')])
    async with opened() as client:
        await client.get(api.url)
        await client.get(api.url)
    assert client.clock.slept == [40 * SECOND]


async def test_a_redirect_wants_a_turn_of_its_own(opened: Any, api: ApiServer) -> None:
    api.answer(302, {"Location": "/there"})
    async with opened() as client:
        assert (await client.get(api.url, follow_redirects=True)).text == "/there"
        await client.get(api.url)
    assert client.clock.slept == [SECOND]


async def test_a_turn_that_is_too_far_off_sends_nothing(opened: Any, api: ApiServer) -> None:
    async with opened(max_wait=0.5, key=host_of) as client:
        await client.get(api.url)
        await client.get(api.url)
        with pytest.raises(RateLimitExceeded) as refusal:
            await client.get(api.url)
    assert (refusal.value.key, refusal.value.retry_after) == ("127.0.0.1", 1.0)
    assert len(api.paths) == 2


async def test_an_answer_can_be_streamed(opened: Any, api: ApiServer) -> None:
    async with opened() as client:
        if client.is_async:
            async with client.client.stream("GET", f"{api.url}/big") as response:
                read = b"".join([part async for part in response.aiter_raw()])
        else:
            with client.client.stream("GET", f"{api.url}/big") as response:
                read = b"".join(response.iter_raw())
    assert read == b"/big"


class Closing:
    """An inner transport that notes what happens to it, and to its responses."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.notes: list[str] = []

    def handle_request(self, request: Any) -> Any:
        notes = self.notes

        class Stream(self.library.SyncByteStream, self.library.AsyncByteStream):  # type: ignore[misc,name-defined]  # either library's
            def close(self) -> None:
                notes.append("response closed")

            async def aclose(self) -> None:
                notes.append("response closed")

        return self.library.Response(429, headers={"Retry-After": "5"}, stream=Stream())

    async def handle_async_request(self, request: Any) -> Any:
        return self.handle_request(request)

    def close(self) -> None:
        self.notes.append("closed")

    async def aclose(self) -> None:
        self.close()


async def test_an_answer_that_nobody_gets_is_closed(library: Any, integration: Any, kind: str) -> None:
    def interrupt() -> float:
        raise KeyboardInterrupt

    inner = Closing(library)
    client = Client(library, integration, kind, jitter=interrupt)
    request = library.Request("GET", "http://api.example.com")
    with pytest.raises(KeyboardInterrupt):
        if client.is_async:
            transport = integration.AsyncRateLimitTransport(client.limit, inner)
            await transport.handle_async_request(request)
        else:
            integration.RateLimitTransport(client.limit, inner).handle_request(request)
    assert inner.notes == ["response closed"]


async def test_the_inner_transport_is_closed_with_the_outer(library: Any, integration: Any, kind: str) -> None:
    client, inner = Client(library, integration, kind), Closing(library)
    if client.is_async:
        await integration.AsyncRateLimitTransport(client.limit, inner).aclose()
    else:
        integration.RateLimitTransport(client.limit, inner).close()
    assert inner.notes == ["closed"]


async def test_a_cancelled_request_gives_its_turn_back(library: Any, integration: Any, api: ApiServer) -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "1/hour")
    limit = OutboundLimit("1/hour", key="api", max_wait=None, manager=manager)
    bucket = manager.bucket("outbound:api")
    async with library.AsyncClient(transport=integration.AsyncRateLimitTransport(limit)) as client:
        await client.get(api.url)
        waiting = asyncio.create_task(client.get(api.url))
        while await bucket.available_tokens() != -1:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await bucket.available_tokens() == 0
    assert len(api.paths) == 1


def test_a_manager_of_the_other_kind_is_refused(integration: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="ProxyManager"):
        integration.RateLimitTransport(OutboundLimit("1/s", key="api", manager=AsyncProxyManager(AsyncMemoryStore())))
    with pytest.raises(InvalidArgumentError, match="AsyncProxyManager"):
        integration.AsyncRateLimitTransport(OutboundLimit("1/s", key="api", manager=ProxyManager(MemoryStore())))


def test_one_limit_by_url_serves_sync_code_and_asyncio(integration: Any) -> None:
    limit = OutboundLimit("1/second", key="api", manager="memory://")
    integration.RateLimitTransport(limit).close()
    asyncio.run(integration.AsyncRateLimitTransport(limit).aclose())


@pytest.mark.redis
def test_workers_share_what_one_of_them_was_told(
    library: Any, integration: Any, api: ApiServer, redis_url: str
) -> None:
    api.answer(429, {"Retry-After": "100"})
    clients = []
    for _ in range(2):
        limit = OutboundLimit("10/second", key="api", max_wait=30, manager=ProxyManager.from_url(redis_url))
        clients.append(library.Client(transport=integration.RateLimitTransport(limit)))
    assert clients[0].get(api.url).status_code == 429
    for client in clients:
        with pytest.raises(RateLimitExceeded):
            client.get(api.url)
        client.close()
    assert len(api.paths) == 1
