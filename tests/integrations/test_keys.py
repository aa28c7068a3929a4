"""Keys: whose bucket a request draws on, and what a client can and can not do about it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import pickle
from collections.abc import Awaitable, Callable
from dataclasses import FrozenInstanceError
from functools import partial
from inspect import iscoroutine
from ipaddress import IPv4Address, IPv6Address
from typing import Any
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ratelimit import InvalidArgumentError, InvalidConfigurationError, ProxyManager
from ratelimit.integrations.http.address import Address, parse
from ratelimit.integrations.http.keys import (
    RequestKey,
    api_key,
    client_ip,
    combined,
    header,
    method,
    route,
    user,
)
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.keys import Key
from ratelimit.policy.callables import name_of

SECRET = "correct horse battery"
ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))


def request(
    peer: str | None = "203.0.113.7",
    headers: dict[str, str] | None = None,
    *,
    verb: str = "GET",
    template: str | None = None,
    who: object = None,
    native: Any = None,
) -> HttpRequest:
    return HttpRequest(verb, "/users/7", peer, (headers or {}).get, native, lambda: template, lambda: who)


def via(header_value: str, peer: str | None = "10.0.0.1", header: str = "x-forwarded-for") -> HttpRequest:
    return request(peer, {header: header_value})


# the client's address


@pytest.mark.parametrize(
    ("peer", "key"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("64:ff9b::203.0.113.7", "203.0.113.7"),
        ("2002:cb00:7107::1", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        (None, None),
        ("", None),
        ("testclient", "testclient"),
        ("x" * 129, f"sha256:{hashlib.sha256(b'x' * 129).hexdigest()}"),
    ],
)
def test_without_trusted_proxies_the_peer_counts(peer: str | None, key: str | None) -> None:
    headers = {"x-forwarded-for": "6.6.6.6", "forwarded": "for=6.6.6.6"}
    assert client_ip()(request(peer, headers)) == key
    assert client_ip(hops=0)(request(peer, headers)) == key


def test_networks_have_the_length_that_is_wanted() -> None:
    key = client_ip(ipv4_prefix=24, ipv6_prefix=56)
    assert key(request("203.0.113.7")) == "203.0.113.0/24"
    assert key(request("2001:db8:1:2ff::1")) == "2001:db8:1:200::/56"
    assert key(request("::ffff:203.0.113.7")) == "203.0.113.0/24"


@pytest.mark.parametrize(
    ("header", "peer", "key"),
    [
        ("203.0.113.7", "10.0.0.1", "203.0.113.7"),
        ("6.6.6.6, 203.0.113.7, 10.0.0.2", "10.0.0.1", "203.0.113.7"),
        ("203.0.113.7", "::ffff:10.0.0.1", "203.0.113.7"),
        ("2001:db8:1:2::3", "10.0.0.1", "2001:db8:1:2::/64"),
        ("203.0.113.7", "192.0.2.1", "192.0.2.1"),
        ("unknown", "10.0.0.1", "10.0.0.1"),
        ("", "10.0.0.1", "10.0.0.1"),
        ("203.0.113.7", None, None),
        ("203.0.113.7", "unix", "unix"),
        # whoever sends from such an address is not the proxy whose IPv4 address is in it
        ("6.6.6.6", "2002:a00:1::1", "10.0.0.1"),
        ("6.6.6.6, 64:ff9b::10.0.0.1", "10.0.0.2", "10.0.0.1"),
    ],
)
def test_behind_trusted_proxies_the_first_other_address_counts(header: str, peer: str | None, key: str | None) -> None:
    assert client_ip(trusted_proxies=["10.0.0.0/8"])(via(header, peer)) == key


@pytest.mark.parametrize(
    ("hops", "header", "peer", "key"),
    [
        (1, "6.6.6.6, 203.0.113.7", "10.0.0.1", "203.0.113.7"),
        (2, "6.6.6.6, 203.0.113.7, 198.51.100.1", "10.0.0.1", "203.0.113.7"),
        (2, "203.0.113.7", "10.0.0.1", "10.0.0.1"),
        (1, "unknown", "10.0.0.1", "10.0.0.1"),
        (1, "", "10.0.0.1", "10.0.0.1"),
        (1, "203.0.113.7", None, "203.0.113.7"),
        (1, "203.0.113.7", "", "203.0.113.7"),
        (1, "unknown", None, None),
        (1, "unknown", "::ffff:10.0.0.1", "10.0.0.1"),
    ],
)
def test_behind_so_many_proxies_the_entry_before_them_counts(
    hops: int, header: str, peer: str | None, key: str | None
) -> None:
    assert client_ip(hops=hops)(via(header, peer)) == key


def test_the_header_that_the_proxies_do_not_write_is_not_looked_at() -> None:
    headers = {"x-forwarded-for": "198.51.100.1", "forwarded": 'for="[2001:db8::1]:4711";proto=http'}
    assert client_ip(hops=1)(request("10.0.0.1", headers)) == "198.51.100.1"
    assert client_ip(hops=1, header="forwarded")(request("10.0.0.1", headers)) == "2001:db8::/64"
    assert client_ip(hops=1, header="Forwarded")(request("10.0.0.1", headers)) == "2001:db8::/64"
    del headers["forwarded"]
    assert client_ip(hops=1, header="forwarded")(request("10.0.0.1", headers)) == "10.0.0.1"


@pytest.mark.parametrize("hops", [None, 2])
@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded"])
@given(client=ADDRESSES, chosen=st.text(), host=st.text())
def test_a_client_never_changes_its_key_by_what_it_sends(
    hops: int | None, name: Any, client: Address, chosen: str, host: str
) -> None:
    assume(str(parse(str(client))) not in ("198.51.100.1", "10.0.0.1"))  # who is trusted may say what it likes
    key = client_ip(trusted_proxies=[] if hops else ["198.51.100.1", "10.0.0.1"], hops=hops, header=name)
    proxies: list[Address] = [client, IPv4Address("198.51.100.1")]
    if name == "forwarded":
        escaped = host.replace("\\", "\\\\").replace('"', '\\"')
        nodes = [f"[{each}]" if isinstance(each, IPv6Address) else str(each) for each in proxies]
        appended = [f'for="{node}";host="{escaped}"' for node in nodes]
    else:
        appended = [str(each) for each in proxies]
    with_text = key(via(", ".join([chosen, *appended]), header=name))
    assert with_text == key(via(", ".join(appended), header=name)) == client_ip()(request(str(client)))


@given(st.one_of(st.none(), st.text()), st.text(), st.sampled_from([None, 1, 3]))
def test_no_text_is_an_error_and_every_key_can_be_stored(peer: str | None, value: str, hops: int | None) -> None:
    networks = [] if hops else ["10.0.0.0/8", "::/1"]
    names: list[Any] = ["x-forwarded-for", "forwarded"]
    keys: list[RequestKey] = [client_ip(trusted_proxies=networks, hops=hops, header=name) for name in names]
    keys += [header("forwarded"), api_key("forwarded", secret=SECRET)]
    for key in keys:
        found: Any = key(request(peer, {"x-forwarded-for": value, "forwarded": value}))
        assert found is None or len(found.encode()) <= 4 * 128


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"trusted_proxies": "10.0.0.0/8"}, "trusted_proxies"),
        ({"trusted_proxies": 8}, "trusted_proxies"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "trusted_proxies"),
        ({"trusted_proxies": ["nginx"]}, "trusted_proxies"),
        ({"trusted_proxies": ["*"]}, "trusted_proxies"),
        ({"trusted_proxies": [167772161]}, "trusted_proxies"),
        ({"trusted_proxies": ["0.0.0.0/0"]}, "trusted_proxies"),
        ({"trusted_proxies": ["::/0"]}, "trusted_proxies"),
        ({"trusted_proxies": ["::ffff:0:0/96"]}, "trusted_proxies"),
        ({"hops": -1}, "hops"),
        ({"hops": 101}, "hops"),
        ({"hops": True}, "hops"),
        ({"hops": 1.0}, "hops"),
        ({"hops": 1, "trusted_proxies": ["10.0.0.0/8"]}, "hops"),
        ({"header": "x-real-ip"}, "header"),
        ({"header": None}, "header"),
        ({"header": ["forwarded"]}, "header"),
        ({"ipv4_prefix": 0}, "ipv4_prefix"),
        ({"ipv4_prefix": 33}, "ipv4_prefix"),
        ({"ipv6_prefix": 129}, "ipv6_prefix"),
        ({"ipv6_prefix": True}, "ipv6_prefix"),
        ({"ipv6_prefix": "64"}, "ipv6_prefix"),
    ],
)
def test_a_client_ip_that_cannot_be_is_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        client_ip(**arguments)
    assert caught.value.field == field


# API keys


def test_an_api_key_is_stored_as_a_keyed_hash() -> None:
    found = api_key(secret=SECRET)(request(headers={"x-api-key": " k-123 "}))
    assert found == hmac.new(SECRET.encode(), b"k-123", hashlib.sha256).hexdigest()[:32]
    assert found == api_key(secret=SECRET.encode()).hashed("k-123")
    assert found != api_key(secret=SECRET + "!").hashed("k-123")


@pytest.mark.parametrize("value", [None, "", "  ", " , ", "\t"])
def test_an_empty_api_key_is_missing(value: str | None) -> None:
    headers = {} if value is None else {"x-api-key": value, "authorization": f"Bearer {value}"}
    assert api_key(secret=SECRET)(request(headers=headers)) is None
    assert api_key(scheme="Bearer", secret=SECRET)(request(headers=headers)) is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("Bearer k-123", "k-123"),
        ("bearer   k-123 ", "k-123"),
        ("BEARER\tk-123", "k-123"),
        ("Bearer k 123", "k 123"),
        ("Basic k-123", None),
        ("Bearerk-123", None),
        ("Bearer", None),
        ("k-123", None),
        ("", None),
    ],
)
def test_an_api_key_stands_after_its_scheme(value: str, key: str | None) -> None:
    bearer = api_key(scheme="Bearer", secret=SECRET)
    assert bearer(request(headers={"authorization": value})) == (None if key is None else bearer.hashed(key))


@pytest.mark.parametrize("value", ["k-123, other", "k-123,other", ", k-123,,", "k-123,"])
def test_a_client_has_no_other_bucket_by_sending_a_second_header(value: str) -> None:
    key, bearer = api_key(secret=SECRET), api_key(scheme="Bearer", secret=SECRET)
    assert key(request(headers={"x-api-key": value})) == key.hashed("k-123")
    joined = value.replace("k-123", "Bearer k-123").replace("other", "Bearer other")
    assert bearer(request(headers={"authorization": joined})) == key.hashed("k-123")


@pytest.mark.parametrize("secret", ["", "fifteen bytes..", b"fifteen bytes..", 1234567890123456, None, bytearray(16)])
def test_a_weak_secret_is_refused_and_not_shown(secret: Any) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        api_key(secret=secret)
    assert caught.value.field == "secret"
    assert not secret or str(secret) not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_secret_is_never_shown() -> None:
    for key in (api_key(secret=SECRET), combined(api_key(secret=SECRET.encode(), scheme="Bearer"), route())):
        assert SECRET not in f"{key} {key!r} {name_of(key)}"
    assert repr(api_key(secret=SECRET)) == "api_key('x-api-key', secret=...)"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"header": ""}, "header"),
        ({"header": "x api key"}, "header"),
        ({"header": "x-api-key\n"}, "header"),
        ({"header": b"x-api-key"}, "header"),
        ({"scheme": ""}, "scheme"),
        ({"scheme": "Bearer "}, "scheme"),
    ],
)
def test_an_api_key_that_cannot_be_is_refused(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        api_key(**arguments, secret=SECRET)
    assert caught.value.field == field


# users, routes, methods, headers


@pytest.mark.parametrize(
    ("who", "key"),
    [
        (None, None),
        ("", None),
        (" ", None),
        ("alice", "alice"),
        ("1", "1"),
        (1, "1"),
        (0, "0"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_a_user_counts_as_the_text_of_its_id(who: object, key: str | None) -> None:
    assert user()(request(who=who)) == key
    assert user(lambda native: native["id"])(request(native={"id": who}, who="somebody else")) == key


@pytest.mark.parametrize("who", [True, False, 1.5, b"alice", object(), {"id": 1}])
async def test_an_id_whose_text_may_be_a_new_one_each_time_is_refused(who: object) -> None:
    async def find(_: object) -> object:
        return who

    with pytest.raises(InvalidArgumentError, match=type(who).__name__):
        user()(request(who=who))
    with pytest.raises(InvalidArgumentError, match=type(who).__name__):
        await settled(user(find)(request()))


async def test_a_user_may_be_found_by_an_async_function() -> None:
    async def find(native: dict[str, object]) -> object:
        await asyncio.sleep(0)
        return native.get("id")

    assert await settled(user(find)(request(native={"id": 7}))) == "7"
    assert await settled(user(find)(request(native={}))) is None


def test_a_user_is_not_found_by_what_is_no_callable() -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        user("id")  # type: ignore[arg-type]  # that is the point
    assert caught.value.field == "find"


@pytest.mark.parametrize("template", ["/users/{id}", None, ""])
def test_a_route_is_its_template_and_never_the_path(template: str | None) -> None:
    assert route()(request(template=template)) == (template or None)


@pytest.mark.parametrize(("verb", "key"), [("GET", "GET"), ("PATCH", "PATCH"), ("GET2", "OTHER"), ("", "OTHER")])
def test_methods_that_a_client_invents_are_one(verb: str, key: str) -> None:
    assert method()(request(verb=verb)) == key


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (None, None),
        ("", None),
        (" \t", None),
        (" acme ", "acme"),
        ("ümläut", "ümläut"),
        ("a" * 128, "a" * 128),
        ("a" * 129, f"sha256:{hashlib.sha256(b'a' * 129).hexdigest()}"),
        ("\udcff", "sha256:" + hashlib.sha256(b"\xed\xb3\xbf").hexdigest()),
    ],
)
def test_a_header_counts_as_it_is_where_it_is_short(value: str | None, key: str | None) -> None:
    headers = {} if value is None else {"x-tenant": value}
    assert header("X-Tenant")(request(headers=headers)) == key


@pytest.mark.parametrize("name", ["", "a b", "a:", "ä", None, 1])
def test_a_header_that_cannot_be_is_refused(name: Any) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        header(name)
    assert caught.value.field == "name"


# several as one


def given_by(part: Any, *, awaited: bool = False) -> RequestKey:
    async def later(_: HttpRequest) -> Any:
        await asyncio.sleep(0)
        return part

    return later if awaited else lambda _: part


async def settled(answer: Key | Awaitable[Key | None] | None) -> Key | None:
    return await answer if isinstance(answer, Awaitable) else answer


def test_keys_are_combined_so_that_they_can_be_read() -> None:
    key = combined(client_ip(), route(), method())
    assert key(request(template="/users/{id}")) == "203.0.113.7|/users/{id}|GET"
    assert key.name == "ip+route+method"


PARTS = st.one_of(st.text("|\\a", max_size=5), st.text(max_size=5), st.binary(max_size=5))


@given(st.lists(PARTS, min_size=1, max_size=4), st.lists(PARTS, min_size=1, max_size=4))
def test_different_parts_never_give_the_same_key(one: list[Key], other: list[Key]) -> None:
    def stored(parts: list[Key]) -> bytes:
        key: Any = combined(*map(given_by, parts))(request())
        assert isinstance(key, bytes) is any(isinstance(part, bytes) for part in parts)
        return raw(key)

    def raw(key: Key) -> bytes:
        return key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")

    assert (stored(one) == stored(other)) == ([*map(raw, one)] == [*map(raw, other)])


@pytest.mark.parametrize(
    ("one", "other"),
    [(["a|b"], ["a", "b"]), (["a\\", "b"], ["a\\|b"]), (["", ""], [""]), (["\\|"], ["\\\\", ""]), ([b"|"], ["", ""])],
)
def test_no_delimiter_is_mistaken(one: list[Key], other: list[Key]) -> None:
    assert combined(*map(given_by, one))(request()) != combined(*map(given_by, other))(request())


@given(st.lists(st.tuples(st.one_of(st.none(), st.text(max_size=3), st.binary(max_size=3)), st.booleans()), min_size=1))
def test_what_is_awaited_is_combined_like_what_is_not(parts: list[tuple[Key | None, bool]]) -> None:
    mixed = combined(*(given_by(part, awaited=awaited) for part, awaited in parts))(request())
    plain = combined(*(given_by(part) for part, _ in parts))(request())
    assert asyncio.run(settled(mixed)) == plain
    assert (plain is None) == any(part is None for part, _ in parts)


def test_a_combined_key_is_async_where_a_part_is() -> None:
    awaited = combined(client_ip(), combined(given_by("a", awaited=True)), user())(request(who=1))
    assert iscoroutine(awaited)
    assert asyncio.run(awaited) == "203.0.113.7|a|1"
    assert asyncio.run(settled(combined(user(), given_by("a", awaited=True))(request()))) is None
    assert combined(user(), given_by("a", awaited=True))(request()) is None  # and nothing is left to be awaited


async def test_nothing_is_asked_after_a_part_that_is_missing() -> None:
    def never(_: HttpRequest) -> str:
        raise AssertionError

    assert combined(given_by(None), never)(request()) is None
    assert await settled(combined(given_by(None, awaited=True), never)(request())) is None


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("part", [7, True, ["a"], bytearray(b"a")])
async def test_a_part_that_is_no_key_is_refused(part: object, awaited: bool) -> None:
    with pytest.raises(InvalidArgumentError, match=r"<lambda>|later"):
        await settled(combined(route(), given_by(part, awaited=awaited))(request(template="/")))


@pytest.mark.parametrize("keys", [(), (client_ip(), "ip"), (None,)])
def test_a_combination_that_cannot_be_is_refused(keys: Any) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        combined(*keys)
    assert caught.value.field == "keys"


# all of them


def find_id(native: Any) -> object:
    return native.id


MADE: list[tuple[Callable[[], Any], str, str]] = [
    (client_ip, "client_ip()", "ip"),
    (
        lambda: client_ip(trusted_proxies=("10.0.0.0/8", "::1", "10.0.0.0/8"), header="forwarded", ipv4_prefix=24),
        "client_ip(trusted_proxies=['10.0.0.0/8', '::1/128'], header='forwarded', ipv4_prefix=24)",
        "ip",
    ),
    (lambda: client_ip(trusted_proxies=[], hops=0), "client_ip()", "ip"),
    (lambda: client_ip(hops=2, ipv6_prefix=56), "client_ip(hops=2, ipv6_prefix=56)", "ip"),
    (lambda: api_key("X-Key", secret=SECRET), "api_key('x-key', secret=...)", "api-key"),
    (
        lambda: api_key(secret=SECRET, scheme="Bearer"),
        "api_key('authorization', secret=..., scheme='bearer')",
        "api-key",
    ),
    (user, "user()", "user"),
    (lambda: user(find_id), f"user({find_id!r})", "user"),
    (route, "route()", "route"),
    (method, "method()", "method"),
    (lambda: header("X-Tenant"), "header('x-tenant')", "header:x-tenant"),
    (lambda: combined(user(), route()), "combined(user(), route())", "user+route"),
]


@pytest.mark.parametrize(("make", "shown", "name"), MADE, ids=[name for _, _, name in MADE])
def test_keys_are_values(make: Callable[[], Any], shown: str, name: str) -> None:
    key = make()
    assert key == make()
    assert hash(key) == hash(make())
    assert pickle.loads(pickle.dumps(key)) == key
    assert repr(key) == str(key) == shown
    assert key.name == name_of(key) == name
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        key.keys = ()


def test_keys_that_are_made_otherwise_differ() -> None:
    keys = [make() for make, _, _ in MADE]
    more = [client_ip(hops=3), api_key(secret=SECRET * 2), user(print), header("x-other"), combined(route(), user())]
    assert len({*keys, *more}) == len(keys) + len(more) - 1  # hops=0 is the default


def test_the_same_proxies_are_equal_in_any_order() -> None:
    assert client_ip(trusted_proxies=["::1", "10.0.0.0/8"]) == client_ip(
        trusted_proxies={"10.0.0.0/255.0.0.0", "0::1", "::ffff:10.0.0.0/104"}
    )


def test_a_key_of_ones_own_has_a_name_too() -> None:
    def tenant(_: HttpRequest) -> str:
        return "acme"

    class Tenant:
        def __call__(self, _: HttpRequest) -> str:
            return "acme"

    assert [name_of(key) for key in (tenant, Tenant(), partial(tenant))] == ["tenant", "Tenant", "partial"]


def test_a_client_in_many_spellings_has_one_bucket() -> None:
    key = client_ip(trusted_proxies=["10.0.0.0/8"])
    manager = ProxyManager.from_url("memory://", "4/hour")
    values = ["203.0.113.7", "203.0.113.7:80", "::ffff:203.0.113.7", "[64:ff9b::cb00:7107]:80", "6.6.6.6,203.0.113.7"]
    found = [key(via(value)) for value in values]
    assert [manager.try_consume(each) for each in found if each] == [True] * 4 + [False]
