"""A proxy in front of a real server, which answers some commands itself, with errors that are rare on a real one."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import hiredis

from tests.support.servers import SLOTS, RedisServer

_INCOMPLETE = object()


class ScriptedProxy:
    """A proxy that hands commands on to a server, and its replies back, one by one.

    A client that asks for the nodes of the cluster learns that the proxy is the only one.

    :param alone: False to let the server say which nodes its cluster has.
    :ivar answer: a function of a command that returns the reply to it, or None to hand the command on. At first every
        command is handed on.
    """

    def __init__(self, server: RedisServer, *, alone: bool = True) -> None:
        self._alone = alone
        self.answer: Callable[[list[bytes]], bytes | None] = lambda _: None
        self._target = (server.host, server.port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = {self._listener}
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets |= {client, server}
                threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        commands = hiredis.Reader(notEnoughData=_INCOMPLETE)
        with contextlib.suppress(OSError), client, server:
            while data := client.recv(65_536):
                commands.feed(data)
                while (command := commands.gets()) is not _INCOMPLETE:
                    client.sendall(self._reply(command, server))

    def _reply(self, command: Any, server: socket.socket) -> bytes:
        if self._alone and [word.upper() for word in command[:2]] == [b"CLUSTER", b"SLOTS"]:
            return b"*1\r\n*3\r\n:0\r\n:%d\r\n*3\r\n$9\r\n127.0.0.1\r\n:%d\r\n$1\r\n1\r\n" % (SLOTS - 1, self.port)
        own = self.answer(command)
        if own is not None:
            return own
        server.sendall(hiredis.pack_command(tuple(command)))
        replies = hiredis.Reader(notEnoughData=_INCOMPLETE)
        reply = b""
        while replies.gets() is _INCOMPLETE:
            data = server.recv(65_536)
            if not data:
                raise OSError("the server has closed the connection")
            replies.feed(data)
            reply += data
        return reply
