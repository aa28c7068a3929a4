"""All rules of a limiter that are about a request are one decision: it pays for each of their buckets, or for none."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    CountingListener,
    Expiration,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    ReservationOverflowError,
    StoreUnavailableError,
)
from ratelimit.all_of import MOST_PARTS
from ratelimit.bucket import AsyncBucket
from ratelimit.policy import AsyncLimiter, Decision, Limiter, Missing, Rule
from ratelimit.policy.recording import RecordedDecision, recording
from ratelimit.stores.memory import SwappingMemoryStore
from ratelimit.stores.protocol import Lost
from tests.engine.unreliable import DOWN, Unreliable
from tests.policy.orders import Limits, Order, customer
from tests.support.both_faces import for_asyncio, settled

SECOND = 10**9
ACME, BETA = Order("acme"), Order("beta")


class Waiting(Rule[Order]):
    """A rule that lets requests wait."""

    __slots__ = ("max_wait_nanos",)

    def __init__(self, limits: str, max_wait: float | None, **settings: Any) -> None:
        super().__init__(limits, **settings)
        self.max_wait_nanos = None if max_wait is None else round(max_wait * SECOND)


class WithoutSwapAll:
    """A store as its owner has written it: it cannot change several keys together."""

    def __init__(self, store: Any) -> None:
        self.get, self.swap, self.delete, self.now_nanos = store.get, store.swap, store.delete, store.now_nanos


def names(outcomes: Any) -> list[str]:
    return [outcome.rule.name for outcome in outcomes]


def left(decision: Decision[Order]) -> list[int]:
    return [outcome.limits[0].remaining for outcome in decision.outcomes]


def limiter_over(store: Any, *rules: Any, asynchronous: bool, manager: dict[str, Any], **settings: Any) -> Any:
    """A limiter over a store; the manager has these settings."""
    if asynchronous:
        return AsyncLimiter(*rules, manager=AsyncProxyManager(for_asyncio(store), **manager), **settings)
    return Limiter(*rules, manager=ProxyManager(store, **manager), **settings)


async def test_a_refusal_charges_nothing_and_shows_all(asynchronous: bool) -> None:
    rules = [Rule[Order]("9/minute", name="all", cost=4), Rule[Order]("1/minute", name="few"), "8/minute"]
    limited = Limits(*rules, asynchronous=asynchronous)
    admitted, refused = await limited.decide(), await limited.decide()
    assert (bool(admitted), bool(refused)) == (True, False)
    assert [limited.consumed(name) for name in ("all", "few", "|8/minute")] == [4, 1, 1]
    assert names(refused.outcomes) == ["all", "few", "8/minute"]
    assert left(refused) == [5, 0, 7]
    assert [outcome.consumed for outcome in refused.outcomes] == [False] * 3
    assert [outcome.refuses for outcome in refused.outcomes] == [False, True, False]
    assert refused.refused is refused.outcomes[1]
    assert refused.violated_policies == ["few"]


async def test_the_first_that_refuses_is_named_and_the_longest_wait_counts(asynchronous: bool) -> None:
    rules = [Rule[Order]("1/minute", name="a"), Rule[Order]("9/minute", name="b"), Rule[Order]("1/hour", name="c")]
    limited = Limits(*rules, asynchronous=asynchronous)
    await limited.decide()
    refused = await limited.decide()
    assert refused.refused is not None
    assert refused.refused.rule.name == "a"
    assert names(refused.refusals) == ["a", "c"]
    assert (refused.retry_after, refused.nanos_to_wait) == (3600, 3600 * SECOND)
    assert refused.violated_policies == ["a", "c"]
    admitted = await Limits(*rules, asynchronous=asynchronous).decide()
    assert (admitted.refusals, admitted.retry_after, admitted.nanos_to_wait) == ((), None, 0)
    assert admitted.violated_policies == []


async def test_a_wait_that_never_ends_is_the_longest(asynchronous: bool) -> None:
    rules = [Rule[Order]("2/minute", name="a", cost=2), Rule[Order]("2/minute", name="b", cost=3)]
    decision = await Limits(*rules, asynchronous=asynchronous).decide()
    assert (decision.retry_after, names(decision.refusals)) == (None, ["b"])


async def test_callables_are_asked_before_anything_is_charged(asynchronous: bool) -> None:
    asked: list[str] = []

    def cost(_: Order) -> int:
        asked.append("cost")
        raise ZeroDivisionError

    def key(_: Order) -> str:
        asked.append("key")
        return "key"

    rules = [Rule[Order]("5/minute", name="all"), Rule("1/minute", key=key, cost=cost, name="late")]
    limited = Limits(*rules, asynchronous=asynchronous)
    with pytest.raises(ZeroDivisionError):
        await limited.decide()
    assert asked == ["key", "cost"]
    assert limited.consumed("all") == 0


async def test_what_is_free_not_limited_or_without_a_key_falls_out(asynchronous: bool) -> None:
    rules: list[Any] = [
        Rule("5/minute", key=customer, name="nobody", missing=Missing.UNLIMITED),
        Rule(lambda _: None, name="unlimited"),
        Rule("5/minute", name="free", cost=lambda _: 0),
        Rule("5/minute", name="one"),
        Rule[Order]("5/minute", name="other", when=lambda order: order.urgent),
    ]
    limited = Limits(*rules, asynchronous=asynchronous)
    assert names((await limited.decide(Order(None))).outcomes) == ["one"]
    assert names((await limited.decide(Order(None, urgent=True))).outcomes) == ["one", "other"]
    assert (await limited.decide(Order(None, urgent=False, pieces=0))).outcomes[0].probe.remaining_tokens == 2
    nothing = Limits(*rules[:3], asynchronous=asynchronous)
    assert (await nothing.decide(Order(None))).outcomes == ()


@pytest.mark.parametrize("key", ["acme", b"acme"])
async def test_a_bucket_is_asked_once(asynchronous: bool, key: Any) -> None:
    rules: list[Any] = [
        Rule("3/minute", name="x", key=customer, cost=2),
        Rule("5/minute", name="y"),
        Rule("3/minute", name="x", key=key),
    ]
    limited = Limits(*rules, asynchronous=asynchronous)
    decision = await limited.decide()
    assert [(outcome.rule.name, outcome.tokens) for outcome in decision.outcomes] == [("x", 2), ("y", 1)]
    assert limited.consumed("x:acme") == 2


async def test_limits_that_differ_from_the_stored_ones_are_logged(
    asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    limited = Limits(Rule("5/minute", name="a"), Rule("5/minute", name="b"), asynchronous=asynchronous)
    await limited.decide()
    other = Limits(Rule("5/minute", name="a"), Rule("6/minute", name="b"), asynchronous=asynchronous, over=limited)
    await other.decide()
    assert caplog.messages == [message for message in caplog.messages if "the limits of 'b' are 6/minute" in message]
    assert len(caplog.messages) == 1


async def test_each_rule_is_recorded_and_the_first_that_refuses_is_logged(
    asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    rules = [Rule[Order]("9/minute", name="a"), Rule[Order]("1/minute", name="b"), Rule[Order]("1/minute", name="c")]
    limited = Limits(*rules, asynchronous=asynchronous)
    await limited.decide()
    with recording() as recorded:
        await limited.decide()
    assert recorded == [
        RecordedDecision("a", None, admitted=True),
        RecordedDecision("b", None, admitted=False),
        RecordedDecision("c", None, admitted=False),
    ]
    assert caplog.messages == ["refused by 'b': limits 1/minute"]


async def test_listeners_are_notified_of_each_bucket(asynchronous: bool) -> None:
    listener = CountingListener()
    rules = [Rule[Order]("9/minute", name="a", cost=2), Rule[Order]("1/minute", name="b")]
    limiter = limiter_over(MemoryStore(), *rules, asynchronous=asynchronous, manager={"listener": listener})
    await settled(limiter.decide(ACME))
    await settled(limiter.decide(ACME))
    assert (listener.consumed, listener.rejected) == (3, 3)


# Where they cannot go together


async def spread_out(limited: Limits) -> None:
    """Check that rules, one of which admits fewer requests than the others, decide together and show what is left."""
    decisions = [await limited.decide() for _ in range(3)]
    assert [bool(decision) for decision in decisions] == [True, True, False]
    refused = decisions[-1]
    assert names(refused.refusals) == ["few"]
    assert not any(outcome.consumed for outcome in refused.outcomes)
    assert {limited.consumed(outcome.rule.name) for outcome in refused.outcomes} == {2}
    assert left(refused) == [0 if outcome.refuses else 1 for outcome in refused.outcomes]


def three(count: int = 3) -> list[Rule[Order]]:
    """Rules, three unless told otherwise, of which the second admits two requests, and the others three."""
    rules = [Rule[Order]("3/minute", name=f"many {number}") for number in range(count - 1)]
    rules.insert(1, Rule("2/minute", name="few"))
    return rules


@pytest.mark.parametrize("count", [2, 3, MOST_PARTS, MOST_PARTS + 1])
async def test_more_than_one_decision_can_be_about_go_one_after_the_other(asynchronous: bool, count: int) -> None:
    await spread_out(Limits(*three(count), asynchronous=asynchronous))


async def test_a_store_that_cannot_change_several_keys_is_asked_for_each(asynchronous: bool) -> None:
    limited = Limits(asynchronous=asynchronous)
    clock = limited.clock
    store: Any = SwappingMemoryStore(clock=clock)
    limited.memory = store
    own: Any = WithoutSwapAll(for_asyncio(store) if asynchronous else store)
    if asynchronous:
        limited.limiter = AsyncLimiter(*three(), manager=AsyncProxyManager(own, clock=clock))
    else:
        limited.limiter = Limiter(*three(), manager=ProxyManager(own, clock=clock))
    await spread_out(limited)


async def test_a_manager_with_an_optimization_decides_about_each_bucket_as_it_does(asynchronous: bool) -> None:
    limited = Limits(asynchronous=asynchronous)
    limited.limiter = limiter_over(
        limited.memory,
        *three(),
        asynchronous=asynchronous,
        manager={"clock": limited.clock, "optimization": Optimization.skip_sync_on_zero()},
    )
    await spread_out(limited)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3), st.booleans()), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from(["acme", "beta"]), st.integers(0, 20)), min_size=1, max_size=12),
)
def test_both_ways_decide_alike_and_charge_what_they_admit(
    limits: list[tuple[int, int, bool]], requests: list[tuple[str, int]]
) -> None:
    rules = [
        Rule[Order](f"{capacity}/minute", name=str(number), cost=cost, key=customer if is_keyed else "all")
        for number, (capacity, cost, is_keyed) in enumerate(limits)
    ]
    together, spread = Limits(), Limits()
    for limited, optimization in ((together, None), (spread, Optimization.skip_sync_on_zero())):
        # Buckets that are full again must not be forgotten: what they have counted is compared.
        kept: Any = {"clock": limited.clock, "expiration": Expiration.none(), "optimization": optimization}
        limited.limiter = limiter_over(limited.memory, *rules, asynchronous=False, manager=kept)
    paid: dict[str, int] = {}
    for customer_name, seconds in requests:
        one, other = (run_sync(limited, Order(customer_name), seconds) for limited in (together, spread))
        assert (bool(one), left(one), names(one.refusals)) == (bool(other), left(other), names(other.refusals))
        assert one.retry_after == other.retry_after
        assert bool(one) is not bool(one.refusals)
        for outcome in one.outcomes if one else ():
            key = f"{outcome.rule.name}:{outcome.key!s}"
            paid[key] = paid.get(key, 0) + outcome.tokens
    for number, (_, _, is_keyed) in enumerate(limits):
        for key in [f"{number}:{name}" for name in ("acme", "beta")] if is_keyed else [f"{number}:all"]:
            assert together.consumed(key) == spread.consumed(key) == paid.get(key, 0)


def run_sync(limited: Limits, order: Order, seconds: int) -> Decision[Order]:
    limited.clock.advance(seconds=seconds)
    decided: Any = limited.limiter.decide(order)
    return decided  # type: ignore[no-any-return]  # the limiter is that of sync code


class FailsOnce(Unreliable):
    """Fails at the swap of this number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.left -= 1
        self.down = None if self.left else DOWN
        try:
            return super().swap(key, before, after, ttl_millis)
        finally:
            self.down = None


@pytest.mark.parametrize("on_error", [OnError.RAISE, OnError.DENY], ids=lambda policy: policy.kind)
async def test_tokens_that_cannot_be_given_back_are_shown_as_taken(
    asynchronous: bool, on_error: OnError, caplog: pytest.LogCaptureFixture
) -> None:
    rules = [Rule[Order]("3/day", name="many"), Rule[Order]("1/day", name="few")]
    manager = {"optimization": Optimization.skip_sync_on_zero(), "on_error": on_error}
    # The third request to the store that changes something charges a refused request, and the fourth undoes that.
    limiter = limiter_over(FailsOnce(4), *rules, asynchronous=asynchronous, manager=manager)
    assert await settled(limiter.decide(ACME))
    decision = await settled(limiter.decide(ACME))
    assert (bool(decision), names(decision.refusals), left(decision)) == (False, ["few"], [1, 0])
    assert not any(outcome.consumed for outcome in decision.outcomes)
    assert ("could not be given back" in caplog.text) is (on_error == OnError.RAISE)


# Waiting


async def test_a_request_waits_until_all_rules_have_their_tokens(asynchronous: bool) -> None:
    limited = Limits(Waiting("1/s", 5, name="a"), Waiting("1/2s", 5, name="b"), asynchronous=asynchronous)
    assert await limited.admitted(ACME, ACME) == [True, True]
    assert limited.clock.slept == [2 * SECOND]
    assert [limited.consumed(name) for name in ("a", "b")] == [2, 2]


async def test_each_rule_says_how_long_a_request_may_wait_for_it(asynchronous: bool) -> None:
    limited = Limits(Waiting("1/s", 1, name="a"), Waiting("1/2s", 1, name="b"), asynchronous=asynchronous)
    assert await limited.admitted(ACME, ACME) == [True, False]
    assert limited.clock.slept == []
    # For the second rule alone nobody has to wait after a second.
    limited.clock.advance(seconds=1)
    assert await limited.admitted(ACME, ACME) == [True, False]
    assert limited.clock.slept == [SECOND]


async def test_a_rule_without_a_wait_refuses_at_once(asynchronous: bool) -> None:
    rules: list[Any] = [Waiting("1/s", 60, name="a"), Rule("2/minute", name="b")]
    limited = Limits(*rules, asynchronous=asynchronous)
    assert await limited.admitted(ACME, ACME) == [True, True]
    assert limited.clock.slept == [SECOND]
    decision = await limited.decide()
    assert names(decision.refusals) == ["a", "b"]
    assert limited.clock.slept == [SECOND]


async def test_a_wait_that_would_never_end_is_an_error_where_it_may_take_forever(asynchronous: bool) -> None:
    rules: list[Any] = [Waiting("1/s", None, name="a", cost=2), Rule("2/minute", name="b")]
    with pytest.raises(ReservationOverflowError):
        await Limits(*rules, asynchronous=asynchronous).decide()
    rules[0] = Waiting("1/s", 60, name="a", cost=2)
    assert (await Limits(*rules, asynchronous=asynchronous).decide()).retry_after is None


async def test_a_request_whose_turn_does_not_come_in_time_tries_once_more() -> None:
    manager = AsyncProxyManager(AsyncMemoryStore())

    def waiting(seconds: float | None) -> AsyncLimiter[Order]:
        rules = [Waiting("2/s", seconds, name="a"), Waiting("90/s", seconds, name="b")]
        return AsyncLimiter(*rules, manager=manager)

    patient = waiting(None)
    assert [bool(await patient.decide(ACME)) for _ in range(2)] == [True, True]
    first = asyncio.create_task(patient.decide(ACME))
    await asyncio.sleep(0.05)
    decision = await waiting(0.1).decide(ACME)
    assert names(decision.refusals) == ["a"]
    assert not first.done()
    assert await first


# Where the store fails


@pytest.mark.parametrize("spread", [False, True], ids=["together", "spread"])
async def test_policies_answer_for_all(asynchronous: bool, spread: bool) -> None:
    rules = [Rule[Order]("5/minute", name="a"), Rule[Order]("1/minute", name="b")]
    manager = {"optimization": Optimization.skip_sync_on_zero()} if spread else {}

    def limiter(on_error: OnError) -> tuple[Unreliable, Any]:
        store = Unreliable()
        store.down = DOWN
        return store, limiter_over(store, *rules, asynchronous=asynchronous, manager=manager, on_error=on_error)

    _, denying = limiter(OnError.DENY)
    decision = await settled(denying.decide(ACME))
    assert (bool(decision), decision.degraded, decision.retry_after) == (False, True, 1)
    assert names(decision.refusals) == ["a", "b"]
    assert [outcome.limits for outcome in decision.outcomes] == [(), ()]
    _, allowing = limiter(OnError.ALLOW)
    assert (await settled(allowing.decide(ACME))).degraded
    store, local = limiter(OnError.local(1))
    assert [bool(await settled(local.decide(ACME))) for _ in range(3)] == [True, False, False]
    decision = await settled(local.decide(ACME))
    assert (names(decision.refusals), decision.degraded) == (["b"], True)
    store.down = None
    _, raising = limiter(OnError.RAISE)
    with pytest.raises(StoreUnavailableError):
        await settled(raising.decide(ACME))


async def test_a_decision_is_settled_for_each_rule(asynchronous: bool) -> None:
    rules = [Rule[Order]("90/minute", name="a", cost=40), Rule[Order]("5/minute", name="b")]
    limited = Limits(*rules, asynchronous=asynchronous)
    decision = await limited.decide()
    if isinstance(decision.outcomes[0].bucket, AsyncBucket):
        await decision.asettle(10)
    else:
        decision.settle(10)
    assert [limited.consumed(name) for name in "ab"] == [10, 1]
