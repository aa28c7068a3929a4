"""Slices: a contender at work for a short while, in this process."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import signal
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from types import FrameType
from typing import Final

from benchmarks.model import AsyncHit, Contender, Hit, Kind, Plan, Sample, Setup, Table, of_latencies

STUCK_SECONDS = 60
FAILURES = 2
USED_UP: Final = 4
"""Keys that are used up where a plan refuses: the first ones. With many of them, much would come back in a slice."""
TOLERANCE: Final = 0.04
"""By which the share of the granted may differ where some are refused: tokens come back."""


class WrongAnswerError(Exception):
    """A contender refused what it had to grant, or granted what it had to refuse."""


class StuckError(Exception):
    """A slice did not end."""


def keys(number: int) -> list[str]:
    return [f"user:{i}" for i in range(number)]


def visits(where: Sequence[str], plan: Plan) -> list[str]:
    """Return the keys to visit; those that are used up come again and again, to get the plan's share."""
    if not plan.refused:
        return [*where]
    others = where[USED_UP:]
    times = round(len(others) * plan.refused / (1 - plan.refused) / USED_UP)
    # They come last, because a warm-up in this order should leave them used up.
    return [*others, *[*where[:USED_UP]] * times]


def expected(contender: Contender, plan: Plan) -> float:
    """Return the share that is granted: of a floor, which decides nothing, all."""
    return 1.0 if contender.entrant.kind is Kind.FLOOR else 1.0 - plan.refused


def use_up(hit: Hit, keys: Iterable[str], plan: Plan) -> None:
    """Ask for each key until it is refused."""
    most = min(limit.capacity for limit in plan.limits) * 2 + 10
    for key in keys:
        for _ in range(most):
            if not hit(key):
                break
        else:
            raise WrongAnswerError(f"{most} granted by {plan.text}")


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
    contender: Contender,
    setup: Setup,
    keys: Sequence[str],
    threads: int,
    seconds: float,
    *,
    granted: float = 1.0,
    before: Callable[[Hit], None] = lambda _: None,
) -> Sample:
    """Measure threads in a closed loop over the keys, on new connections, after asking for each key once."""
    assert contender.sync is not None
    with contender.sync(setup) as hit:
        before(hit)
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


def _in_threads(hit: Hit, keys: Sequence[str], threads: int, seconds: float, *, granted: float) -> Sample:
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
    contender: Contender,
    setup: Setup,
    keys: Sequence[str],
    tasks: int,
    seconds: float,
    *,
    granted: float = 1.0,
    counting: bool = False,
) -> Sample:
    """Measure a contender in tasks of one event loop.

    :param counting: whether errors are counted, and do not end the slice; that also counts those of the warm-up.
    """
    assert contender.asyncio is not None
    async with contender.asyncio(setup) as opened:
        errors = 0

        async def counted(key: str) -> object:
            nonlocal errors
            try:
                return await opened(key)
            except Exception:  # noqa: BLE001  # whatever it is
                errors += 1
                return True

        hit = counted if counting else opened

        async def warm_up(number: int) -> None:
            for key in [*keys[number::tasks], *islice(cycle(keys), number, number + max(2, 20 // tasks))]:
                await hit(key)

        await asyncio.gather(*map(warm_up, range(tasks)))
        orders = shares(keys, tasks)
        gc.collect()
        latencies, earlier = array("q"), errors
        begin = time.perf_counter_ns()
        end = begin + int(seconds * 1e9)
        counts = await asyncio.gather(*(aloop(hit, order, end, latencies) for order in orders))
        sample = _sample(latencies, sum(counts), time.perf_counter_ns() - begin, granted=granted)
        if counting:
            sample |= {"errors": errors, "rate": sample["rate"] * (1 - (errors - earlier) / len(latencies))}
        return sample


def _sample(latencies: array[int], count: int, elapsed: int, *, granted: float) -> Sample:
    check(count, len(latencies), granted=granted)
    sample = {"rate": len(latencies) / elapsed * 1e9, **of_latencies(latencies)}
    return {**sample, "refused": 1 - count / len(latencies)} if 0 < granted < 1 else sample


def check(count: int, decisions: int, *, granted: float) -> None:
    """Refuse wrong answers: a fast one that is wrong does not count.

    :param granted: the share that should be granted: exactly so where it is all or none, and nearly elsewhere.
    """
    if granted in (0, 1):
        right, wanted = count == decisions * granted, "all" if granted else "none"
    else:
        # Where keys are chosen by chance, few decisions may have more or fewer of those that are used up.
        chance = 3 * math.sqrt(granted * (1 - granted) / decisions)
        right, wanted = abs(count / decisions - granted) <= TOLERANCE + chance, f"about {granted:.0%}"
    if not right:
        raise WrongAnswerError(f"{count} of {decisions} granted, although {wanted} should be")


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


@dataclass(frozen=True)
class Turn:
    """One contender's slice of a table, in every round."""

    table: Table
    contender: Contender
    slice: Callable[[Contender], Sample]


def interleaved(turns: Sequence[Turn], rounds: int, tell: Callable[[str], None]) -> None:
    """Run rounds over all turns, each round beginning with another one, so that a slow minute hits them alike.

    A contender that fails loses the round; if it fails again, it also loses all later rounds. The table says so.
    """
    for round in range(rounds):
        first = round * max(1, len(turns) // rounds) % len(turns)
        for turn in [*turns[first:], *turns[:first]]:
            table, name = turn.table, turn.contender.name
            if len(table.failures.get(name, ())) >= FAILURES:
                continue
            tell(f"{table.title}: round {round + 1} of {rounds}, {name}")
            try:
                with not_stuck():
                    sample = turn.slice(turn.contender)
            except Exception as error:  # noqa: BLE001  # of a library, whatever it is
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                table.failures.setdefault(name, []).append(reason)
                tell(f"{name} has failed: {reason}\n")
            else:
                table.rows.setdefault(name, []).append(sample)
    for table in {turn.table.id: turn.table for turn in turns}.values():
        names = [turn.contender.name for turn in turns if turn.table is table]
        table.rows = {name: table.rows[name] for name in names if name in table.rows}
