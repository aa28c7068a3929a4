"""Applications of FastAPI."""

# No "from __future__ import annotations": FastAPI could not resolve those of an endpoint that is defined in a function.

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import Any, Final

import redis.asyncio

from benchmarks.applications.calls import called
from benchmarks.applications.common import (
    WITHOUT,
    Framework,
    async_manager_for,
    bare,
    in_memory,
    limit_of,
    ours,
    peer,
)
from benchmarks.applications.slow import slowapi, with_slowapi
from benchmarks.model import Contender, Setup
from ratelimit import OnError

Opened = Callable[[Setup], AbstractAsyncContextManager[Any]]
"""Opens an application."""


def _fastapi(*dependencies: Any) -> Any:
    from fastapi import Depends, FastAPI

    app = FastAPI()

    @app.get("/", dependencies=[Depends(dependency) for dependency in dependencies])
    async def index() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        return {"answer": "ok"}

    return app


@asynccontextmanager
async def _fastapi_bare(_: Setup) -> AsyncGenerator[Any]:
    yield _fastapi()


@asynccontextmanager
async def _fastapi_dependency(setup: Setup) -> AsyncGenerator[Any]:
    from ratelimit.integrations.fastapi import RateLimit

    async with async_manager_for(setup) as manager:
        yield _fastapi(RateLimit(limit_of(setup), manager=manager, on_error=OnError.DENY))


@asynccontextmanager
async def _fastapi_middleware(setup: Setup) -> AsyncGenerator[Any]:
    from ratelimit.integrations.asgi import RateLimitMiddleware

    app = _fastapi()
    async with async_manager_for(setup) as manager:
        app.add_middleware(RateLimitMiddleware, limit_of(setup), manager=manager, on_error=OnError.DENY)
        yield app


def _fastapi_slowapi(*, headers: bool) -> Opened:
    """A decorator, which reads the parameters of the endpoint."""

    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[Any]:
        from fastapi import FastAPI, Request, Response

        app = FastAPI()
        with slowapi(setup, default=False, headers=headers) as limiter:

            @app.get("/")
            @limiter.limit(limit_of(setup))  # type: ignore[untyped-decorator]  # it is not installed everywhere
            async def index(  # pyright: ignore[reportUnusedFunction, reportUntypedFunctionDecorator]
                request: Request,  # noqa: ARG001
                response: Response,  # noqa: ARG001
            ) -> dict[str, str]:
                return {"answer": "ok"}

            yield with_slowapi(app, limiter)

    return opened


@asynccontextmanager
async def _fastapi_limiter(setup: Setup) -> AsyncGenerator[Any]:
    """``fastapi-limiter`` decides by ``pyrate-limiter``, which needs a factory to have a bucket for each client."""
    pyrate = import_module("pyrate_limiter")
    (limit,) = setup.limits
    rates = [pyrate.Rate(limit.tokens, limit.seconds * 1_000)]
    client: Any = None
    if not in_memory(setup):
        client = redis.asyncio.Redis.from_url(setup.url, max_connections=setup.connections + 1)
    buckets: dict[str, Any] = {}

    def bucket(name: str) -> Any:
        if name not in buckets:
            store = pyrate.InMemoryStateStore() if client is None else pyrate.RedisStateStore(client, name)
            buckets[name] = pyrate.StateBucket(rates, pyrate.TokenBucket(), store)
        return buckets[name]

    def wrap_item(_: Any, name: str, weight: int = 1) -> Any:
        return pyrate.RateItem(name, bucket(name).now(), weight=weight)

    def get(_: Any, item: Any) -> Any:
        return bucket(item.name)

    factory = type("Buckets", (pyrate.BucketFactory,), {"wrap_item": wrap_item, "get": get})()
    limiter = import_module("fastapi_limiter.depends").RateLimiter(limiter=pyrate.Limiter(factory))
    try:
        yield _fastapi(limiter)
    finally:
        if client is not None:
            await client.aclose()


FASTAPI: Final = Framework(
    "fastapi",
    "FastAPI",
    [
        bare(asyncio=called(_fastapi_bare)),
        *WITHOUT,
        Contender(ours("dependency"), asyncio=called(_fastapi_dependency)),
        Contender(ours("middleware"), asyncio=called(_fastapi_middleware)),
        Contender(peer("slowapi decorator"), asyncio=called(_fastapi_slowapi(headers=False))),
        Contender(peer("slowapi decorator, headers", headers=True), asyncio=called(_fastapi_slowapi(headers=True))),
        Contender(peer("fastapi-limiter"), asyncio=called(_fastapi_limiter)),
    ],
)

SERVED: Final[dict[str, Opened]] = {
    "without a limit": _fastapi_bare,
    "ratelimit-redis, dependency": _fastapi_dependency,
    "slowapi decorator": _fastapi_slowapi(headers=False),
    "fastapi-limiter": _fastapi_limiter,
}
"""The applications of a service; the first one has no limit."""
