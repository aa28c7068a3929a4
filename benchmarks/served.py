"""An application of FastAPI as a server's workers run it: ``uvicorn --factory benchmarks.served:application``."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from typing import Any, Final

from benchmarks.applications.fastapi import SERVED
from benchmarks.model import Limit, Setup

NAME: Final = "RATELIMIT_BENCH_APPLICATION"
URL: Final = "RATELIMIT_BENCH_URL"
LIMIT: Final = "RATELIMIT_BENCH_LIMIT"
"""Tokens and seconds, with a blank between them."""
CONNECTIONS: Final = 50


class Served:
    """Opens an application when the worker starts, and closes it at its end."""

    def __init__(self, name: str, setup: Setup) -> None:
        self._opened = SERVED[name](setup)
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        async with AsyncExitStack() as stack:
            await receive()
            self._app = await stack.enter_async_context(self._opened)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


def application() -> Served:
    """Return the application that the environment names."""
    tokens, seconds = map(int, os.environ[LIMIT].split())
    return Served(os.environ[NAME], Setup(os.environ[URL], (Limit(tokens, seconds),), CONNECTIONS))
