"""Managers of buckets: one for each set of limits, shared by the whole process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from enum import Enum
from functools import lru_cache, partial
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, Generic, Self, SupportsIndex, TypedDict, TypeVar, Unpack
from weakref import WeakMethod

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.checks import stored_key, timeout_seconds
from ratelimit.core.expiration import Expiration
from ratelimit.core.numbers import MAX, MIN, NANOS_PER_SECOND, Duration
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, Snapshot
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration, Limits
from ratelimit.core.token_bucket.inheritance import TokensInheritance
from ratelimit.engine.coalescing import TaskMerger, ThreadMerger
from ratelimit.engine.guard import Guard, LocalBuckets
from ratelimit.engine.handle import (
    AsyncLimitsOfKey,
    Handle,
    LimitsOfKey,
    checked_inheritance,
    removed,
    stored_configuration,
)
from ratelimit.engine.last_seen import Remembered
from ratelimit.engine.listener import Listener
from ratelimit.engine.local_decisions import Optimizer
from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.swapping import Backend, Exchange, Target, exchange, exchange_in_process
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError, RateLimitError
from ratelimit.keys import Key, brief
from ratelimit.runtime import fork_safety, threads
from ratelimit.runtime.clock import Clock, MonotonicSleep, has_unique_readings, monotonic
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import Steps, arun, run
from ratelimit.stores.protocol import AsyncStore, DecidingStore, ExecutingStore, Store
from ratelimit.stores.redis.circuit import CircuitStatus
from ratelimit.stores.urls import async_store_from_url, store_from_url

BucketT = TypeVar("BucketT")
StoreT = TypeVar("StoreT", Store, AsyncStore)

_logger = logging.getLogger("ratelimit")

_HANDLES_OF_ITS_OWN = 10_000
_LONGEST_KEPT_KEY = 1_024  # characters or bytes: keys are user input, and may have a megabyte

DEFAULT_TIMEOUT = 0.5
"""Seconds: long enough for a server that is busy, or for a connection that has to be made anew, over some distance."""


class Recovery(Enum):
    """What happens when a bucket is found missing that the same handle has made before."""

    RECONSTRUCT = "reconstruct"
    """It is made anew, with its initial tokens."""
    RAISE = "raise"
    """``BucketNotFoundError``, until another handle makes it again; expired buckets are missing, too."""


class Settings(TypedDict, total=False):
    """What a manager can be told beside its store and its configuration; see :class:`ProxyManager`."""

    clock: Clock | None
    expiration: Expiration | None
    recovery: Recovery
    configuration_version: int | None
    inheritance: TokensInheritance
    prefix: Key
    timeout: Duration
    on_error: ErrorPolicy | None
    listener: Listener | None
    max_attempts: int
    memory_limit_bytes: int
    merging: bool
    optimization: Optimization | None


class _Manager(OfThisProcess, Generic[StoreT, BucketT]):
    """What both faces share: settings, and handles made from them."""

    _advice = "make it by from_url, whose managers can be pickled, or make it in each process"

    def __init__(
        self,
        store: StoreT,
        limits: Limits | AsyncLimitsOfKey | None,
        *,
        clock: Clock | None,
        pause: Callable[[int], Any],
        make: Callable[[Handle], BucketT],
        prefix: Key,
        timeout: Duration,
        on_error: ErrorPolicy | None,
        listener: Listener | None,
        spawn: Callable[[Steps[None]], None],
        configuration_version: int | None,
        inheritance: TokensInheritance,
        expiration: Expiration | None,
        recovery: Recovery,
        max_attempts: int,
        memory_limit_bytes: int,
        merger: ThreadMerger | TaskMerger | None,
        optimization: Optimization | None,
    ) -> None:
        if not isinstance(max_attempts, int) or isinstance(max_attempts, bool) or max_attempts < 1:
            raise InvalidArgumentError(f"max_attempts must be an int of 1 or more, not {brief(max_attempts)}")
        self._store: StoreT = store
        deciding = store if isinstance(store, DecidingStore) else None
        executing = store if isinstance(store, ExecutingStore) and store.executes else None
        self._backend = Backend(
            store=store,
            now=_by_clock(clock) if clock is not None else getattr(deciding, "known_now", store.now_nanos),
            sleep=_sleep(clock, asynchronous=iscoroutinefunction(pause)),
            pause=pause,
            monotonic=monotonic,
            timeout=timeout_seconds(timeout),
            remembered=Remembered(memory_limit_bytes),
            attempts=max_attempts,
            deciding=deciding,
            executing=None if executing is None else (executing.execute, None if clock is None else _by_clock(clock)),
            unique_readings=has_unique_readings(store if clock is None else clock),
        )
        asking: Exchange = exchange if merger is None else merger.exchange
        self._optimizer = Optimizer(asking if executing is None else exchange_in_process, memory_limit_bytes)
        self._exchange = self._optimizer.optimized(_checked_optimization(optimization))
        asks_at_once = executing is None and optimization is None
        self._task_merger = merger if asks_at_once and isinstance(merger, TaskMerger) else None
        self._on_error = OnError.RAISE if on_error is None else _checked_policy(on_error)
        self.has_error_policy = on_error is not None
        self._local = LocalBuckets(None if clock is None else _by_clock(clock), memory_limit_bytes)
        self._make = make
        self._limits = None if limits is None else _checked_limits(limits)
        self._prefix = stored_key(b"", prefix)
        self._described = _described(type(self).__name__, store, self._limits, prefix)
        self._guard = Guard(
            _checked_listener(listener),
            self._local,
            spawn,
            self._described,
            asynchronous=iscoroutinefunction(pause),
        )
        self._version = _checked_version(configuration_version)
        self._inheritance = checked_inheritance(inheritance)
        self._expiration = Expiration.automatic() if expiration is None else _checked_expiration(expiration)
        self._recovery = _checked_recovery(recovery)
        # What from_url was given, where it has opened the store.
        self._opened: tuple[Any, ...] | None = None
        # Kept, because to make one takes time, and because a handle knows whether it has made its bucket.
        # By a weak reference: a manager that is dropped is to give its connections back at once.
        make_bucket = WeakMethod(self.bucket)

        def kept_bucket(key: Key) -> BucketT:
            return make_bucket()(key)  # type: ignore[misc]  # who asks keeps it alive

        self._kept_bucket = lru_cache(_HANDLES_OF_ITS_OWN)(kept_bucket)

    def bucket(
        self,
        key: Key,
        configuration: Limits | AsyncLimitsOfKey | None = None,
        *,
        configuration_version: int | None = None,
        inheritance: TokensInheritance | None = None,
        expiration: Expiration | None = None,
        recovery: Recovery | None = None,
        timeout: Duration | None = None,
        on_error: ErrorPolicy | None = None,
        optimization: Optimization | None = None,
    ) -> BucketT:
        """A handle on the bucket of a key; cheap, nothing is sent before its first verb.

        :param configuration: limits of its own; like all the settings, those of the manager when None.
        :raises InvalidConfigurationError: where neither the manager nor the caller gives a configuration.
        :raises InvalidArgumentError: for a key that is neither ``str`` nor ``bytes``.
        """
        limits = self._limits if configuration is None else _checked_limits(configuration)
        if limits is None:
            raise InvalidConfigurationError(
                "neither the manager nor this bucket has been given a configuration", "configuration"
            )
        target = self._target(key)
        if expiration is not None:
            target.expiration = _checked_expiration(expiration)
        if recovery is not None:
            target.must_exist_once_made = _checked_recovery(recovery) is Recovery.RAISE
        asking, merger = self._exchange, self._task_merger
        if optimization is not None:
            asking, merger = self._optimizer.optimized(_checked_optimization(optimization)), None
        policy = self._on_error if on_error is None else _checked_policy(on_error)
        guard = None if policy == OnError.RAISE and self._guard.listener is None else self._guard
        return self._make(
            Handle(
                self._backend,
                asking,
                target,
                limits,
                self._version if configuration_version is None else _checked_version(configuration_version),
                self._inheritance if inheritance is None else checked_inheritance(inheritance),
                self._backend.timeout if timeout is None else timeout_seconds(timeout),
                self._optimizer,
                policy,
                guard,
                merger if guard is None else None,
            )
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickle what :meth:`from_url` was given, for a manager with connections of its own."""
        return super().__reduce_ex__(protocol) if self._opened is None else self._opened

    def __repr__(self) -> str:
        return self._described

    @property
    def prefix(self) -> bytes:
        """What the keys of all buckets of this manager begin with in the store."""
        return self._prefix

    @property
    def store(self) -> StoreT:
        """The store of this manager, to make further managers over it.

        The store of a manager from :meth:`from_url` is closed with that manager, and connects again when it is used
        after that.
        """
        return self._store

    def _own_bucket(self, key: Key) -> BucketT:
        try:
            return self._kept_bucket(key) if len(key) <= _LONGEST_KEPT_KEY else self.bucket(key)
        except TypeError:  # not hashable, hence no key
            return self.bucket(key)

    def _told(self) -> Steps[None]:
        """The store, of all that was handed out without asking it."""
        fork_safety.check()
        try:
            yield from self._optimizer.sync_all(self._backend)
        finally:
            try:
                yield from self._guard.charge_all(self._exchange, self._backend)
            except RateLimitError as error:
                _logger.warning("what was consumed without the store could not be charged to it: %s", error)

    def circuits(self) -> dict[str, CircuitStatus]:
        """How the circuits to the servers are, by node; none of a store in memory. See :class:`CircuitBreaker`."""
        circuits = getattr(self._store, "circuits", None)
        return {} if circuits is None else circuits()

    def _target(self, key: Key) -> Target:
        return Target(key, stored_key(self._prefix, key), self._expiration, self._recovery is Recovery.RAISE)


class ProxyManager(_Manager[Store, Bucket]):
    """Buckets of a service, all under the same limits: ask it for a decision by key.

    ::

        manager = ProxyManager.from_url("redis://localhost:6379/0", "100/minute")
        if not manager.try_consume(client_ip): ...

    Safe for threads; make one for each set of limits and keep it. Every verb of :class:`Bucket` is here as well, the
    key first.

    :param store: where the buckets are: a ``RedisStore`` over a client of yours, or a ``MemoryStore``.
    :param configuration: the limits: a ``BucketConfiguration``, its text form, a list of limits, or a callable that is
        asked for one of these at every verb, with the key as given, and answers None for a key that is not limited. A
        bucket keeps the limits that it was made with until they are replaced. None: every :meth:`bucket` must be given
        its own.
    :param clock: what time it is; by default the store's clock, which for Redis is the time of the server.
    :param expiration: when idle buckets are forgotten; ``Expiration.automatic()`` by default.
    :param recovery: what to do when a bucket has vanished.
    :param configuration_version: replaces the configuration of stored buckets that have a lower version, or none.
    :param inheritance: what becomes of the tokens of such a bucket.
    :param prefix: put before every key; the same key with no prefix is the same bucket for every Bucket4j client.
    :param timeout: how long a decision may take, in seconds or as a ``timedelta``, above 0: connecting, and waiting for
        others of this process, are in it, waiting for tokens is not. Then ``StoreTimeoutError``.
    :param on_error: what is answered where the store fails: an ``OnError``, or a callable that chooses one by the key
        and the error. None: the error is raised; integrations that are given this manager answer with 503.
    :param listener: is told of every decision.
    :param max_attempts: swaps that one decision may lose to others before ``ContentionError``; 1 or more.
    :param memory_limit_bytes: roughly the memory for states last seen; a key that does not fit costs a round trip.
    :param merging: whether calls that want the same bucket at the same time share a swap; it changes no answer.
    :param optimization: what may be decided without the store; None: nothing.
    """

    def __init__(
        self,
        store: Store,
        configuration: Limits | LimitsOfKey | None = None,
        *,
        clock: Clock | None = None,
        expiration: Expiration | None = None,
        recovery: Recovery = Recovery.RECONSTRUCT,
        configuration_version: int | None = None,
        inheritance: TokensInheritance = TokensInheritance.RESET,
        prefix: Key = "",
        timeout: Duration = DEFAULT_TIMEOUT,
        on_error: ErrorPolicy | None = None,
        listener: Listener | None = None,
        max_attempts: int = 100,
        memory_limit_bytes: int = 16 * 2**20,
        merging: bool = True,
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(
            _checked_store(store, asynchronous=False),
            configuration,
            clock=clock,
            pause=_pause,
            make=Bucket,
            prefix=prefix,
            timeout=timeout,
            on_error=on_error,
            listener=listener,
            spawn=_spawn,
            configuration_version=configuration_version,
            inheritance=inheritance,
            expiration=expiration,
            recovery=recovery,
            max_attempts=max_attempts,
            memory_limit_bytes=memory_limit_bytes,
            merger=ThreadMerger() if merging else None,
            optimization=optimization,
        )

    @classmethod
    def from_url(
        cls, url: str, configuration: Limits | LimitsOfKey | None = None, **settings: Unpack[Settings]
    ) -> Self:
        """A manager over a store that it opens by URL and closes itself; the settings are those of the class.

        ``memory://``, ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://host:port`` and
        ``redis+sentinel://host:port,host:port/service``; see ``docs/operations.md``. Nothing is sent yet.

        :raises InvalidConfigurationError: for a URL that is not valid.
        """
        manager = cls(store_from_url(url), configuration, **settings)
        manager._opened = partial(cls.from_url, **settings), (url, configuration)
        return manager

    def close(self) -> None:
        """Close what :meth:`from_url` has opened; a store of the caller's stays open.

        Tokens that an optimization has handed out without telling the store are told to it before that. Every verb that
        is called after that raises ``RateLimitError``, also those of buckets that this manager has made; ``on_error``
        does not apply to it. Closing again does no harm: it sends what could not be sent before.
        """
        try:
            run(self._told())
        finally:
            self._backend.close()
            if self._opened is not None:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def configuration(self, key: Key) -> BucketConfiguration | None:
        """The configuration that is stored with the bucket of a key; None where there is no bucket."""
        return run(stored_configuration(self._backend, self._target(key)))

    def remove(self, key: Key) -> None:
        """Forget the bucket of a key."""
        run(removed(self._backend, self._target(key), self._optimizer, self._local))

    def try_consume(self, key: Key, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`Bucket.try_consume`."""
        return self._own_bucket(key).try_consume(tokens, timeout=timeout)

    def try_consume_and_return_remaining(
        self, key: Key, tokens: int = 1, *, timeout: Duration | None = None
    ) -> ConsumptionProbe:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return self._own_bucket(key).try_consume_and_return_remaining(tokens, timeout=timeout)

    def try_consume_as_much_as_possible(
        self, key: Key, limit: int | None = None, *, timeout: Duration | None = None
    ) -> int:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return self._own_bucket(key).try_consume_as_much_as_possible(limit, timeout=timeout)

    def consume_ignoring_rate_limits(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.consume_ignoring_rate_limits`."""
        return self._own_bucket(key).consume_ignoring_rate_limits(tokens, timeout=timeout)

    def consume(self, key: Key, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`Bucket.consume`."""
        return self._own_bucket(key).consume(tokens, timeout=timeout)

    def estimate_ability_to_consume(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> EstimationProbe:
        """See :meth:`Bucket.estimate_ability_to_consume`."""
        return self._own_bucket(key).estimate_ability_to_consume(tokens, timeout=timeout)

    def available_tokens(self, key: Key, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.available_tokens`."""
        return self._own_bucket(key).available_tokens(timeout=timeout)

    def add_tokens(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.add_tokens`."""
        self._own_bucket(key).add_tokens(tokens, timeout=timeout)

    def force_add_tokens(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.force_add_tokens`."""
        self._own_bucket(key).force_add_tokens(tokens, timeout=timeout)

    def give_back(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.give_back`."""
        self._own_bucket(key).give_back(tokens, timeout=timeout)

    def hold_back(self, key: Key, duration: Duration, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.hold_back`."""
        self._own_bucket(key).hold_back(duration, timeout=timeout)

    def reset(self, key: Key, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.reset`."""
        self._own_bucket(key).reset(timeout=timeout)

    def replace_configuration(
        self, key: Key, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """See :meth:`Bucket.replace_configuration`."""
        self._own_bucket(key).replace_configuration(configuration, inheritance, timeout=timeout)

    def sync(self, key: Key) -> None:
        """See :meth:`Bucket.sync`."""
        run(self._optimizer.sync(self._backend, stored_key(self._prefix, key), self._backend.call()))

    def snapshot(self, key: Key, *, timeout: Duration | None = None) -> Snapshot:
        """See :meth:`Bucket.snapshot`."""
        return self._own_bucket(key).snapshot(timeout=timeout)


class AsyncProxyManager(_Manager[AsyncStore, AsyncBucket]):
    """The same as :class:`ProxyManager`, for asyncio: the same names, awaited.

    ::

        manager = AsyncProxyManager.from_url("redis://localhost:6379/0", "100/minute")
        if not await manager.try_consume(client_ip): ...

    :param store: an ``AsyncRedisStore`` over a client of yours, or an ``AsyncMemoryStore``.
    :param configuration: as for :class:`ProxyManager`; a callable may be plain or ``async``.
    """

    def __init__(
        self,
        store: AsyncStore,
        configuration: Limits | AsyncLimitsOfKey | None = None,
        *,
        clock: Clock | None = None,
        expiration: Expiration | None = None,
        recovery: Recovery = Recovery.RECONSTRUCT,
        configuration_version: int | None = None,
        inheritance: TokensInheritance = TokensInheritance.RESET,
        prefix: Key = "",
        timeout: Duration = DEFAULT_TIMEOUT,
        on_error: ErrorPolicy | None = None,
        listener: Listener | None = None,
        max_attempts: int = 100,
        memory_limit_bytes: int = 16 * 2**20,
        merging: bool = True,
        optimization: Optimization | None = None,
    ) -> None:
        super().__init__(
            _checked_store(store, asynchronous=True),
            configuration,
            clock=clock,
            pause=_apause,
            make=AsyncBucket,
            prefix=prefix,
            timeout=timeout,
            on_error=on_error,
            listener=listener,
            spawn=_aspawn,
            configuration_version=configuration_version,
            inheritance=inheritance,
            expiration=expiration,
            recovery=recovery,
            max_attempts=max_attempts,
            memory_limit_bytes=memory_limit_bytes,
            merger=TaskMerger() if merging else None,
            optimization=optimization,
        )

    @classmethod
    def from_url(
        cls, url: str, configuration: Limits | AsyncLimitsOfKey | None = None, **settings: Unpack[Settings]
    ) -> Self:
        """A manager over a store that it opens by URL and closes itself; the settings are those of the class.

        ``memory://``, ``redis://``, ``rediss://``, ``unix://``, ``redis+cluster://host:port`` and
        ``redis+sentinel://host:port,host:port/service``; see ``docs/operations.md``. Nothing is sent yet.

        :raises InvalidConfigurationError: for a URL that is not valid.
        """
        manager = cls(async_store_from_url(url), configuration, **settings)
        manager._opened = partial(cls.from_url, **settings), (url, configuration)
        return manager

    async def aclose(self) -> None:
        """See :meth:`ProxyManager.close`."""
        try:
            await arun(self._told())
        finally:
            self._backend.close()
            if self._opened is not None:
                await self._store.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def configuration(self, key: Key) -> BucketConfiguration | None:
        """The configuration that is stored with the bucket of a key; None where there is no bucket."""
        return await arun(stored_configuration(self._backend, self._target(key)))

    async def remove(self, key: Key) -> None:
        """Forget the bucket of a key."""
        await arun(removed(self._backend, self._target(key), self._optimizer, self._local))

    async def try_consume(self, key: Key, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`AsyncBucket.try_consume`."""
        return await self._own_bucket(key).try_consume(tokens, timeout=timeout)

    async def try_consume_and_return_remaining(
        self, key: Key, tokens: int = 1, *, timeout: Duration | None = None
    ) -> ConsumptionProbe:
        """See :meth:`AsyncBucket.try_consume_and_return_remaining`."""
        return await self._own_bucket(key).try_consume_and_return_remaining(tokens, timeout=timeout)

    async def try_consume_as_much_as_possible(
        self, key: Key, limit: int | None = None, *, timeout: Duration | None = None
    ) -> int:
        """See :meth:`AsyncBucket.try_consume_as_much_as_possible`."""
        return await self._own_bucket(key).try_consume_as_much_as_possible(limit, timeout=timeout)

    async def consume_ignoring_rate_limits(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> int:
        """See :meth:`AsyncBucket.consume_ignoring_rate_limits`."""
        return await self._own_bucket(key).consume_ignoring_rate_limits(tokens, timeout=timeout)

    async def consume(self, key: Key, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`AsyncBucket.consume`."""
        return await self._own_bucket(key).consume(tokens, timeout=timeout)

    async def estimate_ability_to_consume(
        self, key: Key, tokens: int, *, timeout: Duration | None = None
    ) -> EstimationProbe:
        """See :meth:`AsyncBucket.estimate_ability_to_consume`."""
        return await self._own_bucket(key).estimate_ability_to_consume(tokens, timeout=timeout)

    async def available_tokens(self, key: Key, *, timeout: Duration | None = None) -> int:
        """See :meth:`AsyncBucket.available_tokens`."""
        return await self._own_bucket(key).available_tokens(timeout=timeout)

    async def add_tokens(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`AsyncBucket.add_tokens`."""
        await self._own_bucket(key).add_tokens(tokens, timeout=timeout)

    async def force_add_tokens(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`AsyncBucket.force_add_tokens`."""
        await self._own_bucket(key).force_add_tokens(tokens, timeout=timeout)

    async def give_back(self, key: Key, tokens: int, *, timeout: Duration | None = None) -> None:
        """See :meth:`AsyncBucket.give_back`."""
        await self._own_bucket(key).give_back(tokens, timeout=timeout)

    async def hold_back(self, key: Key, duration: Duration, *, timeout: Duration | None = None) -> None:
        """See :meth:`AsyncBucket.hold_back`."""
        await self._own_bucket(key).hold_back(duration, timeout=timeout)

    async def reset(self, key: Key, *, timeout: Duration | None = None) -> None:
        """See :meth:`AsyncBucket.reset`."""
        await self._own_bucket(key).reset(timeout=timeout)

    async def replace_configuration(
        self, key: Key, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """See :meth:`AsyncBucket.replace_configuration`."""
        await self._own_bucket(key).replace_configuration(configuration, inheritance, timeout=timeout)

    async def sync(self, key: Key) -> None:
        """See :meth:`AsyncBucket.sync`."""
        await arun(self._optimizer.sync(self._backend, stored_key(self._prefix, key), self._backend.call()))

    async def snapshot(self, key: Key, *, timeout: Duration | None = None) -> Snapshot:
        """See :meth:`AsyncBucket.snapshot`."""
        return await self._own_bucket(key).snapshot(timeout=timeout)


def _pause(nanos: int) -> None:
    time.sleep(nanos / NANOS_PER_SECOND)


def _spawn(steps: Steps[None]) -> None:
    threads.start(partial(run, steps))


_spawned: set[asyncio.Task[None]] = set()  # event loops do not keep their tasks alive


def _aspawn(steps: Steps[None]) -> None:
    task = asyncio.get_running_loop().create_task(arun(steps))
    _spawned.add(task)
    task.add_done_callback(_spawned.discard)


async def _apause(nanos: int) -> None:
    await asyncio.sleep(nanos / NANOS_PER_SECOND)


def _by_clock(clock: Clock) -> Callable[[bytes], int]:
    if not isinstance(clock, Clock):
        raise InvalidArgumentError(f"a clock must have now_nanos, sleep and asleep, which {brief(clock)} has not")
    return lambda _key: clock.now_nanos()


def _sleep(clock: Clock | None, *, asynchronous: bool) -> Callable[[int], Any]:
    sleeper = MonotonicSleep() if clock is None else clock
    return sleeper.asleep if asynchronous else sleeper.sleep


def _checked_store(store: StoreT, *, asynchronous: bool) -> StoreT:
    if not all(callable(getattr(store, name, None)) for name in ("get", "swap", "delete", "now_nanos")):
        raise InvalidArgumentError(f"a store is wanted, RedisStore(client) perhaps, not {type(store).__name__}")
    if iscoroutinefunction(store.swap) != asynchronous:
        wanted = "AsyncProxyManager takes an asyncio" if asynchronous else "ProxyManager takes a sync"
        raise InvalidArgumentError(f"{wanted} store, which {type(store).__name__} is not")
    return store


def _checked_limits(limits: Limits | AsyncLimitsOfKey) -> BucketConfiguration | AsyncLimitsOfKey:
    return limits if callable(limits) else BucketConfiguration.of(limits)


def _checked_version(version: int | None) -> int | None:
    if version is None or (isinstance(version, int) and not isinstance(version, bool) and MIN <= version <= MAX):
        return version
    raise InvalidArgumentError(f"configuration_version must be an int of 64 bits, not {brief(version)}")


def _checked_expiration(expiration: Expiration) -> Expiration:
    if not isinstance(expiration, Expiration):
        raise InvalidArgumentError(f"expiration must be an Expiration, not {brief(expiration)}")
    return expiration


def _checked_optimization(optimization: Optimization | None) -> Optimization | None:
    if optimization is not None and not isinstance(optimization, Optimization):
        raise InvalidArgumentError(f"optimization must be an Optimization, not {brief(optimization)}")
    return optimization


def _checked_policy(policy: ErrorPolicy) -> ErrorPolicy:
    if not isinstance(policy, OnError) and not callable(policy):
        raise InvalidArgumentError(f"on_error must be an OnError, or a callable that gives one, not {brief(policy)}")
    return policy


def _checked_listener(listener: Listener | None) -> Listener | None:
    methods = [getattr(listener, name, None) for name in ("on_decision", "on_interrupted")]
    if listener is not None and not all(callable(one) and not iscoroutinefunction(one) for one in methods):
        raise InvalidArgumentError(
            "a listener must have on_decision and on_interrupted, which are called and not awaited; "
            f"{brief(listener)} has not"
        )
    return listener


def _checked_recovery(recovery: Recovery) -> Recovery:
    if not isinstance(recovery, Recovery):
        raise InvalidArgumentError(f"recovery must be a Recovery, not {brief(recovery)}")
    return recovery


def _described(kind: str, store: object, limits: object, prefix: Key) -> str:
    """Print a manager: ``ProxyManager(RedisStore(localhost:6379/0), '100/minute', prefix='users:')``."""
    shown = [brief(store)]
    if isinstance(limits, BucketConfiguration):
        shown.append(brief(str(limits)))
    elif limits is not None:
        shown.append(brief(limits))
    if prefix:
        shown.append(f"prefix={brief(prefix)}")
    return f"{kind}({', '.join(shown)})"
