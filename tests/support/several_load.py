"""Processes that charge several buckets at once, and keep books of each."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ratelimit import (
    AsyncProxyManager,
    Decision,
    ProxyManager,
    StoreError,
    all_of,
)
from tests.support.both_faces import settled
from tests.support.proxies import Proxy
from tests.support.workers import CALLERS, PATIENCE, Shared

TENANTS, USERS, ROUTES = 1, 20, 3


@dataclass
class Books:
    """What callers were told, by the key of the bucket in the store."""

    admitted: Counter[str] = field(default_factory=Counter[str])
    in_doubt: Counter[str] = field(default_factory=Counter[str])
    round_trips: Counter[int] = field(default_factory=Counter[int])
    decisions: int = 0
    refused: int = 0

    def add(self, other: Books) -> None:
        self.admitted.update(other.admitted)
        self.in_doubt.update(other.in_doubt)
        self.round_trips.update(other.round_trips)
        self.decisions += other.decisions
        self.refused += other.refused


def books_of(all_books: list[Books]) -> Books:
    whole = Books()
    for books in all_books:
        whole.add(books)
    return whole


class _Trips:
    """Notes the round trips of each decision, which all of its buckets report."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def on_decision(self, decision: Decision) -> None:
        if decision.key == "{acme}":
            self._books.round_trips[decision.round_trips] += 1

    def on_interrupted(self, *_: object) -> None:
        raise AssertionError


def by_threads(_: int, url: str, limits: tuple[str, str, str], times: int, losing: float) -> list[Books]:
    """Charge a tenant, a user and a route, so many times in each thread."""
    return _charging(ProxyManager, url, limits, times, losing, _threads)


def by_tasks(_: int, url: str, limits: tuple[str, str, str], times: int, losing: float) -> list[Books]:
    """Charge a tenant, a user and a route, so many times in each task."""
    return _charging(AsyncProxyManager, url, limits, times, losing, _tasks)


def by_both(number: int, *arguments: Any) -> list[Books]:
    return (by_threads if number % 2 else by_tasks)(number, *arguments)


def _threads(caller: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(CALLERS) as threads:
        for done in [threads.submit(asyncio.run, caller()) for _ in range(CALLERS)]:
            done.result(PATIENCE)


def _tasks(caller: Callable[[], Any]) -> None:
    async def main() -> None:
        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    asyncio.run(main())


def _charging(  # noqa: PLR0917  # what is charged, and how
    face: type[ProxyManager | AsyncProxyManager],
    url: str,
    limits: tuple[str, str, str],
    times: int,
    losing: float,
    run: Callable[[Callable[[], Any]], None],
) -> list[Books]:
    books, chance = Books(), random.Random()
    proxy = Proxy(urlsplit(url).port or 6379) if losing else nullcontext()
    with proxy as between:
        at = url if between is None else f"redis://127.0.0.1:{between.port}/0?socket_timeout={PATIENCE}"
        settings: dict[str, Any] = {"timeout": PATIENCE, "merging": Shared.way.merging, "listener": _Trips(books)}
        tenants: Any = face.from_url(at, limits[0], prefix="tenant:", **settings)
        users: Any = face(tenants.store, limits[1], prefix="user:", **settings)
        routes: Any = face(tenants.store, limits[2], prefix="route:", **settings)

        async def caller() -> None:
            for _ in range(times):
                user, route = f"{{acme}}:{chance.randrange(USERS)}", f"{{acme}}:{chance.randrange(ROUTES)}"
                tokens = chance.choice([1, 1, 2])
                charged = {"tenant:{acme}": 1, f"user:{user}": tokens, f"route:{route}": 1}
                limit: Any = all_of((users.bucket(user), tokens), routes.bucket(route), tenants.bucket("{acme}"))
                if between is not None:
                    fate = chance.random()
                    between.lose_replies, between.lose_requests = int(fate < losing), int(fate > 1 - losing)
                books.decisions += 1
                try:
                    if await settled(limit.try_consume()):
                        books.admitted.update(charged)
                    else:
                        books.refused += 1
                except StoreError as error:
                    if error.in_doubt:
                        books.in_doubt.update(charged)

        run(caller)
        if face is ProxyManager:
            tenants.close()
    return [books]
