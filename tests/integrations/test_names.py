"""The keys of buckets of HTTP: no two limits share one unless they have one name, whatever clients send."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import MemoryStore, ProxyManager
from ratelimit.integrations.http import (
    HttpRequest,
    Limiter,
    Missing,
    Rule,
    client_ip,
    combined,
    first_of,
    header,
)
from ratelimit.policy.managers import NAMESPACE_VARIABLE, async_manager_of, manager_of
from tests.integrations.requests_of import Limits, request_of

# The characters that mean something in a key, and some that do not.
tricky = st.text(alphabet=r":|\{}()ab /", max_size=6)


def test_a_value_that_a_client_sends_does_not_name_another_limit() -> None:
    limiter = Limiter(
        Rule("1000/hour", name="tenant", key=header("x-tenant"), missing=Missing.UNLIMITED),
        Rule("3/hour", name="tenant:login", key=client_ip(), routes=["/login"]),
        manager=ProxyManager(MemoryStore()),
    )
    assert limiter.decide(request_of(x_tenant="login:192.0.2.1"))
    assert [bool(limiter.decide(request_of("/login"))) for _ in range(5)] == [True, True, True, False, False]


@given(st.lists(st.tuples(tricky, tricky), min_size=2, max_size=2, unique=True))
def test_combined_keys_of_different_parts_differ(pairs: list[tuple[str, str]]) -> None:
    def parts(one: str, two: str) -> Any:
        return combined(lambda _: one, lambda _: two)(request_of())

    assert parts(*pairs[0]) != parts(*pairs[1])


@given(tricky, tricky)
def test_the_first_of_several_keys_says_which_it_is(one: str, two: str) -> None:
    def key_of(request: HttpRequest) -> Any:
        return first_of(lambda request: request.header("one"), lambda request: request.header("two"))(request)

    def request(**headers: str) -> HttpRequest:
        return HttpRequest("GET", "/", None, headers.get)

    assert key_of(request(one=one)) != key_of(request(two=two))
    assert key_of(request(one=one, two=two)) == key_of(request(one=one))
    assert key_of(request()) is None


class TestPlaces:
    async def test_a_limit_without_a_name_counts_for_the_place_where_it_stands(self, asynchronous: bool) -> None:
        limited = Limits("1/minute", asynchronous=asynchronous)
        decided = [await limited.decide_at(place) for place in ("GET /a", "GET /b", "GET /a", "")]
        assert [bool(decision) for decision in decided] == [True, True, False, True]
        assert limited.consumed("GET /a|1/minute|ip:192.0.2.1") == 1

    async def test_with_a_name_it_is_shared_by_all_places(self, asynchronous: bool) -> None:
        limited = Limits(Rule("1/minute", name="all"), asynchronous=asynchronous)
        decided = [await limited.decide_at(place) for place in ("GET /a", "GET /b")]
        assert [bool(decision) for decision in decided] == [True, False]

    async def test_a_rule_for_some_routes_counts_apart_from_one_for_others(self, asynchronous: bool) -> None:
        rules = [Rule("1/minute", routes=["/a"]), Rule("1/minute", routes=["/b"]), Rule("1/minute", methods=["POST"])]
        limited = Limits(*rules, asynchronous=asynchronous)
        asked = [request_of(path) for path in ("/a", "/b", "/a")]
        assert [bool(await limited.decide(request)) for request in asked] == [True, True, False]


class TestNamespaces:
    async def test_services_with_one_redis_count_apart(
        self, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = Limits(Rule("1/minute", name="login"), asynchronous=asynchronous, namespace="shop")
        monkeypatch.setenv(NAMESPACE_VARIABLE, "billing")
        other = Limits(Rule("1/minute", name="login"), asynchronous=asynchronous, over=one)
        assert [bool(await one.decide()), bool(await one.decide()), bool(await other.decide())] == [True, False, True]
        assert one.consumed("shop||login:192.0.2.1") == one.consumed("billing||login:192.0.2.1") == 1


def test_the_managers_of_integrations_have_a_prefix_by_which_all_their_keys_are_found() -> None:
    assert repr(manager_of("memory://").bucket("a", "1/s")) == "Bucket('a')"
    manager = manager_of("memory://")
    assert manager is manager_of("memory://")
    Limiter("5/minute", manager="memory://").decide(request_of(peer="192.0.2.78"))
    store = manager._store  # pyright: ignore[reportPrivateUsage]
    assert isinstance(store, MemoryStore)
    assert store.get(b"ratelimit:|5/minute|ip:192.0.2.78") is not None
    assert async_manager_of("memory://")._prefix == b"ratelimit:"  # pyright: ignore[reportPrivateUsage]
