"""The address of a client: read from text, followed through trusted proxies, and cut to the network of one client.

Each proxy appends the address of the client that has connected to it on the right. Anybody may have written what stands
further left, so everything here reads from the right, and nothing on the left can change what is read before it. Text
that is not an address is None, never an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import islice
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Hops: TypeAlias = Iterator[Address | None]
"""The addresses that a header lists, from the right; None for an entry that is not an address."""

MOST_HOPS: Final = 100
"""How many entries of a header are read; all that follow count as one entry that is not an address."""

_LONGEST: Final = 100  # characters: 45 of an address, the zone, brackets and port

# A node of RFC 7239, section 6: a port may be a number or a name. X-Forwarded-For has the same forms in practice.
_NODE: Final = re.compile(r"(?:\[(?P<six>[^\[\]]*)\]|(?P<four>[0-9.]+))(?::(?:[0-9]{1,5}|_[A-Za-z0-9._-]+))?")

# An element of Forwarded, spelled backwards. There a quotation mark within a string is followed by the backslash that
# escapes it, and the one that opens a string is followed by a "=".
# Python 3.11.2 ends such a loop too soon if it is possessive itself.
_ELEMENT_BACKWARDS: Final = re.compile(r'(?:[^",]|"(?>(?:[^"]|"(?=\\))*)")*')
_PAIR: Final = re.compile(
    r"""[ \t]*+
        (?: (?P<name>[!#$%&'*+.^_`|~0-9A-Za-z-]++) = (?P<value> "(?:[^"\\]|\\.)*+" | [^";,\s]*+ ) )?
        [ \t]*+ (?: ; | \Z )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)

_NAT64: Final = int(IPv6Address("64:ff9b::")) >> 32  # a /96
_LOCAL_NAT64: Final = int(IPv6Address("64:ff9b:1::")) >> 80  # a /48


def parse(text: str) -> Address | None:
    """Return an address that is written in any way, also with a port, in brackets, or with a zone; None for other text.

    The zone is left out: it names an interface of whoever wrote it. An IPv4-mapped address is the IPv4 address.
    """
    return _parsed(text) if len(text) <= _LONGEST else None


@lru_cache(maxsize=4096)  # the same clients come again and again
def _parsed(text: str) -> Address | None:
    node = _NODE.fullmatch(text)
    try:
        if node is None:
            address: Address = ip_address(text)
        else:
            address = IPv4Address(node["four"]) if node["six"] is None else IPv6Address(node["six"])
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return address.ipv4_mapped or (address if address.scope_id is None else IPv6Address(int(address)))


def parse_network(text: str) -> Network:
    """Return a network like ``10.0.0.0/8``, or that of a single address. IPv4-mapped addresses give a network of IPv4.

    :raises ValueError: for other text, for bits that are set after the prefix, and for a zone.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a zone")
    network = ip_network(text)
    if isinstance(network, IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((int(mapped), network.prefixlen - 96))
    return network


def x_forwarded_for(text: str) -> Hops:
    """Yield the entries of ``X-Forwarded-For``. Empty ones do not count, as in every list of HTTP."""
    entries = text.rsplit(",", MOST_HOPS)
    more = len(entries) > MOST_HOPS
    for entry in reversed(entries[1:] if more else entries):
        stripped = entry.strip(" \t")
        if stripped:
            yield parse(stripped)
    if more:
        yield None


def single(text: str) -> Hops:
    """Yield the address of a header that holds one address and nothing else; nothing for an empty one."""
    stripped = text.strip(" \t")
    if stripped:
        yield parse(stripped)


def forwarded(text: str) -> Hops:
    """Yield the ``for=`` of each element of ``Forwarded`` (RFC 7239).

    The text is read backwards: read forwards, a quotation mark on the left that is never closed would swallow what the
    proxies have appended. A comma within a string that a proxy has quoted (the client's ``host=``, say) does not end an
    element.
    """
    backwards, position = text[::-1], 0
    for _ in range(MOST_HOPS):
        match = _ELEMENT_BACKWARDS.match(backwards, position)
        assert match is not None, "an empty element is one"  # noqa: S101
        position = match.end()
        if position < len(backwards) and backwards[position] != ",":  # a string that nothing opens
            break
        element = match[0][::-1].strip(" \t")
        if element:
            yield _node(element)
        if position == len(backwards):
            return
        position += 1
    yield None


def _node(element: str) -> Address | None:
    """Return the ``for=`` of an element; None where it is missing, double, or not an address, or the rest is broken."""
    nodes: list[str] = []
    position = 0
    while position < len(element):
        pair = _PAIR.match(element, position)
        if pair is None:
            return None
        if pair["name"] is not None and pair["name"].lower() == "for":
            nodes.append(pair["value"])
        position = pair.end()
    if len(nodes) != 1:
        return None
    (node,) = nodes
    return parse(_ESCAPED.sub(r"\1", node[1:-1]) if node.startswith('"') else node)


def first_untrusted(peer: Address, hops: Iterable[Address | None], trusted: Sequence[Network]) -> Address:
    """Return the first address, from the peer on, that is not trusted; the last one where all are trusted.

    Where an entry on the way is not an address, return the peer.
    """
    client = peer
    for hop in _path(peer, hops):
        if hop is None:
            return peer
        client = hop
        if not any(hop in network for network in trusted):
            break
    return client


def _path(peer: Address, hops: Iterable[Address | None]) -> Hops:
    yield peer
    yield from hops


def nth(hops: Iterable[Address | None], count: int) -> Address | None:
    """Return the hop before ``count`` proxies, 1 or more; None where there are fewer, or it is not an address."""
    return next(islice(hops, count - 1, None), None)


def unwrapped(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, else the address itself.

    - NAT64, ``64:ff9b::/96`` (RFC 6052): the last 32 bits.
    - ``64:ff9b:1::/48`` (RFC 8215) is for local use. Where the IPv4 address stands there depends on the length of the
      prefix that was chosen; all but a /96 have zeros in the last 24 bits. So it is the last 32 bits where those are
      not zero, and otherwise not known.
    - 6to4, ``2002::/16``: the IPv4 address of the site, which has 65536 networks of /64.
    """
    if isinstance(address, IPv4Address):
        return address
    number = int(address)
    if number >> 32 == _NAT64 or (number >> 80 == _LOCAL_NAT64 and number & 0xFFFFFF):
        return IPv4Address(number & 0xFFFFFFFF)
    return address.sixtofour or address


@lru_cache(maxsize=4096)
def cut(address: Address, ipv4_prefix: int, ipv6_prefix: int) -> str:
    """Return the network of this length that an address is in; the address alone where it has the full length."""
    if isinstance(address, IPv4Address):
        return str(address if ipv4_prefix == 32 else IPv4Network((int(address), ipv4_prefix), strict=False))
    return str(address if ipv6_prefix == 128 else IPv6Network((int(address), ipv6_prefix), strict=False))
