"""What whoever operates a service relies on: the switch, versions of limits, and what is logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ratelimit import MemoryStore, OnError, ProxyManager
from ratelimit.integrations.http import (
    Answers,
    Assigned,
    HttpDecision,
    HttpRequest,
    Limiter,
    Missing,
    Plans,
    RequestKey,
    Rule,
    client_ip,
    header,
    keys,
)
from ratelimit.policy import switch
from ratelimit.policy.logs import hashed
from ratelimit.testing import ScriptedStore
from tests.integrations.requests_of import Limits, request_of


async def admitted(limited: Limits, *requests: HttpRequest) -> list[bool]:
    return [bool(await limited.decide(request)) for request in requests]


class TestSwitch:
    @pytest.mark.parametrize("value", ["false", "False", "0", "no", "OFF", " false "])
    async def test_the_variable_switches_every_limiter_off(
        self, value: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limited = Limits("1/minute", asynchronous=asynchronous)
        monkeypatch.setenv(switch.ENABLED_VARIABLE, value)
        assert await admitted(limited, request_of(), request_of()) == [True, True]
        monkeypatch.delenv(switch.ENABLED_VARIABLE)
        assert await admitted(limited, request_of(), request_of()) == [True, False]

    @pytest.mark.parametrize("value", ["true", "1", "", "maybe"])
    def test_other_values_leave_it_on(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(switch.ENABLED_VARIABLE, value)
        assert switch.is_enabled()

    def test_a_block_overrides_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(switch.ENABLED_VARIABLE, "false")
        with switch.enabled(True):
            assert switch.is_enabled()
            with switch.enabled(False):
                assert not switch.is_enabled()
            assert switch.is_enabled()
        assert not switch.is_enabled()

    async def test_a_limiter_and_a_rule_have_switches_of_their_own(self, asynchronous: bool) -> None:
        off = Limits("1/minute", asynchronous=asynchronous, enabled=False)
        assert await admitted(off, request_of(), request_of()) == [True, True]
        partly = Limits(Rule("1/minute", enabled=False), "2/minute", asynchronous=asynchronous)
        assert await admitted(partly, *(request_of() for _ in range(3))) == [True, True, False]


class TestVersions:
    async def test_a_higher_version_replaces_the_limits_of_live_buckets(self, asynchronous: bool) -> None:
        old = Limits(Rule("10/minute", name="api", version=1), asynchronous=asynchronous)
        assert await admitted(old, *(request_of() for _ in range(5))) == [True] * 5
        new = Limits(Rule("100/minute", name="api", version=2), asynchronous=asynchronous, over=old)
        decision = await new.decide()
        assert decision.outcomes[0].probe.remaining_tokens == 49, "the fill level is kept"

    async def test_without_versions_the_stored_limits_stay(self, asynchronous: bool) -> None:
        old = Limits(Rule("10/minute", name="api"), asynchronous=asynchronous)
        await old.decide()
        new = Limits(Rule("100/minute", name="api"), asynchronous=asynchronous, over=old)
        assert (await new.decide()).outcomes[0].probe.remaining_tokens == 8

    async def test_old_and_new_side_by_side_go_by_the_new_limits(
        self, asynchronous: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A rolling deployment: the processes that still have the old version do not bring its limits back."""
        old = Limits(Rule("10/minute", name="api", version=1), asynchronous=asynchronous)
        new = Limits(Rule("100/minute", name="api", version=2), asynchronous=asynchronous, over=old)
        await old.decide()
        left = [(await each.decide()).outcomes[0].probe.remaining_tokens for each in (new, old, new, old)]
        assert left == [89, 88, 87, 86]
        assert len(caplog.records) == 1

    async def test_rolling_back_takes_a_version_that_is_higher_still(self, asynchronous: bool) -> None:
        new = Limits(Rule("100/minute", name="api", version=2), asynchronous=asynchronous)
        await new.decide()
        rolled_back = Limits(Rule("10/minute", name="api", version=1), asynchronous=asynchronous, over=new)
        assert (await rolled_back.decide()).outcomes[0].probe.remaining_tokens == 98
        again = Limits(Rule("10/minute", name="api", version=3), asynchronous=asynchronous, over=new)
        assert (await again.decide()).outcomes[0].configuration is not None
        assert (await again.decide()).outcomes[0].limits[0].policy.quota == 10

    async def test_that_of_a_rule_is_added_to_that_of_a_plan(self, asynchronous: bool) -> None:
        def plans(limits: str) -> Plans:
            return Plans({"free": limits}, lambda _: Assigned("free", version=5))

        old = Limits(Rule(plans("10/minute"), name="plan", version=1), asynchronous=asynchronous)
        await old.decide()
        new = Limits(Rule(plans("20/minute"), name="plan", version=2), asynchronous=asynchronous, over=old)
        assert (await new.decide()).outcomes[0].limits[0].policy.quota == 20


class TestStoredLimits:
    async def test_limits_that_differ_from_the_code_are_logged_once_for_each_rule(
        self, asynchronous: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        old = Limits(Rule("3/minute", name="api"), Rule("4/minute", name="web"), asynchronous=asynchronous)
        await old.decide()
        assert not caplog.records
        changed = [Rule("100/minute", name="api"), Rule("4/minute", name="web")]
        new = Limits(*changed, asynchronous=asynchronous, over=old)
        for _ in range(3):
            await new.decide()
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        message = record.getMessage()
        assert "the limits of 'api' are 100/minute in the code, but 3/minute in the store" in message
        assert "raise version=" in message

    async def test_a_local_bucket_that_stands_in_has_limits_of_its_own(
        self, asynchronous: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        rule = Rule("10/minute", name="api")
        limited = Limits(rule, asynchronous=asynchronous, on_error=OnError.local(0.5), store=(store := ScriptedStore()))
        store.fail(times=2)
        assert await limited.decide()
        assert not [record for record in caplog.records if "in the code" in record.getMessage()]


class TestRefusals:
    async def test_each_is_logged_with_the_rule_the_hashed_key_and_the_limits(
        self, asynchronous: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "ratelimit")
        limited = Limits(Rule("1/minute", name="api"), asynchronous=asynchronous)
        await admitted(limited, request_of(), request_of())
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert record.getMessage() == f"refused by 'api': key {hashed('192.0.2.1')}, limits 1/minute"
        assert "192.0.2.1" not in record.getMessage()

    async def test_a_flood_is_logged_ten_times_a_second(
        self, asynchronous: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        caplog.set_level(logging.INFO, "ratelimit")
        now = 100.0
        monkeypatch.setattr("ratelimit.policy.logs.monotonic", lambda: now)
        limited = Limits(Rule("1/hour", name="api"), asynchronous=asynchronous)
        await admitted(limited, *(request_of() for _ in range(51)))
        assert len(caplog.records) == 10
        now = 101.0
        await limited.decide()
        assert caplog.records[-1].getMessage().endswith("; 40 refusals before it were not logged")
        assert len(caplog.records) == 11

    async def test_a_hook_hears_of_each(self, asynchronous: bool) -> None:
        heard: list[Any] = []

        def hook(request: HttpRequest, decision: HttpDecision) -> None:
            heard.append((request, decision))

        async def ahook(request: HttpRequest, decision: HttpDecision) -> None:
            hook(request, decision)

        rules = [Rule("5/minute", name="all"), Rule("1/minute", name="few"), Rule("9/minute", key=header("user"))]
        limited = Limits(*rules, asynchronous=asynchronous, on_refused=ahook if asynchronous else hook)
        asked = [request_of(user="a"), request_of(user="a"), request_of(peer="192.0.2.9")]
        decided = [await limited.decide(request) for request in asked]
        assert heard == [(asked[1], decided[1]), (asked[2], decided[2])]
        assert (decided[1].refused, decided[2].missing) != (None, None)


def test_answers_see_the_request() -> None:
    class Polite(Answers):
        def body(self, problem: dict[str, Any]) -> bytes:
            return b"unused"

        def problem(self, decision: HttpDecision) -> dict[str, Any]:
            assert decision.request is not None
            language = decision.request.header("accept-language")
            return {**super().problem(decision), "title": "Langsam!" if language == "de" else "Slow down!"}

    answers = Polite()
    limiter = Limiter("1/minute", Rule("9/minute", key=header("user")), manager=ProxyManager(MemoryStore()))
    refused = [limiter.decide(request_of(accept_language="de")), limiter.decide(request_of(accept_language="de"))]
    assert [answers.problem(decision)["title"] for decision in refused] == ["Langsam!", "Langsam!"]


class TestLimitsOfRequests:
    async def test_limits_may_see_the_request(self, asynchronous: bool) -> None:
        def limits(key: Any, request: HttpRequest) -> str | None:
            assert key == "192.0.2.1"
            return {"POST": "1/minute", "GET": "2/minute"}.get(request.method)

        async def alimits(key: Any, request: HttpRequest) -> str | None:
            return limits(key, request)

        rule = Rule(alimits if asynchronous else limits, name="x", per_method=True)
        limited = Limits(rule, asynchronous=asynchronous)
        methods = ["POST", "POST", "GET", "GET", "GET", "PUT", "PUT", "PUT"]
        asked = [request_of(method=method) for method in methods]
        assert await admitted(limited, *asked) == [True, False, True, True, False, True, True, True]

    async def test_each_method_has_buckets_of_its_own(self, asynchronous: bool) -> None:
        limited = Limits(Rule("1/minute", name="x", per_method=True), asynchronous=asynchronous)
        asked = [request_of(method=method) for method in ("GET", "POST", "HEAD", "BREW", "POST", "COFFEE")]
        assert await admitted(limited, *asked) == [True, True, False, True, False, False]
        assert limited.consumed("x:GET|192.0.2.1") == 1


class TestProxies:
    @pytest.fixture(autouse=True)
    def _unwarned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(keys, "_warned_of_proxy", [])

    @pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "10.0.0.5", "192.168.1.1", "fd00::5"])
    @pytest.mark.parametrize("name", ["x_forwarded_for", "forwarded"])
    def test_a_proxy_that_is_not_trusted_is_warned_of_once(
        self, peer: str, name: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(3):
            client_ip()(request_of(peer=peer, **{name: "203.0.113.7"}))
        (record,) = caplog.records
        assert f"key=client_ip(trusted_proxies=['{peer}'])" in record.getMessage()

    @pytest.mark.parametrize(
        ("key", "peer", "value"),
        [
            (client_ip(), "1.1.1.1", "203.0.113.7"),
            (client_ip(), "10.0.0.5", ""),
            (client_ip(), "testclient", "203.0.113.7"),
            (client_ip(trusted_proxies=["10.0.0.5"]), "10.0.0.5", "203.0.113.7"),
            (client_ip(hops=1), "10.0.0.5", "203.0.113.7"),
            # What a server has made of the header already.
            (client_ip(), "192.168.1.7", "192.168.1.7"),
            (client_ip(), "192.168.1.7", "6.6.6.6, 192.168.1.7, 10.0.0.5"),
            (client_ip(), "fd00::7", "[FD00:0::7]:4711"),
        ],
    )
    def test_nothing_is_said_where_all_is_well(
        self, key: RequestKey, peer: str, value: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        key(request_of(peer=peer, x_forwarded_for=value))
        assert not caplog.records


def test_a_request_without_a_key_is_not_logged_as_refused_by_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    limiter = Limiter(Rule("1/minute", key=header("user"), missing=Missing.ERROR), manager=ProxyManager(MemoryStore()))
    assert not limiter.decide(request_of())
    assert not caplog.records
