"""Worker processes in a closed loop, started together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import socket
import struct
import time
from array import array
from collections.abc import Callable, Generator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from benchmarks.contenders import BY_NAME
from benchmarks.measure import USED_UP, aloop, loop
from benchmarks.model import NEVER_REACHED, AsyncHit, Hit, Plan, Setup
from benchmarks.spawn import spawned

ANSWER_SECONDS: Final = 45
_VISITS: Final = 50_000
_SEGMENTS_WITH_DATA_SENT: Final = 156  # where struct tcp_info of Linux has them


class WorkerError(Exception):
    """What went wrong in a worker."""


@dataclass(frozen=True)
class Job:
    """What a worker does.

    :param keys: how many keys there are; visited at random.
    :param warm_up: seconds in which they are visited before it counts, at most once each.
    :param plan: whose share of refusals goes to the keys that are used up, which are the first ones.
    :param tasks: how many tasks of an event loop visit them; with 0, the worker's only thread does.
    """

    contender: str
    setup: Setup
    keys: int = 1
    warm_up: float = 0.1
    plan: Plan = NEVER_REACHED
    tasks: int = 0


@dataclass(frozen=True)
class Report:
    """What a worker did.

    :param trips: the round trips of each decision, where they were asked for and this system can tell.
    :param grown: bytes by which the worker has grown since before it opened the contender.
    """

    granted: int
    latencies: array[int]
    trips: list[int]
    grown: int


class Workers:
    """Processes that stay from job to job, since starting one takes longer than a slice."""

    def __init__(self, number: int) -> None:
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        self._asked = 0
        for _ in range(number):
            process, ours = spawned(_serve)
            self._ends.append(ours)
            self._processes.append(process)

    @contextmanager
    def prepared(self, job: Job, number: int) -> Generator[Callable[[float, bool], list[Report]]]:
        """Prepare workers, with the contender open and warm, and give a callable that lets them work for a time."""

        def work(seconds: float, trace: bool) -> list[Report]:
            start = time.perf_counter_ns() + 30_000_000 + number * 1_000_000
            return self._ask(number, (start, int(seconds * 1e9), trace))

        try:
            self._ask(number, job)
            yield work
        except Exception:
            with contextlib.suppress(WorkerError):
                self._ask(number, None)
            raise
        self._ask(number, None)  # not after Ctrl-C, which does not wait for them

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _ask(self, number: int, question: Any) -> list[Any]:
        self._asked += 1
        for end in self._ends[:number]:
            end.send((self._asked, question))
        answers = [self._answer(end) for end in self._ends[:number]]
        for answer in answers:
            if isinstance(answer, str):
                raise WorkerError(answer)
        return answers

    def _answer(self, end: Connection) -> Any:
        while end.poll(ANSWER_SECONDS):
            asked, answer = end.recv()
            # Other answers are late ones, for which nobody has waited.
            if asked == self._asked:
                return answer
        raise WorkerError("a worker does not answer")


def _serve(questions: Connection) -> None:
    """Answer a job, its slices, and None at its end; go on with the next job, until the other end is closed."""
    with contextlib.suppress(EOFError), ExitStack() as at_end:
        opened = at_end.enter_context(ExitStack())
        state: _State | None = None
        while True:
            number, question = questions.recv()
            try:
                if isinstance(question, Job):
                    state = _State(question, opened)
                    answer: Any = True
                elif question is None:
                    state = None
                    opened.close()
                    answer = True
                elif state is None:
                    answer = "nothing is open"
                else:
                    answer = state.work(*question)
            except Exception as error:  # noqa: BLE001  # the process that asked gets it
                answer = f"{type(error).__name__}: {error}"
            questions.send((number, answer))


class _State:
    """A job, with its contender open and warm."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self._job = job
        self._random = random.Random(os.getpid())
        gc.collect()
        self._before = _resident()
        contender = BY_NAME[job.contender]
        if job.tasks:
            assert contender.asyncio is not None
            self._runner = stack.enter_context(asyncio.Runner())
            opened = AsyncExitStack()
            stack.callback(lambda: self._runner.run(opened.aclose()))
            self._async_hit: AsyncHit = self._runner.run(opened.enter_async_context(contender.asyncio(job.setup)))
            self._runner.run(self._warm_up_tasks())
        else:
            assert contender.sync is not None
            self._hit: Hit = stack.enter_context(contender.sync(job.setup))
            self._warm_up()
        self._keys = self._chosen()
        gc.collect()

    def _warm_up(self) -> None:
        end = time.perf_counter() + self._job.warm_up
        for i in range(self._job.keys) if self._job.keys > 1 else [0] * 100:
            self._hit(f"user:{i}")
            if time.perf_counter() > end and self._job.keys > 1:
                break

    async def _warm_up_tasks(self) -> None:
        end = time.perf_counter() + self._job.warm_up

        async def visit(first: int) -> None:
            for i in range(first, self._job.keys, self._job.tasks):
                await self._async_hit(f"user:{i}")
                if time.perf_counter() > end:
                    break

        await asyncio.gather(*map(visit, range(self._job.tasks)))

    def work(self, start: int, nanos: int, trace: bool) -> Report:
        latencies, trips = array("q"), list[int]()
        if self._job.tasks:
            each = len(self._keys) // self._job.tasks
            orders = [self._keys[number * each : (number + 1) * each] for number in range(self._job.tasks)]
            time.sleep(max(0.0, (start - time.perf_counter_ns()) / 1e9))
            granted = self._runner.run(self._tasks(orders, start + nanos, latencies))
        else:
            hit = _traced(self._hit, self._job.setup.url, trips) if trace else self._hit
            time.sleep(max(0.0, (start - time.perf_counter_ns()) / 1e9))
            granted = loop(hit, self._keys, start + nanos, latencies)
        return Report(granted, latencies, trips, _resident() - self._before)

    async def _tasks(self, orders: list[list[str]], end: int, latencies: array[int]) -> int:
        return sum(await asyncio.gather(*(aloop(self._async_hit, order, end, latencies) for order in orders)))

    def _chosen(self) -> list[str]:
        """Return the keys that are visited, over and over."""
        number, chance = self._job.keys, self._random
        if number == 1:
            return ["user:0"]
        refused = self._job.plan.refused
        least = USED_UP if refused else 0
        return [
            f"user:{chance.randrange(USED_UP) if chance.random() < refused else chance.randrange(least, number)}"
            for _ in range(_VISITS)
        ]


def _resident() -> int:
    """Bytes of memory of this process; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _traced(hit: Hit, url: str, trips: list[int]) -> Hit:
    """Counts for each decision the segments with data that this process has sent to the server.

    A request that fits into a segment, sent by a client that waits for the answer, is a round trip. The kernel counts
    them, so that it does not matter how a contender speaks to the server.
    """
    sockets = _sockets_to(urlsplit(url).port)

    def sent() -> int:
        total = 0
        for each in sockets:
            info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            if len(info) < _SEGMENTS_WITH_DATA_SENT + 4:
                return 0
            total += struct.unpack_from("I", info, _SEGMENTS_WITH_DATA_SENT)[0]
        return total

    def counted(key: str) -> object:
        before = sent()
        granted = hit(key)
        trips.append(sent() - before)
        return granted

    return counted if sockets and sent() else hit


def _sockets_to(port: int | None) -> list[socket.socket]:
    found: list[socket.socket] = []
    if not hasattr(socket, "TCP_INFO") or not os.path.isdir("/proc/self/fd"):  # noqa: PTH112
        return found
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
            if copy.family == socket.AF_INET and copy.getpeername()[1] == port:
                found.append(copy)
    return found
