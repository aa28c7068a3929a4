"""A service that limits its clients: ``GET /`` costs a token, and all replicas share the buckets in Redis.

RATELIMIT_LIMIT=10/minute REDIS_URL=redis://localhost:6379/0 PORT=8001 python app.py
"""

from __future__ import annotations

import math
import os
import signal
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ratelimit import ProxyManager, StoreError


def handler(manager: ProxyManager) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/":
                self.answer(HTTPStatus.NOT_FOUND, "There is only /.")
                return
            # A real service takes the key from a client that it has authenticated: a key that anyone may choose
            # is a fresh bucket for the asking.
            key = self.headers.get("X-API-Key") or self.client_address[0]
            try:
                probe = manager.try_consume_and_return_remaining(key)
            except StoreError as error:
                self.log_error("%s", error)
                self.answer(HTTPStatus.SERVICE_UNAVAILABLE, "The rate limiter has no store.")
                return
            if probe.consumed:
                self.answer(HTTPStatus.OK, f"{probe.remaining_tokens} left")
            elif probe.retry_after is None:
                self.answer(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests.")
            else:
                seconds = math.ceil(probe.retry_after)
                self.answer(HTTPStatus.TOO_MANY_REQUESTS, f"Retry in {seconds} s.", {"Retry-After": str(seconds)})

        def answer(self, status: HTTPStatus, text: str, headers: dict[str, str] | None = None) -> None:
            body = f"{text}\n".encode()
            self.send_response(status)
            for name, value in (
                {"Content-Type": "text/plain", "Content-Length": str(len(body))} | (headers or {})
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    url = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
    limit = os.environ.get("RATELIMIT_LIMIT", "10/minute")
    address = ("", int(os.environ.get("PORT", "8000")))
    with ProxyManager.from_url(url, limit) as manager, ThreadingHTTPServer(address, handler(manager)) as server:
        print(f"{limit} on port {address[1]}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
