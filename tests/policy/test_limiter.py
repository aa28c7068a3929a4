"""What a limiter decides about requests of any type: who pays for what, and who gets it back."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ratelimit import (
    AsyncProxyManager,
    InvalidArgumentError,
    InvalidConfigurationError,
    OnError,
    ProxyManager,
    RateLimitError,
    StoreUnavailableError,
)
from ratelimit.policy import (
    AmbiguousKeyError,
    AsyncLimiter,
    Decision,
    Limiter,
    Missing,
    Plans,
    Rule,
)
from ratelimit.policy.recording import RecordedDecision, recording
from ratelimit.testing import ScriptedStore
from tests.policy.orders import Limits, Order, customer
from tests.support.fixed_window import FixedWindow

ACME, BETA = Order("acme"), Order("beta")
NOBODY = Order(None)


async def test_limits_alone_are_one_bucket_for_all(asynchronous: bool) -> None:
    limited = Limits("2/minute", asynchronous=asynchronous)
    assert await limited.admitted(ACME, BETA, ACME) == [True, True, False]
    assert limited.consumed("|2/minute") == 2


async def test_each_key_has_a_bucket(asynchronous: bool) -> None:
    limited = Limits(Rule("1/minute", key=customer, name="orders"), asynchronous=asynchronous)
    assert await limited.admitted(ACME, BETA, ACME, BETA) == [True, True, False, False]
    assert limited.consumed("orders:acme") == 1


@pytest.mark.parametrize("key", ["all", b"all"])
async def test_a_key_may_be_a_value(key: Any, asynchronous: bool) -> None:
    limited = Limits(Rule("1/minute", key=key, name="orders"), asynchronous=asynchronous)
    assert await limited.admitted(ACME, BETA) == [True, False]
    assert limited.consumed("orders:all") == 1


async def test_a_rule_without_a_name_counts_for_its_place(asynchronous: bool) -> None:
    limited = Limits(Rule("1/minute", key=customer), asynchronous=asynchronous)
    decided = [await limited.decide(ACME, place) for place in ("shop", "stall", "shop")]
    assert [bool(decision) for decision in decided] == [True, True, False]
    assert limited.consumed("shop|1/minute|customer:acme") == 1


async def test_a_decision_says_by_which_rule_and_when_to_come_back(asynchronous: bool) -> None:
    limited = Limits(Rule("4/minute", key=customer, name="orders", cost=3), asynchronous=asynchronous)
    admitted, refused = await limited.decide(ACME), await limited.decide(ACME)
    assert (admitted.refused, admitted.retry_after, admitted.missing) == (None, None, None)
    assert [(one.key, one.tokens, one.probe.remaining_tokens) for one in admitted.outcomes] == [("acme", 3, 1)]
    assert refused.refused is refused.outcomes[-1]
    assert refused.refused is not None
    assert (refused.refused.violated_policies, refused.retry_after) == (["orders"], 30)
    assert refused.request is ACME
    assert refused.refused.limits is refused.refused.limits
    assert (refused.refused.limits[0].policy, refused.refused.limits[0].remaining) == (("orders", 4, 60), 1)


async def test_when_and_exempt_say_which_requests_are_limited(asynchronous: bool) -> None:
    async def is_urgent(order: Order) -> bool:
        return order.urgent

    exempt = is_urgent if asynchronous else (lambda order: order.urgent)
    rule = Rule("1/minute", when=lambda order: order.pieces > 1, exempt=exempt)
    limited = Limits(rule, asynchronous=asynchronous)
    free = [Order(pieces=1), Order(pieces=2, urgent=True)]
    assert await limited.admitted(*free, Order(pieces=2), *free, Order(pieces=2)) == [*(True,) * 5, False]


async def test_a_cost_depends_on_the_request_and_may_be_nothing(asynchronous: bool) -> None:
    looked_up: list[Any] = []

    def limits(key: Any) -> str:
        looked_up.append(key)
        return "10/minute"

    rule = Rule(limits, key=customer, name="orders", cost=lambda order: order.pieces)
    limited = Limits(rule, asynchronous=asynchronous)
    assert await limited.admitted(*(Order(pieces=pieces) for pieces in (7, 4, 3, 0))) == [True, False, True, True]
    assert len(looked_up) == 3, "what costs nothing is not looked up"


@pytest.mark.parametrize("cost", [-1, True, 1.5, None, 2**63])
async def test_a_cost_that_is_not_valid_is_an_error(cost: Any, asynchronous: bool) -> None:
    limited = Limits(Rule("10/minute", cost=lambda _: cost), asynchronous=asynchronous)
    with pytest.raises(InvalidArgumentError, match=r"the answer of cost must be an int from 0 to 2\*\*63 - 1; got"):
        await limited.decide()


@pytest.mark.parametrize("key", [42, True, ("a",)])
async def test_a_key_that_is_not_valid_is_an_error(key: Any, asynchronous: bool) -> None:
    limited = Limits(Rule("10/minute", key=lambda _: key), asynchronous=asynchronous)
    with pytest.raises(InvalidArgumentError, match="the answer of key must be a str, bytes or None; got"):
        await limited.decide()


async def test_limits_are_looked_up_by_key_request_or_name(asynchronous: bool) -> None:
    def by_key(key: Any) -> str | None:
        return {"acme": "1/minute"}.get(key)

    def by_both(key: Any, order: Order) -> str | None:
        return "2/minute" if order.urgent and key == "acme" else None

    rules = [Rule(by_key, key=customer, name="key"), Rule(by_both, key=customer, name="both")]
    for rule, order in zip(rules, [ACME, Order("acme", urgent=True)], strict=True):
        limited = Limits(rule, asynchronous=asynchronous)
        assert await limited.admitted(*[BETA] * 3) == [True] * 3
        assert not all(await limited.admitted(*[order] * 3))
    limited = Limits(Rule({"orders": "1/minute"}.get, name="orders"), asynchronous=asynchronous)
    assert await limited.admitted(ACME, BETA) == [True, False]


async def test_a_request_without_a_key_is_an_error_or_not_limited(asynchronous: bool) -> None:
    rules = [Rule[Order]("5/minute", name="all"), Rule("1/minute", key=customer, name="customer")]
    limited = Limits(*rules, asynchronous=asynchronous)
    decision = await limited.decide(NOBODY)
    assert not decision
    assert (decision.missing, decision.fault) == (rules[1], None)
    assert limited.consumed("all") == 0
    lenient = Limits(Rule("1/minute", key=customer, missing=Missing.UNLIMITED), asynchronous=asynchronous)
    assert await lenient.admitted(NOBODY, NOBODY) == [True, True]


async def test_an_ambiguous_key_is_an_error_in_any_case(asynchronous: bool) -> None:
    def key(order: Order) -> str:
        raise AmbiguousKeyError(f"{order.pieces} customers")

    rules = [Rule[Order]("5/minute", name="all"), Rule("1/minute", key=key, missing=Missing.UNLIMITED, name="one")]
    limited = Limits(*rules, asynchronous=asynchronous)
    decision = await limited.decide(Order(pieces=2))
    assert (bool(decision), decision.missing, decision.fault) == (False, rules[1], "2 customers")
    assert limited.consumed("all") == 0


async def test_a_request_pays_for_a_bucket_once(asynchronous: bool) -> None:
    rules: list[Any] = [
        Rule("3/minute", name="x", when=lambda _: True),
        Rule("3/minute", name="x", exempt=lambda _: False),
    ]
    limited = Limits(*rules, asynchronous=asynchronous)
    await limited.decide()
    assert limited.consumed("x") == 1


async def test_a_hook_hears_of_each_refusal(asynchronous: bool) -> None:
    heard: list[tuple[Order, Decision[Order]]] = []

    def hook(order: Order, decision: Decision[Order]) -> None:
        heard.append((order, decision))

    async def ahook(order: Order, decision: Decision[Order]) -> None:
        hook(order, decision)

    limited = Limits("1/minute", asynchronous=asynchronous, on_refused=ahook if asynchronous else hook)
    await limited.decide(ACME)
    decision = await limited.decide(BETA)
    assert heard == [(BETA, decision)]


async def test_refusals_are_logged_with_the_hash_of_the_key_if_there_is_one(
    asynchronous: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    for rule in (Rule("1/minute", name="all"), Rule("1/minute", name="each", key=customer)):
        limited = Limits(rule, asynchronous=asynchronous)
        await limited.admitted(ACME, ACME)
    assert caplog.messages[0] == "refused by 'all': limits 1/minute"
    assert caplog.messages[1].startswith("refused by 'each': key ")


async def test_decisions_are_recorded(asynchronous: bool) -> None:
    limited = Limits(Rule("1/minute", name="all"), Rule("2/minute", key=customer), asynchronous=asynchronous)
    with recording() as recorded:
        await limited.admitted(ACME, ACME)
    assert recorded == [
        RecordedDecision("all", None, admitted=True),
        RecordedDecision("2/minute", "acme", admitted=True),
        RecordedDecision("all", None, admitted=False),
        # It has its token, and is not charged.
        RecordedDecision("2/minute", "acme", admitted=True),
    ]


async def test_limiters_and_rules_can_be_switched_off(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    off = Limits("1/minute", asynchronous=asynchronous, enabled=False)
    partly = Limits(Rule("1/minute", enabled=False), "2/minute", asynchronous=asynchronous)
    assert await off.admitted(ACME, ACME) == [True, True]
    assert await partly.admitted(ACME, ACME, ACME) == [True, True, False]
    monkeypatch.setenv("RATELIMIT_ENABLED", "false")
    assert await partly.admitted(ACME) == [True]


async def test_services_count_apart_by_their_namespaces(asynchronous: bool) -> None:
    one = Limits(Rule("1/minute", name="orders"), asynchronous=asynchronous, namespace="shop")
    other = Limits(Rule("1/minute", name="orders"), asynchronous=asynchronous, over=one, namespace="stall")
    assert [await one.admitted(ACME), await other.admitted(ACME), await one.admitted(ACME)] == [[True], [True], [False]]
    assert one.consumed("shop||orders") == one.consumed("stall||orders") == 1


async def async_answer(_: Any) -> Any:
    return 1


@pytest.mark.parametrize(
    "rule",
    [
        Rule[Order]("5/minute", key=async_answer),
        Rule[Order]("5/minute", cost=async_answer),
        Rule[Order]("5/minute", when=async_answer),
        Rule[Order]("5/minute", exempt=async_answer),
        Rule[Order](async_answer),
        Rule[Order](Plans({"free": "5/minute"}, async_answer)),
        Rule[Order](Plans({"free": "5/minute"}, async_answer, by=async_answer)),
    ],
)
async def test_a_callable_that_has_to_be_awaited_is_refused_where_nobody_can(rule: Rule[Order]) -> None:
    with pytest.raises(InvalidArgumentError, match="only an AsyncLimiter awaits"):
        await Limits(rule).decide()


class TestWithoutStore:
    def test_the_manager_decides_unless_the_limiter_says_otherwise(self) -> None:
        store = ScriptedStore()
        store.fail(times=4)
        with pytest.raises(StoreUnavailableError):
            Limiter[Order]("5/minute", manager=ProxyManager(store)).decide(ACME)
        denying = Limiter[Order]("5/minute", manager=ProxyManager(store), on_error=OnError.DENY)
        decision = denying.decide(ACME)
        assert (bool(decision), decision.degraded, decision.retry_after) == (False, True, 1)
        assert decision.outcomes[0].limits == ()
        assert Limiter[Order]("5/minute", manager=ProxyManager(store, on_error=OnError.ALLOW)).decide(ACME)


def test_a_wrong_manager_is_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="is not valid"):
        Limiter[Order]("5/minute", manager="http://localhost").decide(ACME)
    sync: Any = ProxyManager.from_url("memory://")
    asynchronous: Any = AsyncProxyManager.from_url("memory://")
    with pytest.raises(InvalidArgumentError, match="manager must be a ProxyManager or a URL; got an AsyncProxyManager"):
        Limiter[Order]("5/minute", manager=asynchronous)
    with pytest.raises(InvalidArgumentError, match="manager must be an AsyncProxyManager or a URL; got a ProxyManager"):
        AsyncLimiter[Order]("5/minute", manager=sync)


def test_a_limiter_prints_its_rules_and_no_secrets() -> None:
    limiter = Limiter[Order]("5/minute", manager="redis://:secret@localhost", namespace="shop", enabled=False)
    assert repr(limiter).startswith("Limiter(Rule('5/minute'), manager='redis://")
    assert "secret" not in repr(limiter)
    assert repr(limiter).endswith("namespace='shop', enabled=False)")


def test_a_hook_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(InvalidConfigurationError, match="on_refused must be a callable; got 42"):
        Limiter[Order]("5/minute", on_refused=42)  # type: ignore[arg-type]  # as it says


def test_errors_of_the_library_are_those_of_the_manager() -> None:
    manager = ProxyManager.from_url("memory://", prefix="closed:")
    manager.close()
    with pytest.raises(RateLimitError):
        Limiter[Order]("5/minute", manager=manager).decide(ACME)


async def test_limits_may_be_of_another_algorithm(asynchronous: bool) -> None:
    limits: Any = FixedWindow(2, 60_000_000_000)
    for given in (limits, lambda _: limits):
        limited = Limits(Rule(given, key=customer, name="fixed"), asynchronous=asynchronous)
        assert await limited.admitted(ACME, ACME, ACME) == [True, True, False]
        decision = await limited.decide(BETA)
        assert decision.outcomes[0].limits[0].policy == ("fixed", 2, 60)
        assert (decision.outcomes[0].limits[0].remaining, decision.outcomes[0].limits[0].violated) == (1, False)
