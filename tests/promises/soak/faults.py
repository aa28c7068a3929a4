"""A TCP proxy in front of a server, with the faults of a network: delays, lost replies, resets, and silence."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from types import TracebackType
from typing import Final, Self

_CHUNK: Final = 65_536


class FaultyProxy:
    """Forwards connections to a port of this machine.

    :ivar delay: seconds that a chunk takes at most, each way.
    :ivar losses: the share of replies that are lost, together with their connection.
    :ivar silent: whether nothing gets through, either way, and nobody is told.
    """

    def __init__(self, port: int, chance: random.Random) -> None:
        self.delay = 0.0
        self.losses = 0.0
        self.silent = threading.Event()
        self._chance = chance
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _cut(self._listener)
        self.reset()

    def calm(self) -> None:
        """No faults."""
        self.delay = self.losses = 0.0
        self.silent.clear()

    def reset(self) -> None:
        """Cut all connections."""
        with self._lock:
            cut, self._open = self._open, set()
        for one in cut:
            _cut(one)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # it restarts
                    _cut(client)
                    continue
                with self._lock:
                    self._open |= {client, server}
                for source, drain, are_replies in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=(source, drain, are_replies), daemon=True).start()

    def _pump(self, source: socket.socket, drain: socket.socket, are_replies: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                if self.delay:
                    time.sleep(self._chance.uniform(0, self.delay))
                while self.silent.is_set():
                    time.sleep(0.05)
                if are_replies and self._chance.random() < self.losses:
                    break
                drain.sendall(data)
        for one in (source, drain):
            with self._lock:
                self._open.discard(one)
            _cut(one)


def _cut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
