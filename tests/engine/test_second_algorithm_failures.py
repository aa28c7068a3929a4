"""A second algorithm where replies are lost and the store fails: nothing is charged twice, and every answer is true."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import urlsplit

import pytest

from ratelimit import (
    AsyncProxyManager,
    ConsumptionProbe,
    EstimationProbe,
    OnError,
    ProxyManager,
    StoreUnavailableError,
)
from ratelimit.core.algorithm import encode
from ratelimit.core.commands import Terms
from ratelimit.core.numbers import MAX
from ratelimit.engine.observing import Decision
from ratelimit.keys import Key
from ratelimit.testing import ManualClock
from tests.engine.conftest import NOW, SECOND, Make
from tests.engine.unreliable import DOWN, IN_DOUBT, Unreliable
from tests.support.both_faces import Settled, closing, settled
from tests.support.fixed_window import FixedWindow
from tests.support.inside import pipeline_of
from tests.support.proxies import Proxy
from tests.support.redis_monitor import monitored
from tests.support.servers import wait_until

LIMITS = FixedWindow(8, 3600 * SECOND)
UNTIL_FULL = 2800 * SECOND
"""How long the window of ``NOW`` goes on."""


@pytest.fixture
def store() -> Unreliable:
    return Unreliable()


async def stored(face: Settled, key: str = "key") -> int:
    """Return the tokens that the store has been told of."""
    return int((await face.snapshot(key)).consumed_tokens)


# Replies and requests that are lost


@pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])
async def test_a_swap_that_finds_its_own_bytes_has_succeeded_because_they_show_its_reading(
    make: Make, store: Unreliable, clock: ManualClock, loss: str
) -> None:
    clock.unique_readings = True
    face = make(store, LIMITS, clock=clock)
    getattr(store, loss)()
    assert await face.try_consume("key")  # makes the bucket
    for number in range(2, 6):
        clock.advance(nanos=1)
        store.asked = 0
        getattr(store, loss)()
        assert await face.try_consume("key")
        assert store.asked == 2
        assert await stored(face) == number


@pytest.mark.parametrize(
    ("unique_readings", "moves"), [(False, SECOND), (True, 0), (True, -1)], ids=["not unique", "still", "behind"]
)
async def test_without_a_reading_of_its_own_it_is_in_doubt_whose_bytes_are_there(
    make: Make, store: Unreliable, clock: ManualClock, unique_readings: bool, moves: int
) -> None:
    face = make(store, LIMITS, clock=clock)
    assert await face.try_consume("key", 2)
    clock.unique_readings = pipeline_of(face).requests.unique_readings = unique_readings
    clock.advance(nanos=moves)
    store.lose_replies()
    with pytest.raises(StoreUnavailableError, match="which another writer may have stored") as caught:
        await face.try_consume("key", 3)
    assert (caught.value.key, caught.value.in_doubt) == ("key", True)
    assert await stored(face) == 5
    store.lose_requests()
    assert await face.try_consume("key")
    assert await stored(face) == 6


async def test_a_swap_whose_reply_is_lost_while_others_write_is_in_doubt(
    make: Make, store: Unreliable, clock: ManualClock
) -> None:
    clock.unique_readings = True
    face = make(store, LIMITS, clock=clock)
    assert await face.try_consume("key")
    clock.advance(1)
    store.lose_replies()
    store.lose_swaps(state=encode(Terms(LIMITS).initial(NOW).consumed(7)))
    with pytest.raises(StoreUnavailableError, match="while others were changing the bucket") as caught:
        await face.try_consume("key", 3)
    assert caught.value.in_doubt
    assert await stored(face) == 7


async def test_two_losses_in_a_row_are_in_doubt(make: Make, store: Unreliable, clock: ManualClock) -> None:
    clock.unique_readings = True
    face = make(store, LIMITS, clock=clock)
    store.lose_replies(2)
    with pytest.raises(StoreUnavailableError) as caught:
        await face.try_consume("key")
    assert caught.value.in_doubt
    assert await stored(face) == 1


@pytest.fixture
def proxy(redis_url: str) -> Any:
    with Proxy(urlsplit(redis_url).port or 6379) as proxy:
        yield proxy


@pytest.fixture(params=["sync", "asyncio"])
async def face(request: pytest.FixtureRequest, proxy: Proxy) -> AsyncGenerator[Settled]:
    kind: Any = ProxyManager if request.param == "sync" else AsyncProxyManager
    async with closing(kind.from_url(f"redis://127.0.0.1:{proxy.port}/0", FixedWindow(100, 10**18))) as manager:
        yield Settled(manager)


@pytest.mark.redis
@pytest.mark.parametrize("loss", ["lose_replies", "lose_requests"])
async def test_over_redis_a_swap_whose_reply_or_request_is_lost_is_charged_once(
    face: Settled, proxy: Proxy, redis_url: str, loss: str
) -> None:
    assert await face.try_consume("warm up")
    with ProxyManager.from_url(redis_url, FixedWindow(100, 10**18)) as witness:
        for number in range(1, 6):
            assert await face.try_consume("key")
            with monitored(redis_url) as monitor:
                setattr(proxy, loss, 1)
                assert await face.try_consume("key")
                swaps = [command for command in monitor.sent() if command in ("EVAL", "EVALSHA", "SET")]
            assert len(swaps) == (2 if loss == "lose_replies" else 1)
            assert proxy.lost == number
            assert witness.snapshot("key").consumed_tokens == 2 * number
        setattr(proxy, loss, 1)
        assert await face.try_consume("new", 7)
        assert witness.snapshot("new").consumed_tokens == 7


@pytest.mark.redis
async def test_over_redis_two_losses_in_a_row_are_in_doubt(face: Settled, proxy: Proxy, redis_url: str) -> None:
    assert await face.try_consume("key")
    proxy.lose_replies = 2
    with pytest.raises(StoreUnavailableError) as caught:
        await face.try_consume("key")
    assert (proxy.lost, caught.value.in_doubt) == (2, True)
    with ProxyManager.from_url(redis_url, FixedWindow(100, 10**18)) as witness:
        assert witness.snapshot("key").consumed_tokens == 2
        assert await face.try_consume("key")
        assert witness.snapshot("key").consumed_tokens == 3


# Answers without the store


class Notes:
    """A listener that keeps what it is notified of."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.interrupted: list[tuple[Key, int]] = []

    def on_decision(self, decision: Decision) -> None:
        self.decisions.append(decision)

    def on_interrupted(self, key: Key, tokens: int, _error: BaseException) -> None:
        self.interrupted.append((key, tokens))

    def taken(self) -> list[tuple[str, int, int | None, int, bool, bool]]:
        """Return what is known of the decisions since the last call."""
        taken, self.decisions = self.decisions, []
        return [
            (one.verb, one.consumed, one.remaining, one.wait_nanos, one.degraded, one.error is not None)
            for one in taken
        ]


@pytest.fixture
def notes() -> Notes:
    return Notes()


async def test_a_listener_is_notified_of_decisions_about_windows(
    make: Make, store: Unreliable, clock: ManualClock, notes: Notes
) -> None:
    face = make(store, LIMITS, clock=clock, listener=notes)
    await face.try_consume("key", 6)
    await face.try_consume("key", 6)
    await face.try_consume_as_much_as_possible("key")
    await face.consume("key")
    assert notes.taken() == [
        ("try_consume", 6, 2, 0, False, False),
        ("try_consume", 0, 2, UNTIL_FULL, False, False),
        ("try_consume_as_much_as_possible", 2, 0, 0, False, False),
        ("consume", 1, -1, UNTIL_FULL, False, False),
    ]
    store.down = DOWN
    with pytest.raises(StoreUnavailableError):
        await face.try_consume("key")
    assert notes.taken() == [("try_consume", 0, None, 0, False, True)]


async def test_allow_answers_as_if_there_were_no_limit(make: Make, store: Unreliable, notes: Notes) -> None:
    store.down = DOWN
    face = make(store, LIMITS, on_error=OnError.ALLOW, listener=notes)
    assert await face.try_consume("key", 1000)
    assert await face.try_consume_and_return_remaining("key") == ConsumptionProbe(True, MAX, 0, 0, degraded=True)
    assert await face.consume("key", 1000)
    assert [one[-2:] for one in notes.taken()] == [(True, True)] * 3


async def test_deny_answers_as_if_there_were_no_tokens(make: Make, store: Unreliable, notes: Notes) -> None:
    store.down = DOWN
    face = make(store, LIMITS, on_error=OnError.DENY, listener=notes)
    assert not await face.try_consume("key")
    assert await face.estimate_ability_to_consume("key", 1) == EstimationProbe(False, 0, SECOND, degraded=True)
    assert not await face.consume("key", max_wait=100)
    assert [(one[1], *one[-2:]) for one in notes.taken()] == [(0, True, True)] * 3


async def test_a_local_window_holds_its_share_until_the_next_one(
    make: Make, store: Unreliable, clock: ManualClock, notes: Notes
) -> None:
    store.down = DOWN
    face = make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 4), listener=notes)
    assert [await face.try_consume("key") for _ in range(3)] == [True, True, False]
    assert [await face.try_consume("other") for _ in range(3)] == [True, True, False]
    assert notes.taken()[1:3] == [("try_consume", 1, 0, 0, True, True), ("try_consume", 0, 0, UNTIL_FULL, True, True)]
    assert await face.consume("key")  # by waiting
    assert clock.slept == [UNTIL_FULL]
    probe = await face.try_consume_and_return_remaining("key")
    assert (probe.consumed, probe.remaining_tokens, probe.degraded) == (True, 0, True)
    assert not await face.try_consume("key")


async def test_what_was_consumed_locally_is_charged_when_the_store_is_back(
    make: Make, store: Unreliable, clock: ManualClock, notes: Notes
) -> None:
    face = make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 2), listener=notes)
    assert await face.try_consume("key", 6)
    store.down = DOWN
    assert [await face.try_consume("key", 2) for _ in range(3)] == [True, True, False]
    store.down = None
    notes.taken()
    store.asked = 0
    assert not await face.try_consume("key")
    assert store.asked == 1
    assert notes.taken() == [("try_consume", 0, 0, UNTIL_FULL, False, False)]
    assert await stored(face) == 10
    assert not await face.try_consume("key")
    assert await stored(face) == 10  # once
    assert await face.available_tokens("key") == -2


async def test_keys_that_nobody_asks_for_are_charged_as_well(make: Make, store: Unreliable, clock: ManualClock) -> None:
    face = make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 2))
    store.down = DOWN
    for number in range(20):
        assert await face.try_consume(f"key {number}", 3)
    store.down = None
    assert await face.try_consume("another")
    async with asyncio.timeout(10):
        while store.get("key 19") is None:
            await asyncio.sleep(0)
    wait_until(lambda: not pipeline_of(face).fallback._sweeping, "all is charged")
    assert [await stored(face, f"key {number}") for number in range(20)] == [3] * 20


async def test_what_is_in_doubt_is_not_charged(make: Make, store: Unreliable, clock: ManualClock) -> None:
    face = make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 2))
    store.down = IN_DOUBT
    assert [await face.try_consume("key") for _ in range(5)] == [True] * 4 + [False]
    store.down = None
    assert await face.try_consume("key")
    assert await stored(face) == 1


async def test_a_local_wait_that_is_interrupted_gives_its_tokens_back(
    make: Make, store: Unreliable, clock: ManualClock, notes: Notes
) -> None:
    store.down = DOWN
    face = make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 2), listener=notes)
    assert await face.try_consume("key", 3)

    def interrupt(_nanos: int) -> None:
        raise KeyboardInterrupt

    pipeline_of(face).sleep = interrupt
    with pytest.raises(KeyboardInterrupt):
        await face.consume("key", 2)
    assert notes.interrupted == [("key", 2)]
    assert await face.try_consume("key")
    assert not await face.try_consume("key")
    store.down = None
    assert await face.try_consume("key")
    assert await stored(face) == 3 + 1 + 1


async def test_a_local_bucket_may_change_its_algorithm(make: Make, store: Unreliable, clock: ManualClock) -> None:
    store.down = DOWN
    face = make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 2), configuration_version=1)
    newer = face.face.bucket("key", "100/hour", configuration_version=2)
    assert await face.try_consume("key", 4)
    assert not await face.try_consume("key")
    assert await settled(newer.try_consume(50))
    assert not await settled(newer.try_consume())
    store.down = None
    assert await settled(newer.try_consume(46))
    assert not await settled(newer.try_consume())
    assert await stored(face) == 100


async def test_closing_charges_what_was_not(make: Make, store: Unreliable, clock: ManualClock) -> None:
    store.down = DOWN
    async with closing(make(store, LIMITS, clock=clock, on_error=OnError.local(1 / 2)).face) as manager:
        assert await settled(manager.try_consume("key", 3))
        store.down = None
    assert await stored(make(store, LIMITS, clock=clock)) == 3
