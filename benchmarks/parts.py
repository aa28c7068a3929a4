"""Some of this library without the rest, to show what takes its time.

- The core over a bare socket: a decision is computed, written and swapped. Nothing else is done: no connection is
  looked after, no deadline is kept, nothing is merged.
- The core over the connection that all tasks of a loop share.
- That connection alone, with the command of the floor.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager

import redis.asyncio

from benchmarks.floor import SCRIPT, STATES, TTL, Bare, name_of, threads_own
from benchmarks.model import AsyncHit, Hit, Setup
from benchmarks.ours import configuration_of
from ratelimit.core.algorithm import State, decode, encode
from ratelimit.core.commands import Terms, TryConsume, execute
from ratelimit.core.expiration import Expiration
from ratelimit.stores.redis.async_pool import AsyncPoolChannel

_ONE = TryConsume(1)
_TTL = Expiration.automatic()

_Known = dict[str, tuple[bytes, State]]
"""What was last seen under each name."""


def _made(terms: Terms) -> tuple[bytes, State]:
    state, _ = execute(_ONE, terms, None, time.time_ns())
    assert state is not None
    return encode(state), state


@contextmanager
def core(setup: Setup) -> Generator[Hit]:
    """The core over a bare socket for each thread."""
    terms, known = Terms(configuration_of(setup)), _Known()

    def hit(bare: Bare, key: str) -> bool:
        name = name_of(key, setup)
        if name not in known:
            before, state = known[name] = _made(terms)
            bare.ask("SET", name, before)
        before, state = known[name]
        while True:
            now = time.time_ns()
            after, granted = execute(_ONE, terms, state, now)
            if after is None:
                return granted
            new = encode(after)
            reply = bare.ask("EVALSHA", bare.sha, 1, name, before, new, _TTL.ttl_millis(after, now))
            if reply == 1:
                known[name] = new, after
                return granted
            before, state = reply, decode(reply)

    with threads_own(setup, hit) as each:
        yield each


@asynccontextmanager
async def connection(setup: Setup) -> AsyncGenerator[AsyncHit]:
    """The connection alone."""
    async with _channel(setup) as (channel, sha):
        turns: dict[str, int] = {}

        async def hit(key: str) -> bool:
            turn = turns.get(key)
            if turn is None:
                turn = 0
                await channel.send(b"", ((b"SET", key.encode(), STATES[0]),))
            turns[key] = 1 - turn
            command = (b"EVALSHA", sha, b"1", key.encode(), STATES[turn], STATES[1 - turn], b"%d" % TTL)
            await channel.send(b"", (command,))
            return True

        yield hit


@asynccontextmanager
async def core_over_connection(setup: Setup) -> AsyncGenerator[AsyncHit]:
    """The core over the connection."""
    terms, known = Terms(configuration_of(setup)), _Known()
    async with _channel(setup) as (channel, sha):

        async def hit(key: str) -> bool:
            if key not in known:
                before, state = known[key] = _made(terms)
                await channel.send(b"", ((b"SET", key.encode(), before),))
            before, state = known[key]
            while True:
                now = time.time_ns()
                after, granted = execute(_ONE, terms, state, now)
                if after is None:
                    return granted
                new = encode(after)
                ttl = b"%d" % _TTL.ttl_millis(after, now)
                command = (b"EVALSHA", sha, b"1", key.encode(), before, new, ttl)
                (reply,) = await channel.send(b"", (command,))
                if reply == 1:
                    known[key] = new, after
                    return granted
                before, state = reply, decode(reply)

        yield hit


@asynccontextmanager
async def _channel(setup: Setup) -> AsyncGenerator[tuple[AsyncPoolChannel, bytes]]:
    client = redis.asyncio.Redis.from_url(setup.url)
    channel = AsyncPoolChannel(client, owned=True)
    try:
        yield channel, (await client.script_load(SCRIPT)).encode()
    finally:
        await channel.close()
