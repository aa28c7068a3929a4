"""A middleware of aiohttp's client that stays under somebody else's limit.

::

    limit = OutboundLimit("10/second", key="api.example.com")
    session = aiohttp.ClientSession(middlewares=(rate_limit_middleware(limit),))
"""

from __future__ import annotations

from ratelimit.integrations.extras import needing

with needing("aiohttp"):
    from aiohttp import ClientHandlerType, ClientMiddlewareType, ClientRequest, ClientResponse

    from ratelimit.integrations.outbound import OutboundLimit, host_of

__all__ = ["OutboundLimit", "host_of", "rate_limit_middleware"]


def rate_limit_middleware(limit: OutboundLimit) -> ClientMiddlewareType:
    """Return a middleware that makes each request, redirects too, wait for its turn, and learns from its answer.

    It needs aiohttp 3.12.

    :param limit: its callables are given the ``aiohttp.ClientRequest``.
    :raises InvalidArgumentError: where the limit has a manager for sync code.
    """
    limit.check_face(asynchronous=True)

    async def middleware(request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        key = await limit.aacquire(request)
        response = await handler(request)
        try:
            await limit.alearn(key, response.status, response.headers)
        except BaseException:
            response.close()
            raise
        return response

    return middleware
