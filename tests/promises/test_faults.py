"""Faults on the wire to a real Redis: no decision outlasts its deadline, and none is counted wrong."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
from redis.backoff import NoBackoff

from ratelimit import (
    AsyncProxyManager,
    AsyncRedisStore,
    CircuitBreaker,
    CircuitState,
    CircuitStatus,
    ConsumptionProbe,
    OnError,
    ProxyManager,
    RateLimitError,
    RedisStore,
    StoreTimeoutError,
    StoreUnavailableError,
)
from ratelimit.keys import Key
from tests.support import servers
from tests.support.both_faces import Manager, closing, settled
from tests.support.decision_paths import By, deciding_by
from tests.support.proxies import CLOSE, RESET, SILENCE, Proxy
from tests.support.servers import RedisServer, ServerBinary, TlsServer, wait_until

pytestmark = pytest.mark.redis

T = TypeVar("T")

LIMITS = "1000000/day"
TIMEOUT = 0.2
SLACK = 1.5
"""What a decision may take beyond its timeout: a busy machine stands still for half a second now and then."""

PATIENCE = 1.0
"""The timeout of those whose decisions have to succeed while there is no fault, on such a machine, too."""

LONGEST_PAUSE = 2.0
"""The longest pause of the circuit breaker, in seconds."""

CALLERS = 4


# The faults


class Fault(NamedTuple):
    """What happens on the wire.

    :param on: switches it on, on a proxy.
    :param reads: whether it looks into the conversation, which it cannot where that is encrypted.
    """

    name: str
    on: Callable[[Proxy], AbstractContextManager[None]]
    reads: bool = False

    def __str__(self) -> str:
        return self.name


def spoiling(name: str, spoilt: Callable[[bytes], bytes]) -> Fault:
    return Fault(name, lambda proxy: proxy.spoiling(spoilt), reads=True)


FAULTS = [
    Fault("delays", lambda proxy: proxy.slow(delay=TIMEOUT / 3)),
    Fault("delays beyond the timeout", lambda proxy: proxy.slow(delay=TIMEOUT * 1.5)),
    Fault("dribbles", lambda proxy: proxy.slow(gap=TIMEOUT / 20)),
    Fault("dribbles slowly", lambda proxy: proxy.slow(gap=TIMEOUT * 0.95)),
    Fault("black hole", Proxy.black_hole),
    Fault("refuses", Proxy.refusing),
    Fault("full backlog", Proxy.full),
    spoiling("drops a reply", lambda _: SILENCE),
    spoiling("cuts a reply", lambda reply: reply[: len(reply) // 2] + CLOSE),
    spoiling("resets", lambda _: RESET),
    spoiling("no RESP", lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    spoiling("another type", lambda _: b"*2\r\n+one\r\n:2\r\n"),
    spoiling("one reply too many", lambda reply: reply + b":1\r\n"),
]


# The ways to the server


class Way(Enum):
    SWAPS = "swaps by script"
    SCRIPT = "decided by the server"
    NATIVE = "native swaps"
    UNMERGED = "unmerged"
    OWN_CLIENT = "a client of the caller"
    TLS = "TLS"
    CLUSTER = "cluster"

    def __str__(self) -> str:
        return self.value


class Wire(NamedTuple):
    """A server, the proxy before it, and a client that bypasses the proxy."""

    server: RedisServer
    proxy: Proxy
    witness: ProxyManager

    def stored(self, key: str = "key") -> int:
        return self.witness.snapshot(key).consumed_tokens


@pytest.fixture(scope="module")
def native_server(native_binary: ServerBinary) -> Generator[RedisServer]:
    with RedisServer.start(native_binary) as server:
        yield server


@pytest.fixture(scope="module")
def cluster_of_one(server_binary: ServerBinary) -> Generator[RedisServer]:
    with servers.cluster(server_binary, masters=1) as cluster:
        yield cluster.nodes[0]


@contextmanager
def wired(server: RedisServer, port: int | None = None) -> Generator[Wire]:
    with (
        server.client() as admin,
        Proxy(port or server.port) as proxy,
        ProxyManager.from_url(server.url, LIMITS, timeout=5) as witness,
    ):
        admin.flushall()
        yield Wire(server, proxy, witness)


@asynccontextmanager
async def awaited(context: AbstractContextManager[T]) -> AsyncGenerator[T]:
    with context as entered:
        yield entered


@pytest.fixture
async def wire(server: RedisServer) -> AsyncGenerator[Wire]:
    async with leaving_nothing():
        with wired(server) as wire:
            yield wire


def own_descriptors() -> int:
    directory = Path("/proc/self/fd")
    return sum(1 for _ in directory.iterdir()) if directory.is_dir() else 0


def own_threads() -> int:
    return sum(thread.name.startswith("ratelimit") for thread in threading.enumerate())


@asynccontextmanager
async def leaving_nothing() -> AsyncGenerator[None]:
    """Check that all that is opened in here is closed, and that nobody works on."""

    def counted() -> tuple[int, int, int]:
        return own_descriptors(), own_threads(), len(asyncio.all_tasks())

    before = counted()
    yield
    end = time.monotonic() + 10
    while any(now > then for now, then in zip(counted(), before, strict=True)):
        assert time.monotonic() < end, f"{counted()} descriptors, threads and tasks after {before}"
        await asyncio.sleep(0.005)


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def by_url(url: str, *, asynchronous: bool, **settings: Any) -> Manager:
    settings = {"timeout": TIMEOUT, **settings}
    kind: Any = AsyncProxyManager if asynchronous else ProxyManager
    manager: Manager = kind.from_url(url, LIMITS, **settings)
    return manager


@asynccontextmanager
async def over_own_client(
    port: int, *, asynchronous: bool, pause: float = 0.1, **options: Any
) -> AsyncGenerator[Manager]:
    """Over a client as redis-py makes it, with its retries, but for a timeout that is not awaited at the end."""
    breaker = CircuitBreaker(shortest_pause=pause, longest_pause=max(pause, LONGEST_PAUSE))
    if asynchronous:
        async with (
            redis.asyncio.Redis(port=port, socket_timeout=1, **options) as aclient,
            closing(AsyncRedisStore(aclient, circuit_breaker=breaker)) as astore,
        ):
            yield AsyncProxyManager(astore, LIMITS, timeout=TIMEOUT)
    else:
        with redis.Redis(port=port, socket_timeout=1, **options) as client:
            async with closing(RedisStore(client, circuit_breaker=breaker)) as store:
                yield ProxyManager(store, LIMITS, timeout=TIMEOUT)


def end_pause(manager: Manager) -> None:
    """Let the circuit of a manager's only server try it again now."""
    channel: Any = manager._store._channel  # type: ignore[union-attr]
    circuit = channel._circuit if isinstance(manager, ProxyManager) else channel._connection.circuit
    circuit._retry_at = circuit.monotonic()


# Calls and their outcomes


class Outcome(NamedTuple):
    tokens: int
    seconds: float
    error: Exception | None
    admitted: bool


class Ledger:
    """What callers have been told."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []

    @property
    def acknowledged(self) -> int:
        return sum(one.tokens for one in self.outcomes if one.admitted)

    @property
    def in_doubt(self) -> int:
        return sum(one.tokens for one in self.outcomes if getattr(one.error, "in_doubt", False))

    @property
    def longest(self) -> float:
        return max(one.seconds for one in self.outcomes)

    @property
    def errors(self) -> list[Exception]:
        return [one.error for one in self.outcomes if one.error is not None]

    def check(self, stored: int, timeout: float = TIMEOUT) -> None:
        assert self.longest <= timeout + SLACK
        for error in self.errors:
            assert isinstance(error, StoreTimeoutError | StoreUnavailableError)
        assert self.acknowledged <= stored <= self.acknowledged + self.in_doubt


async def call(manager: Manager, verb: str, tokens: int, key: str = "key", **arguments: Any) -> Outcome:
    begun = time.perf_counter()
    error, answer = None, False
    try:
        answer = bool(await settled(getattr(manager, verb)(key, tokens, **arguments)))
    except Exception as caught:  # noqa: BLE001  # it is looked at later
        error = caught
    return Outcome(tokens, time.perf_counter() - begun, error, answer)


async def at_once(manager: Manager, callers: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Callers in tasks, or threads, of their own, as the manager is for; what each has given."""
    if isinstance(manager, AsyncProxyManager):
        return await asyncio.gather(*callers)
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(callers)) as pool:
        return await asyncio.gather(*(loop.run_in_executor(pool, asyncio.run, caller) for caller in callers))


async def call_at_once(ledger: Ledger, manager: Manager, amounts: Iterable[int]) -> None:
    """One caller for each amount."""
    ledger.outcomes += await at_once(manager, [call(manager, "try_consume", amount) for amount in amounts])


async def until_it_works(ledger: Ledger, manager: Manager, key: str = "key") -> None:
    """Go on asking until there is an answer."""
    end = time.perf_counter() + LONGEST_PAUSE + TIMEOUT + SLACK
    while True:
        outcome = await call(manager, "try_consume", 1, key)
        ledger.outcomes.append(outcome)
        if outcome.error is None:
            return
        assert time.perf_counter() < end, f"it does not work again: {outcome.error}"
        await asyncio.sleep(0.01)


# The table


@asynccontextmanager
async def managed(
    way: Way, request: pytest.FixtureRequest, *, asynchronous: bool
) -> AsyncGenerator[tuple[Wire, Manager]]:
    """A manager that goes to its server that way, through a proxy."""
    fixture = {Way.NATIVE: "native_server", Way.CLUSTER: "cluster_of_one"}.get(way, "server")
    port, form, by = None, "redis://127.0.0.1:{}/0", By.EITHER
    server: RedisServer
    if way is Way.TLS:
        tls: TlsServer = request.getfixturevalue("tls_server")
        server, port = tls.server, int(tls.address.split(":")[1])
        form = f"rediss://127.0.0.1:{{}}/0?ssl_ca_certs={tls.authority}"
        form += "".join(f"&{name}={tls.client_certificate}" for name in ("ssl_certfile", "ssl_keyfile"))
    else:
        server = request.getfixturevalue(fixture)
    async with leaving_nothing(), awaited(wired(server, port)) as wire:
        if way is Way.CLUSTER:
            form = "redis+cluster://127.0.0.1:{}"
            with server.client() as admin:
                admin.config_set("cluster-announce-port", wire.proxy.port)
        if way is Way.OWN_CLIENT:
            async with over_own_client(wire.proxy.port, asynchronous=asynchronous) as manager:
                yield wire, manager
            wire.proxy.cut()  # or those who still connect would wait for long
            return
        if way is not Way.UNMERGED:
            by = By.SCRIPT if way is Way.SCRIPT else By.SWAPS
        with deciding_by(by):
            manager = by_url(form.format(wire.proxy.port), asynchronous=asynchronous, merging=way is not Way.UNMERGED)
            async with closing(manager):
                yield wire, manager


def can_tell(way: Way, fault: Fault) -> bool:
    """Whether there is something to learn from it."""
    if way is Way.TLS and fault.reads:
        return False
    if way is Way.UNMERGED and fault.name == "one reply too many":
        return False  # replies have no numbers: it shifts those that follow
    return way in (Way.SWAPS, Way.SCRIPT) or fault.name not in ONCE_IS_ENOUGH


ONCE_IS_ENOUGH = ("delays", "dribbles", "no RESP", "another type")
TABLE = [(way, fault) for way in Way for fault in FAULTS if can_tell(way, fault)]


@pytest.mark.parametrize(("way", "fault"), TABLE, ids=str)
async def test_a_fault_costs_one_timeout_and_charges_nothing_twice(
    way: Way, fault: Fault, asynchronous: bool, request: pytest.FixtureRequest
) -> None:
    async with managed(way, request, asynchronous=asynchronous) as (wire, manager):
        ledger = Ledger()
        await until_it_works(ledger, manager)
        with fault.on(wire.proxy):
            for _ in range(2):
                await call_at_once(ledger, manager, range(1, CALLERS + 1))
        begun = time.perf_counter()
        await until_it_works(ledger, manager)
        took = time.perf_counter() - begun
        await call_at_once(ledger, manager, range(1, CALLERS + 1))
        print(f"longest {ledger.longest:.3f} s, again after {took:.3f} s")
        ledger.check(wire.stored())


# Connecting


@pytest.mark.parametrize("form", ["redis", "rediss", "redis+cluster", "redis+sentinel"])
async def test_connecting_to_a_silent_server_takes_the_timeout_at_most(form: str, asynchronous: bool) -> None:
    ledger = Ledger()
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        url = f"{form}://127.0.0.1:{silent.getsockname()[1]}{'/service' * form.endswith('sentinel')}"
        async with leaving_nothing(), closing(by_url(url, asynchronous=asynchronous)) as manager:
            for _ in range(2):
                await call_at_once(ledger, manager, range(1, CALLERS + 1))
    ledger.check(stored=0)


async def test_a_name_that_is_not_resolved_costs_the_timeout(
    wire: Wire, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, *arguments: Any, **keywords: Any) -> Any:
        if host == "slow.example":
            assert resolved.wait(10)
            host = "127.0.0.1"
        return real(host, *arguments, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    ledger = Ledger()
    async with closing(by_url(f"redis://slow.example:{wire.proxy.port}", asynchronous=asynchronous)) as manager:
        await call_at_once(ledger, manager, [1, 2])
        assert len(ledger.errors) == 2
        resolved.set()
        await until_it_works(ledger, manager)
    ledger.check(wire.stored())
    if asynchronous:
        await asyncio.get_running_loop().shutdown_default_executor()  # in which names are resolved


async def test_a_pool_without_a_connection_to_spare_costs_the_timeout(wire: Wire) -> None:
    ledger = Ledger()
    pool = redis.BlockingConnectionPool(port=wire.proxy.port, max_connections=1, timeout=5)
    with redis.Redis.from_pool(pool) as client:
        store = RedisStore(client)
        manager = ProxyManager(store, LIMITS, timeout=TIMEOUT)
        taken: Any = pool.get_connection()
        await call_at_once(ledger, manager, [1, 2])
        assert len(ledger.errors) == 2
        pool.release(taken)
        await until_it_works(ledger, manager)
        ledger.check(wire.stored())
        store.close()


# The circuit breaker


async def test_a_dead_server_is_tried_by_one_caller_at_a_time(wire: Wire, asynchronous: bool) -> None:
    ledger = Ledger()
    retry = redis.asyncio.retry.Retry(NoBackoff(), 0) if asynchronous else redis.retry.Retry(NoBackoff(), 0)
    async with over_own_client(wire.proxy.port, asynchronous=asynchronous, pause=3600, retry=retry) as manager:
        await until_it_works(ledger, manager)

        def status() -> CircuitStatus:
            return manager.circuits()[""]

        with wire.proxy.black_hole():
            while status().state is CircuitState.CLOSED:
                await call_at_once(ledger, manager, [1] * CALLERS)
            if not asynchronous:
                # A thread that connects for a caller may begin only when that has given up.
                connections: Any = manager.store._channel._connections  # type: ignore[union-attr]
                wait_until(lambda: not connections._connecting, "no thread connects any more")
            tried = wire.proxy.connections
            for _ in range(300):
                outcome = await call(manager, "try_consume", 1)
                assert isinstance(outcome.error, StoreUnavailableError)
                assert not outcome.error.in_doubt
            assert status().state is CircuitState.OPEN
            assert wire.proxy.connections == tried

            end_pause(manager)
            assert status().state is CircuitState.HALF_OPEN
            trial = Ledger()
            calls = [call(manager, "try_consume", 1, f"key {number}") for number in range(CALLERS)]
            trial.outcomes += await at_once(manager, calls)
            assert sum(isinstance(error, StoreTimeoutError) for error in trial.errors) == 1
            assert sum(isinstance(error, StoreUnavailableError) for error in trial.errors) == CALLERS - 1
            assert wire.proxy.connections - tried <= 1
            assert status().state is CircuitState.OPEN
        async with asyncio.timeout(60):
            while status().state is not CircuitState.CLOSED:
                end_pause(manager)
                await call_at_once(ledger, manager, [1])
        assert status() == (CircuitState.CLOSED, 0, 0.0, None)
        ledger.check(wire.stored())


# A crowd


@pytest.mark.parametrize("merging", [True, False], ids=["merged", "unmerged"])
async def test_a_crowd_before_a_black_hole_ends_in_time_and_is_counted_right(
    wire: Wire, asynchronous: bool, merging: bool
) -> None:
    size, keys, timeout = (2_000 if asynchronous else 50), 5, 0.5
    ledgers = [Ledger() for _ in range(keys)]
    url = f"redis://127.0.0.1:{wire.proxy.port}"
    async with closing(by_url(url, asynchronous=asynchronous, merging=merging, timeout=timeout)) as manager:

        async def ask(number: int) -> None:
            key = number % keys
            for _ in range(3):
                ledgers[key].outcomes.append(await call(manager, "try_consume", 1, f"key {key}"))

        for key in range(keys):
            await until_it_works(ledgers[key], manager, f"key {key}")
        with wire.proxy.black_hole():
            crowd = asyncio.create_task(at_once(manager, [ask(number) for number in range(size)]))
            await asyncio.wait((crowd,), timeout=timeout * 1.5)
        await crowd
        for key in range(keys):
            await until_it_works(ledgers[key], manager, f"key {key}")
    for key in range(keys):
        # What a turn of the loop with thousands of tasks takes comes on top.
        ledgers[key].check(wire.stored(f"key {key}"), timeout + 6 * SLACK)


# Waiting


async def test_an_interrupted_wait_gives_its_tokens_back_within_a_timeout(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    limits = "100/hour"
    url = f"redis://127.0.0.1:{wire.proxy.port}"

    async def stored() -> int:
        return 100 - await asyncio.to_thread(wire.witness.available_tokens, "key")

    async def interrupted(task: asyncio.Task[bool]) -> float:
        begun = time.perf_counter()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.perf_counter() - begun

    async with AsyncProxyManager.from_url(url, limits, timeout=PATIENCE) as manager:
        assert await manager.consume("key", 100, max_wait=60)
        assert not await manager.consume("key", 10, max_wait=60)

        waiting = asyncio.create_task(manager.consume("key", 10, max_wait=3600))
        await until(stored, 110)
        await interrupted(waiting)
        assert await stored() == 100

        waiting = asyncio.create_task(manager.consume("key", 10, max_wait=3600))
        await until(stored, 110)
        with wire.proxy.black_hole():
            outcome = await call(manager, "consume", 20, timeout=3600)
            assert isinstance(outcome.error, StoreTimeoutError)
            assert outcome.error.in_doubt
            assert outcome.seconds <= PATIENCE + SLACK
            assert await interrupted(waiting) <= PATIENCE + SLACK
            in_flight = asyncio.create_task(manager.consume("key", 5, max_wait=3600))
            await asyncio.sleep(0)
            assert await interrupted(in_flight) <= PATIENCE + SLACK
        assert [record.message.split(":")[0] for record in caplog.records] == [
            "10 tokens of a wait that was interrupted could not be given back"
        ]
        assert await stored() == 110


# Policies


class Instance:
    """One of several processes of a service, which takes notes of what its policy was asked about."""

    def __init__(self, wire: Wire, chosen: OnError, *, asynchronous: bool) -> None:
        self.errors: list[RateLimitError] = []
        self._chosen = chosen
        url = f"redis://127.0.0.1:{wire.proxy.port}"
        kind: Any = AsyncProxyManager if asynchronous else ProxyManager
        self.manager: Any = kind.from_url(url, "100/day", timeout=PATIENCE, on_error=self._policy)

    def _policy(self, _key: Key, error: RateLimitError) -> OnError:
        self.errors.append(error)
        return self._chosen

    async def ask(self, key: str = "key") -> ConsumptionProbe:
        probe: ConsumptionProbe = await settled(self.manager.try_consume_and_return_remaining(key))
        return probe

    async def taken(self, key: str) -> tuple[int, int]:
        """Take tokens one by one, while the store is gone, until there are no more; how many, and for how many of them
        the store is in doubt."""
        number = in_doubt = 0
        while await self.ask(key):
            number += 1
            in_doubt += getattr(self.errors[-1], "in_doubt", False)
        return number, in_doubt

    async def until_it_works(self, key: str) -> int:
        """Ask until the store answers; how many tokens that took from it."""
        end = time.perf_counter() + LONGEST_PAUSE + PATIENCE + SLACK
        while (probe := await self.ask(key)).degraded:
            assert time.perf_counter() < end
            await asyncio.sleep(0.01)
        return int(probe.consumed)


@pytest.mark.parametrize("chosen", [OnError.ALLOW, OnError.DENY], ids=["allow", "deny"])
async def test_a_policy_decides_during_an_outage_and_says_so_once(
    wire: Wire, asynchronous: bool, chosen: OnError, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    instance = Instance(wire, chosen, asynchronous=asynchronous)
    async with closing(instance.manager):
        assert not (await instance.ask()).degraded
        with wire.proxy.refusing():
            probes = [await instance.ask() for _ in range(300)]
        assert all(probe.degraded for probe in probes)
        assert {probe.consumed for probe in probes} == {chosen is OnError.ALLOW}
        assert await instance.until_it_works("key") == 1
        assert wire.stored() == 2
    warning, info = [record.message for record in caplog.records]
    assert warning.startswith("the store fails")
    assert info.startswith(f"the store answers again; {len(instance.errors)} decisions")


async def test_local_shares_keep_within_the_limit_and_are_charged_later(
    wire: Wire, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    instances = [Instance(wire, OnError.local(0.5), asynchronous=asynchronous) for _ in range(2)]
    async with closing(instances[0].manager), closing(instances[1].manager):
        stored = {"key": 0, "other": 0}
        for instance in instances:
            for key in stored:
                assert not (await instance.ask(key)).degraded
                stored[key] += 1
        for outage in range(2):
            with wire.proxy.refusing():
                for key in stored:
                    for instance in instances:
                        taken, in_doubt = await instance.taken(key)
                        assert taken == (50 if outage == 0 else 0)
                        stored[key] += taken - in_doubt
            for instance in instances:
                stored["key"] += await instance.until_it_works("key")
            await until(lambda: asyncio.to_thread(wire.stored, "other"), stored["other"])
            assert wire.stored() == stored["key"]
    assert wire.stored("other") == stored["other"]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(instances)


async def test_closing_in_an_outage_takes_a_timeout_and_reports_debts(
    wire: Wire, asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    instance = Instance(wire, OnError.local(1), asynchronous=asynchronous)
    with wire.proxy.refusing():
        for key in ("one", "two", "three"):
            assert await instance.taken(key) == (100, 0)
    with wire.proxy.black_hole():
        await asyncio.sleep(instance.manager.circuits()[""].retry_after)  # so that it is asked
        begun = time.perf_counter()
        async with closing(instance.manager):
            pass
        assert time.perf_counter() - begun <= PATIENCE + SLACK
    assert caplog.records[-1].message.startswith("what was consumed without the store could not be charged to it")


async def until(ask: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    end = time.monotonic() + 20
    while (answer := await ask()) != wanted:
        assert time.monotonic() < end, f"{answer}, not {wanted}"
        await asyncio.sleep(0.005)
