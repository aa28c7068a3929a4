"""A decorator for functions that all processes together may call only so often.

::

    @limited("5/second", key=lambda customer, text: customer)
    def send(customer: str, text: str) -> None: ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from copy import copy
from functools import wraps
from inspect import isasyncgenfunction, isclass, isgeneratorfunction
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar, cast

from ratelimit.checks import instance, max_wait_nanos, refusal
from ratelimit.core.limits import Limits
from ratelimit.core.numbers import Duration
from ratelimit.errors import InvalidArgumentError, RateLimitExceeded
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.policy import AsyncLimiter, Decision, Limiter, Missing, Plans, Rule
from ratelimit.policy.callables import check_sync, checked_cost, is_async
from ratelimit.policy.managers import namespace_of
from ratelimit.policy.rule import LimitsOfKey, RuleLimits

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M", ProxyManager, AsyncProxyManager)

CallKey: TypeAlias = Key | Callable[..., Key | Awaitable[Key | None] | None] | None
CallCost: TypeAlias = int | Callable[..., int | Awaitable[int]]


def limited(
    limits: Limits | Plans | LimitsOfKey,
    *,
    key: CallKey = None,
    cost: CallCost = 1,
    max_wait: Duration | None = 0,
    name: str | None = None,
    version: int | None = None,
    manager: ProxyManager | AsyncProxyManager | str | None = None,
    namespace: str | None = None,
    enabled: bool = True,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Limit how often a function, sync or async, is called: in total, or for each key that its arguments give.

    A call takes its tokens before the function begins; they are spent even if the function fails.

    :param limits: text, a ``BucketConfiguration``, a list of limits, ``Plans``, or a callable that is given the key
        (the name, where there is none) and answers with limits, or with None for a key that is not limited.
    :param key: whose tokens a call takes: a ``str`` or ``bytes``, or a callable that is given the arguments of the call
        and answers with one, or with None for a call that is not limited. None: all calls have one bucket.
    :param cost: tokens of a call, an int of 1 or more, or a callable that is given its arguments; for 0 it is free.
    :param max_wait: the longest wait for tokens that is accepted, a ``timedelta`` or seconds: a call that would have to
        wait for longer is refused at once. 0: no call waits. None: calls wait as long as it takes.
    :param name: the bucket's key is ``name:key``, or the name alone where there is no key. Functions with one name
        share their buckets. Without a name, the module, the qualified name and the limits of the function stand for it.
    :param version: of the limits, an int of 0 or more; raise it whenever they change, so that live buckets get the new
        ones and keep their fill level. None: stored buckets keep the limits that they were made with.
    :param manager: a ``ProxyManager`` for sync functions, an ``AsyncProxyManager`` for async ones; or the URL of a
        store, whose manager the process shares. By default that in the variable ``RATELIMIT_URL``, or on localhost.
    :param namespace: separates services that share a Redis, by their keys; None: that of the variable
        ``RATELIMIT_NAMESPACE``, or none.
    :param enabled: False: every call goes on, and nothing is counted, as where ``RATELIMIT_ENABLED`` is ``false``.
    :raises InvalidConfigurationError: at decoration, for limits that are not valid.
    :raises InvalidArgumentError: at decoration, for other arguments that are not valid, a manager of the other kind,
        and for what is not a function, or is a generator.

    A call that is refused raises :class:`ratelimit.RateLimitExceeded`; any call may raise the errors that the verbs of
    a bucket raise. The callables may be ``async`` where the function is.
    """
    if key is not None and not callable(key):
        instance(key, (str, bytes), "key", "a str, bytes, or a callable")
    checked_cost(cost)
    if name is not None:
        instance(name, str, "name", "a str")
    limit = _FunctionRule(limits, key, cost, max_wait=max_wait, name=name, version=version)
    namespace = namespace_of(namespace)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        _check_function(function)
        rule = limit.of_function(function)
        if is_async(function):
            amanager = _checked_manager(manager, AsyncProxyManager, "an async")
            alimiter = AsyncLimiter(rule, manager=amanager, namespace=namespace, enabled=enabled)

            @wraps(function)
            async def acall(*args: P.args, **kwargs: P.kwargs) -> Any:
                _admit(await alimiter.decide(_Call(args, kwargs)))
                return await cast("Awaitable[Any]", function(*args, **kwargs))

            return cast("Callable[P, R]", acall)

        check_sync("the function", limits=limits, key=key, cost=cost)
        smanager = _checked_manager(manager, ProxyManager, "a sync")
        limiter = Limiter(rule, manager=smanager, namespace=namespace, enabled=enabled)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            _admit(limiter.decide(_Call(args, kwargs)))
            return function(*args, **kwargs)

        return call

    return decorate


class _Call(NamedTuple):
    """A call of a limited function."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _FunctionRule(Rule[_Call]):
    """The limit of a function, which is named by the function where it has no name of its own."""

    __slots__ = ("_limits_text", "max_wait_nanos")

    def __init__(
        self,
        limits: RuleLimits[_Call],
        key: CallKey,
        cost: CallCost,
        *,
        max_wait: Duration | None,
        name: str | None,
        version: int | None,
    ) -> None:
        super().__init__(
            limits,
            key=_of_call(key) if callable(key) else key,
            cost=_of_call(cost) if callable(cost) else cost,
            missing=Missing.UNLIMITED,
            name=name,
            version=version,
        )
        self._limits_text = self.name
        self.max_wait_nanos = None if max_wait is None else max_wait_nanos(max_wait)

    def of_function(self, function: object) -> _FunctionRule:
        """Return the rule as it is placed on a function."""
        if self.named:
            return self
        rule = copy(self)
        rule.name = _name_of(function)
        return rule

    def bucket_name(self, place: str) -> tuple[str, ...]:
        """Return the name, or the function and the text of its limits: with other limits it has other buckets."""
        return (self.name,) if self.named else (self.name, self._limits_text)


def _of_call(function: Callable[..., Any]) -> Callable[[_Call], Any]:
    """Return a callable that gives the arguments of a call to the function."""
    return lambda call: function(*call.args, **call.kwargs)


def _admit(decision: Decision[_Call]) -> None:
    refused = decision.refused
    if refused is not None:
        raise RateLimitExceeded(refused.bucket.key, refused.probe.retry_after, refused.probe)


def _check_function(function: object) -> None:
    if isinstance(function, classmethod | staticmethod):
        raise InvalidArgumentError(f"limited must be placed below {type(function).__name__}, above the function itself")
    if isclass(function) or not callable(function):
        raise refusal("what is limited", "a function", function)
    if isgeneratorfunction(function) or isasyncgenfunction(function):
        raise InvalidArgumentError(
            f"{brief(function)} is a generator, a call of which runs nothing yet; limit the function that it is used"
            " in, or what it calls for each item"
        )


def _name_of(function: object) -> str:
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise InvalidArgumentError(f"{brief(function)} has no name of its own: give it one with name=")
    return f"{getattr(function, '__module__', None)}.{name}"


def _checked_manager(manager: object, kind: type[M], function: str) -> M | str | None:
    if manager is None or isinstance(manager, str | kind):
        return manager
    article = "an" if kind is AsyncProxyManager else "a"
    raise InvalidArgumentError(
        f"manager of {function} function must be {article} {kind.__name__} or a URL; got {brief(manager)}"
    )
