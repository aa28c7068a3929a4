"""Processes that use both faces of the library all at once."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import time
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.synchronize import Barrier, Event, Semaphore
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import redis
import redis.asyncio

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    BucketConfiguration,
    ProxyManager,
    RedisStore,
    StoreError,
    TokensInheritance,
)
from ratelimit.settings import SettingsByName
from tests.support.both_faces import Manager, settled
from tests.support.decision_paths import By, Tap, Way, decide_by

T = TypeVar("T")

Work = Callable[[Manager, str], Coroutine[Any, Any, T]]

PROCESSES = 8
CALLERS = 4
"""Threads, or tasks, of each process."""

PATIENCE = 60
"""Seconds, for what takes one or two."""


class Shared:
    """Values that the processes have in common."""

    start: ClassVar[Barrier]
    sign: ClassVar[Event]
    trouble: ClassVar[Semaphore]
    way: ClassVar[Way]


def _join(start: Barrier, sign: Event, trouble: Semaphore) -> None:
    Shared.start, Shared.sign, Shared.trouble = start, sign, trouble


def _begin(way: Way, share: Callable[..., T], *args: Any) -> T:
    Shared.way = way
    decide_by(way.by)
    Shared.start.wait(PATIENCE)
    return share(*args)


@dataclass(frozen=True)
class Doing(Generic[T]):
    """A piece of work that the processes are doing."""

    shares: list[Future[list[T]]]
    sign: Event

    @property
    def busy(self) -> bool:
        return not all(share.done() for share in self.shares)

    @property
    def answers(self) -> list[T]:
        """Return the answers of all the callers of all the processes."""
        return [answer for share in self.shares for answer in share.result(PATIENCE)]

    def give_sign(self) -> None:
        """Let the processes stop, or begin, whichever they wait for."""
        self.sign.set()


class Workers:
    """Processes that stay from test to test: starting one takes longer than most of what it is asked to do.

    :ivar way: the way that their decisions go.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._start, self._sign, self._trouble = context.Barrier(PROCESSES), context.Event(), context.Semaphore(0)
        shared = (self._start, self._sign, self._trouble)
        self.way = Way()
        self._pool = ProcessPoolExecutor(PROCESSES, context, _join, shared)

    @contextmanager
    def doing(self, share: Callable[..., list[T]], *args: Any) -> Generator[Doing[T]]:
        """Let each process do its share, given its number and the arguments; they begin at the same moment.

        The end of the block gives them the sign, and waits for them.
        """
        self._start.reset()
        self._sign.clear()
        while self._trouble.acquire(block=False):
            pass
        shares = [self._pool.submit(_begin, self.way, share, number, *args) for number in range(PROCESSES)]
        doing = Doing(shares, self._sign)
        try:
            yield doing
        finally:
            doing.give_sign()
            for part in shares:
                part.exception(PATIENCE)

    def do(self, share: Callable[..., list[T]], *args: Any) -> list[T]:
        """Let each process do its share, and give what they answer."""
        with self.doing(share, *args) as doing:
            pass
        return doing.answers

    def wait_for_trouble(self) -> None:
        """Wait until every caller has met an error of the store."""
        for _ in range(PROCESSES * CALLERS):
            if not self._trouble.acquire(timeout=PATIENCE):
                raise TimeoutError("not every caller has met an error")

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class Access(NamedTuple):
    """A bucket, and how a process comes to it."""

    url: str
    limits: BucketConfiguration
    key: str = "user:42"
    settings: SettingsByName = {}  # noqa: RUF012  # nobody changes it

    def manager(self, store: RedisStore | None = None) -> ProxyManager:
        """Make a manager for a process, which has to close it; over a store of its own, where it is given none."""
        if store is not None:
            return ProxyManager(store, self.limits, **self._settings())
        return ProxyManager.from_url(self.url, self.limits, **self._settings())

    def amanager(self, store: AsyncRedisStore | None = None) -> AsyncProxyManager:
        """Make a manager for the tasks of a process, which has to close it."""
        if store is not None:
            return AsyncProxyManager(store, self.limits, **self._settings())
        return AsyncProxyManager.from_url(self.url, self.limits, **self._settings())

    def _settings(self) -> SettingsByName:
        settings: SettingsByName = {"timeout": PATIENCE, **self.settings, "merging": Shared.way.merging}
        if Shared.way.by is By.SWAPS:
            settings["max_attempts"] = 10**6  # it is the script that spares a decision so many
        return settings


def patient(url: str) -> str:
    """Wait longer for replies than a service would: a machine may be busy with other things."""
    return f"{url}{'&' if '?' in url else '?'}socket_timeout={PATIENCE}&socket_connect_timeout={PATIENCE}"


def by_threads(number: int, *plans: tuple[Work[T], Access]) -> list[T]:
    work, access = plans[number % len(plans)]
    with (
        access.manager() as manager,
        ThreadPoolExecutor(CALLERS) as threads,
    ):
        return list(threads.map(lambda _: asyncio.run(work(manager, access.key)), range(CALLERS)))


def by_tasks(number: int, *plans: tuple[Work[T], Access]) -> list[T]:
    work, access = plans[number % len(plans)]

    async def main() -> list[T]:
        async with access.amanager() as manager:
            return await asyncio.gather(*(work(manager, access.key) for _ in range(CALLERS)))

    return asyncio.run(main())


async def drain(manager: Manager, key: str) -> int:
    """Consume until nothing is left."""
    taken = 0
    while await settled(manager.try_consume(key)):
        taken += 1
    return taken


async def drain_after_the_sign(manager: Manager, key: str) -> int:
    if not Shared.sign.wait(PATIENCE):
        raise TimeoutError("there was no sign to begin")
    return await drain(manager, key)


async def consume_until_the_sign(manager: Manager, key: str) -> int:
    """Consume whatever comes."""
    taken = 0
    while not Shared.sign.is_set():
        taken += await settled(manager.try_consume(key))
    return taken


@dataclass
class Tally:
    """The tokens that a caller took, and those in doubt, in a time without errors and in one with errors."""

    taken: int = 0
    in_doubt: int = 0
    taken_after_trouble: int = 0
    in_doubt_after_trouble: int = 0
    errors: set[str] = field(default_factory=set)


async def consume_through_trouble(manager: Manager, key: str) -> Tally:
    """Consume whatever comes until the sign; only errors of the store are expected."""
    tally = Tally()
    while not Shared.sign.is_set():
        known = bool(tally.errors)
        try:
            taken = await settled(manager.try_consume(key))
        except StoreError as error:
            tally.errors.add(type(error).__name__)
            tally.in_doubt += error.in_doubt and not known
            tally.in_doubt_after_trouble += error.in_doubt and known
            if not known:
                Shared.trouble.release()
        else:
            tally.taken += taken and not known
            tally.taken_after_trouble += taken and known
    return tally


def first_use_by_threads(_number: int, access: Access, keys: list[str]) -> list[list[int]]:
    """Try each key once per thread, in all processes at the same moment; return the tokens taken for each."""
    taken: list[int] = []
    with (
        access.manager() as manager,
        ThreadPoolExecutor(CALLERS) as threads,
    ):
        for key in keys:
            Shared.start.wait(PATIENCE)
            taken.append(sum(threads.map(manager.try_consume, [key] * CALLERS)))
    return [taken]


def first_use_by_tasks(_number: int, access: Access, keys: list[str]) -> list[list[int]]:
    """Try each key once per task, in all processes at the same moment; return the tokens taken for each."""

    async def main() -> list[int]:
        taken: list[int] = []
        async with access.amanager() as manager:
            for key in keys:
                Shared.start.wait(PATIENCE)
                taken.append(sum(await asyncio.gather(*(manager.try_consume(key) for _ in range(CALLERS)))))
        return taken

    return [asyncio.run(main())]


class Decision(NamedTuple):
    """A decision about one token, and what it took; none where it went along with another one."""

    taken: bool
    round_trips: int


_round_trips: ContextVar[list[str]] = ContextVar("_round_trips")


def contend_by_threads(_number: int, access: Access, times: int) -> list[list[Decision]]:
    """Try to consume, so many times in each thread, one after another and as fast as it goes."""
    with access.manager() as manager, ThreadPoolExecutor(CALLERS) as threads:
        Tap(manager._store).before = lambda kind: _round_trips.get().append(kind)
        return list(threads.map(lambda _: asyncio.run(_contend(manager, access.key, times)), range(CALLERS)))


def contend_by_tasks(_number: int, access: Access, times: int) -> list[list[Decision]]:
    """Try to consume, so many times in each task, one after another and as fast as it goes."""

    async def main() -> list[list[Decision]]:
        async with access.amanager() as manager:
            Tap(manager._store).before = lambda kind: _round_trips.get().append(kind)
            return await asyncio.gather(*(_contend(manager, access.key, times) for _ in range(CALLERS)))

    return asyncio.run(main())


async def _contend(manager: Manager, key: str, times: int) -> list[Decision]:
    decisions: list[Decision] = []
    for _ in range(times):
        round_trips: list[str] = []
        _round_trips.set(round_trips)
        decisions.append(Decision(await settled(manager.try_consume(key)), len(round_trips)))
    return decisions


MANY_VERBS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("try_consume", (1,), {}),
    ("try_consume_and_return_remaining", (1,), {}),
    ("try_consume_as_much_as_possible", (2,), {}),
    ("consume", (1,), {"max_wait": 1e-9}),
    ("consume_ignoring_rate_limits", (1,), {}),
    ("estimate_ability_to_consume", (1,), {}),
    ("available_tokens", (), {}),
    ("add_tokens", (3,), {}),
    ("force_add_tokens", (3,), {}),
    ("give_back", (1,), {}),
    ("hold_back", (1e-9,), {}),
    ("reset", (), {}),
    ("snapshot", (), {}),
    *(("replace_configuration", (f"{10**6}/second; 10000000/hour", one), {}) for one in TokensInheritance),
]
"""Verbs of a bucket that wait for the store alone."""


async def _do_many_verbs(manager: Manager, key: str, times: int) -> list[tuple[str, int]]:
    """Do all verbs while other processes write the bucket; return each verb and the round trips that it took."""
    done = []
    for number in range(times):
        for name, arguments, keywords in MANY_VERBS:
            raised = number % 2 == 1
            bucket = manager.bucket(
                key,
                configuration_version=time.time_ns() if raised else None,
                inheritance=random.choice(list(TokensInheritance)),
            )
            verbose = random.random() < 0.3
            round_trips: list[str] = []
            _round_trips.set(round_trips)
            await settled(getattr(bucket.verbose if verbose else bucket, name)(*arguments, **keywords))
            done.append((f"{name}{' verbose' * verbose}{' raised' * raised}", len(round_trips)))
    return done


def do_many_verbs_by_threads(_number: int, access: Access, times: int) -> list[list[tuple[str, int]]]:
    """Do all verbs one after another in each thread, and with raised versions every other time."""
    with access.manager() as manager, ThreadPoolExecutor(CALLERS) as threads:
        Tap(manager._store).before = lambda kind: _round_trips.get().append(kind)
        return list(threads.map(lambda _: asyncio.run(_do_many_verbs(manager, access.key, times)), range(CALLERS)))


def do_many_verbs_by_tasks(_number: int, access: Access, times: int) -> list[list[tuple[str, int]]]:
    """Do all verbs one after another in each task, and with raised versions every other time."""

    async def main() -> list[list[tuple[str, int]]]:
        async with access.amanager() as manager:
            Tap(manager._store).before = lambda kind: _round_trips.get().append(kind)
            return await asyncio.gather(*(_do_many_verbs(manager, access.key, times) for _ in range(CALLERS)))

    return asyncio.run(main())


class Wait(NamedTuple):
    """A wait for one token; nanoseconds, by the clock of Redis."""

    due: int
    served: int
    clock_error: int


def wait_by_threads(_number: int, access: Access, times: int) -> list[Wait]:
    """Wait for a token, so many times in each thread."""
    with redis.Redis.from_url(access.url) as client, ThreadPoolExecutor(CALLERS) as threads:
        store = RedisStore(client)
        manager = access.manager(store)
        waits = threads.map(lambda _: asyncio.run(_wait(manager, store, access, times)), range(CALLERS))
        return list(chain.from_iterable(waits))


def wait_by_tasks(_number: int, access: Access, times: int) -> list[Wait]:
    """Wait for a token, so many times in each task."""

    async def main() -> list[Wait]:
        async with redis.asyncio.Redis.from_url(access.url) as client:
            store = AsyncRedisStore(client)
            manager = access.amanager(store)
            waits = await asyncio.gather(*(_wait(manager, store, access, times) for _ in range(CALLERS)))
            return list(chain.from_iterable(waits))

    return asyncio.run(main())


def cancel_half_way(_number: int, access: Access, times: int) -> list[int]:
    """Wait for tokens, and give up every other wait, at any stage of it; the tokens taken."""

    async def wait_often(manager: AsyncProxyManager) -> int:
        taken = 0
        for _ in range(times):
            taken += await manager.consume(access.key)
            wait = asyncio.create_task(manager.consume(access.key))
            await asyncio.sleep(random.uniform(0, 0.005))
            wait.cancel()
            with suppress(asyncio.CancelledError):
                taken += await wait
        return taken

    async def main() -> list[int]:
        async with access.amanager() as manager:
            return await asyncio.gather(*(wait_often(manager) for _ in range(CALLERS)))

    return asyncio.run(main())


def cancel_one_of_many(_number: int, access: Access, times: int) -> list[int]:
    """Call several times at once, and cancel one of the calls, at any stage of it; the tokens taken by the others."""

    async def main() -> list[int]:
        taken: list[int] = []
        async with access.amanager() as manager:
            for _ in range(times):
                calls = [asyncio.create_task(manager.try_consume(access.key)) for _ in range(CALLERS)]
                cancelled = calls.pop(random.randrange(CALLERS))
                await asyncio.sleep(random.uniform(0, 0.003))
                cancelled.cancel()
                taken += await asyncio.gather(*calls)
                await asyncio.wait([cancelled])
        return taken

    return asyncio.run(main())


def line_up(number: int, access: Access) -> list[Wait]:
    """Wait for a token, and begin when as many have been taken as there are processes of a lower number."""
    with redis.Redis.from_url(access.url) as client:
        store = RedisStore(client)
        manager = access.manager(store)
        while manager.snapshot(access.key).consumed_tokens < number:
            time.sleep(0.001)
        return asyncio.run(_wait(manager, store, access, 1))


async def _wait(manager: Manager, store: RedisStore | AsyncRedisStore, access: Access, times: int) -> list[Wait]:
    key = access.key.encode()
    waits: list[Wait] = []
    with redis.Redis.from_url(access.url) as clock:
        await settled(store.now_nanos(key))
        clock_error = store.clock_error_nanos(key)
        assert clock_error is not None
        for _ in range(times):
            result = await settled(manager.bucket(access.key).verbose.consume())
            served = redis_nanos(clock)
            assert result.value
            last_refill, size, unfinished = result.bandwidth_states[0]
            (limit,) = access.limits
            debt = max(0, -size * limit.refill_period_nanos - unfinished)
            waits.append(Wait(last_refill + debt // limit.refill_tokens, served, clock_error))
    return waits


def redis_nanos(client: redis.Redis) -> int:
    """Read the clock of Redis, which tells whole microseconds."""
    seconds, microseconds = client.time()
    return (seconds * 1_000_000 + microseconds) * 1_000
