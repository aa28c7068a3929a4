"""Somebody else's API: it refuses who calls it more often than its limit says, and remembers all calls.

PORT=9000 python api.py
"""

from __future__ import annotations

import json
import math
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, cast

from ratelimit import Bucket, MemoryStore, ProxyManager

LIMIT = "20/second burst 50"


class Call(NamedTuple):
    """A call, with its times on the clock of ``time.monotonic``, which all processes of a machine share.

    :param asked: when the worker wanted to call, as it says.
    :param arrived: when it did.
    """

    worker: str
    asked: float
    arrived: float
    status: int


class Api(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 100

    def __init__(self, port: int, bucket: Bucket) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.bucket = bucket
        self.calls: list[Call] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        api = cast("Api", self.server)
        if self.path == "/calls":
            self.answer(200, api.calls)
            return
        now = time.monotonic()
        probe = api.bucket.try_consume_and_return_remaining()
        status = 200 if probe else 429
        api.calls.append(Call(self.headers["X-Worker"], float(self.headers["X-Asked"]), now, status))
        self.answer(status, "welcome" if probe else "too many", math.ceil(probe.retry_after or 0))

    def answer(self, status: int, content: object, retry_after: int = 0) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if retry_after:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


def main() -> None:
    with ProxyManager(MemoryStore(), LIMIT) as manager:
        Api(int(os.environ.get("PORT", "9000")), manager.bucket("everybody")).serve_forever()


if __name__ == "__main__":
    main()
