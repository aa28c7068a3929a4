"""A bucket that is known to be empty refuses without the store, as the store would."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import NEVER, MemoryStore, Optimization, ProxyManager, ReservationOverflowError, TokensInheritance
from ratelimit.testing import ManualClock
from tests.engine.local_decisions.doubles import LIMITS, NOW, SECOND, SKIP, CountingStore, Make, ask, counts, limits


async def test_a_bucket_known_empty_is_not_asked_about(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(SKIP)
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    store.asked()
    for _ in range(5):
        assert not await face.try_consume("key")
    probe = await face.try_consume_and_return_remaining("key", 3)
    assert (probe.consumed, probe.remaining_tokens, probe.retry_after) == (False, 0, 3)
    assert await face.try_consume_as_much_as_possible("key") == 0
    assert not await face.consume("key", 5, max_wait=4)
    assert store.asked() == (0, 0)
    clock.advance(nanos=SECOND - 1)
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.advance(nanos=1)
    assert await face.try_consume("key")
    assert store.asked() == (0, 1)


async def test_a_debt_is_known_too(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(Optimization.skip_sync_on_zero(100))
    await face.consume_ignoring_rate_limits("key", 30)
    store.asked()
    clock.advance(20)
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.advance(1)
    assert await face.try_consume("key")


async def test_what_others_put_in_is_seen_after_the_recheck(make: Make, store: CountingStore) -> None:
    clock = ManualClock(NOW)
    face = make(SKIP, "10/day", clock=clock)
    await face.try_consume("key", 10)
    ProxyManager(store, LIMITS, clock=clock).reset("key")
    clock.advance(0.999_999)
    assert not await face.try_consume("key")
    clock.advance(0.000_001)
    assert await face.try_consume("key")


async def test_what_the_manager_itself_puts_in_is_seen_at_once(make: Make) -> None:
    face = make(SKIP)
    await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    assert not await face.try_consume("key")
    await face.add_tokens("key", 2)
    assert await face.try_consume("key", 2)
    assert not await face.try_consume("key")
    await face.reset("key")
    assert await face.try_consume("key", 10)
    assert not await face.try_consume("key")
    await face.replace_configuration("key", "99/hour", TokensInheritance.RESET)
    assert await face.try_consume("key", 99)
    assert not await face.try_consume("key")
    await face.remove("key")
    assert await face.try_consume("key", 10)


async def test_reads_ask_the_store_where_only_refusals_are_skipped(make: Make, store: CountingStore) -> None:
    face = make(SKIP)
    await face.try_consume("key", 10)
    store.asked()
    assert await face.available_tokens("key") == 0
    assert (await face.estimate_ability_to_consume("key", 1)).retry_after == 1
    assert store.asked() == (2, 0)


async def test_a_clock_that_went_back_asks_the_store(make: Make, store: CountingStore, clock: ManualClock) -> None:
    face = make(SKIP)
    await face.try_consume("key", 10)
    store.asked()
    clock.set(NOW - 1000)  # as the estimate of a server's time may
    assert not await face.try_consume("key")
    assert store.asked() == (0, 0)
    clock.set(NOW - SECOND)
    assert not await face.try_consume("key")
    assert store.asked() == (1, 0)


async def test_an_endless_wait_is_refused_as_ever(make: Make) -> None:
    face = make(SKIP)
    await face.consume_ignoring_rate_limits("key", 10)
    for _ in range(2):
        with pytest.raises(ReservationOverflowError):
            await face.consume("key", 2**63 - 1)
    assert not (await face.try_consume_and_return_remaining("key", 11)).consumed
    assert (await face.try_consume_and_return_remaining("key", 11)).nanos_to_wait_for_refill == NEVER


consumptions = st.tuples(
    st.integers(0, 2),  # the manager
    st.sampled_from(
        [
            "try_consume",
            "try_consume_and_return_remaining",
            "try_consume_as_much_as_possible",
            "consume_ignoring_rate_limits",
            "reserve",
        ]
    ),
    counts,
    st.sampled_from([0, 0, 1, 10**8, SECOND - 1, SECOND, 3 * SECOND]),  # the time after it
)


@given(limits, st.lists(consumptions, max_size=40))
def test_refusals_without_the_store_are_those_of_the_store(text: str, schedule: list[Any]) -> None:
    clock = ManualClock(NOW, advance_on_sleep=False)
    plain_store, store = MemoryStore(clock=clock), MemoryStore(clock=clock)
    plain = [ProxyManager(plain_store, text, clock=clock) for _ in range(3)]
    optimized = [ProxyManager(store, text, clock=clock, optimization=SKIP) for _ in range(3)]
    for index, verb, tokens, pause in schedule:
        answer, expected = ask(optimized[index], verb, tokens), ask(plain[index], verb, tokens)
        if verb == "try_consume_and_return_remaining":  # how long a refusal tells to wait is as of the state last seen
            assert answer == expected if answer else not expected
        else:
            assert answer == expected
        assert store.get("key") == plain_store.get("key")
        clock.advance(nanos=pause)
