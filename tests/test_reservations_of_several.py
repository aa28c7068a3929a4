"""Reservations of several buckets: taken in one decision, settled in one decision; on stores in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit import (
    AsyncCombinedReservation,
    AsyncProxyManager,
    CombinedProbe,
    CombinedReservation,
    CountingListener,
    Decision,
    InvalidArgumentError,
    MemoryStore,
    OnError,
    ProxyManager,
    RateLimitExceeded,
    ReservationOverflowError,
    StoreError,
    StoreUnavailableError,
    all_of,
)
from ratelimit.core.numbers import MAX
from ratelimit.stores.protocol import Lost, Swap
from ratelimit.testing import AsyncSwappingMemoryStore, ManualClock
from tests.engine.unreliable import DOWN, IN_DOUBT, Unreliable
from tests.support.both_faces import for_asyncio, settled
from tests.support.reservations import entered

NOW = 1_700_000_000 * 10**9
SECOND = 10**9


class ConnectError(Exception):
    """The work was never begun."""


class Gateway:
    """Requests of a user, and tokens of the user and of the organisation."""

    def __init__(self, face: type, store: Unreliable, **settings: Any) -> None:
        clock = ManualClock(NOW)
        self.clock = clock
        self.face = face
        self.store: Any = store if face is ProxyManager else for_asyncio(store)
        given: dict[str, Any] = {"clock": clock, **settings}
        self.managers = [
            face(self.store, limits, prefix=prefix, **given)
            for limits, prefix in (("10/minute", "r:"), ("1000/hour", "u:"), ("1500/hour", "o:"))
        ]

    def parts(self, estimate: int = 400, *, organisation: int | None = None) -> tuple[Any, ...]:
        requests, users, organisations = (manager.bucket("{acme}") for manager in self.managers)
        return requests, (users, estimate), (organisations, organisation or estimate)

    def reserve(self, estimate: int = 400, *, spread: bool = False, **keywords: Any) -> Any:
        return all_of(*self.parts(estimate), spread=spread).reserve(**keywords)

    async def consumed(self) -> list[int]:
        return [(await settled(manager.snapshot("{acme}"))).consumed_tokens for manager in self.managers]

    async def available(self) -> list[int]:
        return [await settled(manager.available_tokens("{acme}")) for manager in self.managers]


@pytest.fixture
def store() -> Unreliable:
    return Unreliable()


Make = Callable[..., Gateway]


@pytest.fixture(params=["sync", "asyncio"])
def make(request: pytest.FixtureRequest, store: Unreliable) -> Make:
    def make(**settings: Any) -> Gateway:
        return Gateway(ProxyManager if request.param == "sync" else AsyncProxyManager, store, **settings)

    return make


@pytest.fixture
def gateway(make: Make) -> Gateway:
    return make()


@pytest.fixture(params=[False, True], ids=["together", "spread"])
def spread(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# What is charged


@pytest.mark.parametrize("used", [0, 1, 399, 400, 401, 999, 5000])
async def test_what_was_used_is_charged_where_there_was_an_estimate(gateway: Gateway, used: int, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)) as reservation:
        assert await gateway.consumed() == [1, 400, 400]
        await reservation.settle(used)
    assert await gateway.consumed() == [1, used, used]
    assert await gateway.available() == [9, 1000 - used, 1500 - used]


async def test_one_number_for_each_bucket(gateway: Gateway, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)) as reservation:
        await reservation.settle((3, 100, 700))
    assert await gateway.consumed() == [3, 100, 700]
    async with entered(gateway.reserve(spread=spread)) as reservation:
        await reservation.settle([0, 0, 400])
    assert await gateway.consumed() == [3, 100, 1100]


async def test_one_number_where_no_bucket_has_an_estimate(gateway: Gateway, spread: bool) -> None:
    buckets = [manager.bucket("{acme}") for manager in gateway.managers]
    async with entered(all_of(*buckets, spread=spread).reserve()) as reservation:
        await reservation.settle(3)
    assert await gateway.consumed() == [3, 3, 3]


async def test_cancelling_gives_the_requests_back_as_well(gateway: Gateway, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)) as reservation:
        await reservation.cancel()
    assert await gateway.consumed() == [0, 0, 0]


async def test_taking_and_settling_is_a_round_trip_each(gateway: Gateway, store: Unreliable) -> None:
    async with entered(gateway.reserve(1)):
        pass
    for used, trips in ((5, 1), (50, 1), (30, 0), ((1, 30, 3), 1), ((0, 30, 30), 1)):
        store.asked = 0
        async with entered(gateway.reserve(30)) as reservation:
            assert store.asked == 1
            await reservation.settle(used)
        assert store.asked == 1 + trips


async def test_it_shows_its_tokens_and_the_answer_of_all_buckets(gateway: Gateway) -> None:
    reservation = gateway.reserve()
    assert isinstance(reservation, CombinedReservation | AsyncCombinedReservation)
    name = type(reservation).__name__
    assert repr(reservation) == f"{name}(not entered)"
    async with entered(reservation) as open_one:
        assert reservation.tokens == (1, 400, 400)
        assert isinstance(reservation.probe, CombinedProbe)
        assert [part.remaining_tokens for part in reservation.probe.parts] == [9, 600, 1100]
        await open_one.settle(4)
    assert repr(reservation) == f"{name}((1, 400, 400) tokens of '{{acme}}', '{{acme}}', '{{acme}}', settled)"


async def test_it_is_settled_once(gateway: Gateway, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)) as reservation:
        await reservation.settle(100)
        for again in (lambda: reservation.settle(5), reservation.cancel):
            with pytest.raises(InvalidArgumentError, match="must be settled or cancelled once; it is settled"):
                await again()
    assert await gateway.consumed() == [1, 100, 100]


# Refusals and waits


async def test_a_refusal_names_the_bucket_with_the_longest_wait_and_charges_none(
    gateway: Gateway, spread: bool
) -> None:
    users, organisations = gateway.managers[1:]
    assert await settled(users.try_consume("{acme}", 700))
    assert await settled(organisations.try_consume("{acme}", 1499))
    parts = gateway.managers[0].bucket("{acme}"), (users.bucket("{acme}"), 400), (organisations.bucket("{acme}"), 2)
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(all_of(*parts, spread=spread).reserve()):
            pytest.fail("the block was entered")
    error = caught.value
    assert (error.key, error.retry_after) == ("{acme}", 360.0)
    assert [part.nanos_to_wait_for_refill // 10**8 for part in error.probe.parts] == [0, 3600, 24]
    assert len(error.probe.refused_by) == 2
    assert await gateway.consumed() == [0, 700, 1499]


@pytest.mark.parametrize("max_wait", [None, 360])
async def test_it_waits_as_long_as_it_may(gateway: Gateway, spread: bool, max_wait: Any) -> None:
    assert await settled(gateway.managers[1].try_consume("{acme}", 900))
    async with entered(gateway.reserve(200, spread=spread, max_wait=max_wait)) as reservation:
        assert sum(gateway.clock.slept) == 360 * SECOND
        await reservation.settle(50)
    assert await gateway.consumed() == [1, 950, 50]


async def test_it_does_not_wait_for_longer(gateway: Gateway, spread: bool) -> None:
    assert await settled(gateway.managers[1].try_consume("{acme}", 900))
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(gateway.reserve(200, spread=spread, max_wait=359)):
            pytest.fail("the block was entered")
    assert caught.value.retry_after == 360.0
    assert gateway.clock.slept == []


@pytest.mark.parametrize("max_wait", [0, 5, None])
async def test_an_estimate_is_cut_to_what_each_bucket_can_hold(gateway: Gateway, spread: bool, max_wait: Any) -> None:
    async with entered(gateway.reserve(1200, spread=spread, max_wait=max_wait)) as reservation:
        assert reservation.face.tokens == (1, 1000, 1200)
        await reservation.settle(1300)
    assert await gateway.consumed() == [1, 1300, 1300]
    assert await gateway.available() == [9, -300, 200]


async def test_one_that_is_cut_waits_for_a_full_bucket(gateway: Gateway, spread: bool) -> None:
    assert await settled(gateway.managers[1].try_consume("{acme}", 500))
    with pytest.raises(RateLimitExceeded) as caught:
        async with entered(gateway.reserve(1200, spread=spread)):
            pytest.fail("the block was entered")
    assert caught.value.retry_after == 1800.0
    async with entered(gateway.reserve(1200, spread=spread, max_wait=None)) as reservation:
        assert reservation.face.tokens == (1, 1000, 1200)
    assert sum(gateway.clock.slept) == 1800 * SECOND


async def test_a_debt_that_could_never_be_paid_changes_nothing(gateway: Gateway) -> None:
    async with entered(gateway.reserve()) as reservation:
        with pytest.raises(ReservationOverflowError):
            await reservation.settle((0, 100, MAX))
        assert await gateway.consumed() == [1, 400, 400]
        await reservation.settle(4)
    assert await gateway.consumed() == [1, 4, 4]


# Wrong arguments


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (-1, "tokens must be an int from 0 to"),
        (True, "tokens must be an int from 0 to"),
        ("700", "tokens must be an int from 0 to"),
        ((1, 700), "tokens must be one number, or one for each of the 3 buckets; got \\(1, 700\\)"),
        ((1, 700, -1), "tokens must be an int from 0 to"),
        ((), "tokens must be one number, or one for each of the 3 buckets"),
    ],
)
async def test_what_was_used_is_a_number_or_one_for_each(gateway: Gateway, tokens: Any, match: str) -> None:
    async with entered(gateway.reserve()) as reservation:
        with pytest.raises(InvalidArgumentError, match=match):
            await reservation.settle(tokens)
        await reservation.settle(1)
    assert await gateway.consumed() == [1, 1, 1]


async def test_one_number_says_too_little_where_estimates_differ(gateway: Gateway) -> None:
    limit: Any = all_of(*gateway.parts(400, organisation=500))
    async with entered(limit.reserve()) as reservation:
        with pytest.raises(InvalidArgumentError, match="tokens must be one number for each bucket, because their est"):
            await reservation.settle(100)
        await reservation.settle((1, 100, 200))
    assert await gateway.consumed() == [1, 100, 200]


@pytest.mark.parametrize("wrong", [{"max_wait": -1}, {"timeout": 0}, {"refund_on": [ValueError]}])
def test_what_is_not_valid_is_refused_at_once(gateway: Gateway, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{next(iter(wrong))} must be"):
        gateway.reserve(**wrong)


# How a block ends


async def test_left_without_settling_the_tokens_stay_charged(gateway: Gateway, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)):
        pass
    assert await gateway.consumed() == [1, 400, 400]


async def test_exceptions_that_refund_give_all_of_it_back(gateway: Gateway, spread: bool) -> None:
    for error, left in ((ConnectError, [0, 0, 0]), (KeyError, [1, 400, 400])):
        with pytest.raises(error):
            async with entered(gateway.reserve(spread=spread, refund_on=ConnectError)):
                raise error
        assert await gateway.consumed() == left


async def test_a_refund_that_fails_never_hides_what_the_caller_raised(
    gateway: Gateway, store: Unreliable, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConnectError), caplog.at_level(logging.WARNING, "ratelimit"):
        async with entered(gateway.reserve(refund_on=ConnectError)):
            store.down = DOWN
            raise ConnectError
    assert "a reservation of (1, 400, 400) tokens could not be cancelled: the store is down" in caplog.text
    store.down = None
    assert await gateway.consumed() == [1, 400, 400]


# Where the store fails


async def test_after_an_error_it_may_be_settled_again(gateway: Gateway, store: Unreliable, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)) as reservation:
        store.down = DOWN
        with pytest.raises(StoreUnavailableError):
            await reservation.settle(100)
        store.down = None
        await reservation.settle(100)
    assert await gateway.consumed() == [1, 100, 100]


async def test_in_doubt_it_is_not_settled_again(gateway: Gateway, store: Unreliable, spread: bool) -> None:
    async with entered(gateway.reserve(spread=spread)) as reservation:
        store.down = IN_DOUBT
        with pytest.raises(StoreError):
            await reservation.settle(100)
        store.down = None
        with pytest.raises(InvalidArgumentError, match="it is settled, in doubt"):
            await reservation.settle(100)
    assert await gateway.consumed() == [1, 400, 400]


async def test_a_bucket_that_is_settled_is_not_settled_again_with_the_others(gateway: Gateway) -> None:
    """Spread buckets are settled one after the other, and each of them once."""
    users = gateway.managers[1]
    async with entered(gateway.reserve(spread=True)) as reservation:
        proxy = users.bucket("{acme}")._proxy
        swap = gateway.store.swap

        def failing(key: bytes, *arguments: Any) -> Any:
            if key == proxy.target.stored_key:
                raise StoreUnavailableError(key, "that node is down")
            return swap(key, *arguments)

        gateway.store.swap = failing
        with pytest.raises(StoreUnavailableError, match="that node is down"):
            await reservation.settle(100)
        gateway.store.swap = swap
        assert await gateway.consumed() == [1, 400, 100]
        await reservation.settle(100)
    assert await gateway.consumed() == [1, 100, 100]


async def test_where_errors_allow_nothing_is_charged_and_nothing_settled(make: Make, store: Unreliable) -> None:
    gateway = make(on_error=OnError.ALLOW)
    async with entered(gateway.reserve()):
        pass
    store.down = DOWN
    async with entered(gateway.reserve()) as reservation:
        assert reservation.face.probe.degraded
        store.down = None
        await reservation.settle(100)
    assert await gateway.consumed() == [1, 400, 400]
    async with entered(gateway.reserve()) as reservation:
        store.down = DOWN
        await reservation.settle(100)
    store.down = None
    assert await gateway.consumed() == [2, 800, 800]


async def test_where_errors_deny_a_rest_stays_charged_and_an_excess_is_an_error(make: Make, store: Unreliable) -> None:
    gateway = make(on_error=OnError.DENY)
    async with entered(gateway.reserve()) as reservation:
        store.down = DOWN
        with pytest.raises(RateLimitExceeded) as caught:
            async with entered(gateway.reserve()):
                pytest.fail("the block was entered")
        assert caught.value.probe.degraded
        with pytest.raises(StoreUnavailableError):
            await reservation.settle((1, 100, 500))
        await reservation.settle(100)
    store.down = None
    assert await gateway.consumed() == [1, 400, 400]


@pytest.mark.parametrize("used", [0, 100, 400, 450])
@pytest.mark.parametrize("is_back", [False, True])
async def test_what_local_buckets_have_granted_is_settled_there(
    make: Make, store: Unreliable, used: int, is_back: bool, spread: bool
) -> None:
    gateway = make(on_error=OnError.local(1 / 2))
    store.down = DOWN
    async with entered(gateway.reserve(spread=spread)) as reservation:
        assert reservation.face.probe.degraded
        store.down = None if is_back else DOWN
        store.asked = 0
        await reservation.settle(used)
        assert store.asked == 0
    store.down = None
    for manager in gateway.managers:
        assert await settled(manager.try_consume("{acme}"))
    assert await gateway.consumed() == [2, 1 + used, 1 + used]


async def test_a_rest_that_is_settled_while_the_store_fails_goes_to_the_local_buckets(
    make: Make, store: Unreliable
) -> None:
    gateway = make(on_error=OnError.local(1))
    async with entered(gateway.reserve()) as reservation:
        store.down = DOWN
        assert await settled(gateway.managers[1].try_consume("{acme}", 300))
        await reservation.settle(100)
    probe = await settled(gateway.managers[1].try_consume_and_return_remaining("{acme}"))
    assert probe.remaining_tokens == 999


async def test_a_key_without_limits_is_not_charged(make: Make, spread: bool) -> None:
    gateway = make()
    free = gateway.face(gateway.store, lambda _: None, prefix="free:", clock=gateway.clock)
    limit: Any = all_of((free.bucket("{acme}"), 10**9), *gateway.parts(), spread=spread)
    async with entered(limit.reserve()) as reservation:
        assert reservation.face.tokens == (10**9, 1, 400, 400)
        await reservation.settle((5, 1, 100, 200))
    assert await gateway.consumed() == [1, 100, 200]


# Listeners


class Recorder:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []

    def on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def on_interrupted(self, *_: Any) -> None:
        raise NotImplementedError


async def test_listeners_are_notified_of_what_was_settled_where(make: Make, store: Unreliable, spread: bool) -> None:
    recorder = Recorder()
    gateway = make(listener=recorder)
    async with entered(gateway.reserve(spread=spread)) as reservation:
        recorder.decisions.clear()
        await reservation.settle((1, 100, 600))
    seen = [(each.verb, each.tokens, each.consumed, each.given_back, each.remaining) for each in recorder.decisions]
    assert seen == [("settle", 100, 0, 300, 900), ("settle", 600, 200, 0, 900)]
    async with entered(gateway.reserve(spread=spread)) as reservation:
        store.down = DOWN
        with pytest.raises(StoreError):
            await reservation.settle(1)
    assert isinstance(recorder.decisions[-1].error, StoreError)
    assert (recorder.decisions[-1].given_back, recorder.decisions[-1].consumed) == (0, 0)


async def test_a_settlement_is_counted_and_never_as_a_refusal(make: Make) -> None:
    listener = CountingListener()
    gateway = make(listener=listener)
    for used in (100, 600):
        async with entered(gateway.reserve()) as reservation:
            await reservation.settle(used)
    assert listener.rejected == 0
    assert listener.consumed - listener.given_back == sum(await gateway.consumed()) == 1402


# Cancellations


class Slow(AsyncSwappingMemoryStore):
    """Whose swaps of several keys take until they are let go; they are carried out at once."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.asked = asyncio.Event()

    async def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        self.asked.set()
        await self.may_go.wait()
        return await super().swap_all(swaps)


def slow_gateway() -> tuple[Slow, Any, Callable[[], Any]]:
    store = Slow()
    requests = AsyncProxyManager(store, "10/minute", prefix="r:")
    tokens = AsyncProxyManager(store, "1000/hour", prefix="t:")
    limit = all_of(requests.bucket("{a}"), (tokens.bucket("{a}"), 400))

    async def consumed() -> list[int]:
        return [snapshot.consumed_tokens for snapshot in await limit.snapshot()]

    return store, limit, consumed


async def cancelled(store: Slow, call: Callable[[], Any]) -> None:
    task = asyncio.create_task(call())
    await asyncio.sleep(0.01)
    await store.asked.wait()
    task.cancel()
    await asyncio.sleep(0.01)
    store.may_go.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_task_that_is_cancelled_while_it_settles_has_settled() -> None:
    store, limit, consumed = slow_gateway()

    async def call() -> None:
        async with limit.reserve(refund_on=asyncio.CancelledError) as reservation:
            store.may_go.clear()
            store.asked.clear()
            await reservation.settle(100)

    await cancelled(store, call)
    assert await consumed() == [1, 100]


async def test_a_task_that_is_cancelled_while_it_enters_has_reserved_nothing() -> None:
    store, limit, consumed = slow_gateway()
    store.may_go.clear()

    async def call() -> None:
        async with limit.reserve():
            pytest.fail("the block was entered")

    await cancelled(store, call)
    assert await consumed() == [0, 0]


async def test_a_task_that_is_cancelled_while_it_waits_has_reserved_nothing() -> None:
    store, limit, consumed = slow_gateway()
    for _ in range(2):
        assert await limit.try_consume()

    async def call() -> None:
        async with limit.reserve(max_wait=None):
            pytest.fail("the block was entered")

    await cancelled(store, call)
    assert await consumed() == [2, 800]


# To the token


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 900), st.integers(0, 1500), st.booleans()), min_size=1, max_size=12))
def test_whatever_is_used_is_what_is_charged(calls: list[tuple[int, int, bool]]) -> None:
    store, clock = MemoryStore(), ManualClock(NOW)
    requests = ProxyManager(store, "1000000/day", prefix="r:", clock=clock)
    tokens = ProxyManager(store, "1000000/day; 100000000/365d", prefix="t:", clock=clock)
    whole = 0
    for estimate, used, together in calls:
        limit = all_of(requests.bucket("k"), (tokens.bucket("k"), estimate), spread=not together)
        with limit.reserve() as reservation:
            reservation.settle(used)
        whole += used
    assert requests.snapshot("k").consumed_tokens == len(calls)
    assert tokens.snapshot("k").consumed_tokens == whole
