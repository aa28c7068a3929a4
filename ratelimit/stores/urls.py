"""Make stores from URLs.

A client made here gives up on a silent server after a second, and leaves repeating to the store. The query of the URL
sets options of the client by redis-py's names: ``redis://host?socket_timeout=0.2&max_connections=200``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
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

from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief
from ratelimit.stores.memory import AsyncMemoryStore, MemoryStore
from ratelimit.stores.protocol import AsyncStore, Store
from ratelimit.stores.redis.async_cluster import AsyncClusterChannel
from ratelimit.stores.redis.async_pool import AsyncPoolChannel
from ratelimit.stores.redis.channel import BytesPacker
from ratelimit.stores.redis.circuit import CircuitBreaker
from ratelimit.stores.redis.clients import cluster_at, place
from ratelimit.stores.redis.cluster import ClusterChannel
from ratelimit.stores.redis.cluster_clients import AsyncCluster, SyncCluster
from ratelimit.stores.redis.pool import PoolChannel
from ratelimit.stores.redis.store import AsyncRedisStore, RedisStore

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
_OTHER_NAMES: Final = {"redis+unix": "unix", "redis+socket": "unix", "sentinel": "redis+sentinel"}
_LONGEST_HOST: Final = 253  # characters of a name of the DNS

_TIMEOUTS: Final = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
_DEFAULTS: Final[dict[str, Any]] = {**_TIMEOUTS, "socket_keepalive": True}
# More threads than connections wait for their turn.
_POOL_DEFAULTS: Final[dict[str, Any]] = {"max_connections": 100, "timeout": 5.0}
# A node that is missing does not harm the slots of other nodes.
_CLUSTER_DEFAULTS: Final[dict[str, Any]] = {"require_full_coverage": False}
_CLUSTER_OPTION: Final = "dynamic_startup_nodes"
_BREAKER: Final = CircuitBreaker()
# Options of redis-py that are objects, or that would change how states are read.
_NO_TEXT: Final = (
    *("retry", "retry_on_error", "credential_provider", "redis_connect_func", "command_packer", "event_dispatcher"),
    *("parser_class", "encoder_class", "encoding", "encoding_errors", "socket_type", "socket_keepalive_options"),
    *("maint_notifications_config", "driver_info"),
)
_BOOLEANS: Final = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_SENTINEL_OPTIONS: Final = {"sentinel_username": "username", "sentinel_password": "password"}
_NOT_ENCODED: Final = "special characters of a user or a password must be percent-encoded"


def default_url() -> str:
    """Return the default URL: the variable ``RATELIMIT_URL`` if it is set, otherwise that of a local Redis."""
    return os.environ.get(URL_VARIABLE) or DEFAULT_URL


def store_from_url(url: str) -> Store:
    """Return the store that a URL names, which owns its connections. Nothing is sent yet.

    :raises InvalidConfigurationError: for a URL that is not valid.
    """
    location = _parsed(url)
    if location.topology == "memory":
        return MemoryStore()
    options: dict[str, Any] = {"retry": redis.retry.Retry(NoBackoff(), 0), **location.options}
    if location.topology == "cluster":
        server = cluster_at(place(options["host"], options.get("port", 6379)))
        connect = partial(SyncCluster, **options)
        channel = ClusterChannel(connect, _given(options), server=server, breaker=_BREAKER, owned=True)
        return RedisStore.over(channel)
    with _refusals(url):
        clients = _clients(redis, location, {"command_packer": BytesPacker(), **options})
    return RedisStore.over(PoolChannel(*clients, breaker=_BREAKER, owned=True))


def async_store_from_url(url: str) -> AsyncStore:
    """Return the asyncio store that a URL names, which owns its connections. Nothing is sent yet.

    :raises InvalidConfigurationError: for a URL that is not valid.
    """
    location = _parsed(url)
    if location.topology == "memory":
        return AsyncMemoryStore()
    options: dict[str, Any] = {"retry": redis.asyncio.retry.Retry(NoBackoff(), 0), **location.options}
    if location.topology == "cluster":
        client = AsyncCluster(**options)
        return AsyncRedisStore.over(AsyncClusterChannel(client, _given(options), breaker=_BREAKER, owned=True))
    with _refusals(url):
        clients = _clients(redis.asyncio, location, options)
    return AsyncRedisStore.over(AsyncPoolChannel(*clients, breaker=_BREAKER, owned=True))


def _given(options: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(options["host"], options.get("port", 6379))]


class _Location(NamedTuple):
    """The parts of a URL: options as redis-py's clients name them, and what only Sentinel needs."""

    topology: str
    options: dict[str, Any]
    sentinels: list[tuple[str, int]]
    service: str


def _clients(api: ModuleType, location: _Location, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return a client over a pool, and its sentinels.

    :param api: ``redis`` or ``redis.asyncio``, which use the same names.
    """
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
        raise InvalidConfigurationError(f"url must be a str; got {type(url).__name__}", "url")
    scheme, separator, rest = url.partition("://")
    transport, _, topology = scheme.lower().partition("+")
    if url.lower() == "memory://":
        return _Location("memory", {}, [], "")
    if scheme.lower() not in _SCHEMES or not separator:
        raise _invalid(url, _scheme_reason(scheme.lower() if separator else "", url))
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
    defaults = {**_DEFAULTS, **_CLUSTER_DEFAULTS} if topology == "cluster" else _DEFAULTS
    return _Location(topology, {**defaults, **options}, sentinels, service)


class _WrongError(ValueError):
    """What is wrong with a URL, in words of this library."""


def _foreign_reason(error: ValueError) -> str:
    """Say in words of this library what urllib or redis-py has found; theirs may show parts of a password."""
    option = re.fullmatch(r"Invalid value for ('\w+') in connection URL\.", str(error))
    return f"the value of {option[1]} cannot be read" if option else "it cannot be taken apart"


def _options(transport: str, topology: str, rest: str) -> dict[str, Any]:
    """Return the options for redis-py's clients.

    :raises _WrongError: for parts of a URL that are not valid.
    """
    place, path, behind = re.fullmatch(r"([^/?#]*)([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    if "@" in behind or ("@" in path and transport != "unix"):
        raise _WrongError(_NOT_ENCODED)
    _check_place(place.rpartition("@")[2].strip(), hidden="@" not in place)
    parts = urlsplit(f"{transport}://{rest}")
    options: dict[str, Any] = dict(redis.connection.parse_url(f"{transport}://{rest}"))
    if transport == "unix" and not options.get("path"):
        raise _WrongError("the path of a socket is missing")
    if transport != "unix" and not re.fullmatch(r"(/\d*)?/?", parts.path):
        raise _WrongError(f"the database must be a number of 0 or more; got {brief(parts.path.strip('/'))}")
    if options.get("db", 0) < 0:
        raise _WrongError(f"the database must be a number of 0 or more; got {options['db']}")
    _check_host(options.get("host", ""))
    if topology == "cluster":
        if options.pop("db", 0) != 0:
            raise _WrongError("a cluster has no databases")
        if "host" not in options:
            raise _WrongError("a cluster needs the host of one of its nodes")
        if _CLUSTER_OPTION in options:
            options[_CLUSTER_OPTION] = _yes_or_no(_CLUSTER_OPTION, options[_CLUSTER_OPTION])
    if options.pop("connection_class", None) is redis.SSLConnection:
        options["ssl"] = True
    return options


def _yes_or_no(option: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise _WrongError(f"{option} must be yes or no; got {brief(text)}")
    return _BOOLEANS[text.lower()]


def _split_sentinels(rest: str) -> tuple[list[tuple[str, int]], str, str]:
    """Return hosts, service, and the rest of the URL, which is about the servers that the sentinels will name."""
    match = re.fullmatch(r"(?:([^@/?]*)@)?([^@/?]+)/([^/?]+)(?:/(\d+))?/?(\?.*)?", rest)
    if match is None:
        raise _WrongError("Sentinel needs hosts and a service, as in redis+sentinel://host:26379/service")
    credentials, hosts, service, database, query = match.groups()
    if "@" in service:
        raise _WrongError(_NOT_ENCODED)
    sentinels: list[tuple[str, int]] = []
    for host in hosts.split(","):
        _check_place(host, hidden=credentials is None)
        parts = urlsplit(f"//{host}")
        if not parts.hostname:
            # What stands in its place is not shown, since it may be a part of a password.
            raise _WrongError("the name of a host is missing")
        _check_host(parts.hostname)
        sentinels.append((parts.hostname, parts.port or 26_379))
    return sentinels, service, f"{credentials + '@' if credentials else ''}/{database or 0}{query or ''}"


def _check_options(url: str, topology: str, options: Mapping[str, Any]) -> None:
    """Refuse options that redis-py would refuse only when it connects, or would misunderstand."""
    for name in ("socket_timeout", "socket_connect_timeout", "timeout", "max_connections"):
        if not 0 < options.get(name, 1) < float("inf"):
            raise _invalid(url, f"{name} must be a finite number above 0; got {options[name]!r}")
    for name in _NO_TEXT:
        if name in options:
            raise _invalid(url, f"{name} cannot be given in a URL")
    connection: Any = redis.SSLConnection if options.get("ssl") else redis.Connection
    own: set[str] = {"ssl", "max_connections"}
    if "path" in options:
        connection = redis.UnixDomainSocketConnection
    if topology == "sentinel":
        own.update(_SENTINEL_OPTIONS)
    elif topology == "cluster":
        own.add(_CLUSTER_OPTION)
    else:
        own.update(_POOL_DEFAULTS)
    with _refusals(url):
        connection(**{name: value for name, value in options.items() if name not in own})
        if topology == "cluster":
            # The client for asyncio knows fewer options.
            _ = redis.asyncio.RedisCluster(**options)


@contextmanager
def _refusals(url: str) -> Generator[None]:
    """Raise whatever redis-py raises as an error of this library."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        raise _invalid(url, _unknown_option(url, error) or str(error)) from None


def _scheme_reason(scheme: str, url: str) -> str:
    """Say what is wrong with a scheme, which may be empty, and which scheme may be meant."""
    if scheme == "memory":
        return "memory:// must stand alone"
    known = ("memory", *_SCHEMES)
    if not re.fullmatch(r"[a-z0-9+.-]{1,40}", scheme):
        begun = re.match(r"[a-z+]{0,40}", url.lower())
        if begun and begun[0] in known:
            return f"{begun[0]} must be followed by ://"
        return f"it must begin with a scheme: use one of {', '.join(FORMS)}"
    meant = get_close_matches(_OTHER_NAMES.get(scheme, scheme).replace("valkey", "redis"), known, 1, 0.8)
    hint = f"; did you mean {meant[0]}://?" if meant else ""
    return f"the scheme must be one of {', '.join(known)}; got {scheme!r}{hint}"


def _check_place(place: str, *, hidden: bool) -> None:
    """Refuse a host or a port that is not valid, and say which of them.

    :param hidden: whether the port may be a password: in ``redis://user:password`` the host was forgotten.
    """
    match = re.fullmatch(r"(?:\[[^\[\]]*\]|[^:\[\]\s]*)(?::([^:\[\]]*))?", place)
    if match is None:
        raise _WrongError("the host must be a name or an address, one of IPv6 in brackets, as in redis://[::1]:6379")
    port = match[1]
    if port and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65_535):
        secret = hidden and re.search("[^0-9]", port)
        got = "text, which is hidden because it may be a password" if secret else brief(port)
        raise _WrongError(f"the port must be a number from 1 to 65535; got {got}")


def _check_host(name: str) -> None:
    """Refuse names that cannot be asked of a resolver; connecting would fail with an error other than redis-py's."""
    if not _is_host(name):
        raise _WrongError(f"the host must be a name of at most {_LONGEST_HOST} characters, or an address")


def _is_host(name: str) -> bool:
    # The time that encode takes grows by the square of the length.
    if len(name) > _LONGEST_HOST or "\0" in name:
        return False
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return True


def _unknown_option(url: str, error: Exception) -> str | None:
    """Say which option redis-py does not know, unless its name may be a part of a password."""
    name = re.search(r"unexpected keyword argument '(.*)'", str(error))
    if name is None:
        return None
    shown = name[1] in without_secrets(url)
    return f"{brief(name[1])} is not a valid option here" if shown else "it has an option that is not valid"


def without_secrets(url: str) -> str:
    """Return a URL for a message, with stars for user, password, and whatever may be a part of them."""
    # A password may hold what a URL may not. So everything up to the last @, and after "password=", counts as one.
    named = re.search(r"(?i)password=", url)
    shown = f"{url[: named.end()]}***" if named else url
    scheme = re.match(r"(?:[A-Za-z0-9+.-]{1,40}://)?", shown)[0]  # type: ignore[index]
    _, at, place = shown[len(scheme) :].rpartition("@")
    if not at:
        # A host that is forgotten leaves the password where the port should be.
        return scheme + re.sub(r"\A([^:/?#\[]*:)(?![0-9:]*(?:[/?#,]|\Z)).*", r"\1***", place, flags=re.DOTALL)
    return f"{scheme}***@{place}"


def _invalid(url: str, reason: str) -> InvalidConfigurationError:
    return InvalidConfigurationError(f"the URL {brief(without_secrets(url))} is not valid: {reason[:300]}", "url")
