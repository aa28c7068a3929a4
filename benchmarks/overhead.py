"""What a limiter adds to a request: applications that are open together are asked in turns, beside the bare one.

What is added is the difference to the bare application within a turn. A turn takes some milliseconds, so that a machine
that is slow for a while is slow for both.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Self

from benchmarks.applications import ALONE, BARE
from benchmarks.measure import check, not_stuck
from benchmarks.model import AsyncHit, Contender, Hit, Kind, Sample, Setup, Table
from benchmarks.server import Server, reads

BATCH = 25
"""Requests in a turn, one after the other; tasks ask once each instead."""


@dataclass(frozen=True)
class Load:
    """What is asked of each application.

    :param asynchronous: which face is opened of a contender that has both.
    :param tasks: how many ask at the same time, in one event loop; with 1, one request follows the other.
    :param seconds: the length of all rounds together.
    :param granted: whether all requests are to be admitted, or all be refused.
    """

    setup: Setup
    keys: Sequence[str]
    asynchronous: bool
    tasks: int
    rounds: int
    seconds: float
    granted: bool


Batch = Callable[[Sequence[str]], tuple[int, float]]
"""Asks once for each key; returns how many were granted, and the nanoseconds per request."""


def measure(
    table: Table, contenders: Sequence[Contender], load: Load, server: Server, tell: Callable[[str], None]
) -> None:
    """Fill a table. A contender that fails is left out of it; the bare application must not fail."""
    server.flush()
    with Opened(load) as opened:
        for contender in contenders:
            tell(f"{table.title}: opening, {contender.name}")
            with _excused(table, contender, tell, opened.batches), not_stuck():
                opened.open(contender)
                opened.warm_up(contender.name)
        for round in range(load.rounds):
            tell(f"{table.title}: round {round + 1} of {load.rounds}, {len(opened.batches)} in turns")
            with not_stuck():
                _round(table, contenders, opened, load, tell)
        for contender in _alive(contenders, opened)[1:]:
            with not_stuck():
                trips = _trips(opened.batches[contender.name], load, server)
            for row in table.rows[contender.name]:
                row["trips"] = trips
        table.rows = {each.name: table.rows[each.name] for each in contenders if each.name in table.rows}


def _round(
    table: Table, contenders: Sequence[Contender], opened: Opened, load: Load, tell: Callable[[str], None]
) -> None:
    took: dict[str, list[float]] = {}
    end = time.perf_counter() + load.seconds / load.rounds
    turn = 0
    gc.collect()
    while turn == 0 or time.perf_counter() < end:
        alive = _alive(contenders, opened)
        first = turn % len(alive)
        keys = _keys(load, turn)
        for contender in [*alive[first:], *alive[:first]]:
            with _excused(table, contender, tell, opened.batches):
                took.setdefault(contender.name, []).append(
                    _micros(opened.batches[contender.name], keys, contender, load)
                )
        turn += 1
    for contender in _alive(contenders, opened):
        table.rows.setdefault(contender.name, []).append(sample(contender.name, took))


def sample(name: str, took: Mapping[str, Sequence[float]]) -> Sample:
    """Medians over the turns of a round."""
    own, bare = took[name], took[BARE]
    added = own if name in ALONE else [mine - theirs for mine, theirs in zip(own, bare, strict=True)]
    return {"overhead_us": statistics.median(added), "request_us": statistics.median(own)}


def _keys(load: Load, turn: int) -> list[str]:
    """Return the keys of one turn; the turns go round all keys."""
    if load.tasks > 1:
        return list(load.keys)
    first = turn * BATCH % len(load.keys)
    return [*load.keys[first:], *load.keys[:first]][:BATCH]


def _micros(batch: Batch, keys: Sequence[str], contender: Contender, load: Load) -> float:
    """Microseconds per request."""
    granted, nanos = batch(keys)
    if contender.entrant.kind is not Kind.FLOOR:
        check(granted, len(keys), granted=load.granted)
    return nanos / 1_000


def _trips(batch: Batch, load: Load, server: Server) -> float:
    """Round trips per request, by the server's count."""
    keys = list(load.keys)
    batch(keys)
    gc.collect()
    time.sleep(0.05)  # the server reads from connections that others have dropped, too
    before = server.counts()
    batch(keys)
    return reads(before, server.counts()) / len(keys)


def _alive(contenders: Sequence[Contender], opened: Opened) -> list[Contender]:
    return [contender for contender in contenders if contender.name in opened.batches]


@contextmanager
def _excused(
    table: Table, contender: Contender, tell: Callable[[str], None], batches: dict[str, Batch]
) -> Generator[None]:
    """Note why a contender fails, and go on without it."""
    try:
        yield
    except Exception as error:
        if contender.name == BARE:
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        table.failures.setdefault(contender.name, []).append(reason)
        tell(f"{contender.name} has failed: {reason}\n")
        batches.pop(contender.name, None)


class Opened:
    """What is open, by name. Asynchronous ones share an event loop, which stands still between the batches."""

    def __init__(self, load: Load) -> None:
        self.batches: dict[str, Batch] = {}
        self._load = load
        self._runner = asyncio.Runner()
        self._stack = ExitStack()
        self._async_stack = AsyncExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._runner, self._stack:
            self._runner.run(self._async_stack.aclose())

    def open(self, contender: Contender) -> Batch:
        setup = self._load.setup
        if self._load.asynchronous:
            assert contender.asyncio is not None
            hit = self._runner.run(self._async_stack.enter_async_context(contender.asyncio(setup)))
            batch = self._of_tasks(hit) if self._load.tasks > 1 else self._of_loop(hit)
        else:
            assert contender.sync is not None
            batch = _sync_batch(self._stack.enter_context(contender.sync(setup)))
        self.batches[contender.name] = batch
        return batch

    def warm_up(self, name: str) -> None:
        """Ask for each key twice, which exhausts a limit of one token."""
        for _ in range(2):
            self.batches[name](self._load.keys)

    def _of_loop(self, hit: AsyncHit) -> Batch:
        async def batch(keys: Sequence[str]) -> tuple[int, float]:
            clock, granted, took = time.perf_counter_ns, 0, list[int]()
            for key in keys:
                begin = clock()
                if await hit(key):
                    granted += 1
                took.append(clock() - begin)
            return granted, statistics.median(took)

        return lambda keys: self._runner.run(batch(keys))

    def _of_tasks(self, hit: AsyncHit) -> Batch:
        async def task(key: str) -> bool:
            return bool(await hit(key))

        async def batch(keys: Sequence[str]) -> tuple[int, float]:
            begin = time.perf_counter_ns()
            granted = sum(await asyncio.gather(*map(task, keys)))
            return granted, (time.perf_counter_ns() - begin) / len(keys)

        return lambda keys: self._runner.run(batch(keys))


def _sync_batch(hit: Hit) -> Batch:
    def batch(keys: Sequence[str]) -> tuple[int, float]:
        clock, granted, took = time.perf_counter_ns, 0, list[int]()
        for key in keys:
            begin = clock()
            if hit(key):
                granted += 1
            took.append(clock() - begin)
        return granted, statistics.median(took)

    return batch
