"""A TCP proxy between a client and a real server, which does to their conversation what networks do."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import hiredis

SWAPS = rb"EVAL|\r\nSET\r\n"
CLOSE = b"<close>"
RESET = b"<reset>"
SILENCE = b"<silence>"


class Proxy:
    """Forwards connections to a local port.

    ``lose_replies`` and ``lose_requests`` are how many of the next replies and requests are swallowed; the connection
    that one of them came over is cut. Only those of commands in which the pattern ``about`` is found count, not the
    handshakes;
    at first these are the swaps, whether by a script or by the server's own command. Commands and replies are small
    here: each is one chunk. ``after_loss`` is called after each, before the connection is cut.

    The faults are there until the end of their ``with`` blocks. Connections that a fault has touched do not get well
    again.

    :ivar connections: how many were made, or tried.
    """

    def __init__(self, port: int) -> None:
        self.lose_replies = 0
        self.lose_requests = 0
        self.after_loss: Callable[[], object] = lambda: None
        self.about = SWAPS
        self.lost = 0
        self.connections = 0
        self._spoilt: Callable[[bytes], bytes] | None = None
        self._spoils_next = False
        self._delay = self._gap = 0.0
        self._silent = False
        self._healed = threading.Event()
        self._target = ("127.0.0.1", port)
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.port = 0
        self._listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._healed.set()
        _close(self._listener)
        self.cut()

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            for one in self._sockets:
                _close(one)
            self._sockets.clear()

    @contextmanager
    def slow(self, delay: float = 0.0, gap: float = 0.0) -> Generator[None]:
        """Hold each reply back for some time, or give it out byte by byte, with a gap before each; all of them."""
        self._healed.clear()
        self._delay, self._gap = delay, gap
        yield
        self._delay = self._gap = 0.0
        self._healed.set()

    @contextmanager
    def spoiling(self, spoilt: Callable[[bytes], bytes]) -> Generator[None]:
        """Put other bytes, which may end in CLOSE, RESET or SILENCE, in the place of every other reply.

        Where replies come several at a time they stay as they are.
        """
        self._spoilt, self._spoils_next = spoilt, True
        yield
        self._spoilt = None

    @contextmanager
    def black_hole(self) -> Generator[None]:
        """Forward nothing any more, in neither direction; what was connected meanwhile hears nothing ever after."""
        self._silent = True
        yield
        self._silent = False

    @contextmanager
    def refusing(self) -> Generator[None]:
        """End all connections, and let nobody connect."""
        _close(self._listener)
        self.cut()
        yield
        self._listen()

    @contextmanager
    def full(self) -> Generator[None]:
        """End all connections, and leave new ones without an answer, as a full backlog does."""
        _close(self._listener)
        self.cut()
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listener(self.port, backlog=0))
            for _ in range(3):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            yield
        self._listen()

    def _listen(self) -> None:
        self._listener = _listener(self.port, backlog=100)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.connections += 1
                server = socket.create_connection(self._target)
                with self._lock:
                    self._sockets |= {client, server}
                dead, requests = threading.Event(), [b""]
                for way in ((client, server, requests, True, dead), (server, client, requests, False, dead)):
                    threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _pump(  # noqa: C901  # one way of the conversation, and all that may happen to it
        self, source: socket.socket, drain: socket.socket, requests: list[bytes], forth: bool, dead: threading.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if self._silent:
                    dead.set()
                if dead.is_set():
                    continue
                if forth:
                    requests[:] = [data]
                about = re.search(self.about, requests[0])
                if about and self._loses("lose_requests" if forth else "lose_replies"):
                    self.after_loss()
                    break
                if forth:
                    drain.sendall(data)
                    continue
                if about and self._spoilt is not None and _is_one_reply(data) and self._spoils():
                    data = self._spoilt(data)
                self._give_out(data.removesuffix(CLOSE).removesuffix(RESET).removesuffix(SILENCE), drain)
                if data.endswith(SILENCE):
                    dead.set()
                if data.endswith(RESET):
                    requests[:] = [RESET]
                if data.endswith((CLOSE, RESET)):
                    break
        for one in (source, drain):
            with self._lock:
                self._sockets.discard(one)
            _close(one, reset=requests == [RESET])

    def _give_out(self, data: bytes, drain: socket.socket) -> None:
        if self._delay:
            self._healed.wait(self._delay)
        size = 1 if self._gap else len(data)
        for place in range(0, len(data), size or 1):
            if self._gap:
                self._healed.wait(self._gap)
            drain.sendall(data[place : place + size])

    def _spoils(self) -> bool:
        with self._lock:
            self._spoils_next = not self._spoils_next
            return not self._spoils_next

    def _loses(self, losses: str) -> bool:
        with self._lock:
            left: int = getattr(self, losses)
            if left:
                setattr(self, losses, left - 1)
                self.lost += 1
            return left > 0


def _is_one_reply(data: bytes) -> bool:
    replies = hiredis.Reader(notEnoughData=CLOSE)
    replies.feed(data)
    try:
        return replies.gets() is not CLOSE and not replies.has_data()
    except hiredis.ProtocolError:  # the rest of one that came in two
        return False


def _listener(port: int, backlog: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=backlog)


def _close(one: socket.socket, *, reset: bool = False) -> None:
    with contextlib.suppress(OSError):
        if reset:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # A thread that receives from the socket has to let go of it.
        one.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
    one.close()
