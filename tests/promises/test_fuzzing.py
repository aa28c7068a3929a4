"""Inputs that nobody has thought of: states, limits and URLs, at random and out of joint."""

from __future__ import annotations

import inspect
import struct
import time
import tracemalloc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import AbstractConnection

from ratelimit import Bandwidth, BucketConfiguration, CorruptStateError, InvalidConfigurationError, ProxyManager
from ratelimit.core.numbers import to_nanos
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from tests.support.decision_paths import By, deciding_by
from tests.support.fuzzing import KEY, NOW, VERBS, check_limits, check_message, check_state, check_url, check_verbs
from tests.support.strategies import configurations, states

ONE = codec.encode(BucketState.initial(BucketConfiguration.parse("10/minute id abc; 5/s"), None, 0))
HALF_A_MEGABYTE = 2**19
PATIENCE = 20
"""Seconds, for what takes a second, and an hour where its time grows with the square of its length."""


@contextmanager
def within(megabytes: float) -> Generator[None]:
    """Check that no more memory than this is taken at any moment, and that there is an end to it."""
    begin = time.monotonic()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 2**20
    assert time.monotonic() - begin < PATIENCE


# States


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that were sound: with some changed, put in, taken out, or written twice."""
    data = draw(whole)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        end = draw(st.integers(begin, min(len(data), begin + 12)))
        edge = draw(st.sampled_from([b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\x80" + b"\0" * 7, b"\xff" * 8]))
        replacement = draw(st.one_of(st.binary(max_size=9), st.just(edge), st.just(data[begin:end] * 2)))
        data = data[:begin] + replacement + data[end:]
    return data


ANY_BYTES = st.one_of(
    st.binary(max_size=400),
    st.binary(max_size=200).map(lambda rest: ONE[:8] + rest),
    states().map(codec.encode),
    damaged(states().map(codec.encode)),
    damaged(st.just(ONE)),
)


@given(ANY_BYTES)
def test_any_bytes_are_a_state_that_comes_back_or_corrupt(data: bytes) -> None:
    check_state(data)


@given(ANY_BYTES)
def test_a_bucket_of_any_bytes_answers_or_is_left_alone(data: bytes) -> None:
    check_verbs(data)


FOUND = {
    "a period below zero": (
        "00000001000000010000000100000001000000000000000a000000000000000afffffffffffffffd01000000000000000080000000000000"
        "00000000000003000000010000000317979cfdfa8f360000000000000000000000000000000000000000010000000000000000"
    ),
    "a rate of zero": (
        "00000001000000010000000200000001000000000000087f000000000000087f0000000000000063000000000000006301000000080befbf"
        "ff00000000000100000000000000100000000000000010000000000000015900000000000000001080000000000000000000000000030000"
        "000100000006007ac8230b70069200000000000008790000000080ffffffffffffff0b7006affffffffffffffff400000000000000ad0000"
        "00010000000000000069"
    ),
    "the least remainder": (
        "0000000100000001000000010000000100000000000000020000000000000002000000000000000500000000000000020080000000000000"
        "000000000000030000000100000003007ac8230b70233e0000000000000002800000000000000000000001000000000000001b"
    ),
}
"""States by which fuzzers have broken something."""


@pytest.mark.parametrize("state", FOUND.values(), ids=FOUND)
def test_what_was_found_once_stays_repaired(state: str) -> None:
    check_state(bytes.fromhex(state))
    check_verbs(bytes.fromhex(state))


LENGTHS = {"bandwidths": slice(8, 12), "id": slice(59, 61), "numbers": slice(119, 123)}


@pytest.mark.parametrize("place", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("first", [0x00, 0x7F, 0x80, 0xFF])
def test_a_length_that_is_not_there_costs_no_memory(place: slice, first: int) -> None:
    state = bytearray(ONE)
    width = place.stop - place.start
    state[place] = bytes([first]) + b"\xff" * (width - 1)
    with within(0.25), pytest.raises(CorruptStateError):
        codec.decode(bytes(state))


def many_limits(count: int, id: bytes | None = None) -> bytes:
    """The state of a bucket with so many limits, each with an id of its own that begins like this."""
    limit = struct.pack(">iqqqqBqBB", 1, 2**60, 2**60, 86_400 * 10**9, 7, 0, -(2**63), 0, id is not None)
    ids = [b""] * count
    if id is not None:
        ids = [struct.pack(">H", len(id) + 4) + id + b"%04d" % place for place in range(count)]
    numbers = struct.pack(">qqq", NOW - 10**9, 2**59, 5) * count
    configuration = struct.pack(">ii", 1, count) + b"".join(limit + one for one in ids)
    return (
        struct.pack(">i", 1) + configuration + struct.pack(">iii", 3, 1, 3 * count) + numbers + struct.pack(">iq", 1, 0)
    )


TOO_LONG = {
    "text": b"x" * HALF_A_MEGABYTE,
    "zeros": bytes(HALF_A_MEGABYTE),
    "limits without end": ONE[:8] + (2**31 - 1).to_bytes(4, "big") + ONE[64:111] * (HALF_A_MEGABYTE // 47),
    "a long tail": ONE + bytes(HALF_A_MEGABYTE),
    "many limits": many_limits(HALF_A_MEGABYTE // 71),
    "many limits with ids": many_limits(5000, b""),
    "one limit too many": many_limits(65),
    "a long id": ONE.replace(b"\0\3abc", b"\xff\xff" + b"a" * 65_535),
    "an id that would grow": many_limits(1, b"\0" * 8_300),
    "ids that are long together": many_limits(64, b"x" * 200),
    "a byte too many": ONE + bytes(16_385 - len(ONE)),
}
"""States that are longer than any, or have more limits, or would when they are written again."""

LONGEST = {
    "limits": many_limits(64),
    "ids": many_limits(64, "é".encode() * 80),
    "an id": many_limits(1, "€".encode() * 5_400),
    "a tail": ONE + bytes(16_384 - len(ONE)),
}


@pytest.mark.parametrize("data", TOO_LONG.values(), ids=TOO_LONG)
def test_a_state_that_is_too_long_is_refused(data: bytes) -> None:
    codec.decode(ONE)
    with within(4), pytest.raises(CorruptStateError) as caught:
        codec.decode(data, KEY)
    check_message(caught.value)
    check_verbs(data)


@pytest.mark.parametrize("data", LONGEST.values(), ids=LONGEST)
def test_the_longest_state_costs_milliseconds(data: bytes) -> None:
    check_verbs(data)
    with within(16):
        check_state(data)
        begin = time.process_time()
        for number in range(10):
            codec.decode(data[:-1] + bytes([number]))
        assert time.process_time() - begin < 2


@pytest.mark.redis
@pytest.mark.parametrize("by", [By.SWAPS, By.SCRIPT], ids=str)
@pytest.mark.parametrize(
    "data", [*TOO_LONG.values(), many_limits(100_000)], ids=[*TOO_LONG, "a hundred thousand limits"]
)
def test_a_state_that_is_too_long_blocks_nobody(data: bytes, by: By, redis_url: str, native_swaps: bool) -> None:
    """No script and no reply is busy with more of it than a state may have, but for the reply to a native swap."""
    each = len(data) if native_swaps and by is By.SWAPS else 16_385
    with (
        deciding_by(by),
        redis.Redis.from_url(redis_url) as client,
        ProxyManager.from_url(redis_url, "10/minute") as one,
    ):
        one.try_consume("another")
        client.set(KEY, data)
        client.config_resetstat()
        for verb in VERBS:
            with pytest.raises(CorruptStateError) as caught:
                verb(one)
            check_message(caught.value)
            assert caught.value.state == data[: len(caught.value.state)]
            assert len(caught.value.state) <= max(each, 16_385)
        sent = client.info("stats")["total_net_output_bytes"]
        assert sent < (each + 20_000) * len(VERBS)
        stats = client.info("commandstats")
        busiest = [stats[name]["usec_per_call"] for name in ("cmdstat_evalsha", "cmdstat_eval") if name in stats]
        assert max(busiest, default=0) < 50_000
        assert client.get(KEY) == data


def test_limits_of_more_than_64_bandwidths_or_with_ids_too_long_are_refused() -> None:
    limits = [Bandwidth.greedy(5, 1, id=f"{place:0182}") for place in range(64)]
    assert len(codec.encode(BucketState.initial(BucketConfiguration(*limits), 1, 0))) == 16_365
    with pytest.raises(InvalidConfigurationError, match="bandwidths must be from 1 to 64; got 65"):
        BucketConfiguration(*limits, Bandwidth.greedy(5, 1))
    with pytest.raises(InvalidConfigurationError, match="ids must be short enough"):
        BucketConfiguration(*limits[1:], Bandwidth.greedy(5, 1, id="x" * 202))
    BucketConfiguration(*limits[1:], Bandwidth.greedy(5, 1, id="x" * 201))
    with pytest.raises(InvalidConfigurationError, match="id must be at most 1024 bytes"):
        Bandwidth.greedy(5, 1, id="é" * 513)
    Bandwidth.greedy(5, 1, id="é" * 512)
    with pytest.raises(InvalidConfigurationError, match="from 1 to 64"):
        BucketConfiguration.parse(";".join(["1/s"] * 65))


# Limits

WORDS = (
    *("/", ";", " per ", " burst ", " initial ", " intervally ", " aligned ", " adaptive ", " id ", "0", "7", "1_000"),
    *(
        "second",
        "minutes",
        "5min",
        "ns",
        "weeks",
        "@0",
        "@9999999999999999",
        "2024-01-01T00:00Z",
        "0001-01-01T00+23:59",
    ),
    "0001-01-01T00+23:59",
    *('"x"', '"\\ud800"', '"', "\\", "\n", "\t", " ", "\0", "\x1b[31m", "٣", "K", "İ", "\ud800", "9" * 50, "9" * 5000),
)
ANY_TEXT = st.one_of(
    st.text(),
    st.text(alphabet=st.characters(codec=None), max_size=30),
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
)


@st.composite
def damaged_limits(draw: st.DrawFn) -> str:
    text = str(draw(configurations()))
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(text)))
        end = draw(st.integers(begin, min(len(text), begin + 6)))
        text = text[:begin] + draw(st.one_of(st.sampled_from(WORDS), st.text(max_size=3))) + text[end:]
    return text


@given(st.one_of(ANY_TEXT, damaged_limits()))
def test_any_text_is_read_and_printed_back_or_refused_in_short(text: str) -> None:
    check_limits(text)


LONG = HALF_A_MEGABYTE


@pytest.mark.parametrize(
    "text",
    [
        "x" * LONG,
        "1" * LONG + "x",
        "1_" * (LONG // 2) + "x",
        "10/" + "9" * LONG + "min",
        "10/" + "1" * (LONG // 2) + "x" * (LONG // 2) + "!",
        "1/s id " + '"' + "x" * LONG + '"',
        "1/s id " + '"' + '\\"' * (LONG // 2),
        " " * LONG + "1/s" + " " * LONG,
        "1/s;\n" * (LONG // 20) + "x",
        ";".join(f"1/s id a{i}" for i in range(LONG // 60)),
        "1/s " + "burst " * (LONG // 6),
        "1/s aligned " + "2024" * (LONG // 4),
        '"' * LONG,
        "\u0130" * LONG,
    ],
    ids=lambda text: f"{text[:20]!r}",
)
def test_a_long_text_takes_memory_and_time_like_its_length(text: str) -> None:
    with within(128):
        check_limits(text)


@pytest.mark.parametrize(
    "refused",
    [
        lambda: Bandwidth.greedy(10**5000, 1),
        lambda: Bandwidth.greedy(5, 1, id="x" * 10**6),
        lambda: Bandwidth.greedy("x" * 10**6, 1),  # type: ignore[arg-type]
        lambda: BucketConfiguration.of(bytearray(10**6)),  # type: ignore[arg-type]
    ],
)
def test_a_value_of_any_size_is_refused_in_short(refused: Callable[[], Any]) -> None:
    with pytest.raises(InvalidConfigurationError) as caught:
        refused()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("beyond", [10**400, Fraction(10**400), Decimal("1e999999")], ids=lambda it: type(it).__name__)
def test_a_duration_beyond_all_numbers_never_ends(beyond: Any) -> None:
    assert to_nanos(beyond) == 2**63 - 1


# URLs

SECRET = "sesame"
OPTIONS = sorted(
    set(inspect.signature(redis.Redis.__init__).parameters)
    | set(inspect.signature(redis.Connection.__init__).parameters)
    | set(inspect.signature(redis.RedisCluster.__init__).parameters)
    | set(inspect.signature(AbstractConnection.__init__).parameters)
    | {"timeout", "max_connections", "sentinel_username", "sentinel_password", "service_name", "nonsense"}
)
SCHEMES = ["redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel", "memory"]
ODD = st.sampled_from(
    [*"@:/?#[]%&=,;'\"\\ \0\n\u2100\uff0f", "%2F", "%zz", "::1", "[", "é", "\ud800", "9" * 70, "x" * 70]
)
PIECE = st.one_of(ODD, st.text(max_size=4))


@st.composite
def urls_with_a_secret(draw: st.DrawFn) -> str:
    """A URL with a password, which may hold what should have been percent-encoded."""
    password = draw(PIECE) + SECRET + draw(PIECE)
    rest = draw(st.sampled_from(["", "h", "h:1", "h:port", "h,i:1/service", "/path", "h/0", "h/db", "[::1"])) + draw(
        st.one_of(st.just(""), PIECE)
    )
    option = f"{draw(st.sampled_from(OPTIONS))}={draw(st.one_of(st.just('1'), PIECE))}"
    url = draw(
        st.sampled_from(
            [
                f"://:{password}@{rest}?{option}",
                f"://user:{password}@{rest}",
                f"://{rest}?password={password}",
                f"://{rest}?{option}&sentinel_password={password}&{option}",
            ]
        )
    )
    return draw(st.sampled_from(SCHEMES)) + url


@given(urls_with_a_secret())
def test_a_url_is_taken_or_refused_and_its_password_not_told(url: str) -> None:
    check_url(url, SECRET)


@given(
    st.one_of(st.text(), st.tuples(st.sampled_from(SCHEMES), st.lists(PIECE, max_size=6).map("".join)).map("://".join))
)
def test_any_text_names_a_store_or_is_refused(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize("place", ["redis://h", "unix:///path", "redis+cluster://h", "redis+sentinel://h/service"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_taken_or_refused_at_once(place: str, option: str) -> None:
    for value in ("1", "x", ""):
        check_url(f"{place}?{option}={value}")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame\u2100@host",
        "redis+sentinel://:sesame/word@host",
        "redis+sentinel://user:@sesame/@host",
        "redis://host?password=open&sesame=1",
        "redis+sentinel://:sesame@,/service",
        "redis+cluster://:sesame@host?timeout=1",
        "redis://:sesame@redis..local",
        "redis://:sesame@host\0",
        "redis://:sesame@" + "x" * 10**6,
    ],
    ids=lambda url: url[:40].encode("ascii", "backslashreplace").decode(),
)
def test_what_only_urllib_and_redis_py_would_stumble_over_is_refused(url: str) -> None:
    check_url(url, SECRET)
    with pytest.raises(InvalidConfigurationError):
        ProxyManager.from_url(url, "1/s")
