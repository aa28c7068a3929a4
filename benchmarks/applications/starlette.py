"""Applications of Starlette."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, Final

from benchmarks.applications.calls import asgi
from benchmarks.applications.common import (
    BODY,
    WITHOUT,
    AsyncOpened,
    Framework,
    async_manager_for,
    bare,
    limit_of,
    ours,
    peer,
)
from benchmarks.applications.slow import slowapi, with_slowapi
from benchmarks.model import AsyncHit, Contender, Setup
from ratelimit import OnError


def _starlette(*middleware: Any) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    async def index(_: Any) -> Response:
        return Response(BODY)

    return Starlette(routes=[Route("/", index)], middleware=middleware)


@asynccontextmanager
async def _starlette_bare(_: Setup) -> AsyncGenerator[AsyncHit]:
    yield asgi(_starlette())


@asynccontextmanager
async def _starlette_ours(setup: Setup) -> AsyncGenerator[AsyncHit]:
    from starlette.middleware import Middleware

    from ratelimit.integrations.asgi import RateLimitMiddleware

    async with async_manager_for(setup) as manager:
        limited = Middleware(RateLimitMiddleware, limit_of(setup), manager=manager, on_error=OnError.DENY)
        yield asgi(_starlette(limited))


def _starlette_slowapi(middleware: str, *, headers: bool = False) -> Callable[[Setup], AsyncOpened]:
    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        from starlette.middleware import Middleware

        with slowapi(setup, default=True, headers=headers) as limiter:
            limited = Middleware(getattr(import_module("slowapi.middleware"), middleware))
            yield asgi(with_slowapi(_starlette(limited), limiter))

    return opened


STARLETTE: Final = Framework(
    "starlette",
    "Starlette",
    [
        bare(asyncio=_starlette_bare),
        *WITHOUT,
        Contender(ours("ASGI middleware"), asyncio=_starlette_ours),
        Contender(peer("slowapi ASGI middleware"), asyncio=_starlette_slowapi("SlowAPIASGIMiddleware")),
        Contender(
            peer("slowapi ASGI middleware, headers", headers=True),
            asyncio=_starlette_slowapi("SlowAPIASGIMiddleware", headers=True),
        ),
        Contender(peer("slowapi middleware"), asyncio=_starlette_slowapi("SlowAPIMiddleware")),
    ],
)
