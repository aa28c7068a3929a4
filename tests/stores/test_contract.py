"""What every store must do. A store of your own should pass these, too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import fakeredis
import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncMemoryStore,
    AsyncRedisStore,
    BucketConfiguration,
    MemoryStore,
    RedisStore,
    SlidingWindow,
    SlidingWindows,
)
from ratelimit.core.algorithm import decode, encode
from ratelimit.core.commands import Command, GiveBack, HoldBack, Reserve, Terms, TryConsume, execute
from ratelimit.stores.protocol import Lost, Swap
from ratelimit.testing import AsyncSwappingMemoryStore, SwappingMemoryStore
from tests.support.both_faces import Settled
from tests.support.fixed_window import FixedWindow

SECOND = 10**9


@pytest.fixture(
    params=[
        "memory",
        "memory asyncio",
        "swapping memory",
        "swapping memory asyncio",
        "fakeredis",
        "fakeredis asyncio",
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("redis asyncio", marks=pytest.mark.redis),
    ]
)
async def store(request: pytest.FixtureRequest) -> AsyncGenerator[Any]:
    match request.param:
        case "memory":
            yield Settled(MemoryStore())
        case "memory asyncio":
            yield Settled(AsyncMemoryStore())
        case "swapping memory":
            yield Settled(SwappingMemoryStore())
        case "swapping memory asyncio":
            yield Settled(AsyncSwappingMemoryStore())
        case "fakeredis":
            with fakeredis.FakeRedis() as client:
                yield Settled(RedisStore(client))
        case "fakeredis asyncio":
            async with fakeredis.FakeAsyncRedis() as aclient:
                yield Settled(AsyncRedisStore(aclient))
        case "redis":
            with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
                yield Settled(RedisStore(client))
        case "redis asyncio":
            async with redis.asyncio.Redis.from_url(request.getfixturevalue("redis_url")) as aclient:
                yield Settled(AsyncRedisStore(aclient))


KEYS = [b"key", b"", b"line\nbreak", b"nul\0", b"\xff\xfe", "schlüssel".encode(), b"k" * 1_000_000]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key[:12]))
async def test_a_state_is_made_read_replaced_and_deleted(store: Any, key: bytes) -> None:
    assert await store.get(key) is None
    assert await store.swap(key, None, b"one", -1) is None
    assert await store.get(key) == b"one"
    assert await store.swap(key, b"one", b"two", -1) is None
    assert await store.get(key) == b"two"
    await store.delete(key)
    assert await store.get(key) is None


async def test_a_swap_that_loses_tells_what_is_there_and_changes_nothing(store: Any) -> None:
    await store.swap(b"key", None, b"here", -1)
    assert await store.swap(b"key", None, b"new", -1) == Lost(b"here")
    assert await store.swap(b"key", None, b"new", 1000) == Lost(b"here")
    assert await store.swap(b"key", b"other", b"new", -1) == Lost(b"here")
    assert await store.swap(b"key", b"other", b"new", 1000) == Lost(b"here")
    assert await store.get(b"key") == b"here"


async def test_a_swap_of_what_is_missing_tells_so(store: Any) -> None:
    assert await store.swap(b"key", b"expected", b"new", -1) == Lost(None)
    assert await store.swap(b"key", b"expected", b"new", 1000) == Lost(None)
    assert await store.get(b"key") is None


async def test_states_are_compared_to_the_byte(store: Any) -> None:
    state = bytes(range(256)) + b"\r\n\0\0"
    await store.swap(b"key", None, state, -1)
    assert await store.swap(b"key", state[:-1], b"new", -1) == Lost(state)
    assert await store.swap(b"key", state + b"\0", b"new", -1) == Lost(state)
    assert await store.swap(b"key", state.replace(b"a", b"A"), b"new", -1) == Lost(state)
    assert await store.swap(b"key", state, b"", -1) is None
    assert not await store.get(b"key")
    assert await store.swap(b"key", None, b"new", -1) == Lost(b"")  # empty is not missing


@pytest.mark.parametrize(
    "limits",
    [
        BucketConfiguration.parse("5/s; 90/minute id x"),
        FixedWindow(10, SECOND),
        SlidingWindow(10, per=1),
        SlidingWindows(SlidingWindow(10, per=1), SlidingWindow(900, per=60)),
    ],
    ids=str,
)
async def test_states_of_any_algorithm_are_kept_to_the_byte(store: Any, limits: Any) -> None:
    state, now = Terms(limits, 3).initial(SECOND), SECOND
    await store.swap(b"key", None, encode(state), -1)
    commands: list[Command[Any]] = [TryConsume(2), Reserve(8), HoldBack(60 * SECOND), GiveBack(2)]
    for command in commands:
        now += SECOND // 2
        after, _ = execute(command, Terms(limits), state, now)
        assert after is not None
        assert await store.swap(b"key", encode(state), encode(after), 60_000) is None
        state = decode(await store.get(b"key"))
        assert state == after


async def test_a_swap_that_changes_nothing_succeeds(store: Any) -> None:
    await store.swap(b"key", None, b"same", -1)
    assert await store.swap(b"key", b"same", b"same", -1) is None


async def test_deleting_what_is_missing_is_no_error(store: Any) -> None:
    await store.delete(b"key")


async def test_keys_are_apart(store: Any) -> None:
    await store.swap(b"a", None, b"1", -1)
    await store.swap(b"A", None, b"2", -1)
    await store.delete(b"a")
    assert await store.get(b"A") == b"2"


async def expire(store: Any, key: bytes) -> None:
    for _ in range(1000):
        if await store.get(key) is None:
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not expire")


async def test_a_state_expires_whether_made_or_replaced(store: Any) -> None:
    await store.swap(b"made", None, b"1", 20)
    await store.swap(b"replaced", None, b"1", -1)
    assert await store.swap(b"replaced", b"1", b"2", 20) is None
    await expire(store, b"made")
    await expire(store, b"replaced")
    assert await store.swap(b"made", None, b"again", -1) is None


@pytest.mark.parametrize("ttl", [0, -1])
async def test_a_replacement_without_expiry_drops_the_one_there_was(store: Any, ttl: int) -> None:
    await store.swap(b"key", None, b"1", 400)
    await store.swap(b"witness", None, b"1", 450)
    assert await store.swap(b"key", b"1", b"2", ttl) is None
    await expire(store, b"witness")
    assert await store.get(b"key") == b"2"


@pytest.mark.parametrize("ttl", [2**31, 2**53 - 1, 2**63 - 1])
async def test_a_time_to_live_may_be_very_long(store: Any, ttl: int) -> None:
    assert await store.swap(b"key", None, b"1", ttl) is None
    assert await store.swap(b"key", b"1", b"2", ttl) is None
    assert await store.get(b"key") == b"2"


async def test_of_many_that_swap_from_the_same_state_one_wins(store: Any) -> None:
    await store.swap(b"key", None, b"old", -1)
    losses = await asyncio.gather(*(store.swap(b"key", b"old", b"%d" % number, -1) for number in range(20)))
    winner = await store.get(b"key")
    assert losses.count(None) == 1
    assert losses[int(winner)] is None
    assert all(loss == Lost(winner) for loss in losses if loss is not None)


async def test_several_swaps_are_carried_out_together(store: Any) -> None:
    await store.swap(b"{a}1", None, b"one", -1)
    await store.swap(b"{a}3", None, b"three", -1)
    swaps = [
        Swap(b"{a}1", b"one", b"uno", 60_000),
        Swap(b"{a}2", None, b"due", -1),
        Swap(b"{a}3", b"three", None, 0),
        Swap(b"{a}4", None, None, 0),
    ]
    assert await store.swap_all(swaps) is None
    assert [await store.get(key) for key in (b"{a}1", b"{a}2", b"{a}3", b"{a}4")] == [b"uno", b"due", b"three", None]


async def test_several_swaps_of_which_one_loses_tell_what_is_there_and_change_nothing(store: Any) -> None:
    await store.swap(b"{a}1", None, b"one", -1)
    await store.swap(b"{a}3", None, b"three", -1)
    swaps = [
        Swap(b"{a}1", b"one", b"uno", -1),
        Swap(b"{a}2", b"two", b"due", -1),
        Swap(b"{a}3", None, b"tre", -1),
        Swap(b"{a}4", None, b"quattro", -1),
        Swap(b"{a}5", b"five", None, 0),
    ]
    assert await store.swap_all(swaps) == [None, Lost(None), Lost(b"three"), None, Lost(None)]
    assert [await store.get(b"{a}%d" % number) for number in range(1, 6)] == [b"one", None, b"three", None, None]


async def test_several_swaps_make_nothing_where_a_value_is_empty(store: Any) -> None:
    await store.swap(b"{a}2", None, b"", -1)
    swaps = [Swap(b"{a}1", None, b"uno", -1), Swap(b"{a}2", None, b"due", -1), Swap(b"{a}3", None, b"tre", 60_000)]
    assert await store.swap_all(swaps) == [None, Lost(b""), None]
    assert [await store.get(key) for key in (b"{a}1", b"{a}3")] == [None, None]


async def test_several_states_expire_each_at_its_time(store: Any) -> None:
    await store.swap(b"{a}2", None, b"two", -1)
    swaps = [Swap(b"{a}1", None, b"uno", 20), Swap(b"{a}2", b"two", b"due", 20), Swap(b"{a}3", None, b"tre", 2**63 - 1)]
    assert await store.swap_all(swaps) is None
    await expire(store, b"{a}1")
    await expire(store, b"{a}2")
    assert await store.get(b"{a}3") == b"tre"


async def test_of_many_that_swap_the_same_states_one_wins(store: Any) -> None:
    calls = [[Swap(b"{a}1", None, b"%d" % number, -1), Swap(b"{a}2", None, b"%d" % number, -1)] for number in range(20)]
    losses = await asyncio.gather(*(store.swap_all(swaps) for swaps in calls))
    winner = await store.get(b"{a}1")
    assert await store.get(b"{a}2") == winner
    assert losses.count(None) == 1
    assert losses[int(winner)] is None


async def test_its_time_is_that_of_the_epoch_and_goes_on(store: Any) -> None:
    first = await store.now_nanos(b"key")
    assert 1_700_000_000 * SECOND < first < 10_000_000_000 * SECOND
    await asyncio.sleep(0.002)
    assert await store.now_nanos(b"key") > first
