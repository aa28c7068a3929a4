"""Processes that fork, loops that end, managers that are forgotten, callers that are stopped: nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from ratelimit import AsyncProxyManager, CountingListener, OnError, Optimization, ProxyManager, StoreError
from ratelimit.runtime import fork_safety
from tests.support import lifecycle
from tests.support.decision_paths import Tap
from tests.support.lifecycle import FORKS, forked
from tests.support.servers import RedisServer, wait_until

pytestmark = pytest.mark.redis

ROOT = Path(__file__).parents[2]
NAME = "lifecycle"
PATIENCE = 60

FORKING = [
    lifecycle.prefork_of_threads,
    lifecycle.prefork_of_tasks,
    lifecycle.fork_beside_a_loop,
    lifecycle.fork_with_a_loop,
    lifecycle.children_that_close,
    lifecycle.children_that_end_as_programs_do,
]
PROGRAMS = [
    lifecycle.multiprocessing_fork,
    lifecycle.multiprocessing_forkserver,
    lifecycle.multiprocessing_spawn,
    lifecycle.parallel_loops,
    lifecycle.left_open,
    lifecycle.left_open_by_threads,
    lifecycle.left_open_by_tasks,
    lifecycle.left_in_flight,
]
by_all_forks = pytest.mark.parametrize("how", lifecycle.FORKS)


def ends_well(program: Callable[[str], None], redis_url: str, how: str) -> None:
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "tests.support.lifecycle", program.__name__]
    url = f"{redis_url}?socket_timeout={PATIENCE}"
    command += [url, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_ends_well_and_complains_of_nothing(program: Callable[[str], None], redis_url: str) -> None:
    ends_well(program, redis_url, "os.fork")


@by_all_forks
@pytest.mark.parametrize("program", FORKING, ids=lambda program: program.__name__)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_and_those_forked_from_it_end_well(program: Callable[[str], None], redis_url: str, how: str) -> None:
    ends_well(program, redis_url, how)


def locks_of(root: object) -> list[Any]:
    """All locks that objects of this library hold, as far as they can be reached from one."""
    found: dict[int, Any] = {}
    seen: dict[int, object] = {}
    left = [root]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | FunctionType):
            continue
        seen[id(one)] = one
        is_ours = type(one).__module__.partition(".")[0] == "ratelimit"
        for other in gc.get_referents(one):
            if is_ours and isinstance(other, LOCK):
                found[id(other)] = other
            left.append(other)
    return [*found.values()]


LOCK = type(threading.Lock())

MAKES: dict[str, Callable[[str], ProxyManager]] = {
    "plain": lambda url: ProxyManager.from_url(url, "100/day"),
    "memory": lambda _: ProxyManager.from_url("memory://", "100/day"),
    "optimized": lambda url: ProxyManager.from_url(url, "100/day", optimization=Optimization.skip_sync_on_zero()),
    "listener": lambda url: ProxyManager.from_url(url, "100/day", listener=CountingListener(), on_error=OnError.DENY),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@by_all_forks
@pytest.mark.parametrize("name", MAKES)
def test_a_fork_while_other_threads_hold_locks_leaves_none_of_them_locked(
    name: str, how: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_safety, "_page", fork_safety._page)  # as it was, afterwards
    with MAKES[name](url) as manager:
        assert manager.try_consume("key")
        locks = locks_of(manager)
        assert len(locks) >= 2
        if name != "memory":  # the client's own pool notices a fork only when it is asked for a connection
            locks.append(manager._store._channel._connections.pool.pool.mutex)  # type: ignore[attr-defined]
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with ExitStack() as stack:
                for lock in locks:
                    stack.enter_context(lock)
                held.set()
                done.wait(PATIENCE)

        thread = threading.Thread(target=hold)
        thread.start()
        try:
            assert held.wait(PATIENCE)
            answers = forked(lambda: [manager.try_consume("key"), manager.try_consume("another")], FORKS[how])
            assert answers == [True, True]
        finally:
            done.set()
            thread.join()


# Managers within a process


@pytest.fixture
def url(server: RedisServer) -> str:
    """The URL of an empty server; connections by it have a name."""
    with server.client() as client:
        client.flushall()
    wait_until(lambda: connections(server) == 0, "nobody is connected")
    return f"{server.url}?client_name={NAME}&socket_timeout={PATIENCE}"


def connections(server: RedisServer) -> int:
    """Those that the server has with managers."""
    with server.client() as client:
        return sum(one["name"] == NAME for one in client.client_list())


def open_files() -> int:
    """How many this process has; 0 where nobody knows."""
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return 0


def owner(remaining: int) -> int:
    """Whose bucket it is that has so many tokens left: each key has a million more than the one before it."""
    return -(-remaining // 10**6)


def limits_of(key: Any) -> str:
    return f"{int(key) * 10**6}/365d intervally"


OPTIMIZATIONS = [None, Optimization.skip_sync_on_zero(), Optimization.delaying(5, 10)]
optimizations = pytest.mark.parametrize("optimization", OPTIMIZATIONS, ids=lambda one: one.kind if one else "none")


@optimizations
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
def test_a_forgotten_manager_leaves_nothing_behind(
    server: RedisServer, url: str, closed: bool, optimization: Optimization | None
) -> None:
    before = open_files()
    manager = ProxyManager.from_url(url, limits_of, optimization=optimization)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(manager.try_consume, ["1", "2"] * 20))
    assert 1 <= connections(server) <= 4
    if closed:
        manager.close()
    forgotten = weakref.ref(manager)
    del manager
    gc.collect()
    assert forgotten() is None
    wait_until(lambda: connections(server) == 0, "its connections are closed")
    assert open_files() == before


@optimizations
@pytest.mark.parametrize("closed", [True, False])
async def test_a_forgotten_manager_of_tasks_leaves_nothing_behind(
    server: RedisServer, url: str, closed: bool, optimization: Optimization | None
) -> None:
    before, tasks = open_files(), asyncio.all_tasks()
    manager = AsyncProxyManager.from_url(url, limits_of, optimization=optimization)
    assert all(await asyncio.gather(*(manager.try_consume(key) for key in ["1", "2"] * 20)))
    assert connections(server) == 1
    if closed:
        await manager.aclose()
    forgotten = weakref.ref(manager)
    del manager
    gc.collect()
    assert forgotten() is None
    async with asyncio.timeout(PATIENCE):
        while connections(server) or asyncio.all_tasks() != tasks:
            await asyncio.sleep(0.01)
    assert open_files() == before


def test_loops_one_after_the_other_leave_nothing_behind(server: RedisServer, url: str) -> None:
    manager = AsyncProxyManager.from_url(url, limits_of)

    async def consume() -> None:
        assert all(await asyncio.gather(*(manager.try_consume(key) for key in ["1", "2"] * 20)))

    asyncio.run(consume())
    before = open_files()
    for _ in range(20):
        asyncio.run(consume())
    wait_until(lambda: connections(server) == 0, "a connection ends with its loop")
    assert open_files() <= before


# Callers that are stopped


@optimizations
async def test_tasks_cancelled_in_flight_mix_no_replies_and_leave_nothing(  # noqa: C901
    server: RedisServer, url: str, optimization: Optimization | None
) -> None:
    chance = random.Random(11)
    manager = AsyncProxyManager.from_url(url, limits_of, optimization=optimization)
    async with manager:
        assert all([await manager.try_consume(f"{key}") for key in range(1, 10)])
        tasks = asyncio.all_tasks()

        async def ask(number: int) -> None:
            key = str(number)
            match chance.randrange(4):
                case 0:
                    assert owner(await manager.available_tokens(key)) == number
                case 1:
                    assert owner((await manager.try_consume_and_return_remaining(key)).remaining_tokens) == number
                case 2:
                    assert str(await manager.configuration(key)).startswith(limits_of(key)[:4])
                case _:
                    assert await manager.consume(key)

        for _ in range(10):
            asked = [asyncio.create_task(ask(chance.randrange(1, 10))) for _ in range(300)]
            while not all(task.done() for task in asked):
                await asyncio.sleep(chance.choice([0, 0, 0.0005]))
                for task in chance.sample(asked, 20):
                    task.cancel()
            for task in asked:
                assert task.cancelled() or task.exception() is None
        assert connections(server) == 1
        async with asyncio.timeout(PATIENCE):
            while asyncio.all_tasks() != tasks:  # what is in flight is seen through
                await asyncio.sleep(0.01)
        for key in range(1, 10):
            assert owner(await manager.available_tokens(f"{key}")) == key
    gc.collect()
    # By their types: isinstance asks objects what they are, and lazy ones of frameworks go and look.
    pending = [one for one in gc.get_objects() if issubclass(type(one), asyncio.Future) and not one.done()]
    assert len(pending) <= len(asyncio.all_tasks()) + 1  # the test waits for one


@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_threads_stopped_in_flight_mix_no_replies_and_hold_up_nobody(
    server: RedisServer, url: str, stop: type[BaseException], merging: bool
) -> None:
    before = open_files()
    manager = ProxyManager.from_url(url, limits_of, merging=merging)
    tap = Tap(manager._store)
    stopped = threading.local()
    chance = random.Random(11)

    def maybe_stop(_kind: str) -> None:
        if chance.random() < getattr(stopped, "often", 0):
            raise stop

    tap.before = tap.after = maybe_stop

    def ask(often: float) -> tuple[int, int]:
        stopped.often = often
        answers = stops = 0
        for turn in range(150):
            number = 1 + turn % 3
            try:
                probe = manager.try_consume_and_return_remaining(f"{number}")
            except stop:
                stops += 1
            except StoreError as error:
                # The leader of the swap that this caller shared was stopped.
                assert error.in_doubt
            else:
                assert owner(probe.remaining_tokens) == number
                answers += 1
        return answers, stops

    with ThreadPoolExecutor(8) as threads:
        results = [threads.submit(ask, often) for often in (0.3, 0) * 4]
        counts = [result.result(PATIENCE) for result in results]
    assert all(stops > 0 for _, stops in counts[::2])
    assert all(stops == 0 for _, stops in counts[1::2])
    assert sum(answers for answers, _ in counts) > 300
    assert connections(server) <= 8
    manager.close()
    wait_until(lambda: connections(server) == 0, "its connections are closed")
    assert open_files() <= before
