"""Programs that are interrupted thousands of times at random moments, for tests of what is left then.

``python -m tests.support.storms NAME URL SECONDS`` runs one of them. It prints a line of JSON: how often it was
interrupted, and how many answers there were; it ends with 0 if nothing was lost.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from ratelimit import AsyncProxyManager, ProxyManager, StoreError
from tests.support.inside import coalescing_of

LIMITS = "1000000000/365d intervally"
CAPACITY = 1_000_000_000
PATIENCE = 10.0
"""Seconds that a decision may take: a caller that waits for something that was lost comes too late."""
LONGEST_WAIT = 5.0
"""Seconds that no decision takes, on a machine however busy, unless it waits for something that was lost."""
CONNECTIONS = 5
KEYS = 3


class TimeLimit(Exception):  # noqa: N818  # as that of Celery
    """What the handler of a signal raises."""


class Storm:
    """Raises in the main thread, at random moments, while it is armed."""

    def __init__(self, kinds: tuple[type[BaseException], ...] = (TimeLimit, KeyboardInterrupt)) -> None:
        self._armed = False
        self._kinds = kinds
        self.interrupted = 0
        signal.signal(signal.SIGALRM, self._handle)

    def _handle(self, *_: object) -> None:
        if self._armed:
            self._armed = False
            raise random.choice(self._kinds)

    def run(self, work: Callable[[], Any]) -> Any:
        """Do some work; None where it was interrupted."""
        signal.setitimer(signal.ITIMER_REAL, random.random() * 0.001 + 1e-6)
        try:
            self._armed = True
            answer = work()
            self._armed = False
        except self._kinds:
            self.interrupted += 1
            return None
        except StoreError as error:
            self._armed = False
            # The leader of this call was a thread that was interrupted.
            assert error.in_doubt, error
            return None
        return answer

    @staticmethod
    def end() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Ledger:
    """Decisions on a few keys: those that were answered, and those that may have been carried out or not."""

    def __init__(self, manager: ProxyManager) -> None:
        self.manager = manager
        self.sure: Counter[str] = Counter()
        self.unsure: Counter[str] = Counter()
        self.slowest = 0.0
        self.late = 0  # answers that were not noted
        self._lock = threading.Lock()

    def note(self, key: str, answer: Any, begun: float) -> None:
        with self._lock:
            self.slowest = max(self.slowest, time.monotonic() - begun)
            (self.sure if answer else self.unsure)[key] += 1

    def check(self) -> None:
        """Find all that was lost."""
        for number in range(20):
            assert self.manager.try_consume(f"afterwards {number}")
        for key in {*self.sure, *self.unsure}:
            sure, unsure = self.sure[key], self.unsure[key] + self.late
            if key.startswith("wait"):
                unsure = self.late  # a wait that was interrupted has given back what it had
            end = time.monotonic() + PATIENCE
            while True:
                taken = CAPACITY - self.manager.available_tokens(key)
                if sure <= taken <= sure + unsure or time.monotonic() > end:
                    break
                time.sleep(0.05)
            assert sure <= taken <= sure + unsure, (key, sure, taken, unsure)
        assert self.slowest < LONGEST_WAIT, self.slowest
        manager: Any = self.manager
        merger: Any
        merger, connections = coalescing_of(manager), manager._store._channel._connections
        assert not merger._leaders, merger._leaders
        connections.clear()
        deadline = time.monotonic() + PATIENCE
        while connections._connecting and time.monotonic() < deadline:
            time.sleep(0.05)
        assert connections._connecting == 0
        assert not connections._out
        pool = connections.pool
        assert pool.pool.qsize() == CONNECTIONS
        assert len(pool._connections) == len([each for each in pool.pool.queue if each is not None])


def open_manager(url: str) -> ProxyManager:
    return ProxyManager.from_url(f"{url}?max_connections={CONNECTIONS}", LIMITS, timeout=PATIENCE)


@contextmanager
def background(ledger: Ledger, threads: int) -> Generator[None]:
    """Threads that nothing interrupts, and that want the same buckets."""
    end = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not end.is_set():
                key = f"key {random.randrange(KEYS)}"
                begun = time.monotonic()
                try:
                    answer = ledger.manager.try_consume(key)
                except StoreError as error:
                    if not error.in_doubt:
                        raise
                    answer = False
                ledger.note(key, answer, begun)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in running:
            thread.join(60)
    assert not errors, errors


VERBS: tuple[tuple[str, str], ...] = (
    ("try_consume", "key {}"),
    ("try_consume", "key {}"),
    ("try_consume", "mine {}"),
    ("consume", "wait {}"),
)


def decide(manager: ProxyManager, verb: str, key: str) -> Any:
    return getattr(manager, verb)(key)


def signals(url: str, seconds: float, threads: int = 0) -> dict[str, int]:
    """The handler of a signal raises in the main thread."""
    ledger = Ledger(open_manager(url))
    storm = Storm()
    end = time.monotonic() + seconds
    with background(ledger, threads):
        while time.monotonic() < end:
            verb, keys = random.choice(VERBS)
            key = keys.format(random.randrange(KEYS))
            begun = time.monotonic()
            answer = storm.run(lambda verb=verb, key=key: decide(ledger.manager, verb, key))  # type: ignore[misc]
            ledger.note(key, answer, begun)
        storm.end()
    ledger.check()
    return {"interrupted": storm.interrupted, "answered": ledger.sure.total()}


def signals_in_a_crowd(url: str, seconds: float) -> dict[str, int]:
    """Send the signals of :func:`signals` while other threads want the same buckets."""
    return signals(url, seconds, threads=3)


class Victim(threading.Thread):
    """A thread that decides, and on which another one sets exceptions."""

    def __init__(self, ledger: Ledger, end: float) -> None:
        super().__init__()
        self._ledger = ledger
        self._end = end
        self.armed = False
        self.interrupted = 0
        self.late = 0
        """Exceptions that came between a decision and the note of it."""

    def run(self) -> None:
        while time.monotonic() < self._end:
            try:
                self._decide()
            except TimeLimit:
                self.late += 1

    def _decide(self) -> None:
        while time.monotonic() < self._end:
            verb, keys = random.choice(VERBS)
            key = keys.format(random.randrange(KEYS))
            begun, answer = time.monotonic(), None
            try:
                self.armed = True
                answer = decide(self._ledger.manager, verb, key)
                self.armed = False
            except TimeLimit:
                self.interrupted += 1
            except StoreError as error:
                assert error.in_doubt, error
            self.armed = False
            self._ledger.note(key, answer, begun)

    def interrupt(self) -> None:
        if self.armed and self.ident is not None:
            self.armed = False
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(TimeLimit))


def set_on_threads(url: str, seconds: float) -> dict[str, int]:
    """Exceptions are set on threads, by another."""
    ledger = Ledger(open_manager(url))
    end = time.monotonic() + seconds
    victims = [Victim(ledger, end) for _ in range(4)]
    for victim in victims:
        victim.start()
    while time.monotonic() < end - 0.2:
        time.sleep(0.0001)
        for victim in victims:
            victim.interrupt()
    for victim in victims:
        victim.join(60)
    assert not any(victim.is_alive() for victim in victims)
    ledger.late = sum(victim.late for victim in victims)
    ledger.check()
    return {"interrupted": sum(victim.interrupted for victim in victims), "answered": ledger.sure.total()}


def event_loops(url: str, seconds: float) -> dict[str, int]:
    """The handler of a signal raises in an event loop, which may lose what it was about to do; the next loop works."""
    manager = AsyncProxyManager.from_url(url, LIMITS, timeout=PATIENCE)
    interrupted = answered = 0
    first = True

    async def crowd() -> int:
        done = 0
        for _ in range(20):
            done += sum(await asyncio.gather(*(manager.try_consume(f"key {number % KEYS}") for number in range(6))))
            await manager.consume("wait")
        return done

    def run() -> int:
        loop = asyncio.new_event_loop()
        try:
            return loop.run_until_complete(crowd())
        finally:
            loop.close()

    def handle(*_: object) -> None:
        # A loop goes on after most exceptions, and may wait for what it has lost; after this one it does not.
        nonlocal first
        if first:
            first = False
            raise TimeLimit
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, handle)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            first = True
            signal.setitimer(signal.ITIMER_REAL, random.random() * 0.02 + 1e-6, 0.5)
            answered += run()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except (TimeLimit, KeyboardInterrupt, asyncio.CancelledError, StoreError, RuntimeError):
            # Connecting takes what is raised in it for its own error, and a loop that was hit may cancel its tasks.
            signal.setitimer(signal.ITIMER_REAL, 0)
            interrupted += 1
    begun = time.monotonic()
    assert run() == 120
    assert time.monotonic() - begun < LONGEST_WAIT
    return {"interrupted": interrupted, "answered": answered + 120}


PROGRAMS: dict[str, Callable[[str, float], dict[str, int]]] = {
    each.__name__: each for each in (signals, signals_in_a_crowd, set_on_threads, event_loops)
}

if __name__ == "__main__":
    _, name, url, seconds = sys.argv
    print(json.dumps(PROGRAMS[name](url, float(seconds))))
