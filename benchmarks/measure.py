"""Slices: a contender at work for a short while, in this process."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from types import FrameType

from benchmarks.model import AsyncHit, Contender, Hit, Sample, Setup, Table, of_latencies

STUCK_SECONDS = 60
FAILURES = 2


class WrongAnswerError(Exception):
    """A contender refused what it had to grant, or granted what it had to refuse."""


class StuckError(Exception):
    """A slice did not end."""


def keys(number: int) -> list[str]:
    return [f"user:{i}" for i in range(number)]


def shares(keys: Sequence[str], workers: int) -> list[list[str]]:
    """Return all the keys for each worker, in an order of its own."""
    return [random.Random(worker).sample(keys, len(keys)) for worker in range(workers)]


def loop(hit: Hit, keys: Iterable[str], end: int, latencies: array[int]) -> int:
    """Decide again and again until this time of ``perf_counter_ns``, and return how many were granted."""
    clock, note, granted = time.perf_counter_ns, latencies.append, 0
    before = clock()
    for key in cycle(keys):
        if hit(key):
            granted += 1
        after = clock()
        note(after - before)
        if after >= end:
            break
        before = after
    return granted


async def aloop(hit: AsyncHit, keys: Iterable[str], end: int, latencies: array[int]) -> int:
    """Do in a task what :func:`loop` does in a thread."""
    clock, note, granted = time.perf_counter_ns, latencies.append, 0
    before = clock()
    for key in cycle(keys):
        if await hit(key):
            granted += 1
        after = clock()
        note(after - before)
        if after >= end:
            break
        before = after
    return granted


def sync_slice(
    contender: Contender, setup: Setup, keys: Sequence[str], threads: int, seconds: float, *, granted: bool = True
) -> Sample:
    """Measure threads in a closed loop over the keys, on new connections, after asking for each key once."""
    assert contender.sync is not None
    with contender.sync(setup) as hit:
        if threads == 1:
            _warm_up(hit, keys, keys)
            (order,) = shares(keys, 1)
            gc.collect()
            latencies = array("q")
            begin = time.perf_counter_ns()
            count = loop(hit, order, begin + int(seconds * 1e9), latencies)
            return _sample(latencies, count, time.perf_counter_ns() - begin, granted=granted)
        return _in_threads(hit, keys, threads, seconds, granted=granted)


def _warm_up(hit: Hit, keys: Sequence[str], own: Sequence[str]) -> None:
    for key in own:
        hit(key)
    for key in islice(cycle(keys), 20):
        hit(key)


def _in_threads(hit: Hit, keys: Sequence[str], threads: int, seconds: float, *, granted: bool) -> Sample:
    barrier = threading.Barrier(threads + 1)
    results: list[tuple[array[int], int, int, int]] = []
    errors: list[Exception] = []

    def work(number: int, order: list[str]) -> None:
        latencies = array("q")
        try:
            _warm_up(hit, keys, keys[number::threads])
            barrier.wait()
            barrier.wait()
            begin = time.perf_counter_ns()
            count = loop(hit, order, begin + int(seconds * 1e9), latencies)
            results.append((latencies, count, begin, time.perf_counter_ns()))
        except Exception as error:  # noqa: BLE001  # of a library, whatever it is
            errors.append(error)
            barrier.abort()

    workers = [
        threading.Thread(target=work, args=(number, order), daemon=True)
        for number, order in enumerate(shares(keys, threads))
    ]
    for worker in workers:
        worker.start()
    try:
        barrier.wait()
        gc.collect()
        barrier.wait()
    except threading.BrokenBarrierError:
        pass
    for worker in workers:
        worker.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    together = array("q")
    for latencies, *_ in results:
        together.extend(latencies)
    elapsed = max(end for *_, end in results) - min(begin for *_, begin, _ in results)
    return _sample(together, sum(count for _, count, *_ in results), elapsed, granted=granted)


async def async_slice(
    contender: Contender, setup: Setup, keys: Sequence[str], tasks: int, seconds: float, *, granted: bool = True
) -> Sample:
    """Measure a contender in tasks of one event loop."""
    assert contender.asyncio is not None
    async with contender.asyncio(setup) as hit:

        async def warm_up(number: int) -> None:
            for key in [*keys[number::tasks], *islice(cycle(keys), number, number + max(2, 20 // tasks))]:
                await hit(key)

        await asyncio.gather(*map(warm_up, range(tasks)))
        orders = shares(keys, tasks)
        gc.collect()
        latencies = array("q")
        begin = time.perf_counter_ns()
        end = begin + int(seconds * 1e9)
        counts = await asyncio.gather(*(aloop(hit, order, end, latencies) for order in orders))
        return _sample(latencies, sum(counts), time.perf_counter_ns() - begin, granted=granted)


def _sample(latencies: array[int], count: int, elapsed: int, *, granted: bool) -> Sample:
    check(count, len(latencies), granted=granted)
    return {"rate": len(latencies) / elapsed * 1e9, **of_latencies(latencies)}


def check(count: int, decisions: int, *, granted: bool) -> None:
    """Refuse wrong answers: a fast one that is wrong does not count."""
    if count != (decisions if granted else 0):
        raise WrongAnswerError(f"{count} of {decisions} granted, although {'all' if granted else 'none'} should be")


@contextmanager
def not_stuck() -> Generator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise StuckError(f"no end after {STUCK_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(STUCK_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def interleaved(
    table: Table,
    contenders: Sequence[Contender],
    rounds: int,
    slice: Callable[[Contender], Sample],
    tell: Callable[[str], None],
) -> None:
    """Run rounds over all contenders, each round beginning with another one, so that a slow minute hits them alike.

    A contender that fails loses the round; if it fails again, it also loses all later rounds. The table says so.
    """
    names = [contender.name for contender in contenders]
    for round in range(rounds):
        first = round * max(1, len(names) // rounds) % len(names)
        for contender in [*contenders[first:], *contenders[:first]]:
            if len(table.failures.get(contender.name, ())) >= FAILURES:
                continue
            tell(f"{table.title}: round {round + 1} of {rounds}, {contender.name}")
            try:
                with not_stuck():
                    sample = slice(contender)
            except Exception as error:  # noqa: BLE001  # of a library, whatever it is
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                table.failures.setdefault(contender.name, []).append(reason)
                tell(f"{contender.name} has failed: {reason}\n")
            else:
                table.rows.setdefault(contender.name, []).append(sample)
    table.rows = {name: table.rows[name] for name in names if name in table.rows}
