"""Interceptors for gRPC servers, sync and aio: calls beyond the limit end with ``RESOURCE_EXHAUSTED``.

::

    grpc.server(pool, interceptors=[RateLimitInterceptor("100/minute", key=peer_ip)])

A refusal says when to come back in both of the ways that clients know: ``google.rpc.RetryInfo`` among the details of
the status, for code that reads them, and ``grpc-retry-pushback-ms`` of gRFC A6, which a channel with a retry policy
obeys by itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Any, ClassVar, Final, Generic, Literal, TypeAlias, TypedDict, TypeVar, Unpack
from urllib.parse import unquote

from ratelimit.checks import refusal
from ratelimit.core.numbers import NANOS_PER_MILLISECOND, NANOS_PER_SECOND, NEVER
from ratelimit.engine.on_error import RETRY_NANOS, ErrorPolicy
from ratelimit.errors import (
    ContentionError,
    CorruptStateError,
    InvalidConfigurationError,
    StoreError,
)
from ratelimit.integrations.extras import needing
from ratelimit.integrations.http import address
from ratelimit.integrations.http.keys import checked_secret, keyed_hash
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.policy import AmbiguousKeyError, AsyncLimiter, Decision, Limiter, Missing, OnRefused, Outcome, Rule
from ratelimit.policy import rule as of_any
from ratelimit.policy.callables import check_sync

with needing("grpc"):
    import grpc
    import grpc.aio
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.rpc.error_details_pb2 import QuotaFailure, RetryInfo
    from google.rpc.status_pb2 import Status
    from grpc_status import rpc_status

_PUSHBACK: Final = "grpc-retry-pushback-ms"
_LONGEST_PUSHBACK: Final = 2**31 - 1  # milliseconds: gRFC A6 has a signed int of 32 bits

_LONGEST: Final = 128  # of a client's text that is kept as it is

_logger = logging.getLogger("ratelimit")


@dataclass(frozen=True, slots=True)
class Rpc:
    """A call, as keys, costs and exemptions see it.

    :param method: the full name of the method, ``/package.Service/Method``.
    :param metadata: what the client has sent along: names in lower case, with text, or with bytes where the name ends
        with ``-bin``. A name may be there more than once.
    :param context: that of the servicer, for what else it knows: ``auth_context()``, say.
    """

    method: str
    metadata: tuple[tuple[str, str | bytes], ...]
    context: Any

    @property
    def peer(self) -> str:
        """The address of the client, as gRPC writes it: ``ipv4:203.0.113.7:50123``."""
        return self.context.peer()  # type: ignore[no-any-return]  # the context of either face has it


M = TypeVar("M", ProxyManager, AsyncProxyManager)

RpcKey: TypeAlias = of_any.RuleKey[Rpc]
RpcCost: TypeAlias = of_any.Cost[Rpc]
RpcPredicate: TypeAlias = of_any.Predicate[Rpc]
RpcLimits: TypeAlias = of_any.RuleLimits[Rpc]
"""Limits of one bucket, ``Plans``, or a callable that returns limits by the key, or by the key and the RPC."""


def peer_ip(rpc: Rpc) -> str | None:
    """Return the address of the client: an IPv4 address, or the network of 64 bits that an IPv6 address is in.

    None where there is no address, as with a Unix socket. Behind a proxy it is the proxy's.
    """
    kind, _, endpoint = rpc.peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    peer = address.parse(unquote(endpoint))
    return None if peer is None else address.cut(address.unwrapped(peer), 32, 64)


def method_name(rpc: Rpc) -> str:
    """Return the full name of the method, so that all its callers share a bucket."""
    return rpc.method


def metadata_value(name: str, *, secret: str | bytes | None = None) -> RpcKey:
    """Return a key that a client sends in its metadata: ``metadata_value("x-api-key", secret=...)``.

    A call in which it is missing, or empty, has no key. One that has it twice is refused with ``INVALID_ARGUMENT``,
    because nobody knows which of the two the service goes by.

    :param name: the name in the metadata, in upper or lower case.
    :param secret: at least 16 bytes, the same in all processes: the value is stored as a keyed hash (HMAC-SHA-256, 128
        bits), as that of an API key should be. None: it is stored as it is, or as a hash if it is longer than 128.
    :raises InvalidConfigurationError: for a secret that is too short.
    """
    return _MetadataValue(name.lower(), None if secret is None else checked_secret(secret))


@dataclass(frozen=True, slots=True)
class _MetadataValue:
    name: str
    secret: bytes | None = field(repr=False)

    def __call__(self, rpc: Rpc) -> Key | None:
        values = [value for name, value in rpc.metadata if name == self.name]
        if len(values) > 1:
            raise AmbiguousKeyError(f"the metadata {self.name!r} must not be there more than once")
        if not values or not values[0]:
            return None
        value = values[0]
        raw = value.encode() if isinstance(value, str) else value
        if self.secret is not None:
            return keyed_hash(self.secret, raw)
        return value if len(value) <= _LONGEST else f"sha256:{hashlib.sha256(raw).hexdigest()}"


class RpcRuleSettings(TypedDict, total=False):
    """What a rule takes besides its limits."""

    key: RpcKey | None
    cost: RpcCost
    methods: Collection[str] | Callable[[str], bool] | None
    when: RpcPredicate | None
    exempt: RpcPredicate | None
    missing: Missing | Literal["error", "unlimited"]
    name: str | None
    version: int | None


class RpcRule(Rule[Rpc]):
    """A limit and the calls that it is for, for an interceptor that has several limits.

    ::

        RateLimitInterceptor(
            RpcRule("100/minute", key=metadata_value("x-api-key", secret=...)),
            RpcRule("5/minute", key=peer_ip, methods=["/demo.Accounts/LogIn"], name="log-in"),
        )

    :param limits: text, a ``BucketConfiguration``, a list of limits, ``Plans``, or a callable that is given the key, or
        the key and the call, and answers with limits, or with None for a key that is not limited.
    :param key: whose tokens a call takes: :func:`peer_ip`, :func:`metadata_value`, :func:`method_name`, or a callable
        that is given the :class:`Rpc` and answers with a ``str`` or ``bytes``, or with None for a call without a key.
    :param cost: tokens of a call, an int of 1 or more, or a callable that is given the call; for 0 it is free. A stream
        pays when it begins, and not for what goes through it.
    :param methods: only these are limited: full names, ``/package.Service/Method``, or a callable that is given a
        name and answers whether it is limited. None: all that the server knows.
    :param when: only calls for which this is true are limited.
    :param exempt: calls for which this is true are not limited.
    :param missing: how a call without a key ends: ``error``, with ``INVALID_ARGUMENT``; ``unlimited``, it goes on.
    :param name: the name of the policy that clients see; a bucket's key is ``name:key``, and rules of one name share
        their buckets. Without a name, clients see the text of the limits, or ``default`` where they are looked up, and
        a rule shares buckets only with rules that have the same limits, methods and kind of key.
    :param version: of the limits, an int of 0 or more; raise it whenever they change, so that live buckets get the new
        ones and keep their fill level. None: stored buckets keep the limits that they were made with.
    :param enabled: False: the rule limits no call.
    :raises InvalidConfigurationError: for arguments that are not valid.
    """

    __slots__ = ("_bucket_name", "_is_limited", "methods")

    _shown_settings: ClassVar[dict[str, object]] = {"methods": None, **Rule._shown_settings}  # noqa: SLF001  # its own

    def __init__(
        self,
        limits: RpcLimits,
        *,
        key: RpcKey | None = None,
        cost: RpcCost = 1,
        methods: Collection[str] | Callable[[str], bool] | None = None,
        when: RpcPredicate | None = None,
        exempt: RpcPredicate | None = None,
        missing: Missing | Literal["error", "unlimited"] = Missing.ERROR,
        name: str | None = None,
        version: int | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__(
            limits,
            key=key,
            cost=cost,
            when=when,
            exempt=exempt,
            missing=_missing(missing),
            name=name,
            version=version,
            enabled=enabled,
        )
        self.methods = methods if methods is None or callable(methods) else _full_names(methods)
        self._is_limited = self.methods.__contains__ if isinstance(self.methods, frozenset) else self.methods
        place = ",".join(sorted(self.methods)) if isinstance(self.methods, frozenset) else ""
        self._bucket_name = super().bucket_name(place)
        self._hash = hash((self._hash, self.methods))

    def _checked_key(self, key: Any) -> Any:
        if not callable(key):
            raise refusal("key", "a callable such as peer_ip", key, InvalidConfigurationError)
        return key

    def is_about(self, request: Rpc) -> bool:
        """Return whether the rule is about calls of this method."""
        return self.is_about_method(request.method)

    def is_about_method(self, method: str) -> bool:
        """Return whether the rule is about calls of a method, by its full name."""
        return self.enabled and (self._is_limited is None or self._is_limited(method))

    def bucket_name(self, place: str) -> tuple[str, ...]:
        """Return the name, or the methods, the limits and the kind of key, which distinguish rules without a name.

        :param place: ignored: a rule counts for its methods, in whichever interceptor it stands.
        """
        return self._bucket_name


class _RpcLimiter(Limiter[Rpc]):
    _rule_type = RpcRule


class _AsyncRpcLimiter(AsyncLimiter[Rpc]):
    _rule_type = RpcRule


@dataclass(frozen=True, slots=True)
class _Refusal:
    """How a call ends if it does not reach its method."""

    code: grpc.StatusCode
    text: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...] = ()


class _Interceptor(Generic[M]):
    """What both faces share; see :class:`RateLimitInterceptor`."""

    _takes: type[M]
    _limiter: Any

    def __init__(
        self,
        limits: RpcRule | RpcLimits,
        *more: RpcRule | RpcLimits,
        manager: M | str | None = None,
        on_error: ErrorPolicy | None = None,
        on_refused: OnRefused[Rpc] | None = None,
        namespace: str | None = None,
        enabled: bool = True,
        **settings: Unpack[RpcRuleSettings],
    ) -> None:
        rules = [RpcRule.of(each, **settings) for each in (limits, *more)]
        if manager is not None and not isinstance(manager, str | self._takes):
            raise refusal("manager", f"a {self._takes.__name__} or a URL", manager, InvalidConfigurationError)
        if self._takes is ProxyManager:
            for rule in rules:
                check_sync(
                    "the server",
                    InvalidConfigurationError,
                    limits=rule.limits,
                    key=rule.key,
                    cost=rule.cost,
                    when=rule.when,
                    exempt=rule.exempt,
                )
        make: Any = _RpcLimiter if self._takes is ProxyManager else _AsyncRpcLimiter
        self._limiter = make(
            *rules, manager=manager, on_error=on_error, on_refused=on_refused, namespace=namespace, enabled=enabled
        )
        self._rules = tuple(rules) if enabled else ()

    def _is_about(self, handler: Any, method: str) -> bool:
        return handler is not None and any(rule.is_about_method(method) for rule in self._rules)


class RateLimitInterceptor(_Interceptor[ProxyManager], grpc.ServerInterceptor):
    """Limits the calls that a ``grpc.server`` takes. Decisions are made in its threads, after the first message.

    :param limits: limits, as :class:`RpcRule` takes them; or such a rule, with settings of its own.
    :param more: further limits or rules. All of them are one decision: a call pays for each, or for none.
    :param settings: the settings of a rule, for limits that are not a rule: ``key=``, which must be given, ``cost=``,
        ``methods=``, ``when=``, ``exempt=``, ``missing=``, ``name=`` and ``version=``.
    :param manager: has the buckets; or the URL of a store, whose manager the process shares. By default that in the
        variable ``RATELIMIT_URL``, or on localhost.
    :param on_error: what is decided where the store fails: an ``OnError``, or a callable. None: what the manager
        decides then.
    :param on_refused: is called with the :class:`Rpc` and the ``Decision`` for each call that is refused.
    :param namespace: separates services that share a Redis, by their keys; None: that of the variable
        ``RATELIMIT_NAMESPACE``, or none.
    :param enabled: False: every call goes on, and nothing is counted, as where ``RATELIMIT_ENABLED`` is ``false``.
    :raises InvalidConfigurationError: for arguments that are not valid.
    :raises InvalidArgumentError: for settings beside a rule, which has its own.

    A call that is refused ends with ``RESOURCE_EXHAUSTED``, or with ``UNAVAILABLE`` if the store fails and ``on_error``
    does not let the call pass.
    """

    _takes = ProxyManager

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See ``grpc.ServerInterceptor``."""
        handler, method = continuation(handler_call_details), handler_call_details.method
        if not self._is_about(handler, method):
            return handler
        behavior = _behavior(handler)

        @wraps(behavior)
        def limited(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
            _admit(context, self._refusal(Rpc(method, _metadata(handler_call_details), context)))
            return behavior(request, context, *more)

        return _with_behavior(handler, limited)

    def _refusal(self, rpc: Rpc) -> _Refusal | None:
        """Decide about a call; None where it may go on."""
        try:
            return _refusal_of(self._limiter.decide(rpc))
        except _NOT_DECIDED as error:
            return _undecided(rpc, error)


class AsyncRateLimitInterceptor(_Interceptor[AsyncProxyManager], grpc.aio.ServerInterceptor):
    """A :class:`RateLimitInterceptor` for a ``grpc.aio.server``, whose event loop it does not block.

    The callables may be ``async``. Methods that are not ``async``, which such a server runs in threads, are limited as
    well.
    """

    _takes = AsyncProxyManager

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See ``grpc.aio.ServerInterceptor``."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if not self._is_about(handler, method):
            return handler
        loop = asyncio.get_running_loop()

        async def refusal_in_loop(context: Any) -> _Refusal | None:
            return await self._refusal(Rpc(method, _metadata(handler_call_details), context))

        def refusal_in_thread(context: Any) -> _Refusal | None:
            return asyncio.run_coroutine_threadsafe(refusal_in_loop(context), loop).result()

        behavior = _behavior(handler)
        if isasyncgenfunction(behavior) or iscoroutinefunction(behavior):
            return _with_behavior(handler, _awaited(behavior, refusal_in_loop))
        return _with_behavior(handler, _in_thread(behavior, refusal_in_thread, streams=handler.response_streaming))

    async def _refusal(self, rpc: Rpc) -> _Refusal | None:
        """Decide about a call; None where it may go on."""
        try:
            return _refusal_of(await self._limiter.decide(rpc))
        except _NOT_DECIDED as error:
            return _undecided(rpc, error)


# gRPC calls a function as its kind demands (plain, async, a generator), so a limited one must stay of the same kind.


def _awaited(behavior: Callable[..., Any], decide: Callable[[Any], Awaitable[_Refusal | None]]) -> Callable[..., Any]:
    async def admit(context: Any) -> None:
        refused = await decide(context)
        if refused is not None:
            context.set_trailing_metadata(refused.trailing_metadata)
            await context.abort(refused.code, refused.text)

    @wraps(behavior)
    async def generate(request: Any, context: Any) -> AsyncGenerator[Any]:
        await admit(context)
        async with aclosing(behavior(request, context)) as responses:
            async for response in responses:
                yield response

    @wraps(behavior)
    async def respond(request: Any, context: Any) -> Any:
        await admit(context)
        return await behavior(request, context)

    return generate if isasyncgenfunction(behavior) else respond


def _in_thread(
    behavior: Callable[..., Any], decide: Callable[[Any], _Refusal | None], *, streams: bool
) -> Callable[..., Any]:
    # A generator, because gRPC computes in a thread only what a function yields.
    @wraps(behavior)
    def generate(request: Any, context: Any) -> Iterator[Any]:
        _admit(context, decide(context))
        yield from behavior(request, context)

    @wraps(behavior)
    def respond(request: Any, context: Any) -> Any:
        _admit(context, decide(context))
        return behavior(request, context)

    return generate if streams else respond


def _admit(context: Any, refused: _Refusal | None) -> None:
    if refused is not None:
        context.set_trailing_metadata(refused.trailing_metadata)
        context.abort(refused.code, refused.text)


# By two flags: whether the request is a stream, and whether the response is.
_KINDS: Final = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _behavior(handler: Any) -> Callable[..., Any]:
    name, _ = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
    return getattr(handler, name)  # type: ignore[no-any-return]  # one of a handler's four attributes


def _with_behavior(handler: Any, behavior: Callable[..., Any]) -> Any:
    _, make = _KINDS[bool(handler.request_streaming), bool(handler.response_streaming)]
    return make(
        behavior,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _metadata(details: grpc.HandlerCallDetails) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((name, value) for name, value in details.invocation_metadata or ())


_NOT_DECIDED: Final = (StoreError, ContentionError, CorruptStateError)


def _undecided(rpc: Rpc, error: Exception) -> _Refusal:
    """Log that no decision could be made about a call, and return how it ends."""
    _logger.error("a call of %s was not decided about: %s", rpc.method, error)
    return _unavailable(RETRY_NANOS)


def _refusal_of(decision: Decision[Rpc]) -> _Refusal | None:
    """Return how a call ends if the decision refuses it; None where it may go on."""
    if decision:
        return None
    if decision.refused is not None:
        return _refused_by(decision.refused, decision)
    key: Any = None if decision.missing is None else decision.missing.key
    wanted = f"the metadata {key.name!r}" if isinstance(key, _MetadataValue) else "a key"
    text = decision.fault or f"calls are limited by {wanted}, which this one does not have"
    return _Refusal(grpc.StatusCode.INVALID_ARGUMENT, text)


def _refused_by(first: Outcome, decision: Decision[Rpc]) -> _Refusal:
    if first.configuration is None:  # the store has failed, and the policy for that is to deny
        return _unavailable(decision.nanos_to_wait)
    failure = QuotaFailure(
        violations=[
            QuotaFailure.Violation(subject=outcome.rule.name, description=str(outcome.configuration))
            for outcome in decision.refusals
        ]
    )
    wait = decision.retry_after
    when = "it can never allow so much" if wait is None else f"retry in {wait:g} s"
    text = f"the limit {first.rule.name!r} is exceeded; {when}"
    return _refusal_to_wait(grpc.StatusCode.RESOURCE_EXHAUSTED, text, decision.nanos_to_wait, failure)


def _unavailable(wait: int) -> _Refusal:
    return _refusal_to_wait(grpc.StatusCode.UNAVAILABLE, "the rate limit cannot be looked up at present", wait)


def _refusal_to_wait(code: grpc.StatusCode, text: str, wait: int, *details: Message) -> _Refusal:
    """Return a refusal that says for how many nanoseconds to wait."""
    status = Status(code=code.value[0], message=text)
    if wait != NEVER:
        seconds, nanos = divmod(wait, NANOS_PER_SECOND)
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos)))
    for detail in details:
        status.details.add().Pack(detail)
    millis = -(-wait // NANOS_PER_MILLISECOND)
    pushback = -1 if millis > _LONGEST_PUSHBACK else millis  # -1: do not retry
    return _Refusal(code, text, (*rpc_status.to_status(status).trailing_metadata, (_PUSHBACK, str(pushback))))


def _full_names(methods: Collection[str]) -> frozenset[str]:
    if isinstance(methods, str | bytes):
        raise refusal("methods", "a collection of names", methods, InvalidConfigurationError)
    for name in methods:
        if not isinstance(name, str) or not re.fullmatch(r"/[^/]+/[^/]+", name):
            raise InvalidConfigurationError(
                f"a method must be named like /package.Service/Method; got {brief(name)}", "methods"
            )
    return frozenset(methods)


def _missing(missing: object) -> Missing:
    try:
        return Missing(missing)
    except ValueError:
        raise refusal("missing", "error or unlimited", missing, InvalidConfigurationError) from None
