"""Applications, called as a server would call them, by the address of a client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from io import BytesIO
from typing import Any

from benchmarks.measure import WrongAnswerError
from benchmarks.model import AsyncHit, Hit, Setup


def wsgi(app: Callable[..., Any]) -> Hit:
    """Asks a WSGI application for its only page."""

    def hit(address: str) -> bool:
        answered = ""

        def start_response(status: str, _headers: Any, _exc_info: Any = None) -> Callable[[bytes], object]:
            nonlocal answered
            answered = status
            return lambda _: None

        environ = {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/",
            "QUERY_STRING": "",
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": address,
            "HTTP_HOST": "example.com",
            "HTTP_ACCEPT": "*/*",
            "HTTP_USER_AGENT": "benchmark",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": BytesIO(),
            "wsgi.errors": BytesIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": True,
            "wsgi.run_once": False,
        }
        body = app(environ, start_response)
        try:
            for _ in body:
                pass
        finally:
            if hasattr(body, "close"):
                body.close()
        return _admitted(int(answered[:3]))

    return hit


def asgi(app: Callable[..., Awaitable[None]]) -> AsyncHit:
    """Asks an ASGI application for its only page."""

    async def hit(address: str) -> bool:
        answered, read = 0, False

        async def receive() -> dict[str, Any]:
            nonlocal read
            if read:
                await asyncio.get_running_loop().create_future()  # nobody disconnects
            read = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 80),
            "client": (address, 50_000),
            "scheme": "http",
            "method": "GET",
            "root_path": "",
            "path": "/",
            "raw_path": b"/",
            "query_string": b"",
            "headers": [(b"host", b"example.com"), (b"accept", b"*/*"), (b"user-agent", b"benchmark")],
            "state": {},
        }
        await app(scope, receive, send)
        return _admitted(answered)

    return hit


def called(
    opened: Callable[[Setup], AbstractAsyncContextManager[Any]],
) -> Callable[[Setup], AbstractAsyncContextManager[AsyncHit]]:
    """Return how to open an ASGI application and ask it, from how to open it."""

    @asynccontextmanager
    async def hit(setup: Setup) -> AsyncGenerator[AsyncHit]:
        async with opened(setup) as app:
            yield asgi(app)

    return hit


def _admitted(status: int) -> bool:
    if status not in (200, 429):
        raise WrongAnswerError(f"the answer has the status {status}")
    return status == 200
