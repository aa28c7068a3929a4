"""Texts that were made to be slow: limits, URLs and the headers of proxies are read in time in proportion to length."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ratelimit import BucketConfiguration, InvalidConfigurationError
from ratelimit.integrations.http import address
from ratelimit.stores.urls import store_from_url

LENGTH, TIMES = 500, 16
# In proportion to the length the time grows TIMES-fold, by its square TIMES**2 = 256 times.
MOST_GROWTH = 80


def seconds(function: Callable[[], object]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def growth(read: Callable[[str], object], make: Callable[[int], str]) -> float:
    """How many times as long a text takes that is TIMES as long: the least of several tries, since others disturb."""
    short, long = make(LENGTH), make(TIMES * LENGTH)
    # Short texts are read several times, because one alone takes a few microseconds.
    quick = min(seconds(lambda: [read(short) for _ in range(4)]) for _ in range(5)) / 4
    slow = seconds(lambda: read(long))
    for _ in range(3):
        if slow > MOST_GROWTH * quick:
            slow = min(slow, seconds(lambda: read(long)))
    return slow / quick


def read_limits(text: str) -> None:
    try:
        configuration = BucketConfiguration.parse(text)
    except InvalidConfigurationError as error:
        assert len(str(error)) < 1_000
    else:
        assert str(configuration)


def read_url(text: str) -> None:
    try:
        store_from_url(text)
    except InvalidConfigurationError as error:
        assert len(str(error)) < 1_000


def read_x_forwarded_for(text: str) -> None:
    assert len(list(address.x_forwarded_for(text))) <= address.MOST_HOPS + 1


def read_forwarded(text: str) -> None:
    assert len(list(address.forwarded(text))) <= address.MOST_HOPS + 1


LIMITS = {
    "limits": lambda n: "1/s;" * n,
    "lines": lambda n: "1/s\r\n" * n,
    "limits with ids": lambda n: ",".join(f"1/s id {i}" for i in range(n)),
    "an id twice": lambda n: ",".join(f"1/s id {i}" for i in range(n)) + "|1/s id 0",
    "a limit in the middle": lambda n: "1/s;" * n + "?" + "1/s;" * n,
    "digits": lambda n: "1" * n,
    "underscores": lambda n: "1_1" * n,
    "thousands": lambda n: "1" + ",000" * n,
    "spaces in a number": lambda n: "1" + " 000" * n,
    "points": lambda n: "1." * n,
    "commas": lambda n: "1,1" * n,
    "a decimal comma, spaces": lambda n: "1,1" + " " * n + "x",
    "a decimal comma, digits": lambda n: f"{'1' * n},{'1' * n} x",
    "spaces": lambda n: "1" + " " * n + "/" + " " * n + "s" + " " * n + "x",
    "lines without limits": lambda n: "\n" * n + "x",
    "separators": lambda n: ";,|" * n,
    "signs": lambda n: "/" * n,
    "a word": lambda n: "1/1" + "a" * n,
    "words": lambda n: "1/s " + "a " * n,
    "options": lambda n: "1/s " + "burst 1 " * n,
    "per": lambda n: "1" + "per" * n,
    "quotation marks": lambda n: '1/s id "' + '\\"' * n,
    "a name": lambda n: '1/s id "' + "\\u0001" * min(n, 60_000) + '"',
    "a name that is not closed": lambda n: '1/s id "' + "a" * n,
    "a time": lambda n: "1/s aligned " + "1," * n,
    "a fraction": lambda n: "1/s aligned 1," + "1" * n,
    "milliseconds": lambda n: "1/s aligned @" + "1" * n,
    "nginx": lambda n: "1/s burst=" + "1" * n,
}

URLS = {
    "schemes": lambda n: "://" * n,
    "schemes in a URL": lambda n: "redis://" * n,
    "schemes behind a password": lambda n: "redis://:a@" + "://" * n,
    "a scheme": lambda n: "redis+" * n + "://host",
    "no scheme": lambda n: "redis:" * n,
    "signs": lambda n: "redis://" + "@" * n,
    "colons": lambda n: "redis://" + ":" * n,
    "brackets": lambda n: "redis://" + "[" * n,
    "slashes": lambda n: "redis://" + "/" * n,
    "a host": lambda n: "redis://" + "a" * n,
    "a host of labels": lambda n: "redis://" + "a." * n,
    "a host of letters without a code": lambda n: "redis://" + "é" * n,
    "a host of various letters": lambda n: "redis://" + "".join(map(chr, range(0x4E00, 0x4E00 + min(n, 20_000)))),
    "a port": lambda n: "redis://host:" + "1" * n,
    "a database": lambda n: "redis://host/" + "1" * n,
    "passwords": lambda n: "redis://host?" + "password=" * n,
    "options": lambda n: "redis://host?" + "&".join(f"a{i}=1" for i in range(n)),
    "an option": lambda n: "redis://host?" + "a" * n + "=1",
    "percent signs": lambda n: "redis://:" + "%" * n + "@host:x",
    "sentinels": lambda n: "redis+sentinel://" + "a," * n + "/service",
    "sentinels, slashes": lambda n: "redis+sentinel://" + "a/" * n,
    "sentinels, a service": lambda n: "redis+sentinel://a/" + "b" * n + "?" + "c" * n + "\n",
    "a socket": lambda n: "unix://" + "/a" * n,
}

HEADERS = {
    "commas": lambda n: "," * n,
    "spaces": lambda n: " " * n,
    "addresses": lambda n: "1.1.1.1," * n,
    "an address": lambda n: "1." * n,
    "colons": lambda n: ":" * n,
    "brackets": lambda n: "[" * n,
    "quotation marks": lambda n: '"' * n,
    "strings": lambda n: 'for="a",' * n,
    "strings in an element": lambda n: 'a="b";' * n,
    "strings that are not closed": lambda n: '="' * n,
    "escapes": lambda n: '\\"' * n,
    "escapes in a string": lambda n: 'for="' + '\\"' * n + '"',
    "backslashes": lambda n: 'for="' + "\\" * n + '"',
    "commas in a string": lambda n: 'for="' + "," * n + '"',
    "a string that is opened": lambda n: 'for="' + "a" * n,
    "a string that is closed": lambda n: "a" * n + '"',
    "pairs": lambda n: "for=1.1.1.1;" * n,
    "names": lambda n: "a" * n,
    "equals signs": lambda n: "for" + "=" * n,
    "semicolons": lambda n: ";" * n,
    "spaces in an element": lambda n: "a=b" + " " * n + "x",
}


@pytest.mark.parametrize("make", LIMITS.values(), ids=LIMITS)
def test_limits_are_read_in_time_in_proportion_to_their_length(make: Callable[[int], str]) -> None:
    assert growth(read_limits, make) < MOST_GROWTH


@pytest.mark.parametrize("make", URLS.values(), ids=URLS)
def test_urls_are_read_in_time_in_proportion_to_their_length(make: Callable[[int], str]) -> None:
    assert growth(read_url, make) < MOST_GROWTH


@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("read", [read_x_forwarded_for, read_forwarded])
def test_addresses_are_read_in_time_in_proportion_to_their_length(
    read: Callable[[str], object], make: Callable[[int], str]
) -> None:
    assert growth(read, make) < MOST_GROWTH
