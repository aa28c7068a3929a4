"""A server that answers as a test says, and shared connections to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import redis
import redis.asyncio

from ratelimit.stores.redis.shared_connection import SharedConnection

CUT = b"cut"
"""Stands for a reply, or for the end of one: the server closes the connection."""

HELLO = b"%1\r\n+proto\r\n:3\r\n"
LAST_OF_HANDSHAKE = [b"CLIENT", b"SETINFO", b"LIB-VER"]
PUSH = b">2\r\n+invalidate\r\n*1\r\n+key\r\n"


def bulk(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def echoed(command: list[bytes]) -> bytes:
    return bulk(command[-1])


class ScriptedServer:
    """A server in the loop of the test.

    :ivar answer: makes the reply to a command; at first, the last word of the command.
    :ivar after_handshake: sent right after each handshake.
    :ivar chunks: the commands as they came in, without those of handshakes.
    :ivar silent: the server answers only while this is set.
    """

    def __init__(self) -> None:
        self.answer: Callable[[list[bytes]], bytes] = echoed
        self.after_handshake = b""
        self.chunks: list[list[list[bytes]]] = []
        self.connections = 0
        self.open = 0
        self.silent = asyncio.Event()
        self.silent.set()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        commands = hiredis.Reader(notEnoughData=self)
        try:
            while data := await reader.read(1 << 20):
                commands.feed(data)
                chunk: list[list[bytes]] = []
                while (command := commands.gets()) is not self:
                    if command[0] in (b"HELLO", b"CLIENT", b"AUTH", b"SELECT"):
                        writer.write(HELLO if command[0] == b"HELLO" else b"+OK\r\n")
                        writer.write(self.after_handshake if command[:3] == LAST_OF_HANDSHAKE else b"")
                    else:
                        chunk.append(command)
                if chunk:
                    self.chunks.append(chunk)
                for command in chunk:
                    await self.silent.wait()
                    reply = self.answer(command)
                    writer.write(reply.removesuffix(CUT))
                    if reply.endswith(CUT):
                        return
        finally:
            self.open -= 1
            writer.close()

    @property
    def commands(self) -> list[bytes]:
        """The last word of each command that has come in."""
        return [command[-1] for chunk in self.chunks for command in chunk]

    @asynccontextmanager
    async def listening(self, **options: Any) -> AsyncGenerator[None]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", self.port, **options)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            self.silent.set()

    def sharing(self, **options: Any) -> SharedConnection:
        return sharing(self.port, **options)


def sharing(port: int, **options: Any) -> SharedConnection:
    return SharedConnection(lambda: redis.asyncio.Connection(host="127.0.0.1", port=port, **options))


async def echo(shared: SharedConnection, word: bytes) -> Any:
    (reply,) = await shared.send(word, ((b"ECHO", word),))
    return reply


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def words(number: int) -> list[bytes]:
    return [b"word %d" % i for i in range(number)]
