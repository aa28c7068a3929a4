"""Transports of httpx2 that stay under somebody else's limit.

::

    limit = OutboundLimit("10/second", key="api.example.com")
    client = httpx2.Client(transport=RateLimitTransport(limit))
"""

from __future__ import annotations

from ratelimit.integrations.extras import needing

with needing("httpx2"):
    import httpx2

    from ratelimit.integrations.outbound import OutboundLimit, host_of
    from ratelimit.integrations.outbound.transports import AsyncTransport, Transport

__all__ = ["AsyncRateLimitTransport", "OutboundLimit", "RateLimitTransport", "host_of"]


class RateLimitTransport(Transport, httpx2.BaseTransport):
    """For ``httpx2.Client``: makes each request, redirects too, wait for its turn, and learns from its answer.

    :param limit: its callables are given the ``httpx2.Request``.
    :param transport: what sends the requests; an ``httpx2.HTTPTransport()`` of its own when None.
    :raises InvalidArgumentError: where the limit has a manager for asyncio.
    """

    def __init__(self, limit: OutboundLimit, transport: httpx2.BaseTransport | None = None) -> None:
        super().__init__(limit, httpx2.HTTPTransport() if transport is None else transport)


class AsyncRateLimitTransport(AsyncTransport, httpx2.AsyncBaseTransport):
    """For ``httpx2.AsyncClient``: makes each request wait for its turn under asyncio, and learns from its answer.

    :raises InvalidArgumentError: where the limit has a manager for sync code.
    """

    def __init__(self, limit: OutboundLimit, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        super().__init__(limit, httpx2.AsyncHTTPTransport() if transport is None else transport)
