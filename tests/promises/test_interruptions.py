"""Threads that are interrupted anywhere, and tasks that are cancelled anywhere: nothing is lost, and nobody waits."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hiredis
import pytest

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    RedisStore,
    StoreUnavailableError,
)
from ratelimit.engine.last_seen import LastSeen, Sighting, _weight
from ratelimit.engine.question import Course
from ratelimit.stores.protocol import Lost
from ratelimit.stores.redis import channel, shared_connection
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.support import storms
from tests.support.inside import coalescing_of, local_buckets_of, local_decisions_of, pipeline_of
from tests.support.interrupting import Interruption, at_every_point
from tests.support.reservations import reserve_and_settle
from tests.support.servers import RedisServer, wait_until

NOW = 1_700_000_000 * 10**9 + 1
LIMITS = "1000/day intervally"
PATIENCE = 20
"""Seconds that a decision may take: a caller that waits for something that was lost fails."""
FEWEST_POINTS = 12
"""The least number of points at which a decision is interrupted, so that no test passes without interrupting it."""


at_points = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="there Python reports some instructions only; the storms are for it"
)


def merger_of(manager: Any) -> Any:
    return coalescing_of(manager)


def connections_of(manager: Any) -> Any:
    return manager._store._channel._connections


def nothing_is_left(manager: ProxyManager) -> None:
    """Nobody leads, nobody queues, and what is out of the pool is kept for the next one."""
    merger = merger_of(manager)
    assert not merger._leaders
    assert not merger._queues


def nothing_is_out(manager: ProxyManager) -> None:
    connections = connections_of(manager)
    wait_until(lambda: len(connections._out) == len(connections._kept), "what was interrupted is back in the pool")
    wait_until(lambda: connections._connecting == 0, "nobody connects any more")
    pool = connections.pool
    idle = [each for each in pool.pool.queue if each is not None]
    assert len(pool._connections) == len(idle) + len(connections._kept)
    assert pool.pool.qsize() + len(connections._kept) == pool.max_connections


@pytest.fixture
def url(server: RedisServer) -> str:
    """The URL of an empty server, with few connections."""
    with server.client() as client:
        client.flushall()
    return f"{server.url}?max_connections=3"


# Connections


@at_points
@pytest.mark.redis
@pytest.mark.parametrize("keeps", [True, False], ids=["a kept connection", "a fresh connection"])
def test_a_decision_that_is_interrupted_anywhere_loses_nothing(url: str, keeps: bool) -> None:
    points = answered = 0
    with ProxyManager.from_url(url, LIMITS, timeout=PATIENCE) as manager:

        def decide() -> bool:
            return manager.try_consume("key")

        assert decide()
        for points, outcome in at_every_point(decide):  # noqa: B007
            assert isinstance(outcome, Interruption)
            assert decide()
            answered += 1
            nothing_is_left(manager)
            nothing_is_out(manager)
            if not keeps:
                connections_of(manager).clear()
        taken = 1000 - manager.available_tokens("key")
    assert points > FEWEST_POINTS
    assert answered + 3 <= taken <= 2 * answered + 3


@at_points
@pytest.mark.redis
def test_what_is_interrupted_while_it_is_given_back_is_given_back_once(url: str) -> None:
    """A connection that two callers were given would mix their replies."""
    with ProxyManager.from_url(url, LIMITS, timeout=PATIENCE) as manager:
        connections = connections_of(manager)

        def give_back(how: dict[str, bool]) -> None:
            connections.give_back(connections.take(time.monotonic(), None), **how)

        for how in ({}, {"broken": True}):
            for point, _ in at_every_point(lambda how=how: give_back(how)):  # type: ignore[misc]
                assert manager.try_consume(f"{point}")
                nothing_is_out(manager)
        for point, _ in at_every_point(connections.clear):
            assert manager.try_consume(f"{point}")
            nothing_is_out(manager)


@at_points
@pytest.mark.redis
def test_an_error_that_is_kept_keeps_no_connection(url: str) -> None:
    """Its traceback holds all that the frames held."""
    kept: list[Any] = []
    with ProxyManager.from_url(url, LIMITS, timeout=PATIENCE) as manager:
        assert manager.try_consume("key")

        def decide() -> None:
            try:
                manager.try_consume("key")
            except Interruption as error:
                kept.append(error.__traceback__)
                raise

        for _ in at_every_point(decide):
            pass
        assert all(manager.try_consume("key") for _ in range(3))
        assert all(manager.try_consume(f"{number}") for number in range(3))
    assert len(kept) > FEWEST_POINTS


# hiredis


@pytest.mark.redis
def test_hiredis_is_given_nothing_but_bytes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It crashes where the handler of a signal raises while it writes an int out."""
    packed: list[Any] = []

    def pack(command: tuple[Any, ...]) -> bytes:
        packed.extend(command)
        return given(command)

    given = channel.pack_one
    monkeypatch.setattr(hiredis, "pack_command", pack)
    for module in (channel, shared_connection):
        monkeypatch.setattr(module, "pack_one", pack)
    for query in ("protocol=2", "protocol=3&db=1"):
        with ProxyManager.from_url(f"{url}&{query}", LIMITS) as manager:
            every_verb(manager)
            assert isinstance(manager._store, RedisStore)
            assert manager._store.ask(b"key", "EVAL", "return ARGV[1]", 1, b"key", 12) == b"12"
    assert len(packed) > 300
    assert {type(argument) for argument in packed} == {bytes}


@pytest.mark.redis
async def test_tasks_give_hiredis_nothing_but_bytes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    given = channel.pack_one

    def pack(command: tuple[Any, ...]) -> bytes:
        packed.extend(command)
        return given(command)

    monkeypatch.setattr(hiredis, "pack_command", pack)
    for module in (channel, shared_connection):
        monkeypatch.setattr(module, "pack_one", pack)
    async with AsyncProxyManager.from_url(f"{url}&protocol=3", LIMITS) as manager:
        assert isinstance(manager._store, AsyncRedisStore)
        for _ in range(20):
            assert all(await asyncio.gather(*(manager.try_consume("key") for _ in range(5))))
    assert len(packed) > 100
    assert {type(argument) for argument in packed} == {bytes}


def every_verb(manager: ProxyManager) -> None:
    manager.remove("key")
    for _ in range(20):
        assert manager.try_consume("key")
    manager.consume("key")
    manager.bucket("key").try_consume_as_much_as_possible(5)
    manager.bucket("key").consume_ignoring_rate_limits(3)
    manager.bucket("key").estimate_ability_to_consume(3)
    manager.bucket("key").add_tokens(3)
    manager.bucket("key").force_add_tokens(3)
    manager.bucket("key").give_back(3)
    reserve_and_settle(manager, "key")
    manager.snapshot("key")
    manager.reset("key")
    manager.bucket("key").hold_back(1)
    manager.remove("key")
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: [manager.try_consume("crowd") for _ in range(25)], range(4)))


# Threads that want the same bucket


class Gate(SwappingMemoryStore):
    """Whose swaps wait, once they are told to, until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.open.set()
        self.waits = threading.Semaphore(0)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        if not self.open.is_set():
            self.waits.release()
            self.open.wait(PATIENCE)
        return super().swap(key, before, after, ttl_millis)


class Crowd:
    """A manager, and threads that want the bucket that the interrupted thread wants."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self.store = Gate()
        self.manager = ProxyManager(self.store, LIMITS, clock=ManualClock(NOW), timeout=PATIENCE)
        self._threads = threads
        self.others: list[Future[bool]] = []
        self.kept: list[Any] = []
        self.patience = PATIENCE - 1  # the one that can wait longest leads

    def decide(self) -> bool:
        try:
            return self.manager.try_consume("key", timeout=self.patience)
        except Interruption as error:
            self.kept.append(error.__traceback__)  # with all frames, as a caller has it who handles the error
            raise

    def add(self) -> None:
        self.others.append(self._threads.submit(self.manager.try_consume, "key"))

    def queue(self) -> list[Any]:
        return list(merger_of(self.manager)._queues.get(b"key", ()))

    def open_when_queued(self, number: int) -> None:
        def wait_and_open() -> None:
            end = time.monotonic() + 0.08  # the interrupted thread may not come
            while len([entry for entry in self.queue() if not entry.left]) < number and time.monotonic() < end:
                time.sleep(0.0005)
            self.store.open.set()

        self._threads.submit(wait_and_open)

    def check(self) -> None:
        """Find that nobody waits, and that what was answered was taken."""
        answers = [self._outcome(other) for other in self.others]
        assert self.decide()
        nothing_is_left(self.manager)
        in_doubt = answers.count(None) + 1  # and the decision that was interrupted
        taken = 1000 - self.manager.available_tokens("key")
        sure = answers.count(True) + 2  # the first one, and the one that was just made
        assert sure <= taken <= sure + in_doubt

    @staticmethod
    def _outcome(other: Future[bool]) -> bool | None:
        """None: in doubt, as the thread that asked for it was interrupted while it asked."""
        try:
            return other.result(PATIENCE / 2)
        except StoreUnavailableError as error:
            assert error.in_doubt
            return None


def behind_another(crowd: Crowd) -> None:
    """Another thread leads, then one beside the interrupted one does, and carries the command of that."""
    crowd.store.open.clear()
    crowd.add()
    assert crowd.store.waits.acquire(timeout=PATIENCE)
    crowd.add()
    crowd.open_when_queued(2)


def before_another(crowd: Crowd) -> None:
    """Another thread leads, then the interrupted one does, and carries the command of one beside it."""
    crowd.patience = 2 * PATIENCE
    behind_another(crowd)


def before_others(crowd: Crowd) -> None:
    """The interrupted thread leads, and two others queue while it does."""
    crowd.store.open.clear()
    crowd.open_when_queued(2)

    def follow() -> None:
        if crowd.store.waits.acquire(timeout=0.08):
            crowd.add()
            crowd.add()

    crowd._threads.submit(follow)


@at_points
@pytest.mark.parametrize(
    "arrange", [behind_another, before_another, before_others], ids=lambda arrange: arrange.__name__
)
def test_a_thread_that_is_interrupted_anywhere_keeps_no_other_waiting(arrange: Callable[[Crowd], None]) -> None:
    points = 0
    with ThreadPoolExecutor(6) as threads:
        crowds: list[Crowd] = []

        def prepare() -> None:
            crowds[:] = [Crowd(threads)]
            assert crowds[0].decide()
            arrange(crowds[0])

        for points, outcome in at_every_point(lambda: crowds[0].decide(), prepare):  # noqa: B007, PLW0108  # another each time
            (crowd,) = crowds
            wait_until(crowd.store.open.is_set, "the gate is open")
            assert isinstance(outcome, Interruption)
            crowd.check()
    assert points > FEWEST_POINTS


# Waits


@at_points
@pytest.mark.parametrize("verb", ["consume", "verbose"])
@pytest.mark.parametrize("waits", [True, False], ids=["waits", "has not to wait"])
@pytest.mark.parametrize("in_process", [True, False], ids=["in process", "by swaps"])
def test_a_wait_that_is_interrupted_anywhere_keeps_no_token(verb: str, waits: bool, in_process: bool) -> None:
    store = MemoryStore() if in_process else SwappingMemoryStore()
    manager = ProxyManager(store, "10/hour", clock=ManualClock(NOW), timeout=PATIENCE)
    points = 0
    bucket: Any = manager.bucket("key") if verb == "consume" else manager.bucket("key").verbose
    debt = 10 if waits else 0
    if waits:
        assert manager.try_consume("key", 10)
        pipeline_of(manager).sleep = lambda _nanos: None  # in which nothing is given back
    for points, outcome in at_every_point(lambda: bucket.consume(3)):  # noqa: B007
        assert isinstance(outcome, Interruption)
        wait_until(lambda: manager.available_tokens("key") == 7 - debt, "the tokens are back")
    assert points > FEWEST_POINTS
    assert manager.available_tokens("key") == 4 - debt


@at_points
def test_an_interrupted_wait_for_a_local_bucket_keeps_no_token() -> None:
    store = Switched()
    manager = ProxyManager(store, "10/hour", clock=ManualClock(NOW), on_error=OnError.local(1), timeout=PATIENCE)
    store.fails = True
    points = 0

    def left() -> int:
        return manager.try_consume_and_return_remaining("key").remaining_tokens

    assert left() == 9
    for points, outcome in at_every_point(lambda: manager.consume("key", 3)):  # noqa: B007
        assert isinstance(outcome, Interruption)
        local: Any = local_buckets_of(manager)._buckets.values[b"key"]
        wait_until(lambda local=local: local.state.available_tokens == 6, "the tokens are back")  # type: ignore[misc]
        assert local.books.uncharged <= 4  # none where the store may have got it
    assert points > FEWEST_POINTS


# Books


class Switched(SwappingMemoryStore):
    """Fails when it is told to."""

    fails = False

    def get(self, key: Any) -> bytes | None:
        self._check(key)
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self._check(key)
        return super().swap(key, before, after, ttl_millis)

    def _check(self, key: bytes) -> None:
        if self.fails:
            raise StoreUnavailableError(key, "it fails")


@at_points
def test_what_a_local_bucket_gave_is_charged_once_despite_interruptions() -> None:
    managers: list[ProxyManager] = []
    points = 0

    def prepare() -> None:
        store = Switched()
        managers[:] = [ProxyManager(store, LIMITS, clock=ManualClock(NOW), on_error=OnError.local(1), timeout=PATIENCE)]
        store.fails = True
        assert all(managers[0].try_consume("key") for _ in range(3))
        store.fails = False

    for points, outcome in at_every_point(lambda: managers[0].try_consume("key"), prepare):  # noqa: B007
        (manager,) = managers
        assert isinstance(outcome, Interruption)
        assert manager.try_consume("key")
        assert local_buckets_of(manager).debt(b"key", Course()) is None
        assert local_buckets_of(manager)._buckets.values[b"key"].books == (0, ())
        # Where the interrupted decision was in doubt, it has either been carried out, debt and all, or neither has.
        assert 1000 - manager.available_tokens("key") in (4, 5, 1)
    assert points > FEWEST_POINTS


@at_points
def test_tokens_handed_out_reach_the_store_despite_interruptions() -> None:
    managers: list[ProxyManager] = []
    optimization = Optimization.delaying(4, 3600)
    points = 0

    def prepare() -> None:
        clock = ManualClock(NOW)
        managers[:] = [
            ProxyManager(SwappingMemoryStore(), LIMITS, clock=clock, optimization=optimization, timeout=PATIENCE)
        ]
        assert all(managers[0].try_consume("key") for _ in range(4))

    for points, outcome in at_every_point(lambda: managers[0].try_consume("key", 3), prepare):  # noqa: B007
        (manager,) = managers
        assert isinstance(outcome, Interruption)
        manager.bucket("key").sync()
        entries = local_decisions_of(manager)._entries
        (entry,) = entries.values.values()
        assert entry.idle()
        # What was under way when it was interrupted may be told twice, which costs its user and never the bound.
        assert 4 <= 1000 - manager.available_tokens("key") <= 4 + 3 + 4
        assert entries.size == entry.weight
    assert points > FEWEST_POINTS


@at_points
def test_the_memory_that_is_accounted_for_is_that_which_is_used() -> None:
    remembered = LastSeen(5_000)

    def put() -> None:
        for number in range(20):
            remembered.put(b"key %d" % (number % 12), Sighting(b"state" * number))
            remembered.forget(b"key %d" % (number % 7))

    points = 0
    for points, _ in at_every_point(put):  # noqa: B007
        assert remembered._sightings.size == sum(_weight(*item) for item in remembered._values.items())
        assert remembered._sightings.size <= 6_000
    assert points > 100


# Tasks


async def cancelled_at(turn: int, work: Callable[[], Any]) -> bool:
    """Cancel a task after so many turns of its loop; whether it had not ended by then."""
    task = asyncio.ensure_future(work())
    for _ in range(turn):
        await asyncio.sleep(0)
        if task.done():
            break
    was_cancelled: bool = task.cancel()
    await asyncio.wait([task])
    return was_cancelled


@pytest.mark.redis
@pytest.mark.parametrize("verb", ["try_consume", "consume"])
@pytest.mark.parametrize("crowd", [0, 3])
async def test_a_task_that_is_cancelled_at_any_await_keeps_nothing(url: str, verb: str, crowd: int) -> None:
    async with AsyncProxyManager.from_url(url, LIMITS, timeout=PATIENCE) as manager:
        assert await manager.try_consume("key")
        taken, turn, got_through = 1, 0, 0
        while got_through < 20:
            others = [asyncio.ensure_future(manager.try_consume("key")) for _ in range(crowd)]
            was_cancelled = await cancelled_at(turn, lambda: getattr(manager, verb)("key"))
            assert all(await asyncio.gather(*others))
            assert await manager.try_consume("key")
            assert not any(line.queues for line in merger_of(manager)._lines.values())
            (link,) = manager._store._channel._connection._links.values()  # type: ignore[attr-defined]
            assert not link._waiters
            assert not link._unsent
            now = 1000 - await manager.available_tokens("key")
            surely = taken + crowd + 1 + (not was_cancelled)
            assert surely <= now <= surely + (was_cancelled and verb == "try_consume")
            taken = now
            turn += 1
            got_through += not was_cancelled
        assert turn > 22


# Storms


@pytest.mark.redis
@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
@pytest.mark.parametrize("name", storms.PROGRAMS)
def test_after_a_storm_of_interruptions_nothing_is_lost(url: str, name: str) -> None:
    """For longer with ``RATELIMIT_STORM_SECONDS``, or as part of ``make soak``."""
    seconds = float(os.environ.get("RATELIMIT_STORM_SECONDS", "3"))
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        "tests.support.storms",
        name,
        url.partition("?")[0],
        str(seconds),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds + 90, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    fewest_a_second = 3 if name == "event_loops" else 50  # each ends a loop
    assert counts["interrupted"] >= fewest_a_second * seconds
    assert counts["answered"] > 0
