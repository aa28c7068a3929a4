"""Several buckets in one decision, over stores in memory: each is charged, or none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from ratelimit import (
    NEVER,
    AllOf,
    AsyncAllOf,
    AsyncProxyManager,
    BucketNotFoundError,
    CorruptStateError,
    InvalidArgumentError,
    MemoryStore,
    Optimization,
    ProxyManager,
    RateLimitError,
    Recovery,
    SystemClock,
    all_of,
)
from ratelimit.testing import ManualClock, SwappingMemoryStore
from tests.support.both_faces import Settled, for_asyncio

NOW = 1_700_000_000 * 10**9
SECOND = 10**9


class Setting:
    """Managers of users and of tenants over one store."""

    def __init__(self, face: type, store: SwappingMemoryStore, clock: ManualClock) -> None:
        self.face = face
        self.given = store
        self.store: Any = store if face is ProxyManager else for_asyncio(store)
        self.clock = clock
        self.users = self.manager("2/minute", "user:")
        self.tenants = self.manager("5/minute", "tenant:")

    def manager(self, limits: Any, prefix: str, **settings: Any) -> Any:
        return self.face(self.store, limits, prefix=prefix, clock=self.clock, **settings)

    def both(self, user: str = "1", tokens: int = 1, **keywords: Any) -> Settled:
        parts = self.users.bucket(f"{{acme}}:{user}"), (self.tenants.bucket("{acme}"), tokens)
        return Settled(all_of(*parts, **keywords))

    async def consumed(self, *users: str) -> list[int]:
        """What the buckets have counted: those of the users, then that of the tenant."""
        buckets = [self.users.bucket(f"{{acme}}:{user}") for user in users] + [self.tenants.bucket("{acme}")]
        return [(await Settled(bucket).snapshot()).consumed_tokens for bucket in buckets]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture(params=[MemoryStore, SwappingMemoryStore])
def store(request: pytest.FixtureRequest, clock: ManualClock) -> SwappingMemoryStore:
    made: SwappingMemoryStore = request.param(clock=clock)
    return made


@pytest.fixture
def setting(face: type, store: SwappingMemoryStore, clock: ManualClock) -> Setting:
    return Setting(face, store, clock)


@pytest.fixture(params=[False, True], ids=["together", "spread"])
def spread(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_all_are_charged_or_none(setting: Setting, spread: bool) -> None:
    limit = setting.both(spread=spread)
    assert [await limit.try_consume() for _ in range(3)] == [True, True, False]
    assert await setting.consumed("1") == [2, 2]
    other = setting.both("2", tokens=3, spread=spread)
    assert await other.try_consume()
    assert not await other.try_consume()
    assert await setting.consumed("1", "2") == [2, 1, 5]


async def test_a_probe_shows_every_part(setting: Setting, spread: bool) -> None:
    limit = setting.both(tokens=2, spread=spread)
    probe = await limit.try_consume_and_return_remaining()
    assert probe
    assert (probe.consumed, probe.refused_by, probe.retry_after, probe.degraded) == (True, (), 0.0, False)
    assert [(part.consumed, part.remaining_tokens) for part in probe.parts] == [(True, 1), (True, 3)]
    await limit.try_consume()
    probe = await limit.try_consume_and_return_remaining()
    assert not probe
    assert probe.refused_by == ("{acme}:1", "{acme}")
    assert probe.retry_after == 30.0
    assert [(part.consumed, part.remaining_tokens) for part in probe.parts] == [(False, 0), (False, 1)]
    assert [part.nanos_to_wait_for_refill for part in probe.parts] == [30 * SECOND, 12 * SECOND]


async def test_a_part_that_has_its_tokens_is_not_named_and_keeps_them(setting: Setting, spread: bool) -> None:
    limit = setting.both(spread=spread)
    for _ in range(2):
        await limit.try_consume()
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}:1",)
    assert [part.remaining_tokens for part in probe.parts] == [0, 3]
    assert [part.nanos_to_wait_for_refill for part in probe.parts] == [30 * SECOND, 0]


async def test_the_first_of_several_that_refuse_does_not_hide_the_others(setting: Setting, spread: bool) -> None:
    parts = setting.tenants.bucket("{acme}"), setting.users.bucket("{acme}:1"), setting.users.bucket("{acme}:2")
    limit = Settled(all_of(parts[0], parts[1], (parts[2], 2), spread=spread))
    assert await limit.try_consume()
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}:2",)
    assert await Settled(parts[1]).try_consume()
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}:1", "{acme}:2")
    assert probe.retry_after == 60.0
    assert await setting.consumed("1", "2") == [2, 2, 1]


async def test_tokens_come_back_with_time(setting: Setting, spread: bool) -> None:
    limit = setting.both(spread=spread)
    assert [await limit.try_consume() for _ in range(3)] == [True, True, False]
    setting.clock.advance(29.9)
    assert not await limit.try_consume()
    setting.clock.advance(0.1)
    assert [await limit.try_consume() for _ in range(2)] == [True, False]


async def test_more_than_a_bucket_can_hold_never_comes(setting: Setting, spread: bool) -> None:
    limit = setting.both(tokens=6, spread=spread)
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}",)
    assert (probe.nanos_to_wait_for_refill, probe.retry_after) == (NEVER, None)
    assert await setting.consumed("1") == [0, 0]


async def test_an_estimate_consumes_nothing(setting: Setting, spread: bool) -> None:
    limit = setting.both(tokens=3, spread=spread)
    for _ in range(2):
        probe = await limit.estimate_ability_to_consume()
        assert probe
        assert [part.remaining_tokens for part in probe.parts] == [2, 5]
    await limit.try_consume()
    probe = await limit.estimate_ability_to_consume()
    assert (probe.consumed, probe.refused_by, probe.retry_after) == (False, ("{acme}",), 12.0)
    assert await setting.consumed("1") == [1, 3]


async def test_what_was_of_no_use_is_given_back(setting: Setting, spread: bool) -> None:
    limit = setting.both(tokens=3, spread=spread)
    await limit.try_consume()
    await limit.give_back()
    assert await setting.consumed("1") == [0, 0]
    assert [part.remaining_tokens for part in (await limit.estimate_ability_to_consume()).parts] == [2, 5]


async def test_a_snapshot_shows_all(setting: Setting, spread: bool) -> None:
    limit = setting.both(tokens=3, spread=spread)
    await limit.try_consume()
    user, tenant = await limit.snapshot()
    assert (user.available_tokens, tenant.available_tokens) == (1, 2)


async def test_parts_of_several_limits_and_versions(setting: Setting, spread: bool) -> None:
    users = setting.manager("2/second; 3/minute id slow", "user:", configuration_version=2)
    aligned = setting.manager("4/minute intervally", "calendar:")
    limit = Settled(all_of(users.bucket("{acme}"), aligned.bucket("{acme}"), spread=spread))
    assert [await limit.try_consume() for _ in range(3)] == [True, True, False]
    setting.clock.advance(1)
    assert [await limit.try_consume() for _ in range(2)] == [True, False]
    raised = setting.manager("9/second", "user:", configuration_version=3)
    limit = Settled(all_of(raised.bucket("{acme}"), aligned.bucket("{acme}"), spread=spread))
    assert [await limit.try_consume() for _ in range(2)] == [True, False]


async def test_a_key_without_limits_falls_out(setting: Setting, spread: bool) -> None:
    unlimited = setting.manager(lambda key: None if key == "free" else "1/minute", "plan:")
    bucket = setting.users.bucket("{acme}:1")
    limit = Settled(all_of(unlimited.bucket("free"), bucket, spread=spread))
    assert [await limit.try_consume() for _ in range(3)] == [True, True, False]
    probe = await limit.try_consume_and_return_remaining()
    assert probe.refused_by == ("{acme}:1",)
    assert probe.parts[0].nanos_to_wait_for_refill == 0
    limit = Settled(all_of(unlimited.bucket("paid"), unlimited.bucket("free"), spread=spread))
    assert [await limit.try_consume() for _ in range(2)] == [True, False]
    assert await Settled(all_of(unlimited.bucket("free"), spread=spread)).try_consume()
    with pytest.raises(BucketNotFoundError, match="free"):
        await Settled(all_of(unlimited.bucket("free"), bucket, spread=spread)).snapshot()


async def test_a_bucket_that_has_vanished_is_an_error_where_it_must_exist(setting: Setting, spread: bool) -> None:
    kept = setting.manager("5/minute", "kept:", recovery=Recovery.RAISE).bucket("{acme}")
    limit = Settled(all_of(setting.users.bucket("{acme}:1"), kept, spread=spread))
    assert await limit.try_consume()
    await Settled(setting.store).delete(b"kept:{acme}")
    with pytest.raises(BucketNotFoundError) as caught:
        await limit.try_consume()
    assert caught.value.key == "{acme}"
    assert (await Settled(setting.users.bucket("{acme}:1")).snapshot()).consumed_tokens == 1


async def test_foreign_bytes_are_an_error_that_names_the_key(setting: Setting, spread: bool) -> None:
    limit = setting.both(spread=spread)
    await limit.try_consume()
    setting.given.put(b"tenant:{acme}", b"garbage")
    with pytest.raises(CorruptStateError) as caught:
        await limit.try_consume()
    assert (caught.value.key, caught.value.state) == ("{acme}", b"garbage")
    assert (await Settled(setting.users.bucket("{acme}:1")).snapshot()).consumed_tokens == 1


# Arguments


def test_what_goes_together_is_checked_before_anything_is_sent(store: SwappingMemoryStore, clock: ManualClock) -> None:
    one = ProxyManager(store, "5/minute", prefix="a:", clock=clock)
    other = ProxyManager(store, "5/minute", prefix="b:", clock=clock)
    elsewhere = ProxyManager(MemoryStore(), "5/minute", prefix="c:", clock=clock)
    no_clock = ProxyManager(store, "5/minute", prefix="d:")
    by_memory = other.bucket("x", optimization=Optimization.skip_sync_on_zero())
    awaited = AsyncProxyManager(for_asyncio(store), "5/minute", prefix="e:", clock=clock)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("parts must be one bucket or more; got none", all_of),
        ("part must be a bucket, or a bucket and a number of tokens; got 'x'", lambda: all_of("x")),  # type: ignore[call-overload]
        ("part must be a bucket", lambda: all_of(one.bucket("x").verbose)),  # type: ignore[call-overload]
        ("tokens must be an int from 1", lambda: all_of((one.bucket("x"), 0))),
        ("tokens must be an int from 1", lambda: all_of((one.bucket("x"), True))),
        ("spread must be True or False", lambda: all_of(one.bucket("x"), spread=1)),  # type: ignore[call-overload]
        ("different keys in the store; got b'a:x' twice", lambda: all_of(one.bucket("x"), one.bucket("x"))),
        ("over one store; .* make the second", lambda: all_of(one.bucket("x"), elsewhere.bucket("x"))),
        ("go by one clock", lambda: all_of(one.bucket("x"), no_clock.bucket("x"))),
        ("without an optimization; got one for the key 'x'", lambda: all_of(one.bucket("x"), by_memory)),
        ("sync code, or of asyncio, and not of both", lambda: all_of(one.bucket("x"), awaited.bucket("x"))),  # type: ignore[call-overload]
        ("16 buckets at most; got 17", lambda: all_of(*(one.bucket(str(number)) for number in range(17)))),
    ]
    for message, made in refused:
        with pytest.raises(InvalidArgumentError, match=message):
            made()
    assert len(store) == 0


def test_what_is_spread_may_be_of_several_stores_and_have_optimizations(clock: ManualClock) -> None:
    one = ProxyManager(MemoryStore(clock=clock), "5/minute", prefix="a:")
    other = ProxyManager(MemoryStore(clock=clock), "3/minute", prefix="b:", optimization=Optimization.delaying(2, 60))
    limit = all_of(one.bucket("x"), other.bucket("x"), spread=True)
    assert [limit.try_consume() for _ in range(4)] == [True] * 3 + [False]
    assert one.snapshot("x").consumed_tokens == 3


def test_two_system_clocks_are_one() -> None:
    store = MemoryStore()
    buckets = [ProxyManager(store, "5/minute", prefix=prefix, clock=SystemClock()).bucket("x") for prefix in "ab"]
    assert all_of(*buckets).try_consume()


def test_it_prints_its_keys_and_is_not_pickled(face: type, store: SwappingMemoryStore) -> None:
    manager = face(store if face is ProxyManager else for_asyncio(store), "5/minute")
    limit: Any = all_of(manager.bucket("x"), manager.bucket(b"y"))
    assert type(limit) is (AllOf if face is ProxyManager else AsyncAllOf)
    assert repr(limit) == f"{type(limit).__name__}('x', b'y')"
    assert limit.keys == ("x", b"y")


async def test_a_timeout_is_that_of_a_call(setting: Setting) -> None:
    limit = setting.both()
    for timeout in (0, -1, "1", timedelta(0)):
        with pytest.raises(InvalidArgumentError, match="timeout"):
            await limit.try_consume(timeout=timeout)
    assert await limit.try_consume(timeout=timedelta(seconds=5))
    for max_wait in (-1, "1"):
        with pytest.raises(InvalidArgumentError, match="max_wait"):
            await limit.consume(max_wait=max_wait)


async def test_any_of_the_managers_that_is_closed_is_an_error(setting: Setting, spread: bool) -> None:
    limit = setting.both(spread=spread)
    assert await limit.try_consume()
    await (Settled(setting.users).aclose() if setting.face is AsyncProxyManager else Settled(setting.users).close())
    for verb in ("try_consume", "consume", "estimate_ability_to_consume", "snapshot", "give_back"):
        with pytest.raises(RateLimitError, match="is closed"):
            await getattr(limit, verb)()
    assert (await Settled(setting.tenants.bucket("{acme}")).snapshot()).consumed_tokens == 1
