"""A decorator for functions that all processes together may call only so often.

::

    @limited("5/second", key=lambda customer, text: customer)
    def send(customer: str, text: str) -> None: ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from inspect import isasyncgenfunction, isclass, iscoroutinefunction, isgeneratorfunction
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

from ratelimit.bucket import AsyncBucket, Bucket
from ratelimit.checks import duration_nanos, token_count
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import Duration
from ratelimit.core.results import VerboseResult
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration, Limits
from ratelimit.engine.pipeline import AsyncLimitsOfKey
from ratelimit.errors import InvalidArgumentError, RateLimitExceeded
from ratelimit.integrations.logs import OtherLimits
from ratelimit.integrations.managers import async_manager_of, bucket_key, checked_version, manager_of, namespace_of
from ratelimit.integrations.recording import record
from ratelimit.integrations.switch import is_enabled
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.runtime.steps import Steps, arun, run

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
M = TypeVar("M", ProxyManager, AsyncProxyManager)

CallKey: TypeAlias = Key | Callable[..., Key | Awaitable[Key | None] | None] | None
CallCost: TypeAlias = int | Callable[..., int | Awaitable[int]]


def limited(
    limits: Limits | AsyncLimitsOfKey,
    *,
    key: CallKey = None,
    cost: CallCost = 1,
    wait: bool | Duration = False,
    name: str | None = None,
    version: int | None = None,
    manager: ProxyManager | AsyncProxyManager | str | None = None,
    namespace: str | None = None,
    enabled: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Limit how often a function is called, sync or async, in all or by what it is called with.

    A call takes its tokens before the function begins; they are gone also where the function fails.

    :param limits: text, a ``BucketConfiguration``, a list of limits, or a callable that is given the key (the name,
        where there is none) and answers with limits, or with None for a key that is not limited.
    :param key: whose tokens a call takes: a ``str`` or ``bytes``, or a callable that is given the arguments of the call
        and answers with one, or with None for a call that is not limited. None: all calls have one bucket.
    :param cost: tokens of a call, an int of 1 or more, or a callable that is given its arguments; for 0 it is free.
    :param wait: False: a call without tokens is refused. True: it waits for them, however long. A ``timedelta``, or
        seconds above 0: it waits, and is refused at once where that would take longer.
    :param name: the bucket's key is ``name:key``, or the name alone where there is no key. Functions with one name
        share their buckets. Without one, a limit counts for the function, by its module, qualified name and limits.
    :param version: of the limits, an int of 0 or more; raise it whenever they change, so that live buckets get the new
        ones and keep their fill level. None: stored buckets keep the limits that they were made with.
    :param manager: a ``ProxyManager`` for sync functions, an ``AsyncProxyManager`` for async ones; or the URL of a
        store, whose manager the process shares. By default that in the variable ``RATELIMIT_URL``, or on localhost.
    :param namespace: separates services that share a Redis, by their keys; None: that of the variable
        ``RATELIMIT_NAMESPACE``, or none.
    :param enabled: False: every call goes on, and nothing is counted, as where ``RATELIMIT_ENABLED`` is ``false``.
    :raises InvalidConfigurationError: at decoration, for limits that cannot be.
    :raises InvalidArgumentError: at decoration, for other arguments that cannot be, a manager of the other kind, and
        for what is no function, or is a generator.

    Calls raise :class:`RateLimitExceeded` where they are refused, and what the verbs of a bucket raise. The callables
    may be ``async`` where the function is.
    """
    limit = _Limit(
        limits if callable(limits) else BucketConfiguration.of(limits),
        key if callable(key) or key is None else _checked(key, (str, bytes), "key", "a str, bytes, or a callable"),
        cost if callable(cost) else token_count(cost, "cost"),
        _checked_wait(wait),
        checked_version(version),
        namespace_of(namespace),
        enabled,
        OtherLimits(),
    )
    if name is not None:
        _checked(name, str, "name", "a str")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _check_function(function)
        names = limit.names(function) if name is None else (name,)
        if _is_async(function):
            amanager = _checked_manager(manager, AsyncProxyManager, "an async")

            @wraps(function)
            async def acall(*args: P.args, **kwargs: P.kwargs) -> Any:
                if limit.counts:
                    await arun(limit.admitted(async_manager_of(amanager), names, args, kwargs))
                return await cast("Awaitable[Any]", function(*args, **kwargs))

            return cast("Callable[P, R]", acall)

        limit.check_sync()
        smanager = _checked_manager(manager, ProxyManager, "a sync")

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if limit.counts:
                run(limit.admitted(manager_of(smanager), names, args, kwargs))
            return function(*args, **kwargs)

        return call

    return decorate


@dataclass(frozen=True, slots=True)
class _Limit:
    """What is taken of which bucket, and how."""

    limits: BucketConfiguration | AsyncLimitsOfKey
    key: CallKey
    cost: CallCost
    wait: bool | Duration
    version: int | None
    namespace: str
    enabled: bool
    other_limits: OtherLimits

    @property
    def counts(self) -> bool:
        """Whether calls are limited at present."""
        return self.enabled and is_enabled()

    def names(self, function: object) -> tuple[str, ...]:
        """Return what the buckets of a function are named by that was not given a name: other limits are other ones."""
        limits = str(self.limits) if isinstance(self.limits, BucketConfiguration) else "default"
        return _name_of(function), limits

    def check_sync(self) -> None:
        """Refuse what a sync function could not await."""
        for role, given in (("limits", self.limits), ("key", self.key), ("cost", self.cost)):
            if _is_async(given):
                raise InvalidArgumentError(f"{role} must not be async where the function is not")

    def admitted(
        self,
        manager: ProxyManager | AsyncProxyManager,
        names: tuple[str, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Steps[None]:
        """Take the tokens of a call."""
        key: Any = self.key
        if callable(key):
            key = yield key(*args, **kwargs)
            if key is None:
                return
            _checked(key, (str, bytes), "what key gives", "a str, bytes or None")
        cost: Any = self.cost
        if callable(cost):
            cost = yield cost(*args, **kwargs)
            if cost == 0 and type(cost) is int:
                return
            token_count(cost, "what cost gives")
        limits: Any = self.limits
        if callable(limits):
            limits = yield limits(names[0] if key is None else key)
            if limits is None:
                return
        yield from self._charged(manager, names, key, BucketConfiguration.of(limits), cost)

    def _charged(
        self,
        manager: ProxyManager | AsyncProxyManager,
        names: tuple[str, ...],
        key: Key | None,
        limits: BucketConfiguration,
        cost: int,
    ) -> Steps[None]:
        bucket = manager.bucket(
            bucket_key(names, key, self.namespace),
            limits,
            configuration_version=self.version,
            inheritance=TokensInheritance.PROPORTIONALLY,
        )
        result = yield from _taken(bucket, cost, self.wait)
        if len(names) == 1 and result.configuration is not None and not result.degraded:
            self.other_limits.compare(names[0], limits, result.configuration)
        record(names[0], key, admitted=bool(result.value))
        if not result.value:
            probe = result.value
            if self.wait is not False:  # a wait that is refused does not say its length
                probe = yield bucket.estimate_ability_to_consume(cost)
            raise RateLimitExceeded(bucket.key, probe.retry_after)


def _taken(bucket: Bucket | AsyncBucket, cost: int, wait: bool | Duration) -> Steps[VerboseResult[Any]]:
    if wait is False:
        return (yield bucket.verbose.try_consume_and_return_remaining(cost))  # type: ignore[no-any-return]
    return (yield bucket.verbose.consume(cost, max_wait=None if wait is True else wait))  # type: ignore[no-any-return]


def _is_async(function: object) -> bool:
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(type(function), "__call__", None))  # noqa: B004


def _check_function(function: object) -> None:
    if isinstance(function, classmethod | staticmethod):
        raise InvalidArgumentError(f"limited goes below {type(function).__name__}: it takes the function itself")
    if isclass(function) or not callable(function):
        raise InvalidArgumentError(f"limited takes a function, not {brief(function)}")
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise InvalidArgumentError(
            f"{brief(function)} is a generator: a call of it only begins when something is asked of it; "
            "limit the function that it is used in, or what it calls for each item"
        )


def _name_of(function: object) -> str:
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise InvalidArgumentError(f"{brief(function)} has no name of its own: give it one, name=")
    return f"{getattr(function, '__module__', None)}.{name}"


def _checked_manager(manager: object, kind: type[M], function: str) -> M | str | None:
    if manager is None or isinstance(manager, str | kind):
        return manager
    article = "an" if kind is AsyncProxyManager else "a"
    raise InvalidArgumentError(
        f"manager of {function} function must be {article} {kind.__name__} or a URL; got {brief(manager)}"
    )


def _checked(value: T, kinds: type | tuple[type, ...], name: str, wanted: str) -> T:
    if not isinstance(value, kinds):
        raise InvalidArgumentError(f"{name} must be {wanted}, not {brief(value)}")
    return value


def _checked_wait(wait: bool | Duration) -> bool | Duration:
    if not isinstance(wait, bool):
        duration_nanos(wait, "wait")
    return wait
