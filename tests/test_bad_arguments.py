"""Tokens, limits and keys that are not valid are refused and leave no trace; those that are only odd work."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
import redis

from ratelimit import (
    NEVER,
    Bandwidth,
    BucketConfiguration,
    InvalidArgumentError,
    InvalidConfigurationError,
    ReservationOverflowError,
    StoreUnavailableError,
    TokensInheritance,
)
from tests.support.both_faces import Face, closing, settled
from tests.support.servers import RedisServer
from tests.support.verbs import KEY, LIMITS, TOKEN_VERBS, nothing_written

pytestmark = pytest.mark.redis


# Tokens


@pytest.mark.parametrize(
    "tokens", [0, -1, 2**63, -(2**63), 1.0, 0.5, float("nan"), True, False, "1", b"1", None, Decimal(1), [1]], ids=repr
)
async def test_a_number_of_tokens_is_an_int_of_1_or_more(
    face: Face, server: RedisServer, admin: redis.Redis, tokens: Any
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for verb in TOKEN_VERBS.values():
            with pytest.raises(InvalidArgumentError, match="tokens must be an int from 1") as caught:
                await settled(verb(manager, tokens))
            assert repr(tokens) in str(caught.value)
        assert not admin.exists(KEY)
        assert await settled(manager.try_consume(KEY))


@pytest.mark.parametrize("limit", [0, -1, 2**63, 1.0, True, "1"], ids=repr)
async def test_a_limit_for_as_much_as_possible_is_an_int_of_1_or_more(
    face: Face, server: RedisServer, admin: redis.Redis, limit: Any
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with pytest.raises(InvalidArgumentError, match="limit must be an int from 1"):
            await settled(manager.bucket(KEY).try_consume_as_much_as_possible(limit))
        assert not admin.exists(KEY)
        assert await settled(manager.bucket(KEY).try_consume_as_much_as_possible()) == 10


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("-inf"), True, "1", timedelta(0)], ids=repr)
async def test_a_timeout_is_a_duration_above_0(
    face: Face, server: RedisServer, admin: redis.Redis, timeout: Any
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with pytest.raises(InvalidArgumentError, match="timeout must be"):
            await settled(manager.consume(KEY, timeout=timeout))
        assert not admin.exists(KEY)


@pytest.mark.parametrize("tokens", [11, 2**63 - 1])
async def test_more_tokens_than_the_capacity_are_refused_for_ever(
    face: Face, server: RedisServer, admin: redis.Redis, tokens: int
) -> None:
    assert not admin.exists(KEY)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        assert not await settled(manager.try_consume(KEY, tokens))
        probe = await settled(manager.try_consume_and_return_remaining(KEY, tokens))
        assert (probe.consumed, probe.remaining_tokens) == (False, 10)
        assert (probe.nanos_to_wait_for_refill, probe.retry_after) == (NEVER, None)
        estimate = await settled(manager.bucket(KEY).estimate_ability_to_consume(tokens))
        assert (estimate.can_be_consumed, estimate.nanos_to_wait_for_refill) == (False, NEVER)
        assert not await settled(manager.consume(KEY, tokens, max_wait=1))
        assert await settled(manager.try_consume(KEY, 10))


async def test_a_debt_beyond_64_bits_is_refused(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        assert await settled(manager.try_consume(KEY))
        with nothing_written(admin):
            with pytest.raises(ReservationOverflowError):
                await settled(manager.consume(KEY, 2**63 - 1))
            with pytest.raises(ReservationOverflowError):
                await settled(manager.bucket(KEY).consume_ignoring_rate_limits(2**63 - 1))
        assert await settled(manager.try_consume(KEY, 9))


# Limits


@pytest.mark.parametrize(
    "limits",
    [
        "",
        "100",
        "0/minute",
        "-1/minute",
        "1.5/minute",
        "100/fortnight",
        "100/0 minutes",
        "9223372036854775808/minute",
        "2/ns",
        "10/second; 1,000/hour",
        "1/s id a; 1/min id a",
        "10/second burst 0",
        "10/second sliding; 5/minute",
        "10/second sliding burst 20",
        "10/second\0",
        "1" * 2**20,
        10,
        1.5,
        [],
        ["10/second", 5],
        (100, 60),
        b"10/second",
    ],
    ids=lambda limits: repr(limits)[:40],
)
async def test_limits_that_cannot_be_are_refused(
    face: Face, server: RedisServer, admin: redis.Redis, limits: Any
) -> None:
    with pytest.raises(InvalidConfigurationError):
        face.from_url(server.url, limits)
    async with (
        closing(face.from_url(server.url, LIMITS)) as manager,
        closing(face.from_url(server.url, lambda _: limits)) as careless,
    ):
        with pytest.raises(InvalidConfigurationError):
            manager.bucket(KEY, limits)
        with pytest.raises(InvalidConfigurationError):
            await settled(careless.try_consume(KEY))
        with pytest.raises(InvalidConfigurationError):
            await settled(manager.replace_configuration(KEY, limits, TokensInheritance.AS_IS))
        assert not admin.exists(KEY)
        assert await settled(manager.try_consume(KEY))


async def test_a_bucket_without_limits_is_refused(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(server.url)) as manager:
        with pytest.raises(InvalidConfigurationError, match="configuration"):
            await settled(manager.try_consume(KEY))


@pytest.mark.parametrize(
    "bandwidth",
    [
        Bandwidth.greedy(1, 1e-9),
        Bandwidth.greedy(2**63 - 1, timedelta.max),
        Bandwidth.greedy(1, timedelta.max),
        Bandwidth.greedy(2**63 - 1, timedelta.max, refill_tokens=1),
        Bandwidth.intervally(1, timedelta.max),
        Bandwidth.intervally(2**63 - 1, timedelta.max, refill_tokens=1),
        Bandwidth.greedy(1, 60, initial_tokens=2**63 - 1),
        Bandwidth.greedy(1, 60, id="\0\n" * 300),
    ],
    ids=lambda bandwidth: repr(bandwidth)[:60],
)
async def test_limits_that_are_only_odd_work(
    face: Face, server: RedisServer, admin: redis.Redis, bandwidth: Bandwidth
) -> None:
    async with closing(face.from_url(server.url, BucketConfiguration(bandwidth))) as manager:
        assert await settled(manager.try_consume(KEY))
        assert await settled(manager.configuration(KEY)) == BucketConfiguration(bandwidth)
        assert (await settled(manager.snapshot(KEY))).consumed_tokens == 1
        assert admin.pttl(KEY) > 0
        rest = bandwidth.initial_tokens - 1
        if rest:
            assert await settled(manager.try_consume(KEY, rest))
            assert not await settled(manager.try_consume(KEY, bandwidth.capacity))
            assert (await settled(manager.snapshot(KEY))).consumed_tokens == rest + 1


@pytest.mark.usefixtures("admin")
async def test_sixty_four_limits_in_a_bucket_work(face: Face, server: RedisServer) -> None:
    limits = BucketConfiguration(*(Bandwidth.greedy(i, 60, id=str(i)) for i in range(1, 65)))
    async with closing(face.from_url(server.url, limits)) as manager:
        assert await settled(manager.try_consume(KEY))
        assert not await settled(manager.try_consume(KEY))
        assert await settled(manager.configuration(KEY)) == limits


# Keys


@pytest.mark.parametrize(
    "key",
    [
        "",
        " ",
        "\n",
        "\r\n$3\r\nGET",
        "\0",
        "a\0b",
        "{}",
        "{user}:42",
        "naïve 🪣",
        "x" * 2**20,
        b"",
        b"\xff\xfe",
        b"\0" * 100,
        bytes(range(256)),
    ],
    ids=lambda key: repr(key[:20]),
)
async def test_keys_that_are_only_odd_work(
    face: Face, server: RedisServer, admin: redis.Redis, key: str | bytes
) -> None:
    stored_key = key.encode() if isinstance(key, str) else key
    for prefix in (b"", b"rl:", b"\xff\0\n"):
        async with closing(face.from_url(server.url, LIMITS, prefix=prefix)) as manager:
            assert await settled(manager.try_consume(key, 9))
            assert await settled(manager.try_consume(key))
            assert not await settled(manager.try_consume(key))
            assert await settled(manager.configuration(key)) == LIMITS
            assert admin.keys() == [prefix + stored_key]
            await settled(manager.remove(key))
            assert admin.dbsize() == 0


@pytest.mark.parametrize(
    "key", [None, 42, 4.2, True, ("user", 42), bytearray(b"user"), object()], ids=lambda key: type(key).__name__
)
async def test_a_key_is_text_or_bytes(face: Face, server: RedisServer, admin: redis.Redis, key: Any) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for verb in (manager.try_consume, manager.remove, manager.configuration, manager.bucket):
            with pytest.raises(InvalidArgumentError, match="key must be a str or bytes"):
                await settled(verb(key))
        assert admin.dbsize() == 0


async def test_a_key_without_utf_8_form_is_refused(face: Face, server: RedisServer) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with pytest.raises(InvalidArgumentError, match="UTF-8"):
            await settled(manager.try_consume("\ud800"))


@pytest.mark.parametrize("key", ["x" * 2**20, b"\0" * 2**20, "\n" * 2**20], ids=["text", "bytes", "line ends"])
async def test_an_error_about_a_huge_key_is_short(face: Face, stopped_server: RedisServer, key: str | bytes) -> None:
    async with closing(face.from_url(stopped_server.url, LIMITS)) as manager:
        for verb in (manager.try_consume, manager.configuration):
            with pytest.raises(StoreUnavailableError) as caught:
                await settled(verb(key))
            assert caught.value.key == key
            assert len(str(caught.value)) < 1000
            assert "\n" not in str(caught.value)
