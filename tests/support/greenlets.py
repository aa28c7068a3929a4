"""What greenlets see of the library, in a process of its own whose standard library gevent or eventlet has replaced.

``python -m tests.support.greenlets LIBRARY REPLACED URL SILENT_URL TLS_URL CLUSTER_URL`` prints what each scenario has
given, as JSON. REPLACED is ``all``, ``but-threads``, or ``late``, which is after a manager was made.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

SILENCE = 1.5
"""Seconds: how long a decision waits for a silent server, and how long it would stop others if it stopped them."""


class Greenlets(NamedTuple):
    """What both libraries have, by the same names."""

    spawn: Callable[..., Any]
    join: Callable[[list[Any]], Any]
    sleep: Callable[[float], Any]
    timeout: Any

    @staticmethod
    def replacing(library: str, *, threads: bool) -> Greenlets:
        options = {} if threads else {"thread": False}
        green: Any = importlib.import_module(library)
        if library == "gevent":
            importlib.import_module("gevent.monkey").patch_all(**options)
            return Greenlets(green.spawn, partial(green.joinall, raise_error=True), green.sleep, green.Timeout)
        green.monkey_patch(**options)
        return Greenlets(green.spawn, lambda jobs: [job.wait() for job in jobs], green.sleep, green.Timeout)

    def each(self, work: Callable[[int], Any], crowd: int) -> None:
        """Let a crowd of greenlets do some work, and wait for them all."""
        self.join([self.spawn(work, number) for number in range(crowd)])


class Scenarios:
    def __init__(self, library: str, replaced: str) -> None:
        self._prefix = f"{library}:{replaced}:"
        self.greenlets: Greenlets

    def manager(self, url: str, limits: str, **options: int) -> Any:
        from ratelimit import ProxyManager

        options = {"socket_timeout": 60, "socket_connect_timeout": 60, **options}
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return ProxyManager.from_url(
            f"{url}{'&' if '?' in url else '?'}{query}", limits, prefix=self._prefix, timeout=60
        )

    def one_key(self, manager: Any, crowd: int = 40) -> int:
        """Count the tokens that a crowd gets of one bucket."""
        admitted: list[bool] = []

        def ask(_: int) -> None:
            admitted.extend(manager.try_consume("one") for _ in range(5))

        self.greenlets.each(ask, crowd)
        return sum(admitted)

    def pause(self, url: str) -> int:
        """Count what is taken from the pool for decisions with pauses, after which a kept connection is looked at."""
        manager = self.manager(url, "1000/day")
        manager.try_consume("paused")
        pool = manager._store._channel._connections.pool
        taken: list[Any] = []
        get = pool.get_connection
        pool.get_connection = lambda: taken.append(get()) or taken[-1]  # type: ignore[func-returns-value]
        for _ in range(5):
            self.greenlets.sleep(0.03)
            manager.try_consume("paused")
        return len(taken)

    def few_connections(self, url: str) -> int:
        """Count the decisions that a crowd gets over two connections."""
        manager = self.manager(url, "1000/day", max_connections=2)
        ended: list[bool] = []

        def ask(number: int) -> None:
            ended.extend(manager.try_consume(f"few:{number}") for _ in range(5))

        self.greenlets.each(ask, 30)
        return len(ended)

    def silent(self, url: str) -> dict[str, Any]:
        """Let a crowd ask a silent server, and another greenlet take its turns meanwhile."""
        from ratelimit import RateLimitError

        manager = self.manager(url, "1/day")
        errors: set[str] = set()
        took: list[float] = []
        turns = [time.monotonic()]

        def take_turns() -> None:
            while len(took) < 20:
                self.greenlets.sleep(0.01)
                turns.append(time.monotonic())

        def ask(number: int) -> None:
            begun = time.monotonic()
            try:
                manager.try_consume(f"silent:{number % 3}", timeout=SILENCE)
            except RateLimitError as error:
                errors.add(type(error).__name__)
            took.append(time.monotonic() - begun)

        others = self.greenlets.spawn(take_turns)
        self.greenlets.each(ask, 20)
        self.greenlets.join([others])
        gaps = [after - before for before, after in pairwise(turns)]
        return {"errors": sorted(errors), "longest": max(took), "gap": max(gaps)}

    def waiting(self, url: str) -> float:
        """Measure how long a crowd of 26 waits for tokens that come back at a rate of 50 in a second."""
        manager = self.manager(url, "1/20ms")
        begun = time.monotonic()
        self.greenlets.each(lambda _: manager.consume("waiting"), 26)
        return time.monotonic() - begun

    def interrupted(self, url: str) -> dict[str, int]:
        """Interrupt requests of many keys; count keys with a wrong charge, and the connections that can be had then."""
        manager = self.manager(url, "1000/day", max_connections=2, timeout=30)
        rand, timeout = random.Random(0), self.greenlets.timeout
        wrong = 0

        def ask(number: int) -> None:
            nonlocal wrong
            key, admitted, in_doubt = f"interrupted:{number}", 0, 0
            for _ in range(30):
                try:
                    with timeout(rand.random() * 0.01):
                        admitted += manager.try_consume(key)
                except timeout:
                    in_doubt += 1
            charged = 1000 - manager.available_tokens(key)
            wrong += not admitted <= charged <= admitted + in_doubt

        self.greenlets.each(ask, 20)
        connections = manager._store._channel._connections
        connections.clear()
        return {"wrong": wrong, "free": len([connections.pool.get_connection() for _ in range(2)])}

    def caught_up(self) -> int:
        """Count what a store is charged, when it is back, for what was decided without it."""
        from ratelimit import OnError, ProxyManager, StoreUnavailableError
        from ratelimit.testing import SwappingMemoryStore

        class Failing(SwappingMemoryStore):
            fails = True

            def swap(self, key: bytes, *arguments: Any, **options: Any) -> Any:
                if self.fails:
                    raise StoreUnavailableError(key, "down")
                return super().swap(key, *arguments, **options)

        store = Failing()
        manager = ProxyManager(store, "100/day", on_error=OnError.local(1))
        for number in range(10):
            manager.try_consume(f"local:{number % 2}", 2)
        store.fails = False
        manager.try_consume("another")
        until = time.monotonic() + 20
        while (charged := 200 - sum(manager.available_tokens(f"local:{number}") for number in range(2))) != 20:
            if time.monotonic() > until:
                break
            self.greenlets.sleep(0.01)
        return charged


def main(library: str, replaced: str, *urls: str) -> dict[str, Any]:
    url, silent_url, tls_url, cluster_url = urls
    scenarios = Scenarios(library, replaced)
    one, cluster = partial(scenarios.manager, url, "10/day"), partial(scenarios.manager, cluster_url, "10/day")
    if replaced == "late":
        early_one, early_cluster = one(), cluster()
        one, cluster = (lambda: early_one), (lambda: early_cluster)  # type: ignore[assignment]
    scenarios.greenlets = Greenlets.replacing(library, threads=replaced != "but-threads")
    return {
        "one_key": given(lambda: scenarios.one_key(one())),
        "cluster": given(lambda: scenarios.one_key(cluster())),
        "tls": given(lambda: scenarios.one_key(scenarios.manager(tls_url, "10/day"), 4)),
        "pause": given(lambda: scenarios.pause(url)),
        "few_connections": given(lambda: scenarios.few_connections(url)),
        "silent": given(lambda: scenarios.silent(silent_url)),
        "waiting": given(lambda: scenarios.waiting(url)),
        "interrupted": given(lambda: scenarios.interrupted(url)),
        "caught_up": given(scenarios.caught_up),
    }


def given(scenario: Callable[[], Any]) -> Any:
    try:
        return scenario()
    except BaseException:  # noqa: BLE001  # the test shows it
        return traceback.format_exc()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
