"""Keys: whose bucket a request draws on.

A key is a callable that is given the request and answers with text or bytes, or with None where the request has no such
key. The ready-made ones are frozen values: two that are defined alike are equal, and print how they are made.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Final, TypeAlias
from uuid import UUID

from ratelimit.checks import refusal, whole_number
from ratelimit.errors import InvalidArgumentError, InvalidConfigurationError
from ratelimit.integrations.http import address
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.keys import Key, brief
from ratelimit.policy.callables import name_of
from ratelimit.policy.managers import bucket_key

RequestKey: TypeAlias = Callable[[HttpRequest], Key | Awaitable[Key | None] | None]
"""Whose bucket a request draws on; None: the request has no such key. May be ``async`` where the limiter is."""

_LONGEST: Final = 128  # characters of a client's text that are kept as they are
_FEWEST_SECRET_BYTES: Final = 16
_HASH_BYTES: Final = 16
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110
_METHODS: Final = frozenset(
    ["CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"],
)
_READERS: Final = {"x-forwarded-for": address.x_forwarded_for, "forwarded": address.forwarded}

_logger = logging.getLogger("ratelimit")
_warned_of_proxy: list[bool] = []


@dataclass(frozen=True, slots=True, repr=False)
class ClientIp:
    """See :func:`client_ip`, which makes it."""

    name: ClassVar[str] = "ip"

    trusted_proxies: tuple[address.Network, ...]
    hops: int | None
    header: str
    ipv6_prefix: int
    ipv4_prefix: int

    def __call__(self, request: HttpRequest) -> str | None:
        peer = (request.peer or "").strip()
        client = address.parse(peer)
        if self.hops:
            client = address.nth(self._listed(request), self.hops) or client
        elif client is not None:
            if self.trusted_proxies:
                client = address.first_untrusted(client, self._listed(request), self.trusted_proxies)
            elif not _warned_of_proxy and _is_of_proxy(peer):
                _warn_of_proxy(request, peer)
        if client is None:
            return _bounded(peer) if peer else None
        return address.cut(address.unwrapped(client), self.ipv4_prefix, self.ipv6_prefix)

    def _listed(self, request: HttpRequest) -> address.Hops:
        read = _READERS.get(self.header, address.single)
        return read(request.header(self.header) or "")

    def __repr__(self) -> str:
        arguments: list[tuple[str, object, object]] = [
            ("trusted_proxies", [str(network) for network in self.trusted_proxies], []),
            ("hops", self.hops, None),
            ("header", self.header, "x-forwarded-for"),
            ("ipv6_prefix", self.ipv6_prefix, 64),
            ("ipv4_prefix", self.ipv4_prefix, 32),
        ]
        shown = [f"{name}={value!r}" for name, value, default in arguments if value != default]
        return f"client_ip({', '.join(shown)})"


def client_ip(
    *,
    trusted_proxies: Collection[str] = (),
    hops: int | None = None,
    header: str = "x-forwarded-for",
    ipv6_prefix: int = 64,
    ipv4_prefix: int = 32,
) -> ClientIp:
    """Return the key of the client's address: ``203.0.113.7``, ``2001:db8:1:2::/64``.

    By default that is the peer, and headers, which anybody can send, are not looked at. Behind proxies, say which ones
    are yours by ``trusted_proxies`` or ``hops``. If their header lists something that is not an address, or has too few
    entries, the peer counts.

    IPv4-mapped, NAT64 and 6to4 addresses count as the IPv4 address in them. If the peer is not an
    address, its text is the key. A request over a Unix socket has no peer, and so it has no key.

    :param trusted_proxies: addresses and networks of your proxies: ``["10.0.0.0/8", "2001:db8::1"]``. As long as the
        peer is one of them, the header is read from the right to the first address that is not; where all are, the
        leftmost counts. At most 100 entries are read.
    :param hops: how many proxies of yours there are, each of which appends the address that has connected to it; 0 to
        100. The last of them is the peer, and the client is the entry of this number from the right: with 2, the first
        address in ``203.0.113.7, 198.51.100.1``. A client that can bypass the proxies chooses its key. 0: the
        peer.
    :param header: the one that your proxies write: ``x-forwarded-for``, ``forwarded``, or one that holds nothing but
        the address of the client, like ``cf-connecting-ip``, ``x-real-ip`` and ``fastly-client-ip``. Such a header is
        believed from trusted proxies only, so that it needs ``trusted_proxies``, or ``hops=1``.
    :param ipv6_prefix: 1 to 128. One subscriber has a whole /64, or more of them.
    :param ipv4_prefix: 1 to 32.
    :raises InvalidConfigurationError: for values outside these ranges, for ``trusted_proxies`` and ``hops`` together,
        for a network of all addresses, and for a header with a single address without either.
    """
    networks = _networks(trusted_proxies)
    if hops is not None:
        whole_number(hops, "hops", least=0, most=address.MOST_HOPS, error=InvalidConfigurationError)
        if networks:
            raise InvalidConfigurationError("trusted_proxies and hops do not go together", "hops")
    _check_token("header", header)
    lower = header.lower()
    if lower not in _READERS and not networks and hops != 1:
        raise InvalidConfigurationError(
            f"header={lower!r} must come with trusted_proxies, the addresses of the proxies that set it, or hops=1",
            "header",
        )
    whole_number(ipv6_prefix, "ipv6_prefix", least=1, most=128, error=InvalidConfigurationError)
    whole_number(ipv4_prefix, "ipv4_prefix", least=1, most=32, error=InvalidConfigurationError)
    return ClientIp(networks, hops or None, lower, ipv6_prefix, ipv4_prefix)


@lru_cache(maxsize=1024)
def _is_of_proxy(peer: str) -> bool:
    """Return whether a peer has an address that no client on the internet has: a proxy of one's own, most likely."""
    parsed = address.parse(peer)
    return parsed is not None and (parsed.is_loopback or parsed.is_private)


def _warn_of_proxy(request: HttpRequest, peer: str) -> None:
    """Warn, once in each process, if all clients seem to be counted as one: the proxy that they come through.

    If the header lists the peer, that is not a proxy: the server has already put the client in its place.
    """
    header = next((name for name in _READERS if request.header(name)), None)
    if header is None or address.parse(peer) in _READERS[header](request.header(header) or ""):
        return
    _warned_of_proxy.append(True)
    _logger.warning(
        "a request from %s has the header %s, so that there seems to be a proxy at this address, and all of its clients"
        " share one bucket; say which proxies are yours: key=client_ip(trusted_proxies=[%r])",
        peer,
        header,
        peer,
    )


def _networks(texts: Collection[str]) -> tuple[address.Network, ...]:
    """Return the networks in one order, so that equal ones compare equal."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Collection):
        raise refusal("trusted_proxies", "a list of addresses and networks", texts, InvalidConfigurationError)
    return tuple(sorted({_network(text) for text in texts}, key=str))


def _network(text: str) -> address.Network:
    wanted = "trusted_proxies must be addresses or networks like 10.0.0.0/8"
    if not isinstance(text, str):
        raise InvalidConfigurationError(f"{wanted}; got {brief(text)}", "trusted_proxies")
    try:
        network = address.parse_network(text)
    except ValueError as error:
        raise InvalidConfigurationError(f"{wanted}: {brief(str(error))}", "trusted_proxies") from None
    if network.prefixlen == 0:
        raise InvalidConfigurationError(
            f"{wanted}; with {text} every client would choose its key (hops=1 is for a proxy of unknown address)",
            "trusted_proxies",
        )
    return network


@dataclass(frozen=True, slots=True, repr=False)
class ApiKey:
    """See :func:`api_key`, which makes it."""

    name: ClassVar[str] = "api-key"

    header: str
    scheme: str | None
    secret: bytes

    def __call__(self, request: HttpRequest) -> str | None:
        value, _, _ = (request.header(self.header) or "").lstrip(", \t").partition(",")
        if self.scheme is not None:
            scheme, *rest = value.split(None, 1) or [""]
            value = rest[0] if rest and scheme.lower() == self.scheme else ""
        value = value.strip()
        return self.hashed(value) if value else None

    def hashed(self, value: str) -> str:
        """Return what an API key is stored and looked up by: 32 hexadecimal digits."""
        return keyed_hash(self.secret, value.encode("utf-8", "surrogatepass"))

    def __repr__(self) -> str:
        scheme = "" if self.scheme is None else f", scheme={self.scheme!r}"
        return f"api_key({self.header!r}, secret=...{scheme})"


def api_key(header: str | None = None, *, secret: str | bytes, scheme: str | None = None) -> ApiKey:
    """Return the key of the API key in a header, which is stored as a keyed hash only (HMAC-SHA-256, 128 bits).

    This library does not know which API keys exist. Let the application refuse all others, or a client can invent a
    new key, with a new bucket, for each request. A key ends at a comma, because several headers of one name come joined
    by commas, and the application may look at the first only.

    :param header: its name; by default ``x-api-key``, and ``authorization`` with a scheme.
    :param secret: at least 16 bytes, the same in all processes. A new secret makes all buckets new.
    :param scheme: what stands before the key: ``Bearer`` for ``Authorization: Bearer <key>``, in upper or lower case. A
        request with another scheme has no such key.
    :raises InvalidConfigurationError: for a secret that is too short, or a header or scheme that is not valid.
    """
    if header is None:
        header = "x-api-key" if scheme is None else "authorization"
    _check_token("header", header)
    if scheme is not None:
        _check_token("scheme", scheme)
    return ApiKey(header.lower(), None if scheme is None else scheme.lower(), checked_secret(secret))


def checked_secret(secret: str | bytes) -> bytes:
    """Check the secret of a keyed hash.

    :raises InvalidConfigurationError: for one that is too short, without showing it.
    """
    raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
    if not isinstance(raw, bytes) or len(raw) < _FEWEST_SECRET_BYTES:
        raise InvalidConfigurationError(
            f"secret must be of at least {_FEWEST_SECRET_BYTES} bytes, as a str or bytes", "secret"
        )
    return raw


def keyed_hash(secret: bytes, value: bytes) -> str:
    """Return what is stored in place of a secret value: 32 hexadecimal digits of its HMAC-SHA-256."""
    return hmac.digest(secret, value, "sha256")[:_HASH_BYTES].hex()


@dataclass(frozen=True, slots=True, repr=False)
class User:
    """See :func:`user`, which makes it."""

    name: ClassVar[str] = "user"

    find: Callable[[Any], object] | None

    def __call__(self, request: HttpRequest) -> str | Awaitable[str | None] | None:
        found = request.find_user() if self.find is None else self.find(request.native)
        return _id_later(found) if isinstance(found, Awaitable) else _id(found)

    def __repr__(self) -> str:
        return "user()" if self.find is None else f"user({self.find!r})"


def user(find: Callable[[Any], object] | None = None) -> User:
    """Return the key of the user that has logged in; an anonymous request has no such key.

    The id is a str, an int or a UUID, and counts as its text: 1 and "1" are one user, whose id may be a number in a
    session and the same number as text in a token. Where numbers and names are different users, let ``find`` write
    them differently (``f"id:{user.id}"``).

    :param find: is given the framework's own request and answers with the id, or None for nobody; may be ``async``.
        None: as the framework knows it.
    :raises InvalidConfigurationError: for what is not a callable. The key raises ``InvalidArgumentError`` for an id
        of another type, whose text may be a new one for each request.
    """
    if find is not None and not callable(find):
        raise refusal("find", "a callable", find, InvalidConfigurationError)
    return User(find)


def _id(found: object) -> str | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, str | int | UUID):
        raise InvalidArgumentError(
            f"the id of a user must be a str, an int or a UUID; got one of type {type(found).__name__}:"
            " let user(find) answer with an id"
        )
    text = str(found)
    return text if text.strip() else None


async def _id_later(found: Awaitable[object]) -> str | None:
    return _id(await found)


@dataclass(frozen=True, slots=True, repr=False)
class Route:
    """See :func:`route`, which makes it."""

    name: ClassVar[str] = "route"

    def __call__(self, request: HttpRequest) -> str | None:
        return request.find_route() or None

    def __repr__(self) -> str:
        return "route()"


def route() -> Route:
    """Return the key of the route, which is its template: ``/users/{id}``, whatever the method.

    A request whose route is not known has no such key. The path never replaces it: clients could vary it endlessly.
    """
    return Route()


@dataclass(frozen=True, slots=True, repr=False)
class Method:
    """See :func:`method`, which makes it."""

    name: ClassVar[str] = "method"

    def __call__(self, request: HttpRequest) -> str:
        if request.method == "HEAD":
            return "GET"
        return request.method if request.method in _METHODS else "OTHER"

    def __repr__(self) -> str:
        return "method()"


def method() -> Method:
    """Return the key of the method: ``GET``.

    HEAD counts as GET, which routers send to the same place. All methods that are not standard are ``OTHER``, because
    clients can invent them.
    """
    return Method()


@dataclass(frozen=True, slots=True, repr=False)
class Header:
    """See :func:`header`, which makes it."""

    header: str

    @property
    def name(self) -> str:
        return f"header:{self.header}"

    def __call__(self, request: HttpRequest) -> str | None:
        value = (request.header(self.header) or "").strip()
        return _bounded(value) if value else None

    def __repr__(self) -> str:
        return f"header({self.header!r})"


def header(name: str) -> Header:
    """Return the key of a header, which is its value, or a hash of a value that is longer than 128 characters.

    A request in which it is missing or empty has no such key.

    A client chooses its headers, and may choose others for each request. Take only a header that something in front of
    the application sets, after removing it from what clients send.

    :raises InvalidConfigurationError: for what is not the name of a header.
    """
    _check_token("name", name)
    return Header(name.lower())


@dataclass(frozen=True, slots=True, repr=False)
class Combined:
    """See :func:`combined`, which makes it."""

    keys: tuple[RequestKey, ...]

    @property
    def name(self) -> str:
        return "+".join(map(name_of, self.keys))

    def __call__(self, request: HttpRequest) -> Key | Awaitable[Key | None] | None:
        parts: list[Key] = []
        for key in self.keys:
            part = key(request)
            if isinstance(part, Awaitable):
                return self._rest(request, parts, part)
            if part is None:
                return None
            parts.append(_checked(key, part))
        return joined(parts)

    async def _rest(self, request: HttpRequest, parts: list[Key], awaited: Awaitable[Key | None]) -> Key | None:
        """Await a part before the next key is called, so that no coroutine is ever left without being awaited."""
        part = await awaited
        while part is not None:
            parts.append(_checked(self.keys[len(parts)], part))
            if len(parts) == len(self.keys):
                return joined(parts)
            answer = self.keys[len(parts)](request)
            part = await answer if isinstance(answer, Awaitable) else answer
        return None

    def __repr__(self) -> str:
        return f"combined({', '.join(map(repr, self.keys))})"


def combined(*keys: RequestKey) -> Combined:
    """Return several keys as one: ``203.0.113.7|/users/{id}``. It is missing if one of them is missing.

    Different parts never give the same text: a ``|`` and a backslash within a part have a backslash before them. If
    a part is awaited, so is the whole; if a part is bytes, so is the whole.

    :raises InvalidConfigurationError: without a key, or for what is not a callable. The key raises
        ``InvalidArgumentError`` where a part is neither text nor bytes.
    """
    return Combined(_checked_keys("combined", keys))


@dataclass(frozen=True, slots=True, repr=False)
class FirstOf:
    """The key that :func:`first_of` makes."""

    keys: tuple[RequestKey, ...]

    @property
    def name(self) -> str:
        return " or ".join(map(name_of, self.keys))

    def __call__(self, request: HttpRequest) -> Key | Awaitable[Key | None] | None:
        for place, key in enumerate(self.keys):
            found = key(request)
            if isinstance(found, Awaitable):
                return self._rest(request, place, found)
            if found is not None:
                return self._named(place, found)
        return None

    async def _rest(self, request: HttpRequest, place: int, awaited: Awaitable[Key | None]) -> Key | None:
        found = await awaited
        while found is None:
            place += 1
            if place == len(self.keys):
                return None
            answer = self.keys[place](request)
            found = await answer if isinstance(answer, Awaitable) else answer
        return self._named(place, found)

    def _named(self, place: int, found: object) -> Key:
        """Return the key with its name before it: the user 203.0.113.7 is not the address."""
        names = [name_of(key) for key in self.keys]
        own = names[place]
        name = own if names.count(own) == 1 else f"{own} {place}"
        return bucket_key((name,), _checked(self.keys[place], found))

    def __repr__(self) -> str:
        return f"first_of({', '.join(map(repr, self.keys))})"


def first_of(*keys: RequestKey) -> FirstOf:
    """Return a key that is the first of these that a request has: ``first_of(user(), client_ip())``.

    The answer says which one it is, ``user:42`` or ``ip:203.0.113.7``, so that different keys never give the same text.
    It is missing if all of them are missing. If one is awaited, so is the whole.

    :raises InvalidConfigurationError: without a key, or for what is not a callable. The key raises
        ``InvalidArgumentError`` where one answers with neither text nor bytes.
    """
    return FirstOf(_checked_keys("first_of", keys))


def _checked_keys(function: str, keys: tuple[RequestKey, ...]) -> tuple[RequestKey, ...]:
    if not keys:
        raise InvalidConfigurationError(f"{function} must be given at least one key", "keys")
    for key in keys:
        if not callable(key):
            raise InvalidConfigurationError(f"keys must be callables; got {brief(key)}", "keys")
    return keys


def _checked(key: RequestKey, part: object) -> Key:
    if not isinstance(part, str | bytes):
        raise InvalidArgumentError(
            f"the answer of the key {brief(name_of(key))} must be a str, bytes or None; got {brief(part)}"
        )
    return part


def joined(parts: list[Key]) -> Key:
    """Return several keys as one, with a backslash before each ``|`` and backslash within a part."""
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        return "|".join(text.replace("\\", "\\\\").replace("|", "\\|") for text in texts)
    raw = [part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part for part in parts]
    return b"|".join(part.replace(b"\\", b"\\\\").replace(b"|", b"\\|") for part in raw)


def _bounded(text: str) -> str:
    """Return text that a stranger has chosen: as it is if it is short and has a form in UTF-8, else as a hash."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(text) <= _LONGEST and (text.isascii() or raw == text.encode("utf-8", "replace")):
        return text
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


def _check_token(name: str, value: object) -> None:
    if not isinstance(value, str) or not _TOKEN.fullmatch(value):
        raise refusal(name, "a token as HTTP defines it", value, InvalidConfigurationError)
