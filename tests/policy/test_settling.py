"""Decisions that are settled once it is known what a request has cost."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ratelimit import AsyncProxyManager, InvalidArgumentError, OnError, ProxyManager
from ratelimit.policy import AsyncLimiter, Decision, Limiter, Rule
from tests.engine.unreliable import DOWN, Unreliable
from tests.policy.orders import Limits, Order, customer
from tests.support.both_faces import for_asyncio


async def settle(decision: Decision[Any], cost: int, *names: str) -> None:
    """Settle a decision by whichever face has made it."""
    if isinstance(decision.outcomes[0].bucket.verbose, type(_async_bucket().verbose)):
        await decision.asettle(cost, *names)
    else:
        decision.settle(cost, *names)


def _async_bucket() -> Any:
    return AsyncProxyManager.from_url("memory://", "1/s").bucket("key")


ESTIMATED: Rule[Order] = Rule("100/hour", key=customer, cost=lambda order: order.pieces, name="pieces")
COUNTED: Rule[Order] = Rule("10/hour", key=customer, name="orders")


@pytest.mark.parametrize("cost", [0, 5, 40, 41, 500])
async def test_what_a_request_has_cost_is_charged_in_the_end(asynchronous: bool, cost: int) -> None:
    limited = Limits(ESTIMATED, asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=40))
    (outcome,) = decision.outcomes
    assert outcome.settled is None
    await settle(decision, cost)
    assert limited.consumed("pieces:acme") == cost
    assert outcome.settled == cost


async def test_what_is_left_is_shown_after_it(asynchronous: bool) -> None:
    limited = Limits(ESTIMATED, asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=40))
    (outcome,) = decision.outcomes
    assert [limit.remaining for limit in outcome.limits] == [60]
    await settle(decision, 10)
    assert [limit.remaining for limit in outcome.limits] == [90]
    assert not any(limit.violated for limit in outcome.limits)
    assert outcome.probe.remaining_tokens == 60


async def test_it_is_shown_as_it_was_where_nothing_has_changed(asynchronous: bool) -> None:
    limited = Limits(ESTIMATED, asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=40))
    await settle(decision, 40)
    assert [limit.remaining for limit in decision.outcomes[0].limits] == [60]


async def test_an_excess_leaves_nothing_and_refuses_nobody_afterwards(asynchronous: bool) -> None:
    limited = Limits(ESTIMATED, asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=40))
    await settle(decision, 150)
    (limit,) = decision.outcomes[0].limits
    assert (limit.remaining, limit.violated) == (0, False)
    assert decision
    assert not await limited.decide(Order(pieces=1))


async def test_it_is_that_of_the_rules_with_a_cost(asynchronous: bool) -> None:
    limited = Limits(COUNTED, ESTIMATED, asynchronous=asynchronous)
    await settle(await limited.decide(Order(pieces=40)), 10)
    assert (limited.consumed("orders:acme"), limited.consumed("pieces:acme")) == (1, 10)


async def test_or_of_all_rules_where_none_has_one(asynchronous: bool) -> None:
    limited = Limits(COUNTED, Rule("50/hour", name="all"), asynchronous=asynchronous)
    await settle(await limited.decide(), 0)
    assert (limited.consumed("orders:acme"), limited.consumed("all")) == (0, 0)


async def test_or_of_the_rules_that_are_named(asynchronous: bool) -> None:
    limited = Limits(COUNTED, ESTIMATED, Rule("9/hour", name="all"), asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=40))
    await settle(decision, 0, "orders", "a rule that was not about this request")
    assert [limited.consumed(key) for key in ("orders:acme", "pieces:acme", "all")] == [0, 40, 1]
    await settle(decision, 7, "pieces", "all")
    assert [limited.consumed(key) for key in ("orders:acme", "pieces:acme", "all")] == [0, 7, 7]


async def test_it_is_settled_once(asynchronous: bool) -> None:
    limited = Limits(COUNTED, ESTIMATED, asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=40))
    await settle(decision, 10)
    with pytest.raises(InvalidArgumentError, match="must be settled once; that of 'pieces' is"):
        await settle(decision, 10)
    with pytest.raises(InvalidArgumentError, match="must be settled once"):
        await settle(decision, 3, "orders", "pieces")
    assert (limited.consumed("orders:acme"), limited.consumed("pieces:acme")) == (1, 10)


@pytest.mark.parametrize("cost", [-1, 1.0, "1", None, True, 2**63])
async def test_a_cost_is_an_int_of_0_or_more(asynchronous: bool, cost: Any) -> None:
    decision = await Limits(ESTIMATED, asynchronous=asynchronous).decide()
    with pytest.raises(InvalidArgumentError, match="cost must be an int from 0 to"):
        await settle(decision, cost)


async def test_a_refused_request_has_paid_nothing(asynchronous: bool) -> None:
    limited = Limits(ESTIMATED, Rule("1/hour", name="all"), asynchronous=asynchronous)
    assert await limited.decide(Order(pieces=40))
    decision = await limited.decide(Order(pieces=40))
    assert not decision
    await settle(decision, 10)
    assert limited.consumed("pieces:acme") == 40


async def test_nothing_is_settled_where_no_limit_was_looked_at() -> None:
    decision: Decision[Order] = Decision()
    decision.settle(5)
    await decision.asettle(5)


async def test_each_face_settles_its_own(asynchronous: bool) -> None:
    decision = await Limits(ESTIMATED, asynchronous=asynchronous).decide()
    if asynchronous:
        with pytest.raises(InvalidArgumentError, match=r"must be settled by: await asettle\(cost\)"):
            decision.settle(5)
    else:
        with pytest.raises(InvalidArgumentError, match=r"must be settled by settle\(cost\)"):
            await decision.asettle(5)
    await settle(decision, 5)


@pytest.mark.parametrize("on_error", [OnError.ALLOW, OnError.local(1)], ids=lambda policy: policy.kind)
async def test_what_was_admitted_without_the_store_is_not_settled(asynchronous: bool, on_error: OnError) -> None:
    store = Unreliable()
    limiter = limiter_over(store, asynchronous=asynchronous, on_error=on_error)
    store.down = DOWN
    decision = await decided(limiter, Order(pieces=40))
    assert decision
    store.down = None
    store.asked = 0
    await settle(decision, 10)
    assert store.asked == 0
    assert decision.outcomes[0].settled == 10


@pytest.mark.parametrize("cost", [10, 60])
@pytest.mark.parametrize("on_error", [OnError.RAISE, OnError.DENY], ids=lambda policy: policy.kind)
async def test_an_error_of_the_store_is_logged_and_what_was_paid_stays_charged(
    asynchronous: bool, on_error: OnError, cost: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = Unreliable()
    limiter = limiter_over(store, asynchronous=asynchronous, on_error=on_error)
    decision = await decided(limiter, Order(pieces=40))
    store.down = DOWN
    with caplog.at_level(logging.WARNING, "ratelimit"):
        await settle(decision, cost)
    assert "the store is down" in caplog.text
    assert decision.outcomes[0].settled is None
    store.down = None
    assert [limit.remaining for limit in decision.outcomes[0].limits] == [60]
    assert ProxyManager(store, "1/s").snapshot("pieces:acme").consumed_tokens == 40


def limiter_over(store: Unreliable, *, asynchronous: bool, on_error: OnError) -> Any:
    if asynchronous:
        return AsyncLimiter(ESTIMATED, manager=AsyncProxyManager(for_asyncio(store)), on_error=on_error)
    return Limiter(ESTIMATED, manager=ProxyManager(store), on_error=on_error)


async def decided(limiter: Any, order: Order) -> Decision[Order]:
    decision = limiter.decide(order)
    return decision if isinstance(decision, Decision) else await decision
