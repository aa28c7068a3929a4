"""Transports for httpx and for httpx2, which have the same parts under the same names."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, Self

from ratelimit.integrations.outbound.limit import OutboundLimit
from ratelimit.runtime.copies import OfThisProcess

_ADVICE: Final = "pickle the limit, and make the transport in each process"


class Transport(OfThisProcess):
    """A transport in front of another one, under a limit."""

    _advice = _ADVICE

    def __init__(self, limit: OutboundLimit, transport: Any) -> None:
        limit.check_face(asynchronous=False)
        self._limit = limit
        self._transport = transport

    def handle_request(self, request: Any) -> Any:
        """Wait for the turn of the request, send it, and learn from the answer, which is given back as it is."""
        key = self._limit.acquire(request)
        response = self._transport.handle_request(request)
        try:
            self._limit.learn(key, response.status_code, response.headers)
        except BaseException:
            response.close()
            raise
        return response

    def close(self) -> None:
        """Close the inner transport."""
        self._transport.close()

    def __enter__(self) -> Self:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(kind, error, traceback)


class AsyncTransport(OfThisProcess):
    """A transport for asyncio that waits for a limit before it sends, and learns from the answer."""

    _advice = _ADVICE

    def __init__(self, limit: OutboundLimit, transport: Any) -> None:
        limit.check_face(asynchronous=True)
        self._limit = limit
        self._transport = transport

    async def handle_async_request(self, request: Any) -> Any:
        """See ``Transport.handle_request``."""
        key = await self._limit.aacquire(request)
        response = await self._transport.handle_async_request(request)
        try:
            await self._limit.alearn(key, response.status_code, response.headers)
        except BaseException:
            await response.aclose()
            raise
        return response

    async def aclose(self) -> None:
        """Close the inner transport."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(kind, error, traceback)
