"""The floor: what a decision costs where there is no limiter, only its command.

The command is the one with which a state is replaced: ``EVALSHA`` of ``compare_and_swap_px.lua`` with two states of 107
bytes, the size of a bucket with one bandwidth. Each client swaps the first state for the second and back. Where all
clients of a scenario share one key, each has a key of its own, so that its swaps succeed; where they share many, a swap
that another client has overtaken counts as well.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import hiredis
import redis
import redis.asyncio

from benchmarks.model import AsyncHit, Hit, Setup

SCRIPT = (Path(__file__).parents[1] / "lua" / "compare_and_swap_px.lua").read_text()
STATES = (b"\x00" * 106 + b"a", b"\x00" * 106 + b"b")
TTL = 11_000

_pack: Callable[[tuple[Any, ...]], bytes] = cast("Any", hiredis.pack_command)  # typed as if it took one argument


def name_of(key: str, setup: Setup) -> str:
    """Return the name that a client of the floor gives a key."""
    return f"{key}:{os.getpid()}:{threading.get_ident()}" if setup.own_keys else key


class Bare:
    """A blocking socket, with hiredis to write and to read the protocol."""

    def __init__(self, setup: Setup) -> None:
        where = urlsplit(setup.url)
        self._socket = socket.create_connection((where.hostname, where.port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()
        self.sha = self.ask("SCRIPT", "LOAD", SCRIPT)

    def ask(self, *command: Any) -> Any:
        """Send a command, and wait for its reply."""
        self._socket.sendall(_pack(command))
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(65_536))
        return reply

    def close(self) -> None:
        self._socket.close()


class _Local(threading.local):
    bare: Bare | None = None


@contextmanager
def threads_own(setup: Setup, hit: Callable[[Bare, str], bool]) -> Generator[Hit]:
    """A socket for each thread."""
    local = _Local()
    opened: list[Bare] = []

    def each(key: str) -> bool:
        bare = local.bare
        if bare is None:
            bare = local.bare = Bare(setup)
            opened.append(bare)
        return hit(bare, key)

    try:
        yield each
    finally:
        for bare in opened:
            bare.close()


@contextmanager
def bare_socket(setup: Setup) -> Generator[Hit]:
    """The swap over a bare socket."""
    turns: dict[str, int] = {}

    def hit(bare: Bare, key: str) -> bool:
        name = name_of(key, setup)
        turn = turns.get(name)
        if turn is None:
            turn = 0
            bare.ask("SET", name, STATES[0])
        reply = bare.ask("EVALSHA", bare.sha, 1, name, STATES[turn], STATES[1 - turn], TTL)
        turns[name] = 1 - turn if reply == 1 else STATES.index(reply)
        return True

    with threads_own(setup, hit) as each:
        yield each


@contextmanager
def redis_py(setup: Setup) -> Generator[Hit]:
    """``redis.Redis.evalsha``."""
    with redis.Redis.from_url(setup.url, max_connections=setup.connections + 1) as client:
        sha = client.script_load(SCRIPT)
        evalsha: Any = client.evalsha
        turns: dict[str, int] = {}

        def hit(key: str) -> bool:
            name = name_of(key, setup)
            turn = turns.get(name)
            if turn is None:
                turn = 0
                client.set(name, STATES[0])
            reply = evalsha(sha, 1, name, STATES[turn], STATES[1 - turn], TTL)
            turns[name] = 1 - turn if reply == 1 else STATES.index(reply)
            return True

        yield hit


@asynccontextmanager
async def redis_py_asyncio(setup: Setup) -> AsyncGenerator[AsyncHit]:
    """``redis.asyncio.Redis.evalsha``; a swap that another task has overtaken counts as well, also on one key."""
    async with redis.asyncio.Redis.from_url(setup.url, max_connections=setup.connections + 1) as client:
        sha = await client.script_load(SCRIPT)
        evalsha: Any = client.evalsha
        turns: dict[str, int] = {}

        async def hit(key: str) -> bool:
            turn = turns.get(key)
            if turn is None:
                turn = 0
                await client.set(key, STATES[0])
            turns[key] = 1 - turn
            await evalsha(sha, 1, key, STATES[turn], STATES[1 - turn], TTL)
            return True

        yield hit
