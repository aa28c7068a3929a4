"""The worker processes of the demo, as the demo sees them.

A signal may raise an exception in the demo between any two of its steps. So the demo waits only within the
interpreter's own code: ``threading.Event`` and ``threading.Thread`` are Python, and do not survive such an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from queue import Empty, SimpleQueue

from ratelimit.demo.children import Child
from ratelimit.demo.errors import DemoError
from ratelimit.demo.worker import Counts, Task
from ratelimit.runtime import threads

_PATIENCE_SECONDS = 30  # with a process that is late
_END_SECONDS = 5
_LOOK_SECONDS = 0.1

News = SimpleQueue[None]
"""Holds something when a process has reported since the demo looked last."""


class Process:
    """A worker process.

    :ivar counts: what it has reported last.
    :ivar ready: whether it has reported anything.
    :ivar ended: whether it will report no more.
    """

    def __init__(self, task: Task, news: News) -> None:
        self.kind = task.kind
        self.counts = Counts()
        self.ready = self.ended = False
        self._news = news
        self._child = Child("ratelimit.demo.worker")
        self._all_read = threads.event()
        threads.start(self._read)
        self._child.tell(**asdict(task))

    @property
    def pid(self) -> int:
        return self._child.pid

    def go(self) -> None:
        """Let it begin with its task."""
        self._child.tell(go=True)

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._child.end(_END_SECONDS)
        self._all_read.wait()
        self._child.close()

    def _read(self) -> None:
        try:
            while (told := self._child.hear()) is not None:
                self.counts = Counts(**told)
                self.ready = True
                self._announce()
        finally:
            self.ended = True
            self._announce()
            self._all_read.set()

    def _announce(self) -> None:
        # One entry is enough: more of them would pile up while the demo does not look.
        if self._news.empty():
            self._news.put(None)


class Team:
    """The worker processes of a demo."""

    def __init__(self, processes: list[Process], news: News) -> None:
        self.processes = processes
        self._news = news

    @classmethod
    @contextmanager
    def of(cls, tasks: Iterable[Task]) -> Generator[Team]:
        """Start a process for each task; none outlives this block."""
        news = News()
        with ExitStack() as stack:
            processes = []
            for task in tasks:
                process = Process(task, news)
                stack.callback(process.close)
                processes.append(process)
            yield cls(processes, news)

    def go(self) -> None:
        """Let all begin."""
        for process in self.processes:
            process.go()

    def admitted(self, key: str) -> int:
        """Return the tokens that they were given under a key."""
        return sum(process.counts.admitted.get(key, 0) for process in self.processes)

    @property
    def last_error(self) -> str:
        """Return an error that one of them met, or an empty text when none did."""
        return next((process.counts.last_error for process in self.processes if process.counts.errors), "")

    def wait_until(
        self, reached: Callable[[Process], bool], meanwhile: Callable[[], None] = lambda: None, seconds: float = 0
    ) -> None:
        """Wait until each process has reached something, which should take this many seconds.

        :raises DemoError: where a process has died before, or does not get there in time.
        """
        deadline = time.monotonic() + seconds + _PATIENCE_SECONDS
        while not all(map(reached, self.processes)):
            for process in self.processes:
                if process.ended and not reached(process):
                    raise DemoError(f"process {process.pid} of the demo has died")
            if time.monotonic() > deadline:
                raise DemoError("a process of the demo does not answer")
            with suppress(Empty):
                self._news.get(timeout=_LOOK_SECONDS)
            meanwhile()
