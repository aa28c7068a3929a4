"""Reservations that settle: what is charged when, and what is left however their block ends; on stores in memory."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from heapq import heappop, heappush
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit import (
    AsyncProxyManager,
    AsyncReservation,
    BucketConfiguration,
    CountingListener,
    Decision,
    InvalidArgumentError,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    RateLimitExceeded,
    Reservation,
    ReservationOverflowError,
    StoreError,
    StoreUnavailableError,
    TokensInheritance,
)
from ratelimit.core.numbers import MAX
from ratelimit.stores.protocol import Lost
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock, SwappingMemoryStore
from tests.engine.unreliable import DOWN, IN_DOUBT, Unreliable
from tests.support.both_faces import for_asyncio, settled
from tests.support.inside import local_buckets_of
from tests.support.reservations import consumed, entered

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
LIMITS = "1000/hour"

Make = Callable[..., Any]


class ConnectError(Exception):
    """The work was never begun."""


class CallError(Exception):
    """The work has failed, and may have been done in part."""


def fail(error: Exception) -> None:
    raise error


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def store() -> Unreliable:
    return Unreliable()


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest, store: Unreliable, clock: ManualClock) -> Make:
    """Make a manager over the store that fails on command."""

    def make(limits: Any = LIMITS, **given: Any) -> Any:
        given = {"clock": clock, **given}
        if request.param == "sync":
            return ProxyManager(store, limits, **given)
        return AsyncProxyManager(for_asyncio(store), limits, **given)

    return make


@pytest.fixture
def manager(make: Make) -> Any:
    return make()


# What is charged


@pytest.mark.parametrize("used", [0, 1, 399, 400, 401, 999, 1000, 5000])
async def test_what_was_used_is_charged_in_the_end(manager: Any, used: int) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        assert await consumed(manager) == 400
        await reservation.settle(used)
    assert await consumed(manager) == used
    assert await settled(manager.available_tokens("key")) == 1000 - used


async def test_taking_and_settling_is_a_swap_each(manager: Any, store: Unreliable) -> None:
    assert await settled(manager.try_consume("key"))
    for used in (100, 300):
        store.asked = 0
        async with entered(manager.reserve("key", 200)) as reservation:
            assert store.asked == 1
            await reservation.settle(used)
        assert store.asked == 2


async def test_nothing_is_sent_where_the_estimate_was_right(manager: Any, store: Unreliable) -> None:
    async with entered(manager.reserve("key", 200)) as reservation:
        store.asked = 0
        await reservation.settle(200)
    assert store.asked == 0
    assert await consumed(manager) == 200


async def test_a_reservation_is_of_a_bucket_as_well(manager: Any) -> None:
    bucket = manager.bucket("key", "50/minute")
    async with entered(bucket.reserve(30)) as reservation:
        await reservation.settle(10)
    assert await settled(bucket.available_tokens()) == 40


async def test_it_shows_its_tokens_and_the_answer_of_the_bucket(manager: Any) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        shown = reservation.face
        assert shown.tokens == 400
        assert (shown.probe.consumed, shown.probe.remaining_tokens, shown.probe.degraded) == (True, 600, False)
        assert repr(shown) == f"{type(shown).__name__}(400 tokens of 'key', open)"
        await reservation.settle(3)
        assert repr(shown) == f"{type(shown).__name__}(400 tokens of 'key', settled)"
    cancelled = manager.reserve("key", 7)
    assert repr(cancelled) == f"{type(cancelled).__name__}(not entered)"
    async with entered(cancelled) as reservation:
        await reservation.cancel()
    assert repr(cancelled) == f"{type(cancelled).__name__}(7 tokens of 'key', cancelled)"


def test_nothing_is_sent_before_the_block(manager: Any, store: Unreliable) -> None:
    store.down = DOWN
    reservation = manager.reserve("key", 5)
    assert isinstance(reservation, Reservation | AsyncReservation)
    assert store.asked == 0


async def test_several_limits_are_settled_together(make: Make) -> None:
    manager = make("100/minute; 1000/day intervally")
    async with entered(manager.reserve("key", 80)) as reservation:
        await reservation.settle(30)
    result = await settled(manager.bucket("key").verbose.available_tokens())
    assert result.available_tokens_per_bandwidth == (70, 970)
    async with entered(manager.reserve("key", 50)) as reservation:
        await reservation.settle(150)
    result = await settled(manager.bucket("key").verbose.available_tokens())
    assert result.available_tokens_per_bandwidth == (-80, 820)
    assert await consumed(manager) == 180


async def test_what_is_given_back_never_fills_a_bucket_above_its_capacity(manager: Any, clock: ManualClock) -> None:
    async with entered(manager.reserve("key", 600)) as reservation:
        clock.advance(3600)
        await reservation.settle(100)
    assert await settled(manager.available_tokens("key")) == 1000
    assert await consumed(manager) == 100


async def test_an_excess_is_debt_that_is_paid_before_anybody_is_admitted(manager: Any, clock: ManualClock) -> None:
    async with entered(manager.reserve("key", 1000)) as reservation:
        await reservation.settle(1500)
    clock.advance(1799)
    assert not await settled(manager.try_consume("key"))
    clock.advance(5)
    assert await settled(manager.try_consume("key"))


async def test_a_debt_that_could_never_be_paid_is_an_error_and_changes_nothing(manager: Any) -> None:
    async with entered(manager.reserve("key", 10)) as reservation:
        with pytest.raises(ReservationOverflowError):
            await reservation.settle(MAX)
        assert await consumed(manager) == 10
        await reservation.settle(4)
    assert await consumed(manager) == 4


# Refusals and waits


async def test_a_refusal_is_raised_with_its_probe(manager: Any) -> None:
    assert await settled(manager.try_consume("key", 900))
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(manager.reserve("key", 200)):
            pytest.fail("the block was entered")
    probe = await settled(manager.try_consume_and_return_remaining("key", 200))
    assert (caught.value.key, caught.value.probe) == ("key", probe)
    assert caught.value.retry_after == 360.0
    assert await consumed(manager) == 900


@pytest.mark.parametrize("max_wait", [None, 360, timedelta(minutes=7)])
async def test_it_waits_as_long_as_it_may(manager: Any, clock: ManualClock, max_wait: Any) -> None:
    assert await settled(manager.try_consume("key", 900))
    async with entered(manager.reserve("key", 200, max_wait=max_wait)) as reservation:
        assert clock.slept == [360 * SECOND]
        assert reservation.face.probe.consumed
        await reservation.settle(50)
    assert await consumed(manager) == 950


async def test_it_does_not_wait_for_longer(manager: Any, clock: ManualClock) -> None:
    assert await settled(manager.try_consume("key", 900))
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(manager.reserve("key", 200, max_wait=359)):
            pytest.fail("the block was entered")
    assert caught.value.retry_after == 360.0
    assert clock.slept == []
    assert await consumed(manager) == 900


async def test_a_reservation_that_is_ahead_of_it_refuses_it(make: Make, store: Unreliable) -> None:
    """Another caller reserves between the look at the bucket and the reservation."""
    manager = make()
    assert await settled(manager.try_consume("key", 1000))
    other = ProxyManager(store, LIMITS, clock=ManualClock(NOW, advance_on_sleep=False))
    read, swap = store.get, store.swap

    def get(key: Any) -> bytes | None:
        found = read(key)
        store.get = read  # type: ignore[method-assign]
        assert other.consume("key", 100)
        return found

    store.get = get  # type: ignore[method-assign]
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(manager.reserve("key", 100, max_wait=500)):
            pytest.fail("the block was entered")
    assert caught.value.retry_after == 720.0
    assert store.swap == swap
    assert await consumed(manager) == 1100


# More than the bucket can hold


@pytest.mark.parametrize("max_wait", [0, 5, None])
@pytest.mark.parametrize("limits", ["100/minute", "200/minute; 100/hour", "100/minute intervally", "10/s burst 100"])
async def test_an_estimate_above_the_capacity_is_cut_to_it(make: Make, limits: str, max_wait: Any) -> None:
    manager = make(limits)
    async with entered(manager.reserve("key", 5000, max_wait=max_wait)) as reservation:
        assert reservation.face.tokens == 100
        await reservation.settle(250)
    assert await consumed(manager) == 250
    assert await settled(manager.available_tokens("key")) == -150


async def test_the_capacity_is_that_of_the_stored_limits(make: Make) -> None:
    assert await settled(make("500/hour").try_consume("key", 1))
    assert await settled(make("9000/hour").try_consume("other", 1))
    manager = make("1000/hour")
    await settled(manager.reset("key"))
    async with entered(manager.reserve("key", 800)) as reservation:
        assert reservation.face.tokens == 500
    async with entered(manager.reserve("other", 5000)) as reservation:
        assert reservation.face.tokens == 5000


async def test_one_that_is_cut_waits_for_a_full_bucket(manager: Any, clock: ManualClock) -> None:
    assert await settled(manager.try_consume("key", 500))
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(manager.reserve("key", 2000)):
            pytest.fail("the block was entered")
    assert caught.value.retry_after == 1800.0
    async with entered(manager.reserve("key", 2000, max_wait=None)) as reservation:
        assert reservation.face.tokens == 1000
    assert clock.slept == [1800 * SECOND]


# How a block ends


async def test_left_without_settling_the_tokens_stay_charged(manager: Any) -> None:
    async with entered(manager.reserve("key", 400)):
        pass
    assert await consumed(manager) == 400


@pytest.mark.parametrize("kind", [CallError, KeyboardInterrupt, asyncio.CancelledError, SystemExit, GeneratorExit])
async def test_left_by_an_exception_they_stay_charged(manager: Any, kind: type[BaseException]) -> None:
    reservation = manager.reserve("key", 400)
    error = kind()
    with pytest.raises(kind) as caught:
        await left_by(reservation, error)
    assert caught.value is error
    assert await consumed(manager) == 400


async def left_by(reservation: Any, error: BaseException) -> None:
    if isinstance(reservation, AsyncReservation):
        async with reservation:
            raise error
    with reservation:
        raise error


@pytest.mark.parametrize("refund_on", [ConnectError, (ConnectError,), (ValueError, ConnectError), Exception])
async def test_exceptions_that_refund_give_all_of_it_back(manager: Any, refund_on: Any) -> None:
    with pytest.raises(ConnectError):
        await left_by(manager.reserve("key", 400, refund_on=refund_on), ConnectError())
    assert await consumed(manager) == 0
    assert await settled(manager.available_tokens("key")) == 1000
    with pytest.raises(KeyboardInterrupt):
        await left_by(manager.reserve("key", 400, refund_on=refund_on), KeyboardInterrupt())
    assert await consumed(manager) == 400


async def test_they_give_nothing_back_that_is_settled(manager: Any) -> None:
    with pytest.raises(ConnectError):
        async with entered(manager.reserve("key", 400, refund_on=ConnectError)) as reservation:
            await reservation.settle(300)
            raise ConnectError
    assert await consumed(manager) == 300


async def test_a_settlement_that_fails_refunds_nothing(manager: Any, store: Unreliable) -> None:
    """Its error is one of those that refund, but the work was done."""
    with pytest.raises(StoreUnavailableError):
        async with entered(manager.reserve("key", 400, refund_on=Exception)) as reservation:
            store.down = DOWN
            try:
                await reservation.settle(300)
            finally:
                store.down = None
    assert await consumed(manager) == 400


async def test_cancelling_gives_all_of_it_back(manager: Any) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        await reservation.cancel()
    assert await consumed(manager) == 0


async def test_it_may_be_settled_after_its_block(manager: Any) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        pass
    await reservation.settle(150)
    assert await consumed(manager) == 150


@pytest.mark.parametrize("first", ["settle", "cancel"])
@pytest.mark.parametrize("second", ["settle", "cancel"])
async def test_it_is_settled_or_cancelled_once(manager: Any, first: str, second: str) -> None:
    def arguments(verb: str) -> tuple[int, ...]:
        return (100,) if verb == "settle" else ()

    async with entered(manager.reserve("key", 400)) as reservation:
        await getattr(reservation, first)(*arguments(first))
        after = await consumed(manager)
        how = "settled" if first == "settle" else "cancelled"
        with pytest.raises(InvalidArgumentError, match=f"must be settled or cancelled once; it is {how}"):
            await getattr(reservation, second)(*arguments(second))
    assert await consumed(manager) == after


# Wrong arguments


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "5", True, None, 2**63])
def test_an_estimate_is_an_int_of_1_or_more(manager: Any, tokens: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="tokens must be an int from 1 to"):
        manager.reserve("key", tokens)


@pytest.mark.parametrize("tokens", [-1, 1.5, "5", True, None, 2**63])
async def test_what_was_used_is_an_int_of_0_or_more(manager: Any, tokens: Any) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        with pytest.raises(InvalidArgumentError, match="tokens must be an int from 0 to"):
            await reservation.settle(tokens)
        await reservation.settle(1)
    assert await consumed(manager) == 1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"max_wait": -1}, "max_wait must be 0 or more"),
        ({"max_wait": "5"}, "max_wait must be"),
        ({"timeout": 0}, "timeout must be above 0"),
        ({"refund_on": ValueError()}, "refund_on must be a class of exceptions, or a tuple of them"),
        ({"refund_on": [ValueError]}, "refund_on must be"),
        ({"refund_on": (int,)}, "refund_on must be"),
    ],
)
def test_what_is_not_valid_is_refused_at_once(manager: Any, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        manager.reserve("key", 5, **wrong)


async def test_a_reservation_is_entered_once_and_before_all_else(manager: Any) -> None:
    reservation = manager.reserve("key", 5)
    for use in (lambda: reservation.tokens, lambda: reservation.probe, reservation.cancel):
        with pytest.raises(InvalidArgumentError, match="must be entered first"):
            await settled(use())
    async with entered(reservation):
        pass
    with pytest.raises(InvalidArgumentError, match="must be entered once"):
        async with entered(reservation):
            pass
    assert await consumed(manager) == 5


def test_it_belongs_to_its_process(manager: Any) -> None:
    reservation = manager.reserve("key", 5)
    assert copy.deepcopy(reservation) is reservation
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(reservation)


# Where the store fails


async def test_an_error_of_the_store_is_raised_and_it_may_be_settled_again(manager: Any, store: Unreliable) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = DOWN
        with pytest.raises(StoreUnavailableError) as caught:
            await reservation.settle(100)
        assert caught.value.key == "key"
        store.down = None
        await reservation.settle(100)
    assert await consumed(manager) == 100


async def test_one_whose_settlement_is_in_doubt_is_not_settled_again(manager: Any, store: Unreliable) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = IN_DOUBT
        with pytest.raises(StoreError):
            await reservation.settle(100)
        store.down = None
        with pytest.raises(InvalidArgumentError, match="it is settled, in doubt"):
            await reservation.settle(100)
    assert await consumed(manager) == 400


async def test_an_entry_that_fails_reserves_nothing(manager: Any, store: Unreliable) -> None:
    store.down = DOWN
    with pytest.raises(StoreUnavailableError):
        async with entered(manager.reserve("key", 400)):
            pytest.fail("the block was entered")


async def test_a_refund_that_fails_never_hides_what_the_caller_raised(
    manager: Any, store: Unreliable, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectError), caplog.at_level(logging.WARNING, "ratelimit"):
        async with entered(manager.reserve("key", 400, refund_on=ConnectError)):
            store.down = DOWN
            raise ConnectError
    assert "a reservation of 400 tokens could not be cancelled: the store is down" in caplog.text
    store.down = None
    assert await consumed(manager) == 400


async def test_nor_does_a_settlement_that_fails_while_it_is_handled(
    manager: Any, store: Unreliable, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(manager, AsyncProxyManager):
        with pytest.raises(CallError):
            async with manager.reserve("key", 400) as areservation:
                try:
                    store.down = DOWN
                    raise CallError
                finally:
                    await areservation.settle(100)
    else:
        with pytest.raises(CallError), manager.reserve("key", 400) as reservation:
            try:
                store.down = DOWN
                fail(CallError())
            except CallError:
                reservation.cancel()
                raise
    assert "a reservation of 400 tokens could not be" in caplog.text


async def test_an_exception_that_was_handled_before_the_block_hides_no_error(manager: Any, store: Unreliable) -> None:
    try:
        fail(CallError())
    except CallError:
        with pytest.raises(StoreUnavailableError):
            async with entered(manager.reserve("key", 400)) as reservation:
                store.down = DOWN
                await reservation.settle(100)


async def test_where_errors_allow_nothing_is_charged_and_nothing_settled(make: Make, store: Unreliable) -> None:
    manager = make(on_error=OnError.ALLOW)
    assert await settled(manager.try_consume("key", 50))
    store.down = DOWN
    async with entered(manager.reserve("key", 400)) as reservation:
        assert reservation.face.probe.degraded
        store.down = None
        await reservation.settle(100)
    assert await consumed(manager) == 50


async def test_where_errors_allow_what_was_reserved_before_stays_charged(make: Make, store: Unreliable) -> None:
    manager = make(on_error=OnError.ALLOW)
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = DOWN
        await reservation.settle(100)
    store.down = None
    assert await consumed(manager) == 400


async def test_where_errors_deny_a_rest_stays_charged_and_an_excess_is_an_error(make: Make, store: Unreliable) -> None:
    manager = make(on_error=OnError.DENY)
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = DOWN
        await reservation.settle(100)
    async with contextlib.AsyncExitStack() as stack:
        store.down = None
        reservation = await stack.enter_async_context(entered(manager.reserve("key", 400)))
        store.down = DOWN
        with pytest.raises(StoreUnavailableError):
            await reservation.settle(500)
        store.down = None
        await reservation.settle(500)
        store.down = DOWN
        with pytest.raises(RateLimitExceeded) as caught:
            await stack.enter_async_context(entered(manager.reserve("key", 1)))
        assert caught.value.probe.degraded
    store.down = None
    assert await consumed(manager) == 900


@pytest.mark.parametrize("used", [0, 100, 400, 700])
async def test_what_a_local_bucket_has_granted_is_settled_there(make: Make, store: Unreliable, used: int) -> None:
    manager = make(on_error=OnError.local(1 / 2))
    assert await settled(manager.try_consume("key", 50))
    store.down = DOWN
    async with entered(manager.reserve("key", 400)) as reservation:
        assert reservation.face.probe.degraded
        await reservation.settle(used)
    store.down = None
    assert await settled(manager.try_consume("key", 1)) is (used + 50 < 1000)
    assert await consumed(manager) == 51 + used


@pytest.mark.parametrize("used", [100, 700])
async def test_it_is_settled_there_although_the_store_is_back(make: Make, store: Unreliable, used: int) -> None:
    manager = make(on_error=OnError.local(1 / 2))
    store.down = DOWN
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = None
        store.asked = 0
        await reservation.settle(used)
        assert store.asked == 0
    assert await settled(manager.try_consume("key", 1))
    assert await consumed(manager) == 1 + used


async def test_what_was_charged_to_the_shared_bucket_meanwhile_stays_charged(make: Make, store: Unreliable) -> None:
    """Nobody knows which tokens they were: they come back by the refill, and are never given back twice."""
    manager = make(on_error=OnError.local(1 / 2))
    store.down = DOWN
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = None
        assert await settled(manager.try_consume("key", 1))
        await reservation.settle(100)
    assert await settled(manager.try_consume("key", 1))
    assert await consumed(manager) == 402


async def test_a_local_bucket_that_is_forgotten_settles_nothing(make: Make, store: Unreliable) -> None:
    manager = make(on_error=OnError.local(1))
    for used in (1, 10):
        store.down = DOWN
        async with entered(manager.reserve("key", 5)) as reservation:
            local_buckets_of(manager).forget(b"key")
            await reservation.settle(used)
        store.down = None
        assert not local_buckets_of(manager)


async def test_a_local_bucket_may_have_decided_in_doubt_and_then_settles_nothing(make: Make, store: Unreliable) -> None:
    manager = make(on_error=OnError.local(1))
    store.down = IN_DOUBT
    async with entered(manager.reserve("key", 400)) as reservation:
        await reservation.settle(100)
    store.down = None
    assert await settled(manager.try_consume("key", 1))
    assert await consumed(manager) == 1


async def test_a_rest_in_doubt_is_not_credited_to_a_local_bucket(make: Make, store: Unreliable) -> None:
    manager = make(on_error=OnError.local(1))
    async with entered(manager.reserve("key", 400)) as reservation:
        store.down = DOWN
        assert await settled(manager.try_consume("key", 300))
        store.down = IN_DOUBT
        await reservation.settle(100)
    store.down = DOWN
    assert (await settled(manager.try_consume_and_return_remaining("key"))).remaining_tokens == 699


# Keys without limits, and limits that are looked up


async def test_a_key_without_limits_is_not_charged(make: Make) -> None:
    manager = make(lambda key: None if key == "free" else LIMITS)
    async with entered(manager.reserve("free", 10**9)) as reservation:
        assert reservation.face.tokens == 10**9
        await reservation.settle(5)
    async with entered(manager.reserve("key", 10**9)) as reservation:
        assert reservation.face.tokens == 1000
        await reservation.settle(5)
    assert await consumed(manager) == 5


async def test_limits_may_change_while_a_reservation_is_open(manager: Any) -> None:
    async with entered(manager.reserve("key", 400)) as reservation:
        await settled(manager.replace_configuration("key", "100/hour", TokensInheritance.RESET))
        await reservation.settle(500)
    assert await settled(manager.available_tokens("key")) == 0
    assert await consumed(manager) == 500


# Listeners


class Recorder:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def on_interrupted(self, *_: Any) -> None:
        raise NotImplementedError


async def test_listeners_are_notified_of_what_was_settled(make: Make, store: Unreliable) -> None:
    recorder = Recorder()
    manager = make(listener=recorder)
    for used in (100, 600, 400):
        async with entered(manager.reserve("key", 400)) as reservation:
            await reservation.settle(used)
        await settled(manager.reset("key"))
    seen = [(each.verb, each.tokens, each.consumed, each.given_back, each.remaining) for each in recorder.decisions]
    assert seen == [
        ("try_consume_and_return_remaining", 400, 400, 0, 600),
        ("settle", 100, 0, 300, 900),
        ("try_consume_and_return_remaining", 400, 400, 0, 600),
        ("settle", 600, 200, 0, 400),
        ("try_consume_and_return_remaining", 400, 400, 0, 600),
    ]
    store.down = DOWN
    async with entered(make(listener=recorder, on_error=OnError.ALLOW).reserve("key", 400)):
        pass
    store.down = None
    allowing = make(listener=recorder, on_error=OnError.ALLOW)
    async with entered(allowing.reserve("key", 400)) as reservation:
        store.down = DOWN
        await reservation.settle(1)
    last = recorder.decisions[-1]
    assert (last.verb, last.consumed, last.given_back, last.degraded) == ("settle", 0, 0, True)


async def test_a_settlement_is_counted_and_never_as_a_refusal(make: Make) -> None:
    listener = CountingListener()
    manager = make(listener=listener)
    for used in (100, 600):
        async with entered(manager.reserve("key", 400)) as reservation:
            await reservation.settle(used)
    assert (listener.consumed, listener.given_back, listener.rejected) == (1000, 300, 0)
    assert listener.consumed - listener.given_back == await consumed(manager) == 700


# Optimizations


@pytest.mark.parametrize("used", [100, 600])
async def test_what_was_decided_without_the_store_is_settled_with_it(make: Make, used: int) -> None:
    manager = make(optimization=Optimization.delaying(500, 60))
    assert await settled(manager.try_consume("key", 1))
    async with entered(manager.reserve("key", 400)) as reservation:
        await reservation.settle(used)
    await settled(manager.bucket("key").sync())
    assert await consumed(make()) == 1 + used


# Cancellations and interruptions


async def test_a_cancelled_task_leaves_its_tokens_charged() -> None:
    manager = AsyncProxyManager.from_url("memory://", LIMITS)
    inside = asyncio.Event()

    async def call() -> None:
        async with manager.reserve("key", 400):
            inside.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(call())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await consumed(manager) == 400


class Slow(AsyncSwappingMemoryStore):
    """Whose swaps take until they are let go; they are carried out at once."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.asked = asyncio.Event()
        self.left = 100

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.asked.set()
        await self.may_go.wait()
        self.left -= 1
        if self.left < 0:
            raise StoreUnavailableError(key, "the store is down")
        return await super().swap(key, before, after, ttl_millis)


async def test_a_task_that_is_cancelled_while_it_settles_has_settled() -> None:
    store = Slow()
    manager = AsyncProxyManager(store, LIMITS)
    entered = asyncio.Event()

    async def call() -> None:
        async with manager.reserve("key", 400, refund_on=asyncio.CancelledError) as reservation:
            store.may_go.clear()
            store.asked.clear()
            entered.set()
            await reservation.settle(100)

    task = asyncio.create_task(call())
    await entered.wait()
    await store.asked.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    store.may_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await consumed(manager) == 100


@pytest.mark.parametrize("fails", [False, True])
async def test_a_task_that_is_cancelled_while_it_enters_has_reserved_nothing(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = Slow()
    store.left = 1 if fails else 100
    manager = AsyncProxyManager(store, LIMITS)
    store.may_go.clear()

    async def call() -> None:
        async with manager.reserve("key", 400):
            pytest.fail("the block was entered")

    task = asyncio.create_task(call())
    await store.asked.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    store.may_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await consumed(manager) == (400 if fails else 0)
    assert ("could not be given back: the store is down" in caplog.text) is fails


async def test_a_task_that_is_cancelled_while_it_waits_has_reserved_nothing() -> None:
    manager = AsyncProxyManager.from_url("memory://", LIMITS)
    assert await manager.try_consume("key", 1000)

    async def call() -> None:
        async with manager.reserve("key", 400, max_wait=None):
            pytest.fail("the block was entered")

    task = asyncio.create_task(call())
    while await consumed(manager) == 1000:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await consumed(manager) == 1000


def test_two_threads_settle_once() -> None:
    manager = ProxyManager(SwappingMemoryStore(), LIMITS)
    with manager.reserve("key", 1000) as reservation, ThreadPoolExecutor(8) as threads:
        ready = threading.Barrier(8)

        def settle(_: int) -> bool:
            ready.wait(10)
            try:
                reservation.settle(10)
            except InvalidArgumentError:
                return False
            return True

        assert sum(threads.map(settle, range(8))) == 1
    assert manager.snapshot("key").consumed_tokens == 10


# In all


OUTCOMES = st.sampled_from(["settle", "cancel", "leave", "fail", "refund"])


@given(
    st.sampled_from(["1000/second", "1000/second; 5000/minute intervally", "500/second intervally", "7/second"]),
    st.lists(st.tuples(st.integers(1, 1500), st.integers(0, 3000), OUTCOMES, st.integers(0, 2 * SECOND)), max_size=25),
)
@settings(deadline=None)
def test_settled_totals_are_what_was_used_to_the_token(limits: str, calls: list[tuple[int, int, str, int]]) -> None:
    clock = ManualClock(NOW)
    manager = ProxyManager(MemoryStore(clock=clock), limits, clock=clock)
    smallest = min(limit.capacity for limit in BucketConfiguration.parse(limits))
    expected = 0
    for estimate, used, outcome, pause in calls:
        clock.advance(nanos=pause)
        try:
            with manager.reserve("key", estimate, refund_on=ConnectError) as reservation:
                assert reservation.tokens == min(estimate, smallest)
                if outcome == "settle":
                    reservation.settle(used)
                elif outcome == "cancel":
                    reservation.cancel()
                elif outcome == "fail":
                    fail(CallError())
                elif outcome == "refund":
                    fail(ConnectError())
        except RateLimitExceeded:
            continue
        except (CallError, ConnectError):
            pass
        if outcome == "settle":
            expected += used
        elif outcome in ("leave", "fail"):
            expected += min(estimate, smallest)
    assert manager.try_consume("key", 1) or True
    taken = manager.snapshot("key").consumed_tokens
    assert taken - expected in (0, 1)


class Call(NamedTuple):
    """A call that reserves an estimate, and settles what it has used some time later."""

    pause: int
    estimate: int
    used: int
    duration: int


class Settlement(NamedTuple):
    """What an admitted call has reserved and used, and when; times are in nanoseconds."""

    begun: int
    ended: int
    reserved: int
    used: int


def settlements(manager: ProxyManager, clock: ManualClock, calls: list[Call]) -> list[Settlement]:
    """Let calls begin one after another, each of which ends in its own time."""
    under_way: list[tuple[int, int, Call, int, Reservation]] = []
    ended: list[Settlement] = []

    def end_until(then: int) -> None:
        while under_way and under_way[0][0] <= then:
            at, _, call, begun, reservation = heappop(under_way)
            clock.set(at)
            reservation.settle(call.used)
            ended.append(Settlement(begun, at, reservation.tokens, call.used))

    begun = NOW
    for number, call in enumerate(calls):
        begun += call.pause
        end_until(begun)
        clock.set(begun)
        with contextlib.suppress(RateLimitExceeded), manager.reserve("key", call.estimate) as reservation:
            heappush(under_way, (begun + call.duration, number, call, begun, reservation))
    end_until(begun + 100 * SECOND)
    return ended


TIMES = st.integers(0, 3 * SECOND)
CALLS = st.builds(Call, TIMES, st.integers(1, 150), st.integers(0, 200), TIMES)


@given(st.sampled_from([100, 1000]), st.lists(CALLS, max_size=30))
def test_calls_of_any_span_use_no_more_than_the_limit_admits(rate: int, calls: list[Call]) -> None:
    clock = ManualClock(NOW)
    manager = ProxyManager(MemoryStore(clock=clock), f"{rate}/10s burst 100", clock=clock)
    ended = settlements(manager, clock, calls)
    for first in (NOW, *(each.begun for each in ended)):
        for last in (each.begun for each in ended if each.begun >= first):
            own = [each for each in ended if first <= each.begun <= last]
            earlier = [each for each in ended if each.begun < first <= each.ended <= last]
            given_back = sum(max(0, each.reserved - each.used) for each in earlier)
            unpaid = sum(max(0, each.used - each.reserved) for each in own if each.ended >= last)
            admitted = 100 + rate * (last - first) // (10 * SECOND) + 1
            assert sum(each.used for each in own) <= admitted + given_back + unpaid
