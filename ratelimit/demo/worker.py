"""A process of the demo, which imports the library and asks for tokens until its time is up.

It reads its task from stdin, one line of JSON, and begins at the next line. It writes what it has counted to stdout, a
line of JSON at a time: once when it is ready, every fifth of a second, and at the end. It ends when stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Final

import ratelimit
from ratelimit.demo.children import tell

_REPORT_SECONDS: Final = 0.2
# Between calls: the demo shows the limiter, not the load that a machine can bear.
_PAUSE_SECONDS: Final = 0.001
# After an error, and after a wait that would have been too long.
_COME_BACK_SECONDS: Final = 0.05
_LONGEST_WAIT_SECONDS: Final = 1
_TASKS: Final = 10


@dataclass(frozen=True)
class Task:
    """What a process has to do: ask for tokens under these keys for some seconds, in the way that ``kind`` names."""

    kind: str
    url: str
    limit: str
    prefix: str
    keys: list[str]
    seconds: float


@dataclass
class Counts:
    """What a process has asked for, and what the limiter has answered.

    :param admitted: the calls that were admitted, by key; each key is there from the start, since another thread reads
        it.
    :param waited: the seconds that its calls took together, where they wait.
    """

    calls: int = 0
    admitted: dict[str, int] = field(default_factory=dict[str, int])
    refused: int = 0
    waited: float | None = None
    errors: int = 0
    last_error: str = ""
    done: bool = False

    def add(self, key: str, admitted: bool) -> None:
        """Count an answer."""
        self.calls += 1
        if admitted:
            self.admitted[key] += 1
        else:
            self.refused += 1

    @contextmanager
    def errors_counted(self) -> Generator[None]:
        """Count an error of the library in place of an answer."""
        try:
            yield
        except ratelimit.RateLimitError as error:
            self.calls += 1
            self.errors += 1
            self.last_error = str(error)


def try_consume(task: Task, counts: Counts, end: float) -> None:
    """Ask again and again, and never wait."""
    with ratelimit.ProxyManager.from_url(task.url, task.limit, prefix=task.prefix) as manager:
        keys = cycle(task.keys)
        while time.monotonic() < end:
            key = next(keys)
            with counts.errors_counted():
                counts.add(key, manager.try_consume(key))
            time.sleep(_PAUSE_SECONDS)


def consume(task: Task, counts: Counts, end: float) -> None:
    """Wait for each token."""
    counts.waited = 0.0
    with ratelimit.ProxyManager.from_url(task.url, task.limit, prefix=task.prefix) as manager:
        keys = cycle(task.keys)
        while (begin := time.monotonic()) < end:
            key, admitted = next(keys), False
            with counts.errors_counted():
                admitted = manager.consume(key, max_wait=_LONGEST_WAIT_SECONDS)
                counts.add(key, admitted)
                counts.waited += time.monotonic() - begin
            if not admitted:
                time.sleep(_COME_BACK_SECONDS)


def try_consume_in_tasks(task: Task, counts: Counts, end: float) -> None:
    """Ask from several asyncio tasks at once."""
    asyncio.run(_try_consume_in_tasks(task, counts, end))


async def _try_consume_in_tasks(task: Task, counts: Counts, end: float) -> None:
    async with ratelimit.AsyncProxyManager.from_url(task.url, task.limit, prefix=task.prefix) as manager:
        keys = cycle(task.keys)

        async def ask() -> None:
            while time.monotonic() < end:
                key = next(keys)
                with counts.errors_counted():
                    counts.add(key, await manager.try_consume(key))
                await asyncio.sleep(_PAUSE_SECONDS)

        async with asyncio.TaskGroup() as group:
            for _ in range(_TASKS):
                group.create_task(ask())


KINDS: Final[dict[str, Callable[[Task, Counts, float], None]]] = {
    "try_consume": try_consume,
    f"asyncio, {_TASKS} tasks": try_consume_in_tasks,
    "consume": consume,
}


def main() -> None:
    """Do the task that stdin names."""
    line = sys.stdin.readline()
    if not line:
        return
    task = Task(**json.loads(line))
    counts = Counts(admitted=dict.fromkeys(task.keys, 0))
    tell(**asdict(counts))
    if not sys.stdin.readline():
        return
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    finished = threading.Event()
    reporter = threading.Thread(target=_keep_reporting, args=(counts, finished))
    reporter.start()
    try:
        KINDS[task.kind](task, counts, time.monotonic() + task.seconds)
    finally:
        finished.set()
        reporter.join()
    counts.done = True
    tell(**asdict(counts))


def _keep_reporting(counts: Counts, finished: threading.Event) -> None:
    while not finished.wait(_REPORT_SECONDS):
        tell(**asdict(counts))


def _end_with_stdin() -> None:
    # sys.stdin is not used here: the interpreter needs its lock to end.
    while os.read(0, 1):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
