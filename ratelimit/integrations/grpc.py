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
from typing import Any, Final, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import unquote

from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import NANOS_PER_MILLISECOND, NANOS_PER_SECOND, NEVER
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration, Limits
from ratelimit.engine.on_error import RETRY_NANOS
from ratelimit.engine.pipeline import AsyncLimitsOfKey
from ratelimit.errors import (
    ContentionError,
    CorruptStateError,
    InvalidArgumentError,
    InvalidConfigurationError,
    StoreError,
)
from ratelimit.integrations.extras import needing
from ratelimit.integrations.http import address
from ratelimit.integrations.http.keys import Missing, checked_secret, keyed_hash, name_of
from ratelimit.integrations.logs import OtherLimits, RefusalLog
from ratelimit.integrations.managers import async_manager_of, bucket_key, checked_version, manager_of, namespace_of
from ratelimit.integrations.recording import record
from ratelimit.integrations.switch import is_enabled
from ratelimit.keys import Key, brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.runtime.steps import Steps, arun, run

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
        """Who is connected, as gRPC writes it: ``ipv4:203.0.113.7:50123``."""
        return self.context.peer()  # type: ignore[no-any-return]  # that of a context of either face


M = TypeVar("M", ProxyManager, AsyncProxyManager)

RpcKey: TypeAlias = Callable[[Rpc], Key | Awaitable[Key | None] | None]
RpcCost: TypeAlias = int | Callable[[Rpc], int | Awaitable[int]]
RpcPredicate: TypeAlias = Callable[[Rpc], bool | Awaitable[bool]]


def peer_ip(rpc: Rpc) -> str | None:
    """The key of who is connected: an IPv4 address, or the network of 64 bits that an IPv6 address is in.

    None where there is no address, as with a Unix socket. Behind a proxy it is the proxy's.
    """
    kind, _, endpoint = rpc.peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    peer = address.parse(unquote(endpoint))
    return None if peer is None else address.cut(address.unwrapped(peer), 32, 64)


def method_name(rpc: Rpc) -> str:
    """The key of a method: all its callers share a bucket."""
    return rpc.method


def metadata_value(name: str, *, secret: str | bytes | None = None) -> RpcKey:
    """The key that a client sends in its metadata: ``metadata_value("x-api-key", secret=...)``.

    A call in which it is missing, or empty, has no key. One that has it twice is refused with ``INVALID_ARGUMENT``,
    because nobody knows which of them the service goes by.

    :param name: of the metadata, in either case.
    :param secret: at least 16 bytes, the same in all processes: the value is stored as a keyed hash (HMAC-SHA-256, 128
        bits), as that of an API key should be. None: as it is, or as a hash where it is longer than 128.
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
            raise _AmbiguousKeyError(f"the metadata {self.name!r} must not be there more than once")
        if not values or not values[0]:
            return None
        value = values[0]
        raw = value.encode() if isinstance(value, str) else value
        if self.secret is not None:
            return keyed_hash(self.secret, raw)
        return value if len(value) <= _LONGEST else f"sha256:{hashlib.sha256(raw).hexdigest()}"


class _AmbiguousKeyError(Exception):
    """What a client has sent is no one key."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """How a call ends that does not reach its method."""

    code: grpc.StatusCode
    text: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...] = ()


class _Interceptor(Generic[M]):
    """What both faces share; see :class:`RateLimitInterceptor`."""

    _takes: type[M]

    def __init__(
        self,
        limits: Limits | AsyncLimitsOfKey,
        *,
        key: RpcKey,
        cost: RpcCost = 1,
        methods: Collection[str] | Callable[[str], bool] | None = None,
        exempt: RpcPredicate | None = None,
        missing: Missing | Literal["error", "unlimited"] = Missing.ERROR,
        name: str | None = None,
        version: int | None = None,
        manager: M | str | None = None,
        namespace: str | None = None,
        enabled: bool = True,
    ) -> None:
        self._limits = limits if callable(limits) else BucketConfiguration.of(limits)
        self._key = key
        self._cost = cost
        listed = frozenset[str]() if methods is None or callable(methods) else _full_names(methods)
        self._is_limited = methods if methods is None or callable(methods) else listed.__contains__
        self._exempt = exempt
        self._name = ("default" if callable(self._limits) else str(self._limits)) if name is None else name
        place = ",".join(sorted(listed))
        self._names = (place, str(self._name), name_of(key)) if name is None else (name,)
        self._version = checked_version(version)
        self._namespace = namespace_of(namespace)
        self._enabled = enabled
        self._refusals = RefusalLog()
        self._other_limits = OtherLimits()
        self._manager: M | str | None = manager
        if not callable(key):
            raise InvalidConfigurationError(f"key must be a callable, peer_ip say, not {brief(key)}", "key")
        if not callable(cost) and (isinstance(cost, bool) or not isinstance(cost, int) or cost < 1):
            raise InvalidConfigurationError(
                f"cost must be an int of 1 or more, or a callable, not {brief(cost)}", "cost"
            )
        if exempt is not None and not callable(exempt):
            raise InvalidConfigurationError(f"exempt must be a callable, not {brief(exempt)}", "exempt")
        if self._takes is ProxyManager:
            for role, given in (("limits", self._limits), ("key", key), ("cost", cost), ("exempt", exempt)):
                if iscoroutinefunction(given):
                    raise InvalidConfigurationError(f"{role} must not be async where the server is not", role)
        try:
            self._missing = Missing(missing)
        except ValueError:
            raise InvalidConfigurationError(
                f"missing must be error or unlimited, not {brief(missing)}", "missing"
            ) from None
        if not isinstance(self._name, str):
            raise InvalidConfigurationError(f"name must be a str, not {brief(name)}", "name")
        if manager is not None and not isinstance(manager, str | self._takes):
            raise InvalidConfigurationError(
                f"manager must be a {self._takes.__name__} or a URL, not {brief(manager)}", "manager"
            )

    def _is_about(self, handler: Any, method: str) -> bool:
        if handler is None or not self._enabled or not is_enabled():
            return False
        return self._is_limited is None or self._is_limited(method)

    def _decision(self, manager: M, rpc: Rpc) -> Steps[_Refusal | None]:
        """None where the call may go on."""
        try:
            return (yield from self._decided(manager, rpc))
        except _AmbiguousKeyError as error:
            return _Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except (StoreError, ContentionError, CorruptStateError) as error:
            _logger.error("a call of %s was not decided about: %s", rpc.method, error)  # noqa: TRY400  # a line is enough
            return _unavailable(RETRY_NANOS)

    def _decided(self, manager: M, rpc: Rpc) -> Steps[_Refusal | None]:
        if self._exempt is not None and (yield self._exempt(rpc)):
            return None
        key: Any = yield self._key(rpc)
        if key is None:
            return None if self._missing is Missing.UNLIMITED else self._without_key()
        if not isinstance(key, str | bytes):
            raise InvalidArgumentError(f"a key must be a str, bytes or None, not {brief(key)}")
        cost: Any = self._cost
        if callable(cost):
            cost = yield cost(rpc)
            if cost == 0 and type(cost) is int:
                return None
        limits: Any = self._limits
        if callable(limits):
            limits = yield limits(key)
            if limits is None:
                return None
        configuration = BucketConfiguration.of(limits)
        bucket = manager.bucket(
            bucket_key(self._names, key, self._namespace),
            configuration,
            configuration_version=self._version,
            inheritance=TokensInheritance.PROPORTIONALLY,
        )
        result = yield bucket.verbose.try_consume_and_return_remaining(cost)
        if len(self._names) == 1 and result.configuration is not None and not result.degraded:
            self._other_limits.compare(self._name, configuration, result.configuration)
        record(self._name, key, admitted=bool(result.value))
        if result.value:
            return None
        self._refusals.log(self._name, key, result.configuration)
        return self._refused(result)

    def _refused(self, result: VerboseResult[ConsumptionProbe]) -> _Refusal:
        probe, limits = result.value, result.configuration
        if limits is None:  # nobody knows: the store has failed, and its policy is to deny
            return _unavailable(probe.nanos_to_wait_for_refill)
        failure = QuotaFailure(violations=[QuotaFailure.Violation(subject=self._name, description=str(limits))])
        wait = probe.retry_after
        when = "it can never allow so much" if wait is None else f"retry in {wait:g} s"
        text = f"the limit {self._name!r} is exceeded; {when}"
        return _refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text, probe.nanos_to_wait_for_refill, failure)

    def _without_key(self) -> _Refusal:
        wanted = f"the metadata {self._key.name!r}" if isinstance(self._key, _MetadataValue) else "a key"
        return _Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"calls are limited by {wanted}, which this one has not")


class RateLimitInterceptor(_Interceptor[ProxyManager], grpc.ServerInterceptor):
    """Limits the calls that a ``grpc.server`` takes. Decisions are made in its threads, after the first message.

    :param limits: text, a ``BucketConfiguration``, a list of limits, or a callable that is given the key and answers
        with limits, or with None for a key that is not limited.
    :param key: whose tokens a call takes: :func:`peer_ip`, :func:`metadata_value`, :func:`method_name`, or a callable
        that is given the :class:`Rpc` and answers with a ``str`` or ``bytes``, or with None for a call without a key.
    :param cost: tokens of a call, an int of 1 or more, or a callable that is given the call; for 0 it is free. A stream
        pays when it begins, and not for what goes through it.
    :param methods: only these are limited: full names, ``/package.Service/Method``, or a callable that is given one and
        answers whether. None: all that the server knows.
    :param exempt: calls for which this is true are not limited.
    :param missing: what becomes of a call without a key: ``error``, it ends with ``INVALID_ARGUMENT``; ``unlimited``.
    :param name: of the policy, as clients are told; a bucket's key is ``name:key``, and interceptors of one name share
        their buckets. Without a name, clients are told the text of the limits, or ``default`` where they are looked up,
        and an interceptor shares buckets with those alone that have the same limits, methods and kind of key.
    :param version: of the limits, an int of 0 or more; raise it whenever they change, so that live buckets get the new
        ones and keep their fill level. None: stored buckets keep the limits that they were made with.
    :param manager: has the buckets; or the URL of a store, whose manager the process shares. By default that in the
        variable ``RATELIMIT_URL``, or on localhost.
    :param namespace: separates services that share a Redis, by their keys; None: that of the variable
        ``RATELIMIT_NAMESPACE``, or none.
    :param enabled: False: every call goes on, and nothing is counted, as where ``RATELIMIT_ENABLED`` is ``false``.
    :raises InvalidConfigurationError: for what cannot be.

    A call that is refused ends with ``RESOURCE_EXHAUSTED``; with ``UNAVAILABLE`` where the store has failed, and the
    manager's ``on_error`` lets it not pass.
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
            rpc = Rpc(method, _metadata(handler_call_details), context)
            _admit(context, run(self._decision(manager_of(self._manager), rpc)))
            return behavior(request, context, *more)

        return _with_behavior(handler, limited)


class AsyncRateLimitInterceptor(_Interceptor[AsyncProxyManager], grpc.aio.ServerInterceptor):
    """The same for a ``grpc.aio.server``, without blocking its event loop; the callables may be ``async``.

    Methods that are not ``async``, which such a server runs in threads, are limited as well.
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

        async def decision(context: Any) -> _Refusal | None:
            rpc = Rpc(method, _metadata(handler_call_details), context)
            return await arun(self._decision(async_manager_of(self._manager), rpc))

        def decision_in_thread(context: Any) -> _Refusal | None:
            return asyncio.run_coroutine_threadsafe(decision(context), loop).result()

        behavior = _behavior(handler)
        if isasyncgenfunction(behavior) or iscoroutinefunction(behavior):
            return _with_behavior(handler, _awaited(behavior, decision))
        return _with_behavior(handler, _in_thread(behavior, decision_in_thread, streams=handler.response_streaming))


# gRPC chooses by the kind of a function how it is to be called: what is limited must stay of the same kind.


def _awaited(behavior: Callable[..., Any], decision: Callable[[Any], Awaitable[_Refusal | None]]) -> Callable[..., Any]:
    async def admit(context: Any) -> None:
        refusal = await decision(context)
        if refusal is not None:
            context.set_trailing_metadata(refusal.trailing_metadata)
            await context.abort(refusal.code, refusal.text)

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
    behavior: Callable[..., Any], decision: Callable[[Any], _Refusal | None], *, streams: bool
) -> Callable[..., Any]:
    @wraps(behavior)
    def generate(request: Any, context: Any) -> Iterator[Any]:  # only what it yields is computed in a thread
        _admit(context, decision(context))
        yield from behavior(request, context)

    @wraps(behavior)
    def respond(request: Any, context: Any) -> Any:
        _admit(context, decision(context))
        return behavior(request, context)

    return generate if streams else respond


def _admit(context: Any, refusal: _Refusal | None) -> None:
    if refusal is not None:
        context.set_trailing_metadata(refusal.trailing_metadata)
        context.abort(refusal.code, refusal.text)


_KINDS: Final = {  # by what is a stream, the request and the response
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


def _unavailable(wait: int) -> _Refusal:
    return _refusal(grpc.StatusCode.UNAVAILABLE, "the rate limit cannot be looked up at present", wait)


def _refusal(code: grpc.StatusCode, text: str, wait: int, *details: Message) -> _Refusal:
    """A refusal that says for how many nanoseconds to wait."""
    status = Status(code=code.value[0], message=text)
    if wait != NEVER:
        seconds, nanos = divmod(wait, NANOS_PER_SECOND)
        status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos)))
    for detail in details:
        status.details.add().Pack(detail)
    millis = -(-wait // NANOS_PER_MILLISECOND)
    pushback = -1 if millis > _LONGEST_PUSHBACK else millis  # -1: it is not to be retried
    return _Refusal(code, text, (*rpc_status.to_status(status).trailing_metadata, (_PUSHBACK, str(pushback))))


def _full_names(methods: Collection[str]) -> frozenset[str]:
    if isinstance(methods, str | bytes):
        raise InvalidConfigurationError(f"methods must be a collection of names, not {brief(methods)}", "methods")
    for name in methods:
        if not isinstance(name, str) or not re.fullmatch(r"/[^/]+/[^/]+", name):
            raise InvalidConfigurationError(
                f"a method is named like /package.Service/Method, unlike {brief(name)}", "methods"
            )
    return frozenset(methods)
