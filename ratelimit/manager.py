"""Managers of buckets: one for each set of limits, shared by the whole process."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from inspect import iscoroutinefunction
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, SupportsIndex, TypeAlias, TypeVar, Unpack
from weakref import WeakMethod

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.checks import refusal, stored_key, timeout_seconds
from ratelimit.core.algorithm import Configuration
from ratelimit.core.expiration import Expiration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.limits import Limits, configuration_of
from ratelimit.core.numbers import Duration
from ratelimit.core.results import ConsumptionProbe, Snapshot
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.engine.face import ASYNCIO, SYNC, Face
from ratelimit.engine.on_error import ErrorPolicy, OnError
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.pipeline import AsyncLimitsOfKey, Pipeline
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Target
from ratelimit.engine.store_requests import DEFAULT_TUNING
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import Key, brief
from ratelimit.reservation import AsyncReservation, RefundOn, Reservation
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.runtime.steps import arun, run
from ratelimit.settings import (
    Recovery,
    Settings,
    SettingsByName,
    checked_expiration,
    checked_inheritance,
    checked_optimization,
    checked_policy,
    checked_recovery,
    checked_version,
)
from ratelimit.stores.protocol import AsyncStore, Store
from ratelimit.stores.redis.circuit import CircuitStatus
from ratelimit.stores.urls import async_store_from_url, store_from_url

BucketT = TypeVar("BucketT")
StoreT = TypeVar("StoreT", Store, AsyncStore)

LimitsOfKey: TypeAlias = Callable[[Any], Limits | None]
"""Returns the limits of a key, or None for a key that is not limited."""

_BUCKETS_KEPT = 10_000
# In characters or bytes: keys are user input, and may have a megabyte.
_LONGEST_KEPT_KEY = 1_024


class _Manager(OfThisProcess, Generic[StoreT, BucketT]):
    """What both faces share: settings, and the buckets that are made from them."""

    _advice = "make it by from_url, whose managers can be pickled, or make it in each process"

    _face: ClassVar[Face]

    def __init__(
        self,
        store: StoreT,
        limits: Limits | AsyncLimitsOfKey | None,
        settings: Settings,
    ) -> None:
        self._store: StoreT = _checked_store(store, asynchronous=self._face.asynchronous)
        self._settings = settings
        self._limits = None if limits is None else _checked_limits(limits)
        self._prefix = stored_key(b"", settings.prefix)
        self._timeout = timeout_seconds(settings.timeout)
        self._expiration = settings.expiration or Expiration.automatic()
        self._described = _described(type(self).__name__, store, self._limits, settings.prefix)
        self._pipeline = Pipeline(
            store,
            self._face,
            clock=settings.clock,
            on_error=settings.on_error or OnError.RAISE,
            listener=settings.listener,
            optimization=settings.optimization,
            described=self._described,
            tuning=DEFAULT_TUNING._replace(most_attempts=settings.max_attempts),
            memory_limit_bytes=settings.memory_limit_bytes,
            coalesces=settings.merging,
            timeout=self._timeout,
        )
        # The arguments of from_url, if that has opened the store.
        self._opened: tuple[Any, ...] | None = None
        # Buckets are kept, because making one takes time, and because the object remembers whether its bucket has been
        # stored. They are made through a weak reference, so that a manager that is dropped gives its connections back
        # at once.
        make_bucket = WeakMethod(self.bucket)

        def kept_bucket(key: Key) -> BucketT:
            return make_bucket()(key)  # type: ignore[misc]  # the caller keeps the manager alive

        self._kept_bucket = lru_cache(_BUCKETS_KEPT)(kept_bucket)

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
        """Return a handle on the bucket of a key. That is cheap: nothing is sent before its first verb.

        :param configuration: the limits of this bucket. None, here and for the settings: those of the manager.
        :raises InvalidConfigurationError: where neither the manager nor the caller gives a configuration.
        :raises InvalidArgumentError: for a key that is neither ``str`` nor ``bytes``.
        """
        limits = self._limits if configuration is None else _checked_limits(configuration)
        if limits is None:
            raise InvalidConfigurationError(
                "neither the manager nor this bucket has been given a configuration", "configuration"
            )
        settings, target = self._settings, self._target(key)
        if expiration is not None:
            target.expiration = checked_expiration(expiration)
        if recovery is not None:
            target.must_exist_once_made = checked_recovery(recovery) is Recovery.RAISE
        proxy = self._pipeline.bucket(
            target,
            limits,
            version=(
                settings.configuration_version
                if configuration_version is None
                else checked_version(configuration_version)
            ),
            inheritance=settings.inheritance if inheritance is None else checked_inheritance(inheritance),
            timeout=self._timeout if timeout is None else timeout_seconds(timeout),
            on_error=None if on_error is None else checked_policy(on_error),
            optimization=None if optimization is None else checked_optimization(optimization),
        )
        return self._bucket_of(proxy)

    def _bucket_of(self, proxy: BucketProxy) -> BucketT:
        raise NotImplementedError

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

    @property
    def has_error_policy(self) -> bool:
        """Whether the manager was made with an ``on_error``."""
        return self._settings.on_error is not None

    def _own_bucket(self, key: Key) -> BucketT:
        try:
            return self._kept_bucket(key) if len(key) <= _LONGEST_KEPT_KEY else self.bucket(key)
        except TypeError:
            # A value that cannot be hashed is not a valid key: this call raises the error.
            return self.bucket(key)

    def circuits(self) -> dict[str, CircuitStatus]:
        """Return the circuits by server, see :class:`CircuitBreaker`; a store in memory has none."""
        circuits = getattr(self._store, "circuits", None)
        return {} if circuits is None else circuits()

    def _target(self, key: Key) -> Target:
        is_raising = self._settings.recovery is Recovery.RAISE
        return Target(key, stored_key(self._prefix, key), self._expiration, is_raising)


class ProxyManager(_Manager[Store, Bucket]):
    """The buckets of a service, all under the same limits: ask it for a decision by key.

    ::

        manager = ProxyManager.from_url("redis://localhost:6379/0", "100/minute")
        if not manager.try_consume(client_ip): ...

    A manager is safe for threads. Make one for each set of limits and keep it. It has the everyday verbs of a
    :class:`Bucket`, with the key first; a bucket from :meth:`bucket` has all verbs.

    :param store: where the buckets are: a ``RedisStore`` over a client of yours, or a ``MemoryStore``.
    :param configuration: the limits: a limit, its text form, a list of limits, or a callable that is
        asked for one of these at every verb, with the key as given, and returns None for a key that is not limited. A
        bucket keeps the limits that it was made with until they are replaced. If this is None, each call of
        :meth:`bucket` must give limits.
    :param settings: see :class:`ratelimit.settings.Settings`.
    :raises InvalidArgumentError: for a setting that is not allowed.
    """

    _face = SYNC

    def __init__(
        self,
        store: Store,
        configuration: Limits | LimitsOfKey | None = None,
        **settings: Unpack[SettingsByName],
    ) -> None:
        super().__init__(store, configuration, Settings(**settings))

    def _bucket_of(self, proxy: BucketProxy) -> Bucket:
        return Bucket(proxy)

    @classmethod
    def from_url(
        cls, url: str, configuration: Limits | LimitsOfKey | None = None, **settings: Unpack[SettingsByName]
    ) -> Self:
        """Return a manager over a store that it opens by URL and closes itself; the settings are those of the class.

        A URL begins with ``memory://``, ``redis://``, ``rediss://`` or ``unix://``, or has the form
        ``redis+cluster://host:port`` or ``redis+sentinel://host:port,host:port/service``; see ``docs/operations.md``.
        Nothing is sent yet.

        :raises InvalidConfigurationError: for a URL that is not valid.
        """
        manager = cls(store_from_url(url), configuration, **settings)
        manager._opened = partial(cls.from_url, **settings), (url, configuration)
        return manager

    def close(self) -> None:
        """Close what :meth:`from_url` has opened; a store of the caller's stays open.

        Tokens that an optimization has handed out and not reported are reported to the store first. Every verb that is
        called after that raises ``RateLimitError``, also those of buckets that this manager has made; ``on_error``
        does not apply to it. Closing again does no harm: it sends what could not be sent before.
        """
        try:
            run(self._pipeline.settled())
        finally:
            self._pipeline.close()
            if self._opened is not None:
                self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def configuration(self, key: Key) -> BucketConfiguration | None:
        """Return the configuration that is stored with the bucket of a key; None where there is no bucket."""
        return run(self._pipeline.stored_configuration(self._target(key), self._timeout))

    def remove(self, key: Key) -> None:
        """Delete the bucket of a key, in the store and in this process."""
        run(self._pipeline.remove(self._target(key), self._timeout))

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

    def consume(
        self, key: Key, tokens: int = 1, *, max_wait: Duration | None = None, timeout: Duration | None = None
    ) -> bool:
        """See :meth:`Bucket.consume`."""
        return self._own_bucket(key).consume(tokens, max_wait=max_wait, timeout=timeout)

    def reserve(
        self,
        key: Key,
        tokens: int,
        *,
        max_wait: Duration | None = 0,
        refund_on: RefundOn = (),
        timeout: Duration | None = None,
    ) -> Reservation:
        """See :meth:`Bucket.reserve`."""
        return self._own_bucket(key).reserve(tokens, max_wait=max_wait, refund_on=refund_on, timeout=timeout)

    def available_tokens(self, key: Key, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.available_tokens`."""
        return self._own_bucket(key).available_tokens(timeout=timeout)

    def reset(self, key: Key, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.reset`."""
        self._own_bucket(key).reset(timeout=timeout)

    def replace_configuration(
        self, key: Key, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """See :meth:`Bucket.replace_configuration`."""
        self._own_bucket(key).replace_configuration(configuration, inheritance, timeout=timeout)

    def snapshot(self, key: Key, *, timeout: Duration | None = None) -> Snapshot:
        """See :meth:`Bucket.snapshot`."""
        return self._own_bucket(key).snapshot(timeout=timeout)


class AsyncProxyManager(_Manager[AsyncStore, AsyncBucket]):
    """The buckets of a service, for asyncio: the names are those of :class:`ProxyManager`, awaited.

    ::

        manager = AsyncProxyManager.from_url("redis://localhost:6379/0", "100/minute")
        if not await manager.try_consume(client_ip): ...

    :param store: an ``AsyncRedisStore`` over a client of yours, or an ``AsyncMemoryStore``.
    :param configuration: as for :class:`ProxyManager`; a callable may be plain or ``async``.
    """

    _face = ASYNCIO

    def __init__(
        self,
        store: AsyncStore,
        configuration: Limits | AsyncLimitsOfKey | None = None,
        **settings: Unpack[SettingsByName],
    ) -> None:
        super().__init__(store, configuration, Settings(**settings))

    def _bucket_of(self, proxy: BucketProxy) -> AsyncBucket:
        return AsyncBucket(proxy)

    @classmethod
    def from_url(
        cls, url: str, configuration: Limits | AsyncLimitsOfKey | None = None, **settings: Unpack[SettingsByName]
    ) -> Self:
        """Return a manager over a store that it opens by URL and closes itself; see :meth:`ProxyManager.from_url`."""
        manager = cls(async_store_from_url(url), configuration, **settings)
        manager._opened = partial(cls.from_url, **settings), (url, configuration)
        return manager

    async def aclose(self) -> None:
        """See :meth:`ProxyManager.close`."""
        try:
            await arun(self._pipeline.settled())
        finally:
            self._pipeline.close()
            if self._opened is not None:
                await self._store.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def configuration(self, key: Key) -> BucketConfiguration | None:
        """Return the configuration that is stored with the bucket of a key; None where there is no bucket."""
        return await arun(self._pipeline.stored_configuration(self._target(key), self._timeout))

    async def remove(self, key: Key) -> None:
        """Delete the bucket of a key, in the store and in this process."""
        await arun(self._pipeline.remove(self._target(key), self._timeout))

    async def try_consume(self, key: Key, tokens: int = 1, *, timeout: Duration | None = None) -> bool:
        """See :meth:`Bucket.try_consume`."""
        return await self._own_bucket(key).try_consume(tokens, timeout=timeout)

    async def try_consume_and_return_remaining(
        self, key: Key, tokens: int = 1, *, timeout: Duration | None = None
    ) -> ConsumptionProbe:
        """See :meth:`Bucket.try_consume_and_return_remaining`."""
        return await self._own_bucket(key).try_consume_and_return_remaining(tokens, timeout=timeout)

    async def try_consume_as_much_as_possible(
        self, key: Key, limit: int | None = None, *, timeout: Duration | None = None
    ) -> int:
        """See :meth:`Bucket.try_consume_as_much_as_possible`."""
        return await self._own_bucket(key).try_consume_as_much_as_possible(limit, timeout=timeout)

    async def consume(
        self, key: Key, tokens: int = 1, *, max_wait: Duration | None = None, timeout: Duration | None = None
    ) -> bool:
        """See :meth:`Bucket.consume`."""
        return await self._own_bucket(key).consume(tokens, max_wait=max_wait, timeout=timeout)

    def reserve(
        self,
        key: Key,
        tokens: int,
        *,
        max_wait: Duration | None = 0,
        refund_on: RefundOn = (),
        timeout: Duration | None = None,
    ) -> AsyncReservation:
        """See :meth:`AsyncBucket.reserve`."""
        return self._own_bucket(key).reserve(tokens, max_wait=max_wait, refund_on=refund_on, timeout=timeout)

    async def available_tokens(self, key: Key, *, timeout: Duration | None = None) -> int:
        """See :meth:`Bucket.available_tokens`."""
        return await self._own_bucket(key).available_tokens(timeout=timeout)

    async def reset(self, key: Key, *, timeout: Duration | None = None) -> None:
        """See :meth:`Bucket.reset`."""
        await self._own_bucket(key).reset(timeout=timeout)

    async def replace_configuration(
        self, key: Key, configuration: Limits, inheritance: TokensInheritance, *, timeout: Duration | None = None
    ) -> None:
        """See :meth:`Bucket.replace_configuration`."""
        await self._own_bucket(key).replace_configuration(configuration, inheritance, timeout=timeout)

    async def snapshot(self, key: Key, *, timeout: Duration | None = None) -> Snapshot:
        """See :meth:`Bucket.snapshot`."""
        return await self._own_bucket(key).snapshot(timeout=timeout)


def _checked_store(store: StoreT, *, asynchronous: bool) -> StoreT:
    kind = "an asyncio store such as AsyncRedisStore(client)" if asynchronous else "a store such as RedisStore(client)"
    if not all(callable(getattr(store, name, None)) for name in ("get", "swap", "delete", "now_nanos")):
        raise refusal("store", kind, store)
    if iscoroutinefunction(store.swap) != asynchronous:
        raise refusal("store", kind, store)
    return store


def _checked_limits(limits: Limits | AsyncLimitsOfKey) -> Configuration | AsyncLimitsOfKey:
    return limits if callable(limits) else configuration_of(limits)


def _described(kind: str, store: object, limits: object, prefix: Key) -> str:
    """Return a manager as text: ``ProxyManager(RedisStore(localhost:6379/0), '100/minute', prefix='users:')``."""
    shown = [brief(store)]
    if callable(limits):
        shown.append(brief(limits))
    elif limits is not None:
        shown.append(brief(str(limits)))
    if prefix:
        shown.append(f"prefix={brief(prefix)}")
    return f"{kind}({', '.join(shown)})"
