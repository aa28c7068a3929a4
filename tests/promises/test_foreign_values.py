"""What others have stored under a key is left alone, and is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import redis

from ratelimit import CorruptStateError, StoreError, UnsupportedStateError
from tests.support.both_faces import Face, Manager, closing, settled
from tests.support.servers import RedisServer
from tests.support.verbs import KEY, LIMITS, READING_VERBS, VERBS, check_failure, nothing_written

pytestmark = pytest.mark.redis


def a_list(admin: redis.Redis) -> None:
    admin.rpush(KEY, "first", "second")


def a_hash(admin: redis.Redis) -> None:
    admin.hset(KEY, "field", "value")


def a_set(admin: redis.Redis) -> None:
    admin.sadd(KEY, "member")


def a_sorted_set(admin: redis.Redis) -> None:
    admin.zadd(KEY, {"member": 1})


def a_stream(admin: redis.Redis) -> None:
    admin.xadd(KEY, {"field": "value"})


@pytest.mark.parametrize("store", [a_list, a_hash, a_set, a_sorted_set, a_stream])
async def test_a_value_of_another_type_is_left_alone(
    face: Face, server: RedisServer, admin: redis.Redis, store: Callable[[redis.Redis], None]
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        for _ in ("a missing bucket", "a bucket that was in use"):
            store(admin)
            admin.expire(KEY, 1000)
            with nothing_written(admin):
                for verb in READING_VERBS.values():
                    error = await check_failure(manager, StoreError, "another type", verb)
                    assert not error.in_doubt
            await settled(manager.remove(KEY))
            assert await settled(manager.try_consume(KEY))
            admin.delete(KEY)


SOUND = bytes.fromhex(
    "00000001 00000001 00000001 00000001 000000000000000a 000000000000000a 000000003b9aca00 000000000000000a"
    "00 8000000000000000 00 00 00000003 00000001 00000003 17979cfe4510b280 0000000000000008 0000000000000000"
    "00000001 0000000000000004"
)


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"\n",
        b"OK",
        b"12345",
        b'{"tokens": 5, "timestamp": 1700000000}',
        b"\x80\x05\x95pickled",
        bytes(107),
        b"\xff" * 107,
        SOUND[:-1],
        SOUND[:50],
        SOUND.replace(b"\0\0\0\3\0\0\0\1\0\0\0\3", b"\0\0\0\2\0\0\0\1\0\0\0\3"),
        SOUND.replace(b"\0\0\0\3\0\0\0\1\0\0\0\3", b"\0\0\0\3\0\0\0\1\x7f\xff\xff\xff"),
        SOUND[:8] + b"\x7f\xff\xff\xff" + SOUND[12:],
        b"x" * 2**20,
    ],
    ids=lambda state: f"{state[:20]!r}, {len(state)} bytes",
)
async def test_foreign_bytes_are_left_alone(face: Face, server: RedisServer, admin: redis.Redis, state: bytes) -> None:
    admin.set(KEY, state, ex=1000)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with nothing_written(admin):
            for verb in READING_VERBS.values():
                if not state and verb is VERBS["configuration"]:
                    assert await settled(verb(manager)) is None  # an empty value is not a bucket
                    continue
                with pytest.raises(CorruptStateError, match="cannot be read as a bucket") as caught:
                    await settled(verb(manager))
                assert caught.value.key == KEY
                assert caught.value.state in (state, state[:16_385])
                assert len(str(caught.value)) < 300
        await settled(manager.remove(KEY))
        assert await settled(manager.try_consume(KEY))


@pytest.mark.parametrize("verb", [VERBS["configuration"], VERBS["try_consume"]], ids=["configuration", "try_consume"])
async def test_a_state_of_a_newer_format_is_left_alone(
    face: Face, server: RedisServer, admin: redis.Redis, verb: Callable[[Manager], Any]
) -> None:
    admin.set(KEY, b"\0\0\0\3" + SOUND[4:], ex=1000)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with nothing_written(admin):
            error = await check_failure(manager, UnsupportedStateError, "format 3", verb)
        assert error.format == 3
        admin.set(KEY, SOUND)
        assert await settled(manager.try_consume(KEY))


async def test_a_state_with_a_period_of_0_is_left_alone(face: Face, server: RedisServer, admin: redis.Redis) -> None:
    state = SOUND.replace(bytes.fromhex("3b9aca00"), bytes(4))
    admin.set(KEY, state, ex=1000)
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        with nothing_written(admin):
            error = await check_failure(manager, CorruptStateError, "limits are out of range")
            assert error.state == state


async def test_a_bucket_that_is_spoilt_in_use_is_left_alone(
    face: Face, server: RedisServer, admin: redis.Redis
) -> None:
    async with closing(face.from_url(server.url, LIMITS)) as manager:
        assert await settled(manager.try_consume(KEY))
        admin.set(KEY, "spoilt", ex=1000)
        with nothing_written(admin):
            for _ in range(2):
                with pytest.raises(CorruptStateError) as caught:
                    await settled(manager.try_consume(KEY))
                assert (caught.value.key, caught.value.state) == (KEY, b"spoilt")
