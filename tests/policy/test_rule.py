"""Rules for requests of any type."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from ratelimit import BucketConfiguration, InvalidArgumentError, InvalidConfigurationError
from ratelimit.integrations import http
from ratelimit.policy import Limiter, Missing, Plans, Rule
from tests.policy.orders import customer


def pieces(order: Any) -> int:
    return order.pieces  # type: ignore[no-any-return]  # an order has them


def test_a_rule_is_named_by_its_limits() -> None:
    assert Rule("10/minute").name == "10/minute"
    assert Rule("10 per minute").name == "10/minute"
    assert Rule(lambda _: "10/minute").name == "default"
    assert Rule("10/minute", name="größer").name == "größer"


@pytest.mark.parametrize(
    ("rule", "place", "name"),
    [
        (Rule[Any]("10/minute", name="orders"), "shop", ("orders",)),
        (Rule[Any]("10/minute"), "shop", ("shop", "10/minute")),
        (Rule[Any]("10/minute", key="all"), "", ("", "10/minute", "str")),
        (Rule[Any]("10/minute", key=customer), "shop", ("shop", "10/minute", "customer")),
    ],
)
def test_buckets_are_named_by_the_rule_or_by_all_that_distinguishes_it(
    rule: Rule[Any], place: str, name: tuple[str, ...]
) -> None:
    assert rule.bucket_name(place) == name


def test_rules_that_are_made_alike_are_equal() -> None:
    def make() -> Rule[Any]:
        return Rule("10/minute", key=customer, name="orders", cost=pieces, version=3)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != "10/minute"
    others: list[dict[str, Any]] = [
        *({"key": customer}, {"name": "x"}, {"when": bool}, {"exempt": bool}, {"cost": 2}, {"version": 0}),
        *({"missing": Missing.UNLIMITED}, {"enabled": False}, {"key": "all"}, {"key": b"all"}),
    ]
    rules = [Rule[Any]("10/minute"), Rule[Any]("11/minute"), *(Rule[Any]("10/minute", **other) for other in others)]
    for place, one in enumerate(rules):
        assert [place for place, other in enumerate(rules) if one == other] == [place]


def test_a_rule_for_other_requests_is_another_one() -> None:
    ours = http.Rule("10/minute", key=customer)  # type: ignore[arg-type]  # is not called
    assert ours != Rule[Any]("10/minute", key=customer)


def test_a_rule_prints_how_it_is_made() -> None:
    assert repr(Rule[Any]("10 per minute")) == "Rule('10/minute')"
    rule = Rule[Any]("10/minute", key="all", name="x", cost=2, missing=Missing.UNLIMITED, version=3, enabled=False)
    assert repr(rule) == (
        "Rule('10/minute', key='all', name='x', cost=2, missing=<Missing.UNLIMITED: 'unlimited'>, version=3,"
        " enabled=False)"
    )


def test_a_rule_travels_to_another_process() -> None:
    rule = Rule[Any]("10/minute", key=customer, name="orders", cost=pieces, version=3)
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_a_key_is_given_to_rules_without_one() -> None:
    assert Rule[Any]("10/minute").by(customer) == Rule[Any]("10/minute", key=customer)
    assert Rule[Any]("10/minute", key="all").by(customer) == Rule[Any]("10/minute", key="all")
    rule = Rule[Any]("10/minute")
    assert rule.by(None) is rule


def test_a_rule_is_made_of_limits_and_settings_but_has_its_own() -> None:
    rule: Rule[Any] = Rule.of("10/minute", name="x")
    assert (rule.name, Rule.of(rule)) == ("x", rule)
    with pytest.raises(InvalidArgumentError, match="a Rule has its settings already; 'name' goes there"):
        Rule.of(rule, name="y")
    with pytest.raises(InvalidArgumentError, match=r"rule must be a ratelimit.integrations.http.rules.Rule or limits"):
        http.Rule.of(rule)  # type: ignore[arg-type]  # as it says


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"key": 42}, "key must be a str, bytes, or a callable; got 42"),
        ({"name": b"orders"}, "name must be a str; got b'orders'"),
        ({"when": True}, "when must be a callable; got True"),
        ({"exempt": "x"}, "exempt must be a callable; got 'x'"),
        ({"cost": 0}, "cost must be an int from 1 to 2**63 - 1, or a callable; got 0"),
        ({"cost": True}, "cost must be an int from 1 to 2**63 - 1, or a callable; got True"),
        ({"cost": 2**63}, f"cost must be an int from 1 to 2**63 - 1; got {2**63}"),
        ({"missing": "error"}, "missing must be a Missing; got 'error'"),
        ({"version": -1}, "version must be None or an int of 0 or more; got -1"),
        ({"version": True}, "version must be None or an int of 0 or more; got True"),
        ({"enabled": 1}, "enabled must be True or False; got 1"),
    ],
)
def test_settings_that_are_not_valid_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidConfigurationError) as error:
        Rule("1/s", **settings)
    assert (str(error.value), error.value.field) == (complaint, next(iter(settings)))


def test_limits_that_are_not_valid_are_refused() -> None:
    with pytest.raises(InvalidConfigurationError):
        Rule("1 per fortnight")


def test_two_rules_of_one_name_have_the_same_limits() -> None:
    Limiter[Any](Rule("1/s", name="a", when=bool), Rule("1/s", name="a", exempt=bool))
    with pytest.raises(InvalidConfigurationError, match="'a' has '1/second' and '2/second'"):
        Limiter[Any](Rule("1/s", name="a"), Rule("2/s", name="a"))
    with pytest.raises(InvalidConfigurationError, match="'a' has '1/second' of version 1 and '1/second' of version 2"):
        Limiter[Any](Rule("1/s", name="a", version=1), Rule("1/s", name="a", version=2))


def test_two_rules_without_a_name_differ_in_what_their_buckets_are_named_by() -> None:
    Limiter[Any]("1/s", Rule("1/s", key=customer), "2/s", Rule("1 per second"))
    with pytest.raises(InvalidConfigurationError, match="must have names, or they would share their buckets"):
        Limiter[Any](Rule("1/s", when=bool), Rule("1/s", exempt=bool))


def test_a_policy_of_several_bandwidths_is_named_by_each() -> None:
    configuration = BucketConfiguration.parse("10/second burst 50; 1000/hour id hourly")
    named, unnamed = Rule[Any](configuration, name="api"), Rule[Any](configuration)
    assert [named.policy_name(configuration, each) for each in configuration] == [
        *("api: 10/second burst 50", "api: hourly")
    ]
    assert [unnamed.policy_name(configuration, each) for each in configuration] == ["10/second burst 50", "hourly"]


def test_plans_say_how_tokens_pass_to_other_limits() -> None:
    plans = Plans({"free": "1/s"}, lambda _: "free")
    assert Rule[Any](plans).inheritance is plans.inheritance
