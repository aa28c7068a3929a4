"""What clients are told, to the letter: fields and problems."""

from __future__ import annotations

import json
from typing import Any

import http_sf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import BucketConfiguration, InvalidConfigurationError, OnError
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.core.token_bucket.state import BandwidthState
from ratelimit.integrations.http import Answers, HttpDecision, Rule
from ratelimit.policy import Outcome
from tests.integrations.requests_of import NOW, Limits

SECOND = 10**9


async def decisions(limited: Limits, count: int) -> list[HttpDecision]:
    return [await limited.decide() for _ in range(count)]


async def test_the_fields_of_ten_requests_and_of_five_that_are_refused() -> None:
    limited = Limits("10/minute")
    told = [dict(limited.answers.headers(decision)) for decision in await decisions(limited, 15)]
    assert told[:10] == [
        {"RateLimit-Policy": '"10/minute";q=10;w=60', "RateLimit": f'"10/minute";r={left};t=6'}
        for left in range(9, -1, -1)
    ]
    assert told[10:] == [{"Retry-After": "6", **told[9]}] * 5


async def test_the_effective_window_is_until_the_next_token_and_no_reset() -> None:
    limited = Limits("10/minute")
    await decisions(limited, 9)
    limited.clock.advance(4.5)
    (decision,) = await decisions(limited, 1)
    assert dict(limited.answers.headers(decision))["RateLimit"] == '"10/minute";r=0;t=2'
    assert decision.outcomes[0].limits[0].reset_after == 56


async def test_a_refusal_tells_when_to_come_back_and_why() -> None:
    limited = Limits(Rule("3/minute", name="login"))
    limited.clock.advance(nanos=1)
    *_, refused = await decisions(limited, 4)
    status, headers, body = limited.answers.refusal(refused)
    assert status == 429
    assert json.loads(body) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "violated-policies": ["login"],
    }
    assert headers == [
        ("Content-Type", "application/problem+json"),
        ("Content-Length", str(len(body))),
        ("Retry-After", "20"),
        ("RateLimit-Policy", '"login";q=3;w=60'),
        ("RateLimit", '"login";r=0;t=20'),
    ]


@pytest.mark.parametrize(("elapsed", "retry_after"), [(0, "20"), (1, "20"), (19 * SECOND, "1"), (20 * SECOND - 1, "1")])
async def test_the_wait_is_in_whole_seconds_rounded_up(elapsed: int, retry_after: str) -> None:
    limited = Limits("3/minute")
    await decisions(limited, 3)
    limited.clock.advance(nanos=elapsed)
    (refused,) = await decisions(limited, 1)
    assert dict(limited.answers.refusal(refused).headers)["Retry-After"] == retry_after


async def test_nobody_is_told_to_come_back_when_that_is_of_no_use() -> None:
    limited = Limits(Rule("3/minute", cost=4))
    (refused,) = await decisions(limited, 1)
    assert "Retry-After" not in dict(limited.answers.refusal(refused).headers)


async def test_of_several_limits_a_refusal_tells_of_those_that_are_exceeded() -> None:
    """A client waits until the end of the last window that it is told of, which must not be later than Retry-After."""
    limited = Limits(Rule("2/second intervally; 100/day intervally", name="api"), Rule("50/hour", name="other"))
    *admitted, refused = await decisions(limited, 3)
    policies = '"api: 2/second intervally";q=2;w=1, "api: 100/day intervally";q=100;w=86400, "other";q=50;w=3600'
    assert limited.answers.headers(admitted[1]) == [
        ("RateLimit-Policy", policies),
        ("RateLimit", '"api: 2/second intervally";r=0;t=1, "api: 100/day intervally";r=98;t=86400, "other";r=48;t=72'),
    ]
    assert limited.answers.headers(refused) == [
        ("Retry-After", "1"),
        ("RateLimit-Policy", policies),
        ("RateLimit", '"api: 2/second intervally";r=0;t=1'),
    ]
    assert limited.answers.problem(refused)["violated-policies"] == ["api: 2/second intervally"]


async def test_a_refusal_names_all_policies_that_are_exceeded_and_the_longest_wait() -> None:
    rules = [Rule("2/hour", name="hourly"), Rule("9/hour", name="other"), Rule("2/day", name="daily")]
    limited = Limits(*rules)
    refused = (await decisions(limited, 3))[-1]
    assert limited.answers.headers(refused) == [
        ("Retry-After", "43200"),
        ("RateLimit-Policy", '"hourly";q=2;w=3600, "other";q=9;w=3600, "daily";q=2;w=86400'),
        ("RateLimit", '"hourly";r=0;t=1800, "daily";r=0;t=43200'),
    ]
    assert limited.answers.problem(refused)["violated-policies"] == ["hourly", "daily"]


@pytest.mark.parametrize(
    ("kind", "answered"),
    [
        (None, {}),
        ("epoch", {"X-RateLimit-Limit": "3", "X-RateLimit-Remaining": "2", "X-RateLimit-Reset": "1700000020"}),
        ("delta", {"X-RateLimit-Limit": "3", "X-RateLimit-Remaining": "2", "X-RateLimit-Reset": "20"}),
    ],
)
async def test_the_older_fields_are_sent_on_request(kind: Any, answered: dict[str, str]) -> None:
    answers = Answers(standard=False, x_ratelimit=kind, clock=lambda: NOW / SECOND)
    limited = Limits("3/minute; 100/day", answers=answers)
    (decision,) = await decisions(limited, 1)
    assert dict(answers.headers(decision)) == answered


def test_another_kind_of_older_fields_is_refused() -> None:
    kind: Any = "seconds"
    with pytest.raises(InvalidConfigurationError, match="x_ratelimit must be None, 'epoch' or 'delta'"):
        Answers(x_ratelimit=kind)


async def test_where_nothing_was_limited_nothing_is_told() -> None:
    limited = Limits(Rule("1/minute", methods=["POST"]))
    assert limited.answers.headers(await limited.decide()) == []
    with pytest.raises(ValueError, match="no problem"):
        limited.answers.refusal(await limited.decide())


class TestWithoutStore:
    def decision(self, policy: OnError) -> HttpDecision:
        from ratelimit import ProxyManager
        from ratelimit.integrations.http import Limiter
        from ratelimit.testing import ScriptedStore
        from tests.integrations.requests_of import request_of

        store = ScriptedStore()
        store.fail(times=10)
        limiter = Limiter(Rule("1/minute", name="api"), manager=ProxyManager(store), on_error=policy)
        limiter.decide(request_of())
        return limiter.decide(request_of())

    def test_who_is_denied_is_told_of_reduced_capacity(self) -> None:
        status, headers, body = Answers().refusal(self.decision(OnError.DENY))
        assert status == 503
        assert json.loads(body) == {
            "type": "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
            "title": "Request cannot be satisfied due to temporary server capacity constraints",
            "status": 503,
            "violated-policies": ["api"],
        }
        assert headers[2:] == [("Retry-After", "1")]

    def test_who_is_let_in_is_told_nothing(self) -> None:
        assert Answers().headers(self.decision(OnError.ALLOW)) == []

    def test_a_local_bucket_refuses_by_its_own_limits(self) -> None:
        assert Answers().refusal(self.decision(OnError.local(1))).status == 429


async def test_a_request_without_a_key_is_told_which() -> None:
    from ratelimit.integrations.http import header

    answers = Answers()
    status, headers, body = answers.refusal(await Limits(Rule("1/minute", key=header("x-tenant"))).decide())
    assert (status, headers[2:]) == (400, [])
    assert json.loads(body)["detail"].startswith("The request has no header:x-tenant, ")


async def test_answers_may_be_replaced() -> None:
    class Plain(Answers):
        content_type = "text/plain"

        def body(self, problem: dict[str, Any]) -> bytes:
            return problem["title"].encode()  # type: ignore[no-any-return]

        def headers(self, decision: HttpDecision) -> list[tuple[str, str]]:
            return [("X-Left", str(decision.outcomes[0].probe.remaining_tokens))]

    limited = Limits("1/minute", answers=Plain(standard=False))
    *_, refused = await decisions(limited, 2)
    answer = limited.limiter.answers.refusal(refused)
    assert answer.body == b"Request cannot be satisfied as assigned quota has been exceeded"
    assert answer.headers == [
        ("Content-Type", "text/plain"),
        ("Content-Length", str(len(answer.body))),
        ("X-Left", "0"),
    ]


@given(
    name=st.from_regex(r"[\x20-\x7e]{1,200}", fullmatch=True),
    limits=st.sampled_from(["1/s", "7/3 ms", "1/100000 days", f"{2**61}/36500 days", "5/s intervally; 9/min id x"]),
    sizes=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=2, max_size=2),
    consumed=st.booleans(),
)
def test_any_bucket_gives_fields_that_can_be_parsed(name: str, limits: str, sizes: list[int], consumed: bool) -> None:
    configuration = BucketConfiguration.parse(limits)
    states = tuple(BandwidthState(NOW, size, 0) for size, _ in zip(sizes, configuration, strict=False))
    probe = ConsumptionProbe(consumed, 0, int(not consumed), 0)
    result = VerboseResult(probe, NOW, 0, (), 0, configuration, states)
    rule: Any = Rule(configuration, name=name)
    bucket: Any = None
    outcome = Outcome(rule, "key", bucket, 1, result)
    fields = dict(Answers(x_ratelimit="delta").headers(HttpDecision((outcome,))))
    policies: Any = http_sf.parse(fields["RateLimit-Policy"].encode(), tltype="list")
    left: Any = http_sf.parse(fields["RateLimit"].encode(), tltype="list")
    assert [policy for policy, _ in policies] == [rule.policy_name(configuration, each) for each in configuration]
    for _, parameters in policies:
        assert parameters["q"] >= 1
        assert parameters["w"] >= 1
    for _, parameters in left:
        assert parameters["r"] >= 0
        assert parameters.get("t", 1) >= 1
