"""Plans: the look-up and its cache, and what a change of plan does to a live bucket."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ratelimit import BucketConfiguration, InvalidConfigurationError, TokensInheritance
from ratelimit.keys import Key
from ratelimit.policy import Assigned, Plans, Rule
from ratelimit.policy.plans import PlanLimits
from ratelimit.runtime.steps import arun, run
from tests.policy.orders import Limits, Order, customer

LIMITS: dict[str, Any] = {"free": "20/hour", "basic": "40/hour", "professional": "100/hour", "internal": None}


class Customers:
    """A table of customers, and how often it was asked."""

    def __init__(self, **plans: Any) -> None:
        self.plans = plans
        self.asked: list[Key] = []
        self.fails = False
        self.error = ConnectionError("the table of customers is gone")

    def __call__(self, key: Key) -> Any:
        self.asked.append(key)
        if self.fails:
            raise self.error
        return self.plans.get(str(key))

    async def awaited(self, key: Key) -> Any:
        return self(key)


class Seconds:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_plan_may_be_a_list_of_limits() -> None:
    plans = Plans({"free": ["20/hour", "2/second"]}, lambda _: "free")
    assert run(plans.limits_of(Order(), "key")) == limits("20/hour; 2/second")


def limits(text: str | None, version: int | None = None) -> PlanLimits:
    return PlanLimits(None if text is None else BucketConfiguration.parse(text), version)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("free", limits("20/hour")),
        (Assigned("basic", 3), limits("40/hour", 3)),
        (("basic", 0), limits("40/hour", 0)),
        ("internal", limits(None)),
        (None, limits("100/hour")),
    ],
)
async def test_the_limits_of_a_key_are_those_of_its_plan(answer: Any, expected: PlanLimits) -> None:
    customers = Customers(acme=answer)
    assert run(Plans(LIMITS, customers, default="professional").limits_of(Order(), "acme")) == expected
    assert await arun(Plans(LIMITS, customers.awaited, default="professional").limits_of(Order(), "acme")) == expected


def test_the_version_grows_with_that_of_the_customer_and_with_that_of_the_plans() -> None:
    customers = Customers(acme=("free", 7), other="free")
    assert run(Plans(LIMITS, customers, version=5).limits_of(Order(), "acme")) == limits("20/hour", 12)
    assert run(Plans(LIMITS, customers, version=5).limits_of(Order(), "other")) == limits("20/hour", 5)


@pytest.mark.parametrize("answer", ["gold", None, 3, ("free", -1), ("free", True), ("free", "1"), ("free", 1, 2)])
def test_an_answer_that_names_no_plan_is_told_of(answer: Any) -> None:
    with pytest.raises(
        InvalidConfigurationError, match=r"the answer of plan_of must be one of the plans|version of a plan"
    ):
        run(Plans(LIMITS, Customers(acme=answer)).limits_of(Order(), "acme"))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"default": "gold"}, "default must be one of the plans"),
        ({"version": -1}, "version must be"),
        ({"version": True}, "version must be"),
        ({"size": 0}, "size must be"),
        ({"ttl": -1}, "ttl must be 0 or more"),
        ({"ttl": "soon"}, "ttl must be a timedelta or a number"),
        ({"inheritance": "RESET"}, "inheritance must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(InvalidConfigurationError, match=fault):
        Plans(LIMITS, Customers(), **settings)
    with pytest.raises(InvalidConfigurationError):
        Plans({"free": "20 per fortnight"}, Customers())


class TestCache:
    def test_an_answer_counts_for_its_time(self) -> None:
        clock, customers = Seconds(), Customers(acme="free")
        plans = Plans(LIMITS, customers, ttl=60, clock=clock)
        for now in (100, 159.9, 160, 219):
            clock.now = now
            run(plans.limits_of(Order(), "acme"))
        assert customers.asked == ["acme", "acme"]

    def test_none_is_kept_without_a_time(self) -> None:
        customers = Customers(acme="free")
        plans = Plans(LIMITS, customers, ttl=0)
        for _ in range(3):
            run(plans.limits_of(Order(), "acme"))
        assert len(customers.asked) == 3

    def test_no_more_than_its_size_is_kept_and_what_was_used_last_stays(self) -> None:
        customers = Customers()
        plans = Plans(LIMITS, customers, default="free", size=2)
        for key in ("a", "b", "a", "c", "a", "b"):
            run(plans.limits_of(Order(), key))
        assert customers.asked == ["a", "b", "c", "b"]

    def test_a_key_is_looked_up_anew_when_it_was_forgotten(self) -> None:
        customers = Customers(acme="free")
        plans = Plans(LIMITS, customers)
        assert run(plans.limits_of(Order(), "acme")) == limits("20/hour")
        customers.plans["acme"] = "basic"
        plans.forget("acme")
        plans.forget("unknown")
        assert run(plans.limits_of(Order(), "acme")) == limits("40/hour")

    def test_one_looks_up_anew_while_others_go_on_with_what_is_known(self) -> None:
        clock, customers = Seconds(), Customers(acme="free")
        plans = Plans(LIMITS, customers, ttl=60, clock=clock)
        run(plans.limits_of(Order(), "acme"))
        clock.now += 60
        renewal = plans.limits_of(Order(), "acme")
        renewal.send(None)  # it waits for the table
        assert run(plans.limits_of(Order(), "acme")) == limits("20/hour")
        assert len(customers.asked) == 2

    def test_the_last_answer_counts_on_where_the_look_up_fails(self, caplog: pytest.LogCaptureFixture) -> None:
        clock, customers = Seconds(), Customers(acme="free")
        plans = Plans(LIMITS, customers, ttl=60, clock=clock)
        run(plans.limits_of(Order(), "acme"))
        customers.fails = True
        clock.now += 60
        assert run(plans.limits_of(Order(), "acme")) == limits("20/hour")
        assert caplog.record_tuples == [
            (
                "ratelimit",
                logging.WARNING,
                f"a plan could not be looked up, the last one known stays valid: {customers.error!r}",
            )
        ]
        with pytest.raises(ConnectionError):
            run(plans.limits_of(Order(), "other"))
        clock.now += 5
        customers.fails = False
        customers.plans["acme"] = "basic"
        assert run(plans.limits_of(Order(), "acme")) == limits("40/hour")


@pytest.mark.parametrize(
    ("inheritance", "left"),
    [
        (TokensInheritance.PROPORTIONALLY, 29),
        (TokensInheritance.ADDITIVE, 34),
        (TokensInheritance.AS_IS, 14),
        (TokensInheritance.RESET, 39),
    ],
)
async def test_a_new_plan_takes_effect_on_the_live_bucket_once(
    asynchronous: bool, inheritance: TokensInheritance, left: int
) -> None:
    customers = Customers(acme=Assigned("free", 1))
    plans = Plans(LIMITS, customers.awaited if asynchronous else customers, ttl=0, inheritance=inheritance)
    limited = Limits(Rule(plans, key=customer), asynchronous=asynchronous)
    for _ in range(5):
        assert await limited.decide(Order("acme"))
    customers.plans["acme"] = Assigned("basic", 2)
    for expected in (left, left - 1):
        decision = await limited.decide(Order("acme"))
        assert decision.outcomes[0].probe.remaining_tokens == expected
        assert decision.outcomes[0].limits[0].policy.quota == 40
    customers.plans["acme"] = Assigned("free", 1)  # as a process says that has not heard of it
    decision = await limited.decide(Order("acme"))
    assert decision.outcomes[0].limits[0].policy.quota == 40


async def test_a_plan_without_limits_is_not_limited() -> None:
    limited = Limits(Rule(Plans(LIMITS, Customers(ci="internal")), key=customer))
    decision = await limited.decide(Order("ci"))
    assert decision
    assert decision.outcomes == ()
    assert limited.memory.get(b"default:ci") is None


async def test_the_plan_may_be_that_of_another_key_than_the_bucket(asynchronous: bool) -> None:
    customers = Customers(acme=Assigned("basic", 1))
    plans = Plans(LIMITS, customers.awaited if asynchronous else customers, by=customer, default="free")
    rule = Rule[Order](plans, key=lambda order: f"{order.customer}, {order.pieces}")
    limited = Limits(rule, asynchronous=asynchronous)
    for order, quota in [(Order("acme", 1), 40), (Order("acme", 2), 40), (Order("beta", 1), 20)]:
        decision = await limited.decide(order)
        assert decision.outcomes[0].limits[0].policy.quota == quota
        assert decision.outcomes[0].probe.remaining_tokens == quota - 1
    assert customers.asked == ["acme", "beta"]


def test_a_request_without_the_key_of_a_plan_has_the_default_one() -> None:
    customers = Customers()
    plans = Plans(LIMITS, customers, by=customer, default="free")
    assert run(plans.limits_of(Order(None), "192.0.2.1")) == limits("20/hour")
    assert customers.asked == []
