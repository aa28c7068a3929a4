"""Addresses of clients: what is read, and what no stranger can do to it."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import islice

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ratelimit.integrations.http.address import (
    MOST_HOPS,
    Address,
    Hops,
    cut,
    first_untrusted,
    forwarded,
    nth,
    parse,
    parse_network,
    unwrapped,
    x_forwarded_for,
)

ADDRESSES = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6))
NEAR_MISSES = st.text(alphabet='0123456789abcdf.:,;[]%="\\ \tfor_unkw', max_size=60)
TEXTS = st.one_of(st.text(), NEAR_MISSES)
READERS = [x_forwarded_for, forwarded]
either_reader = pytest.mark.parametrize("read", READERS)


def canonical(address: Address) -> Address:
    """What is read where this address was written."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("192.0.2.1:5678", "192.0.2.1"),
        ("192.0.2.1:_port.a-b", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("2001:DB8:0:0::0001", "2001:db8::1"),
        ("2001:db8::192.0.2.1", "2001:db8::c000:201"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:4711", "2001:db8::1"),
        ("::1", "::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::FFFF:c000:201", "192.0.2.1"),
        ("[::ffff:192.0.2.1]:80", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::1"),
        ("[fe80::1%eth0]:80", "fe80::1"),
        ("::ffff:192.0.2.1%1", "192.0.2.1"),
    ],
)
def test_an_address_is_read_in_all_its_spellings(text: str, address: str) -> None:
    assert str(parse(text)) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        " 192.0.2.1",
        "192.0.2.1\n",
        "unknown",
        "_hidden",
        "example.com",
        "testclient",
        "192.0.2",
        "192.0.2.256",
        "192.0.2.01",
        "192.0.2.1:",
        "192.0.2.1:123456",
        "192.0.2.1:http",
        "192.0.2.1/32",
        "192.0.2.1%eth0",
        "3221225985",
        "0xc0000201",
        "١٩٢.0.2.1",  # digits, but not those of an address
        "[]",
        "[192.0.2.1]",
        "[2001:db8::1",
        "2001:db8::1]",
        "[2001:db8::1]:",
        "[[2001:db8::1]]",
        "[2001:db8::1]4711",
        "2001:db8::1::2",
        "2001:db8:::1",
        "fe80::1%",
        "fe80::1%a%b",
        "fe80::1%" + "a" * 100,
        "1" * 1_000_000,
        ":" * 1_000_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_other_text_is_no_address(text: str) -> None:
    assert parse(text) is None


@given(TEXTS)
def test_no_text_is_an_error(text: str) -> None:
    address = parse(text)
    assert address is None or parse(str(address)) == address
    for read in READERS:
        assert all(hop is None or parse(str(hop)) == hop for hop in read(text))


SPELLINGS: list[Callable[[Address], str]] = [
    str,
    lambda address: address.exploded,
    lambda address: address.exploded.upper(),
    lambda address: f"[{address}]:443" if isinstance(address, IPv6Address) else f"{address}:443",
    lambda address: f"{address}%eth0" if isinstance(address, IPv6Address) else f"::ffff:{address}",
    lambda address: f"[{address}]" if isinstance(address, IPv6Address) else f"[::ffff:{address}]:80",
]


@given(ADDRESSES, st.sampled_from(SPELLINGS))
def test_one_address_is_one_in_all_its_spellings(address: Address, spelling: Callable[[Address], str]) -> None:
    assert parse(spelling(address)) == canonical(address)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("10.0.0.0/255.0.0.0", "10.0.0.0/8"),
        ("10.0.0.1", "10.0.0.1/32"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("::1", "::1/128"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::ffff:10.0.0.1", "10.0.0.1/32"),
    ],
)
def test_a_network_is_read(text: str, network: str) -> None:
    assert parse_network(text) == ip_network(network)


@pytest.mark.parametrize("text", ["", "10.0.0.1/8", "10.0.0.0/33", "nginx", "fe80::1%eth0", "10.0.0.0/8, ::1"])
def test_other_text_is_no_network(text: str) -> None:
    with pytest.raises(ValueError):
        parse_network(text)


def addresses(hops: Hops) -> list[str | None]:
    return [None if hop is None else str(hop) for hop in hops]


@pytest.mark.parametrize(
    ("text", "from_the_right"),
    [
        ("", []),
        (" , ,", []),
        ("192.0.2.1", ["192.0.2.1"]),
        ("192.0.2.1, 198.51.100.2:80,\t[2001:db8::1]:80", ["2001:db8::1", "198.51.100.2", "192.0.2.1"]),
        ("192.0.2.1,, 198.51.100.2 ,", ["198.51.100.2", "192.0.2.1"]),
        ("192.0.2.1, unknown, 198.51.100.2", ["198.51.100.2", None, "192.0.2.1"]),
        ('"192.0.2.1"', [None]),
        ("192.0.2.1\xa0", [None]),
    ],
)
def test_x_forwarded_for_is_read_from_the_right(text: str, from_the_right: list[str | None]) -> None:
    assert addresses(x_forwarded_for(text)) == from_the_right


@pytest.mark.parametrize(
    ("text", "from_the_right"),
    [
        ("", []),
        (" , ,", []),
        ("for=192.0.2.43", ["192.0.2.43"]),
        ('For="[2001:db8:cafe::17]:4711"', ["2001:db8:cafe::17"]),
        ("for=192.0.2.60;proto=http;by=203.0.113.43", ["192.0.2.60"]),
        ("proto=http; by=203.0.113.43 ;FOR=192.0.2.60;", ["192.0.2.60"]),
        ("for=192.0.2.43, for=198.51.100.17", ["198.51.100.17", "192.0.2.43"]),
        ('for=192.0.2.43,for="[::ffff:198.51.100.17]"', ["198.51.100.17", "192.0.2.43"]),
        ('for="192.0.2.43:47011"', ["192.0.2.43"]),
        ('for="192.0.2.43:_port"', ["192.0.2.43"]),
        (r'for="\1\92.0.2.43"', ["192.0.2.43"]),
        ("for=_hidden, for=_SEVKISEK", [None, None]),
        ("for=unknown", [None]),
        ("for=", [None]),
        ('for=""', [None]),
        ("proto=http", [None]),
        ("192.0.2.43", [None]),
        ("for = 192.0.2.43", [None]),
        ("for=192.0.2.43\xa0", [None]),
        ("for=192.0.2.43;;proto=http", ["192.0.2.43"]),
        # what proxies write that do not quote what must be quoted
        ("for=[2001:db8::1]:4711", ["2001:db8::1"]),
        ("for=2001:db8::1", ["2001:db8::1"]),
        # what clients can put into host= of a proxy that quotes it, and of one that does not
        ('for=192.0.2.43;host="a, for=6.6.6.6, b", for=10.0.0.1', ["10.0.0.1", "192.0.2.43"]),
        (r'for=192.0.2.43;host="\", for=6.6.6.6;x=\"", for=10.0.0.1', ["10.0.0.1", "192.0.2.43"]),
        (r'for=192.0.2.43;host="\\\\", for=10.0.0.1', ["10.0.0.1", "192.0.2.43"]),
        ("for=192.0.2.43;host=a;for=6.6.6.6, for=10.0.0.1", ["10.0.0.1", None]),
        # strings that are never closed, or never opened
        ('for="192.0.2.43, for=198.51.100.17', ["198.51.100.17", None]),
        ('for=192.0.2.43", for=198.51.100.17', ["198.51.100.17", None]),
        (r'for="192.0.2.43\", for=198.51.100.17', ["198.51.100.17", None]),
    ],
)
def test_forwarded_is_read_from_the_right(text: str, from_the_right: list[str | None]) -> None:
    assert addresses(forwarded(text)) == from_the_right


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def written(read: Callable[[str], Hops], address: Address, host: str) -> str:
    """What a proxy appends: Forwarded has the client's own choice of a host in it."""
    if read is x_forwarded_for:
        return str(address)
    node = f"[{address}]" if isinstance(address, IPv6Address) else str(address)
    return f"for={quoted(node)};host={quoted(host)};proto=https"


@either_reader
@given(left=TEXTS, appended=st.lists(ADDRESSES, min_size=1, max_size=5), host=TEXTS)
@example(left='for="', appended=[IPv4Address("192.0.2.1")], host='"')
@example(left="for=6.6.6.6\\", appended=[IPv4Address("192.0.2.1")] * 2, host=', for=6.6.6.6, x="\\')
def test_nothing_on_the_left_changes_what_proxies_have_appended(
    read: Callable[[str], Hops], left: str, appended: list[Address], host: str
) -> None:
    text = ", ".join([left, *(written(read, address, host) for address in appended)])
    seen = list(islice(read(text), len(appended)))
    assert seen == [canonical(address) for address in reversed(appended)]


@either_reader
@pytest.mark.parametrize("more", [0, 1, 1000])
def test_entries_that_are_too_many_are_not_read(read: Callable[[str], Hops], more: int) -> None:
    entry = "for=192.0.2.1" if read is forwarded else "192.0.2.1"
    hops = addresses(read(", ".join([entry] * (MOST_HOPS + more))))
    assert hops == ["192.0.2.1"] * MOST_HOPS + [None] * (more > 0)


@either_reader
@pytest.mark.parametrize("piece", [",", '"', "\\", '"\\', '\\"', "a", "=", ";", "a=b;", " ", "[", ":", "1.", 'a="'])
def test_megabytes_of_anything_are_soon_done_with(read: Callable[[str], Hops], piece: str) -> None:
    """In quadratic time this test would never end."""
    entry = "for=192.0.2.1" if read is forwarded else "192.0.2.1"
    for left in (piece * 1_000_000, f'"{piece * 1_000_000}"', f'x="{piece * 1_000_000}'):
        hops = list(read(f"{left}, {entry}"))
        assert hops[0] == IPv4Address("192.0.2.1")
        assert len(hops) <= MOST_HOPS + 1


TRUSTED = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]


@pytest.mark.parametrize(
    ("peer", "header", "client"),
    [
        ("203.0.113.7", "192.0.2.1", "203.0.113.7"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "6.6.6.6, 192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "6.6.6.6, 192.0.2.1, 10.0.0.2, 2001:db8::1", "192.0.2.1"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "192.0.2.1, unknown, 10.0.0.2", "10.0.0.1"),
        ("10.0.0.1", "unknown, 192.0.2.1", "192.0.2.1"),
        ("10.0.0.1", "unknown", "10.0.0.1"),
        ("10.0.0.1", ", ".join(["192.0.2.1", *["10.0.0.2"] * 99]), "192.0.2.1"),
        ("10.0.0.1", ", ".join(["192.0.2.1", *["10.0.0.2"] * 100]), "10.0.0.1"),
    ],
)
def test_the_client_is_the_first_from_the_right_that_is_not_trusted(peer: str, header: str, client: str) -> None:
    known = parse(peer)
    assert known is not None
    assert str(first_untrusted(known, x_forwarded_for(header), TRUSTED)) == client


@pytest.mark.parametrize(
    ("header", "count", "client"),
    [
        ("203.0.113.7, 198.51.100.1", 1, "198.51.100.1"),
        ("203.0.113.7, 198.51.100.1", 2, "203.0.113.7"),
        ("203.0.113.7, 198.51.100.1", 3, None),
        ("203.0.113.7, unknown", 1, None),
        ("203.0.113.7, unknown", 2, "203.0.113.7"),
        ("", 1, None),
    ],
)
def test_the_client_is_the_entry_before_so_many_proxies(header: str, count: int, client: str | None) -> None:
    assert str(nth(x_forwarded_for(header), count)) == str(client)


@pytest.mark.parametrize(
    ("address", "stands_for"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("64:ff9b::192.0.2.1", "192.0.2.1"),
        ("64:ff9b::1:192.0.2.1", "64:ff9b::1:c000:201"),
        ("64:ff9b:1::192.0.2.1", "192.0.2.1"),
        ("64:ff9b:1:fffe::192.0.2.1", "192.0.2.1"),
        ("64:ff9b:1:c000:2:100::", "64:ff9b:1:c000:2:100::"),  # 192.0.2.1 after a /48
        ("64:ff9b:1:c0:0:201::", "64:ff9b:1:c0:0:201::"),  # after a /56
        ("64:ff9b:1:0:c0:2:100::", "64:ff9b:1:0:c0:2:100:0"),  # after a /64
        ("64:ff9b:2::192.0.2.1", "64:ff9b:2::c000:201"),
        ("2002:c000:201::", "192.0.2.1"),
        ("2002:c000:201:ffff::1", "192.0.2.1"),
        ("2003:c000:201::", "2003:c000:201::"),
    ],
)
def test_an_ipv4_address_is_found_in_an_ipv6_address(address: str, stands_for: str) -> None:
    parsed = parse(address)
    assert parsed is not None
    assert str(unwrapped(parsed)) == stands_for


@pytest.mark.parametrize(
    ("address", "prefixes", "network"),
    [
        ("192.0.2.1", (32, 64), "192.0.2.1"),
        ("192.0.2.1", (24, 64), "192.0.2.0/24"),
        ("192.0.2.1", (1, 64), "128.0.0.0/1"),
        ("2001:db8:1:2:3:4:5:6", (32, 64), "2001:db8:1:2::/64"),
        ("2001:db8:1:2:3:4:5:6", (32, 48), "2001:db8:1::/48"),
        ("2001:db8:1:2:3:4:5:6", (32, 128), "2001:db8:1:2:3:4:5:6"),
        ("::1", (32, 64), "::/64"),
        ("ffff::1", (32, 1), "8000::/1"),
    ],
)
def test_an_address_is_cut_to_its_network(address: str, prefixes: tuple[int, int], network: str) -> None:
    parsed = parse(address)
    assert parsed is not None
    assert cut(parsed, *prefixes) == network


@given(ADDRESSES, st.integers(1, 128), st.integers(1, 32), st.integers(1, 128))
def test_addresses_are_cut_to_one_network_just_where_their_first_bits_are_the_same(
    address: Address, bit: int, ipv4_prefix: int, ipv6_prefix: int
) -> None:
    length = address.max_prefixlen
    bit = min(bit, length)
    neighbour = type(address)(int(address) ^ 1 << (length - bit))
    network = cut(address, ipv4_prefix, ipv6_prefix)
    assert address in ip_network(network)
    same = bit > (ipv4_prefix if isinstance(address, IPv4Address) else ipv6_prefix)
    assert (cut(neighbour, ipv4_prefix, ipv6_prefix) == network) is same
