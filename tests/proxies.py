"""A TCP proxy between a client and a real server, which loses what it is told to lose."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from types import TracebackType
from typing import Self

SWAPS = rb"EVAL|\r\nSET\r\n"


class Proxy:
    """Forwards connections to a local port.

    ``lose_replies`` and ``lose_requests`` are how many of the next replies and requests are swallowed; the connection
    that one of them came over is cut. Only those of commands in which the pattern ``about`` is found count, not the
    handshakes;
    at first these are the swaps, whether by a script or by the server's own command. Commands and replies are small
    here: each is one chunk.
    """

    def __init__(self, port: int) -> None:
        self.lose_replies = 0
        self.lose_requests = 0
        self.about = SWAPS
        self.lost = 0
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = {self._listener}
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            for one in self._sockets:
                _close(one)
            self._sockets.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                with self._lock:
                    self._sockets |= {client, server}
                requests: list[bytes] = []
                threading.Thread(target=self._pump, args=(client, server, requests, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, requests, False), daemon=True).start()

    def _pump(self, source: socket.socket, drain: socket.socket, requests: list[bytes], forth: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if forth:
                    requests[:] = [data]
                if re.search(self.about, requests[0]) and self._loses("lose_requests" if forth else "lose_replies"):
                    break
                drain.sendall(data)
        for one in (source, drain):
            with self._lock:
                self._sockets.discard(one)
            _close(one)

    def _loses(self, losses: str) -> bool:
        with self._lock:
            left: int = getattr(self, losses)
            if left:
                setattr(self, losses, left - 1)
                self.lost += 1
            return left > 0


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
