"""Clients of a service: a process that asks again as soon as it is answered, over connections that stay open.

It reads no more of an answer than its status and its length, so that it leaves the processor to the service.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import cycle
from multiprocessing.connection import Connection
from typing import Any, Final, Self

from benchmarks.spawn import spawned

ANSWER_SECONDS: Final = 45


@dataclass(frozen=True)
class Visit:
    """What the clients do.

    :param users: the addresses that ask, in this order, over and over.
    :param before: those that ask before, once each.
    :param warm_up: seconds in which they ask before it counts.
    """

    port: int
    clients: int
    users: Sequence[str]
    before: Sequence[str]
    warm_up: float
    seconds: float


@dataclass(frozen=True)
class Answers:
    """What the service answered.

    :param statuses: how often each status was answered.
    """

    statuses: Counter[int]
    latencies: array[int]
    seconds: float

    @classmethod
    def none(cls) -> Self:
        """Return no answers, to add some."""
        return cls(Counter(), array("q"), 0.0)


class LoadError(Exception):
    """What went wrong among the clients."""


class Clients:
    """The process of the clients."""

    def __init__(self) -> None:
        self._process, self._end = spawned(_serve)

    def visit(self, visit: Visit) -> Answers:
        self._end.send(visit)
        if not self._end.poll(ANSWER_SECONDS):
            raise LoadError("the clients do not answer")
        answer = self._end.recv()
        if isinstance(answer, str):
            raise LoadError(answer)
        return answer  # type: ignore[no-any-return]

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(questions: Connection) -> None:
    while True:
        try:
            visit = questions.recv()
        except EOFError:
            return
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                answer: Any = runner.run(_visit(visit))
        except Exception as error:  # noqa: BLE001  # the process that asked gets it
            answer = f"{type(error).__name__}: {error}"
        questions.send(answer)


def _loop_factory() -> Callable[[], Any] | None:
    try:
        return import_module("uvloop").new_event_loop  # type: ignore[no-any-return]
    except ImportError:
        return None


async def _visit(visit: Visit) -> Answers:
    loop = asyncio.get_running_loop()
    clients = [Client() for _ in range(visit.clients)]
    try:
        await asyncio.gather(
            *(loop.create_connection(lambda each=each: each, "127.0.0.1", visit.port) for each in clients)  # type: ignore[misc]
        )
        if visit.before:
            await _ask(clients, iter(visit.before), None)
        users = cycle(visit.users)
        await _ask(clients, users, visit.warm_up)
        begin = time.perf_counter_ns()
        answers = await _ask(clients, users, visit.seconds)
        return Answers(answers.statuses, answers.latencies, (time.perf_counter_ns() - begin) / 1e9)
    finally:
        for client in clients:
            client.close()


async def _ask(clients: Sequence[Client], users: Iterator[str], seconds: float | None) -> Answers:
    end = None if seconds is None else time.perf_counter_ns() + int(seconds * 1e9)
    answers = Answers.none()
    await asyncio.gather(*(client.ask(users, end, answers) for client in clients))
    return answers


class Client(asyncio.Protocol):
    """One client, which has one request under way."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = b""
        self._since = 0
        self._users: Iterator[str] = iter(())
        self._end: int | None = None
        self._answers = Answers.none()
        self._over: asyncio.Future[None] | None = None

    async def ask(self, users: Iterator[str], end: int | None, answers: Answers) -> None:
        """Ask until the end, or until there are no more users."""
        self._users, self._end, self._answers = users, end, answers
        self._over = asyncio.get_running_loop().create_future()
        self._next()
        await self._over

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_exception(exc or ConnectionError("the service has closed a connection"))

    def data_received(self, data: bytes) -> None:
        received = self._received + data if self._received else data
        length = length_of(received)
        if length is None or len(received) < length:
            self._received = received
            return
        self._received = received[length:]
        now = time.perf_counter_ns()
        self._answers.latencies.append(now - self._since)
        self._answers.statuses[int(received[9:12])] += 1
        if self._end is None or now < self._end:
            self._next()
        else:
            self._finish()

    def _next(self) -> None:
        user = next(self._users, None)
        if user is None:
            self._finish()
            return
        self._since = time.perf_counter_ns()
        self._transport.write(
            b"GET / HTTP/1.1\r\nhost: localhost\r\naccept: */*\r\nx-forwarded-for: %b\r\n\r\n" % user.encode()
        )

    def _finish(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)


def length_of(received: bytes) -> int | None:
    """Return the length of an answer with its head, or None where the head has not come as a whole."""
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return None
    for line in received[:head].split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head + 4 + int(value)
    raise ValueError("an answer without a length")
