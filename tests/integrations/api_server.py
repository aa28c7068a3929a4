"""A small API over real HTTP, which answers with the path, and refuses when told to."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Fields = Mapping[str, str] | Sequence[tuple[str, str]]


class ApiServer:
    """Answers 200, or what has been scripted, one for each request.

    :ivar paths: what was asked for.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self._script: deque[tuple[int, list[tuple[str, str]]]] = deque()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                api.paths.append(self.path)
                status, fields = api._script.popleft() if api._script else (200, [])
                body = self.path.encode()
                self.send_response(status)
                for name, value in [*fields, ("Content-Length", str(len(body)))]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, status: int, fields: Fields) -> None:
        """Let the next request that has no answer yet be answered so."""
        self._script.append((status, list(fields.items() if isinstance(fields, Mapping) else fields)))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
