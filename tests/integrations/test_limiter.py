"""Rules, and what a limiter decides by them: who is limited, who pays how much and for what, and who gets it back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ratelimit import (
    BucketConfiguration,
    InvalidConfigurationError,
    OnError,
    ProxyManager,
    StoreUnavailableError,
)
from ratelimit.integrations.http import (
    Answers,
    AsyncLimiter,
    HttpRequest,
    Limiter,
    Missing,
    Rule,
    client_ip,
    combined,
    decision_about,
    header,
    route,
)
from ratelimit.testing import ScriptedStore
from tests.integrations.requests_of import Limits, request_of


async def statuses(limited: Limits, *requests: HttpRequest) -> list[bool]:
    return [bool(await limited.decide(request)) for request in requests]


class TestRule:
    def test_takes_a_list_for_several_limits_and_a_limiter_for_one_rule_each(self) -> None:
        several = BucketConfiguration.parse("10/minute; 5/second")
        assert Rule(["10/minute", "5/second"]).limits == several
        assert Rule(("10/minute", "5/second")).name == "10/minute; 5/second"
        one, other = Limiter(["10/minute", "5/second"], "7/hour", manager="memory://").rules
        assert (one.limits, other.limits) == (several, BucketConfiguration.parse("7/hour"))

    def test_buckets_are_named_by_the_rule_or_by_all_that_tells_it_from_others(self) -> None:
        assert Rule("10/minute", name="n").bucket_name("GET /a") == ("n",)
        assert Rule("10/minute").bucket_name("") == ("", "10/minute", "ip")
        assert Rule("10/minute").bucket_name("GET /a") == ("GET /a", "10/minute", "ip")
        somewhere = Rule("10/minute", key=header("user"), methods=["post"], routes=["/b", "/c"])
        assert somewhere.bucket_name("api") == ("api", "POST /b,/c", "10/minute", "header:user")

    def test_rules_that_are_made_alike_are_equal(self) -> None:
        def make() -> Rule:
            key = combined(client_ip(hops=1), route())
            return Rule("10/minute", key=key, routes=["/a"], methods=["GET"], cost=2, version=3, per_method=True)

        assert make() == make()
        assert hash(make()) == hash(make())
        assert make() != "10/minute"
        others: list[dict[str, Any]] = [
            *({"key": route()}, {"name": "x"}, {"routes": ["/b"]}, {"methods": ["GET"]}, {"when": bool}),
            *({"exempt": bool}, {"cost": 2}, {"missing": Missing.UNLIMITED}, {"per_method": True}),
            *({"version": 0}, {"enabled": False}),
        ]
        rules = [Rule("10/minute"), Rule("11/minute"), *(Rule("10/minute", **other) for other in others)]
        for place, one in enumerate(rules):
            assert [place for place, other in enumerate(rules) if one == other] == [place]

    def test_prints_how_it_is_made(self) -> None:
        rule = Rule("10/minute", name="x", methods=["GET"], routes=["/a"], version=3, enabled=False)
        assert repr(rule) == (
            "Rule('10/minute', key=client_ip(), name='x', methods=['GET', 'HEAD'], routes=('/a',), version=3,"
            " enabled=False)"
        )

    @pytest.mark.parametrize(
        ("routes", "path", "expected"),
        [
            (["/"], "/", True),
            (["/"], "/users", False),
            (["/users/{id}"], "/users/7", True),
            (["/users/{id}"], "/users/7/", False),
            (["/users/{id}"], "/users/", False),
            (["/users/{id}/posts"], "/users/a/b/posts", False),
            (["/files/{rest:path}"], "/files/a/b\nc", True),
            (["/a.b"], "/axb", False),
            (["/a", "/b"], "/b", True),
            (["/login"], "/login\n", True),
            (["/{year}-{month}"], "/2026-11", True),
            (["/{year}-{month}"], "/2026-11-27", True),
            (["/{year}-{month}"], "/2026-", False),
            (["/{year}-{month}"], "/2026-1/1", False),
            (["/{a}{b}c"], "/abc", True),
            (["/{a}{b}c"], "/ac", False),
            (["/{a}/x/{rest:path}/z"], "/1/x/y/y/z", True),
            (["/users/<int:id>"], "/users/7", True),
            (["/users/{id:int}/{rest:path}"], "/users/7/", True),
            ([], "/b", False),
        ],
    )
    def test_is_about_its_routes(self, routes: list[str], path: str, expected: bool) -> None:
        assert Rule("1/s", routes=routes).is_about(request_of(path)) is expected

    @pytest.mark.parametrize(
        ("methods", "method", "expected"),
        [
            (["post", "PUT"], "GET", False),
            (["post", "PUT"], "POST", True),
            (["post", "PUT"], "PUT", True),
            (["post", "PUT"], "HEAD", False),
            (["GET"], "HEAD", True),
            (["HEAD"], "GET", False),
        ],
    )
    def test_is_about_its_methods(self, methods: list[str], method: str, expected: bool) -> None:
        assert Rule("1/s", methods=methods).is_about(request_of(method=method)) is expected

    @pytest.mark.parametrize(
        ("rule_route", "found", "path", "expected"),
        [
            ("/users/{id}", "/users/{user_id}", "/anything", True),
            ("/users/{id}", "/users/<int:id>", "/anything", True),
            ("/users/<int:id>", "/users/{id}", "/anything", True),
            ("/users/{id}", "/users/me", "/users/me", False),
            ("/users/{id}", None, "/users/7", False),
            ("/users/{rest:path}", "/users/me", "/users/me", True),
            ("/nowhere", None, "/nowhere", True),
        ],
    )
    def test_a_route_of_the_application_is_where_its_router_sends_requests(
        self, rule_route: str, found: str | None, path: str, expected: bool
    ) -> None:
        request = request_of(path, route=found)
        request.find_routes = lambda: frozenset(["/users/{}", "/users/me"])
        assert Rule("1/s", routes=[rule_route]).is_about(request) is expected

    def test_is_about_nothing_where_it_is_not_enabled(self) -> None:
        assert not Rule("1/s", enabled=False).is_about(request_of())

    @pytest.mark.parametrize(
        ("settings", "fault"),
        [
            ({"key": "ip"}, "key must be a callable"),
            ({"name": ""}, "name must be"),
            ({"name": "ü"}, "name must be"),
            ({"name": "a\nb"}, "name must be"),
            ({"name": "a" * 201}, "name must be"),
            ({"methods": "GET"}, "methods must be a list"),
            ({"routes": "/users"}, "routes must be a list"),
            ({"routes": ["users"]}, "must begin with a slash"),
            ({"routes": ["/users/{id"]}, "must be written"),
            ({"routes": ["/users/<id>", "/{a-b}"]}, "must be written"),
            ({"routes": ["/{a:path}/{b:path}"]}, "at most one parameter for the rest"),
            ({"version": -1}, "version must be"),
            ({"version": True}, "version must be"),
            ({"enabled": "false"}, "enabled must be"),
            ({"per_method": 1}, "per_method must be"),
            ({"cost": 0}, "cost must be"),
            ({"cost": True}, "cost must be"),
            ({"cost": 1.5}, "cost must be"),
            ({"missing": "error"}, "missing must be"),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings: dict[str, Any], fault: str) -> None:
        with pytest.raises(InvalidConfigurationError, match=fault):
            Rule("1/s", **settings)
        with pytest.raises(InvalidConfigurationError):
            Rule("1 per fortnight")

    def test_two_without_a_name_differ_in_what_their_buckets_are_named_by(self) -> None:
        Limiter(Rule("1/s", methods=["GET"]), Rule("1/s", methods=["POST"]), Rule("1/s", key=route()), "1/s", "2/s")
        Limiter("1/s", Rule("1 per second"))
        with pytest.raises(InvalidConfigurationError, match="must have names, or they would share their buckets"):
            Limiter(Rule("1/s", when=bool), Rule("1/s", exempt=bool))


class TestLimiter:
    async def test_limits_alone_are_a_rule_for_all_by_their_address(self, asynchronous: bool) -> None:
        limited = Limits("2/minute", asynchronous=asynchronous)
        first, second = request_of(), request_of(peer="192.0.2.2")
        assert await statuses(limited, request_of("/a"), request_of("/b", method="POST"), first, second) == [
            *(True, True, False, True)
        ]
        assert decision_about(first).retry_after == 30
        assert limited.consumed("|2/minute|ip:192.0.2.1") == 2

    async def test_rules_share_buckets_by_name_and_key(self, asynchronous: bool) -> None:
        rules = [Rule("2/minute", name="x", routes=["/a"]), Rule("2/minute", name="x", routes=["/b"])]
        limited = Limits(*rules, asynchronous=asynchronous)
        assert await statuses(limited, request_of("/a"), request_of("/b"), request_of("/a")) == [True, True, False]

    async def test_a_key_of_route_and_address_is_a_bucket_for_each_route(self, asynchronous: bool) -> None:
        limited = Limits(Rule("1/minute", key=combined(client_ip(), route())), asynchronous=asynchronous)
        asked = [request_of(f"/users/{number}", route="/users/{id}") for number in range(2)]
        assert await statuses(limited, *asked, request_of("/a", route="/a")) == [True, False, True]

    async def test_exempt_and_when_say_who_is_not_limited(self, asynchronous: bool) -> None:
        async def is_internal(request: HttpRequest) -> bool:
            return request.header("x-internal") == "yes"

        exempt = is_internal if asynchronous else (lambda request: request.header("x-internal") == "yes")
        rule = Rule("1/minute", when=lambda request: request.path != "/health", exempt=exempt)
        limited = Limits(rule, asynchronous=asynchronous)
        free = [request_of("/health"), request_of(x_internal="yes")]
        assert await statuses(limited, *free, request_of(), *free, request_of()) == [*(True,) * 5, False]

    async def test_a_cost_is_a_number_or_depends_on_the_request(self, asynchronous: bool) -> None:
        async def cost(request: HttpRequest) -> int:
            return int(request.header("x-cost") or 0)

        limited = Limits(
            Rule("10/minute", cost=cost if asynchronous else (lambda request: int(request.header("x-cost") or 0))),
            asynchronous=asynchronous,
        )
        asked = [request_of(x_cost=cost) for cost in ("7", "4", "3", "11")]
        assert await statuses(limited, *asked, request_of()) == [True, False, True, False, True]
        assert decision_about(asked[1]).retry_after == 6
        assert decision_about(asked[3]).retry_after is None
        assert limited.consumed("|10/minute|ip:192.0.2.1") == 10

    async def test_a_request_without_a_key_is_an_error_or_not_limited(self, asynchronous: bool) -> None:
        limited = Limits(
            Rule("5/minute", name="all"), Rule("1/minute", key=header("user"), name="user"), asynchronous=asynchronous
        )
        decision = await limited.decide()
        assert not decision
        assert decision.missing is limited.limiter.rules[1]
        assert limited.consumed("all:192.0.2.1") == 0
        lenient = Limits(Rule("1/minute", key=header("user"), missing=Missing.UNLIMITED), asynchronous=asynchronous)
        assert await statuses(lenient, request_of(), request_of(), request_of(user="a")) == [True, True, True]

    async def test_a_refusal_says_by_which_rule_and_costs_nothing(self, asynchronous: bool) -> None:
        rules = [Rule("100/minute", name="all"), Rule("1/minute", name="few"), Rule("9/minute", name="last")]
        limited = Limits(*rules, asynchronous=asynchronous)
        assert await limited.decide()
        decision = await limited.decide()
        assert decision.refused is not None
        assert decision.refused.rule is rules[1]
        assert decision.refused.violated_policies == ["few"]
        assert [outcome.limits[0].remaining for outcome in decision.outcomes] == [99, 0, 8]
        assert [limited.consumed(f"{rule.name}:192.0.2.1") for rule in rules] == [1, 1, 1]

    async def test_a_request_pays_for_a_bucket_once(self, asynchronous: bool) -> None:
        """Whatever middleware, dependency and decorator it passes."""
        outer = Limits("5/minute", Rule("9/minute", name="outer"), asynchronous=asynchronous)
        kind: Any = AsyncLimiter if asynchronous else Limiter
        inner = kind(Rule("5/minute", cost=3), Rule("7/minute", name="inner"), manager=outer.manager)
        request = request_of()
        await outer.decide(request)
        outer.limiter = inner
        decision = await outer.decide(request)
        await outer.decide(request)
        assert [outcome.rule.name for outcome in decision.outcomes] == ["5/minute", "outer", "inner"]
        assert [outer.consumed(f"{name}:192.0.2.1") for name in ("|5/minute|ip", "outer", "inner")] == [1, 1, 1]
        assert decision_about(request) == decision

    async def test_a_refusal_further_in_gives_back_what_was_paid_further_out(self, asynchronous: bool) -> None:
        limited = Limits("5/minute", asynchronous=asynchronous)
        kind: Any = AsyncLimiter if asynchronous else Limiter
        request = request_of()
        assert await limited.decide(request)
        assert limited.consumed("|5/minute|ip:192.0.2.1") == 1
        limited.limiter = kind(Rule("2/minute", cost=3), manager=limited.manager)
        assert not await limited.decide(request)
        assert limited.consumed("|5/minute|ip:192.0.2.1") == 0
        assert not await limited.decide(request), "what was refused stays refused"
        assert limited.consumed("|5/minute|ip:192.0.2.1") == 0

    def test_tokens_that_cannot_be_given_back_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        store = ScriptedStore()
        manager, request = ProxyManager(store), request_of()
        assert Limiter("5/minute", manager=manager, on_error=OnError.RAISE).decide(request)
        store.fail(times=2)
        policies = iter([OnError.DENY, OnError.RAISE])
        assert not Limiter("3/minute", manager=manager, on_error=lambda *_: next(policies)).decide(request)
        assert "1 tokens of a refused request could not be given back: the store failed" in caplog.text


def test_a_request_has_the_attributes_of_the_one_of_the_framework() -> None:
    request = request_of()
    request.native = SimpleNamespace(client=SimpleNamespace(host="192.0.2.9"), method="of the framework")
    assert (request.client.host, request.method) == ("192.0.2.9", "GET")
    with pytest.raises(AttributeError, match="neither HttpRequest nor SimpleNamespace has 'headers'"):
        request.headers  # noqa: B018


class TestWithoutStore:
    async def test_a_manager_of_the_callers_decides_by_its_own_policy(self) -> None:
        store = ScriptedStore()
        raising = ProxyManager(store, on_error=OnError.RAISE)
        store.fail(times=4)
        with pytest.raises(StoreUnavailableError):
            Limiter("5/minute", manager=raising).decide(request_of())
        assert not Limiter("5/minute", manager=raising, on_error=OnError.DENY).decide(request_of())
        assert Limiter("5/minute", manager=ProxyManager(store, on_error=OnError.ALLOW)).decide(request_of())

    def test_a_manager_that_does_not_say_what_to_decide_answers_as_one_by_url(self) -> None:
        store = ScriptedStore()
        limiter = Limiter("5/minute", manager=ProxyManager(store))
        store.fail()
        decision = limiter.decide(request_of())
        assert Answers().refusal(decision).status == 503
        assert decision.degraded

    @pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", None])
    async def test_by_url_requests_are_refused_for_the_time_being(
        self, url: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RATELIMIT_URL", "redis://127.0.0.1:1/1")
        for decision in (
            Limiter("5/minute", manager=url).decide(request_of()),
            await AsyncLimiter("5/minute", manager=url).decide(request_of()),
        ):
            assert not decision
            assert decision.degraded
            assert decision.retry_after == 1

    def test_a_policy_may_allow(self) -> None:
        decision = Limiter("5/minute", manager="redis://127.0.0.1:1/0", on_error=OnError.ALLOW).decide(request_of())
        assert decision
        assert decision.degraded


def test_a_manager_by_url_is_shared() -> None:
    one, other = Limiter("5/minute", manager="memory://"), Limiter(Rule("5/minute", cost=5), manager="memory://")
    assert one.decide(request_of(peer="192.0.2.77"))
    assert not other.decide(request_of(peer="192.0.2.77"))
