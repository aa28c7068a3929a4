"""A network that takes its time: a process that forwards TCP, and holds every byte back for a while."""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from benchmarks.spawn import spawned


@contextmanager
def delayed(port: int, added: float) -> Generator[int]:
    """Give a port of this machine that leads to another one, with this many seconds added to each round trip."""
    process, ours = spawned(_serve, port, added)
    try:
        if not ours.poll(15):
            raise RuntimeError("the delaying proxy does not start")
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def _serve(answer: Connection, port: int, added: float) -> None:
    # select() waits for microseconds, where epoll in asyncio waits for whole milliseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_forward(answer, port, added / 2))


async def _forward(answer: Connection, port: int, delay: float) -> None:
    loop = asyncio.get_running_loop()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            await asyncio.gather(_pass_on(reader, back, delay), _pass_on(there, writer, delay))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, backlog=1_000)
    answer.send(server.sockets[0].getsockname()[1])
    loop.set_exception_handler(lambda *_: None)
    over = loop.create_future()
    loop.add_reader(answer.fileno(), over.cancel)  # readable when the other end is closed, by whatever
    async with server:
        with contextlib.suppress(asyncio.CancelledError):
            await over


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    loop = asyncio.get_running_loop()
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while data := await reader.read(65_536):
        loop.call_later(delay, writer.write, data)
    loop.call_later(delay, writer.close)
