"""Forked processes: whose tokens and debts are whose, clusters, and servers that fork."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ratelimit import AsyncProxyManager, OnError, Optimization, ProxyManager, StoreUnavailableError
from ratelimit.engine.question import Question
from ratelimit.runtime import fork_safety
from ratelimit.stores.protocol import Lost
from ratelimit.testing import SwappingMemoryStore
from tests.integrations.gunicorns import gunicorn, statuses
from tests.integrations.uwsgis import uwsgi
from tests.support import servers
from tests.support.inside import local_decisions_of
from tests.support.lifecycle import FORKS, forked
from tests.support.servers import wait_until
from tests.support.workers import patient

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")

LIMITS = "1000/365d intervally"
PATIENCE = 60


@pytest.fixture(params=FORKS)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    monkeypatch.setattr(fork_safety, "_page", fork_safety._page)  # as it was, afterwards
    return FORKS[request.param]


# Whose tokens


@pytest.mark.redis
def test_tokens_that_are_not_booked_yet_are_booked_by_the_parent_alone(url: str, how: Callable[[], int]) -> None:
    optimization = Optimization.delaying(100, 3600)
    with ProxyManager.from_url(url, LIMITS, optimization=optimization, timeout=PATIENCE) as manager:
        assert all(manager.try_consume("key") for _ in range(11))

        def consume_and_close() -> int:
            consumed = sum(manager.try_consume("key") for _ in range(5))
            manager.close()
            return consumed

        assert forked(consume_and_close, how) == 5
    with ProxyManager.from_url(url, LIMITS) as manager:
        assert manager.snapshot("key").consumed_tokens == 16


@pytest.mark.redis
def test_tokens_on_their_way_to_the_store_at_a_fork_are_booked_once(url: str, how: Callable[[], int]) -> None:
    """A thread of the parent is in an exchange that carries them, which does not end in the child."""
    with ProxyManager.from_url(url, LIMITS, optimization=Optimization.delaying(100, 3600)) as manager:
        assert all(manager.try_consume("key") for _ in range(11))
        local: Any = local_decisions_of(manager)
        inner, asked, forks = local._inner, threading.Event(), threading.Event()

        def slow(question: Question) -> Any:
            asked.set()
            assert forks.wait(PATIENCE)
            return (yield from inner(question))

        local._inner = slow
        thread = threading.Thread(target=manager.bucket("key").sync)
        thread.start()
        assert asked.wait(PATIENCE)

        def consume_and_close() -> list[int]:
            local._inner = inner
            consumed = sum(manager.try_consume("key") for _ in range(5))
            manager.close()
            return [consumed, sum(len(entry.under_way()) for entry in local._entries.values.values())]

        assert forked(consume_and_close, how) == [5, 0]
        forks.set()
        thread.join()
    with ProxyManager.from_url(url, LIMITS) as manager:
        assert manager.snapshot("key").consumed_tokens == 16


class FailingStore(SwappingMemoryStore):
    """A store that fails when it is told to, or lets its caller wait."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.waiting, self.goes_on = threading.Event(), threading.Event()
        self.waits_for: bytes | None = None

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        if self.fails:
            raise StoreUnavailableError(key, "it fails, as it was told to")
        if key == self.waits_for:
            self.waiting.set()
            assert self.goes_on.wait(PATIENCE)
        return super().swap(key, before, after, ttl_millis)


def test_parent_and_child_each_charge_their_own_debts(
    how: Callable[[], int],
) -> None:
    store = FailingStore()
    manager = ProxyManager(store, LIMITS, on_error=OnError.local(share=1), timeout=PATIENCE)

    def consume_without_store(tokens: int) -> None:
        store.fails = True
        assert manager.try_consume("debtor", tokens)
        store.fails = False

    def charged() -> int:
        return 0 if store.get("debtor") is None else manager.snapshot("debtor").consumed_tokens

    consume_without_store(3)
    store.waits_for = b"debtor"
    assert manager.try_consume("another")  # begins to charge debts, in a thread
    assert store.waiting.wait(PATIENCE)

    def charge() -> int:
        store.waits_for = None
        consume_without_store(5)
        # A second after the last time that debts were charged, a decision looks for others.
        wait_until(lambda: manager.try_consume("another") and charged() > 0, "the debt is charged")
        return charged()

    assert forked(charge, how) == 5  # in a memory of its own
    store.goes_on.set()
    wait_until(lambda: charged() == 3, "the debt is charged")


# Clusters


@pytest.fixture(scope="module")
def cluster(server_binary: servers.ServerBinary) -> Generator[servers.Cluster]:
    with servers.cluster(server_binary) as cluster:
        yield cluster


KEYS = [f"{number}" for number in range(10)]


@pytest.mark.redis
def test_parent_and_child_use_a_cluster_whose_client_held_locks(
    cluster: servers.Cluster, how: Callable[[], int]
) -> None:
    with ProxyManager.from_url(cluster.url, LIMITS, prefix=f"{how}:", timeout=PATIENCE) as manager:

        def consume(times: int) -> int:
            return sum(manager.try_consume(key) for key in KEYS for _ in range(times))

        assert consume(3) == 30
        channel: Any = manager._store._channel  # type: ignore[attr-defined]
        table = channel._table
        with ExitStack() as stack:
            held, done = threading.Event(), threading.Event()

            def hold() -> None:
                with table.client.nodes_manager._lock, table.client._lock:
                    held.set()
                    done.wait(PATIENCE)

            thread = threading.Thread(target=hold)
            stack.callback(thread.join)
            stack.callback(done.set)
            thread.start()
            assert held.wait(PATIENCE)
            # Not that it happens to be asked for nothing that takes the locks.
            assert forked(lambda: [consume(5), channel._table is table], how) == [50, False]
        assert consume(2) == 20
        assert {manager.snapshot(key).consumed_tokens for key in KEYS} == {10}


@pytest.mark.redis
def test_a_cluster_is_used_by_tasks_of_parent_and_child(cluster: servers.Cluster, how: Callable[[], int]) -> None:
    manager = AsyncProxyManager.from_url(cluster.url, LIMITS, prefix=f"tasks:{how}:", timeout=PATIENCE)

    async def consume(times: int) -> int:
        return sum(await asyncio.gather(*(manager.try_consume(key) for key in KEYS for _ in range(times))))

    async def consumed() -> set[int]:
        return {(await manager.snapshot(key)).consumed_tokens for key in KEYS}

    with asyncio.Runner() as runner:
        assert runner.run(consume(3)) == 30
        client: Any = manager._store._channel._client  # type: ignore[attr-defined]
        runner.run(client.eval("return 1", 1, "a key"))  # over a connection of the client itself
        theirs = {id(one) for node in client.get_nodes() for one in node._connections}
        assert theirs

        def in_child() -> list[Any]:
            async def consume_and_look() -> list[Any]:
                count = await consume(5)
                await client.eval("return 1", 1, "a key")
                return [count, theirs & {id(one) for node in client.get_nodes() for one in node._connections}]

            count, shared = asyncio.run(consume_and_look())
            return [count, len(shared)]

        assert forked(in_child, how) == [50, 0]
        assert runner.run(consume(2)) == 20
        assert runner.run(consumed()) == {10}
        runner.run(manager.aclose())


# Servers

PROGRAM = """
import os
from ratelimit import ProxyManager
from ratelimit.engine.question import Question
from tests.support.inside import local_decisions_of

manager = ProxyManager.from_url(os.environ["RATELIMIT_URL"], "300/day", timeout=60)
manager.try_consume("while the program is imported")


def application(environ, start_response):
    admitted = all(manager.try_consume(key) for key in ("all", environ["PATH_INFO"]))
    start_response("200 OK" if admitted else "429 Too Many Requests", [("Content-Length", "0")])
    return []
"""


def serve_together(address: tuple[str, int], url: str) -> None:
    assert statuses(address, "/", 500) == {200: 300, 429: 200}
    with ProxyManager.from_url(url, "300/day") as manager:
        assert manager.snapshot("all").consumed_tokens == manager.snapshot("/").consumed_tokens == 300


UWSGI_OPTIONS: list[tuple[str, ...]] = [
    (),
    ("--enable-threads", "--threads", "4"),
    ("--lazy-apps",),
    # With Python 3.13 uWSGI 2.0.30 answers nothing then, whatever the application.
    *([("--py-call-osafterfork",)] if sys.version_info < (3, 12) else []),
]


@pytest.mark.redis
@pytest.mark.parametrize("options", UWSGI_OPTIONS, ids=" ".join)
def test_workers_of_uwsgi_admit_together_what_the_limit_says(
    options: tuple[str, ...], redis_url: str, tmp_path: Path
) -> None:
    pytest.importorskip("pyuwsgi")
    with uwsgi(PROGRAM, tmp_path, *options, redis_url=patient(redis_url)) as address:
        serve_together(address, redis_url)


@pytest.mark.redis
@pytest.mark.parametrize("preload", [True, False])
def test_workers_of_gunicorn_admit_together_what_the_limit_says(preload: bool, redis_url: str, tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    with gunicorn(PROGRAM, tmp_path, redis_url=patient(redis_url), preload=preload) as address:
        serve_together(address, redis_url)
