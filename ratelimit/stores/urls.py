"""Stores by URL.

A client made here gives up on a silent server after a second, and leaves repeating to the store. Both can be set by
the query of the URL, which takes redis-py's names: ``redis://host?socket_timeout=0.2&max_connections=200``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.connection
import redis.retry
from redis.backoff import NoBackoff

from ratelimit.errors import InvalidConfigurationError, brief
from ratelimit.stores.circuit import CircuitBreaker
from ratelimit.stores.memory import AsyncMemoryStore, MemoryStore
from ratelimit.stores.protocol import AsyncStore, Store
from ratelimit.stores.redis import AsyncRedisStore, RedisStore
from ratelimit.stores.redis_async_channels import AsyncClusterChannel, AsyncPoolChannel
from ratelimit.stores.redis_channels import ClusterChannel, PoolChannel

URL_VARIABLE: Final = "RATELIMIT_URL"
DEFAULT_URL: Final = "redis://localhost:6379/0"
FORMS: Final = (
    "memory://",
    "redis://host:port/db",
    "rediss://host:port/db",
    "unix:///path/to/socket",
    "redis+cluster://host:port",
    "redis+sentinel://host:port,host:port/service",
)
_SCHEMES: Final = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")

_TIMEOUTS: Final = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
_DEFAULTS: Final[dict[str, Any]] = {**_TIMEOUTS, "socket_keepalive": True}
_POOL_DEFAULTS: Final[dict[str, Any]] = {"max_connections": 100, "timeout": 5.0}  # a crowd waits for its turn
_BREAKER: Final = CircuitBreaker()
_NO_TEXT: Final = (  # options of redis-py that are objects, or that would change how states are read
    *("retry", "retry_on_error", "credential_provider", "redis_connect_func", "command_packer", "event_dispatcher"),
    *("parser_class", "encoder_class", "encoding", "encoding_errors", "socket_type", "socket_keepalive_options"),
    *("maint_notifications_config", "driver_info"),
)
_SENTINEL_OPTIONS: Final = {"sentinel_username": "username", "sentinel_password": "password"}


def default_url() -> str:
    """Where the buckets are for who says nothing: where the variable ``RATELIMIT_URL`` says, or on this machine."""
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL


def store_from_url(url: str) -> Store:
    """The store that a URL names, owning its connections. Nothing is sent yet.

    :raises InvalidConfigurationError: for a URL that names none.
    """
    location = _parsed(url)
    if location.topology == "memory":
        return MemoryStore()
    options: dict[str, Any] = {"retry": redis.retry.Retry(NoBackoff(), 0), **location.options}
    if location.topology == "cluster":
        return RedisStore.over(ClusterChannel(partial(redis.RedisCluster, **options), breaker=_BREAKER, owned=True))
    with _refusals(url):
        clients = _clients(redis, location, options)
    return RedisStore.over(PoolChannel(*clients, breaker=_BREAKER, owned=True))


def async_store_from_url(url: str) -> AsyncStore:
    """The same for asyncio."""
    location = _parsed(url)
    if location.topology == "memory":
        return AsyncMemoryStore()
    options: dict[str, Any] = {"retry": redis.asyncio.retry.Retry(NoBackoff(), 0), **location.options}
    if location.topology == "cluster":
        return AsyncRedisStore.over(
            AsyncClusterChannel(redis.asyncio.RedisCluster(**options), breaker=_BREAKER, owned=True)
        )
    with _refusals(url):
        clients = _clients(redis.asyncio, location, options)
    return AsyncRedisStore.over(AsyncPoolChannel(*clients, breaker=_BREAKER, owned=True))


class _Location(NamedTuple):
    """A URL taken apart: options as redis-py's clients name them, and what only Sentinel needs."""

    topology: str
    options: dict[str, Any]
    sentinels: list[tuple[str, int]]
    service: str


def _clients(api: ModuleType, location: _Location, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A client over a pool, of ``redis`` or of ``redis.asyncio``, which name everything alike, and its sentinels."""
    if location.sentinels:
        for_sentinels = {name: options[name] for name in (*_TIMEOUTS, "retry")}
        for_sentinels |= {name: options.pop(option) for option, name in _SENTINEL_OPTIONS.items() if option in options}
        sentinel = api.Sentinel(location.sentinels, sentinel_kwargs=for_sentinels, **options)
        return sentinel.master_for(location.service), sentinel.sentinels
    if options.pop("ssl", False):
        options["connection_class"] = api.SSLConnection
    if "path" in options:
        options["connection_class"] = api.UnixDomainSocketConnection
        del options["socket_keepalive"]
    return api.Redis(connection_pool=api.BlockingConnectionPool(**{**_POOL_DEFAULTS, **options})), []


def _parsed(url: str) -> _Location:
    if not isinstance(url, str):
        raise InvalidConfigurationError(f"a URL must be a str, not {type(url).__name__}", "url")
    scheme, separator, rest = url.partition("://")
    transport, _, topology = scheme.lower().partition("+")
    if url.lower() == "memory://":
        return _Location("memory", {}, [], "")
    if scheme.lower() not in _SCHEMES or not separator:
        raise _invalid(url, f"use one of {', '.join(FORMS)}")
    sentinels: list[tuple[str, int]] = []
    service = ""
    try:
        if topology == "sentinel":
            sentinels, service, rest = _split_sentinels(rest)
        options = _options(transport, topology, rest)
    except _WrongError as error:
        raise _invalid(url, str(error)) from None
    except ValueError as error:
        raise _invalid(url, _foreign_reason(error)) from None
    _check_options(url, topology, options)
    return _Location(topology, {**_DEFAULTS, **options}, sentinels, service)


class _WrongError(ValueError):
    """What is wrong with a URL, in our words."""


def _foreign_reason(error: ValueError) -> str:
    """The same in ours, where urllib or redis-py has found it: they show pieces, which may be those of a password."""
    if "Port" in str(error):
        return "the port is no number"
    option = re.fullmatch(r"Invalid value for ('\w+') in connection URL\.", str(error))
    return f"the value of {option[1]} cannot be read" if option else "it cannot be taken apart"


def _options(transport: str, topology: str, rest: str) -> dict[str, Any]:
    """What redis-py's clients are to be given; raises ``_WrongError`` that says what is."""
    parts = urlsplit(f"{transport}://{rest}")
    if "@" in parts.query + parts.fragment or ("@" in parts.path and transport != "unix"):
        raise _WrongError("special characters of a user or a password have to be percent-encoded")
    options: dict[str, Any] = dict(redis.connection.parse_url(f"{transport}://{rest}"))
    if transport == "unix" and not options.get("path"):
        raise _WrongError("the path of a socket is missing")
    if transport != "unix" and not re.fullmatch(r"(/-?\d*)?/?", parts.path):
        raise _WrongError(f"a database is a number, not {parts.path.strip('/')!r}")
    if options.get("db", 0) < 0:
        raise _WrongError("a database is a number of 0 or more")
    _check_host(options.get("host", ""))
    if topology == "cluster":
        if options.pop("db", 0) != 0:
            raise _WrongError("a cluster has no databases")
        if "host" not in options:
            raise _WrongError("a cluster wants the host of one of its nodes")
    if options.pop("connection_class", None) is redis.SSLConnection:
        options["ssl"] = True
    return options


def _split_sentinels(rest: str) -> tuple[list[tuple[str, int]], str, str]:
    """Hosts, service, and what is left of the URL for the servers that the sentinels will name."""
    match = re.fullmatch(r"(?:([^@/?]*)@)?([^@/?]+)/([^/?]+)(?:/(\d+))?/?(\?.*)?", rest)
    if match is None:
        raise _WrongError("Sentinel wants hosts and a service")
    credentials, hosts, service, database, query = match.groups()
    sentinels: list[tuple[str, int]] = []
    for host in hosts.split(","):
        parts = urlsplit(f"//{host}")
        if not parts.hostname:
            raise _WrongError("the name of a host is missing")  # what stands in its place may be a piece of a password
        _check_host(parts.hostname)
        sentinels.append((parts.hostname, parts.port or 26_379))
    return sentinels, service, f"{credentials + '@' if credentials else ''}/{database or 0}{query or ''}"


def _check_options(url: str, topology: str, options: Mapping[str, Any]) -> None:
    """Refuse what redis-py would stumble over only when it connects, or take for something else."""
    for name in ("socket_timeout", "socket_connect_timeout", "timeout", "max_connections"):
        if not 0 < options.get(name, 1) < float("inf"):
            raise _invalid(url, f"{name} must be above 0")
    for name in _NO_TEXT:
        if name in options:
            raise _invalid(url, f"{name} cannot be given in a URL")
    connection: Any = redis.SSLConnection if options.get("ssl") else redis.Connection
    own: set[str] = {"ssl", "max_connections"}
    if "path" in options:
        connection = redis.UnixDomainSocketConnection
    if topology == "sentinel":
        own.update(_SENTINEL_OPTIONS)
    elif not topology:
        own.update(_POOL_DEFAULTS)
    with _refusals(url):
        connection(**{name: value for name, value in options.items() if name not in own})
        if topology == "cluster":
            redis.asyncio.RedisCluster(**options)  # which knows fewer of them


@contextmanager
def _refusals(url: str) -> Generator[None]:
    """Let whatever redis-py stumbles over, in whatever way, be an error of ours."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise _invalid(url, _unknown_option(url, error) or str(error)) from None


def _check_host(name: str) -> None:
    """Refuse what no resolver is asked for: it would be an error of the connection, and none of redis-py's."""
    try:
        name.encode("idna")
    except UnicodeError:
        raise _WrongError("the host is no name of one") from None
    if "\0" in name:
        raise _WrongError("the host is no name of one")


def _unknown_option(url: str, error: Exception) -> str | None:
    """What is no option, unless it stands where only a piece of a password can."""
    name = re.search(r"unexpected keyword argument '(.*)'", str(error))
    if name is None:
        return None
    return f"{name[1]} is no option here" if name[1] in _without_secrets(url) else "it has an option that is none"


def _without_secrets(url: str) -> str:
    # To the last @ and to the end, since a password may hold what a URL may not.
    shown = re.sub(r"(?i)(password=).*", r"\1***", url, flags=re.DOTALL)
    return re.sub(r"(?<=://).*@", "***@", shown, flags=re.DOTALL)


def _invalid(url: str, reason: str) -> InvalidConfigurationError:
    return InvalidConfigurationError(f"the URL {brief(_without_secrets(url))} names no store: {reason[:300]}", "url")
