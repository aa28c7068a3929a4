"""Outbound limits: turns, what answers say, and a fleet that is held back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    InvalidArgumentError,
    InvalidConfigurationError,
    MemoryStore,
    OnError,
    ProxyManager,
    RateLimitExceeded,
    StoreUnavailableError,
)
from ratelimit.testing import ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.both_faces import closing, for_asyncio, settled

pytest.importorskip("http_sf")

from ratelimit.integrations.outbound import OutboundLimit, host_of
from ratelimit.integrations.outbound.answers import fields_of, nanos_to_hold

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
KEY = "outbound:api"


def without_jitter() -> float:
    return 0


class Face:
    """A limit with its bucket, of either face."""

    def __init__(self, kind: str, store: SwappingMemoryStore, clock: ManualClock) -> None:
        self.is_async, self.store, self.clock = kind == "asyncio", store, clock
        self.manager: Any = self.make_manager()

    def make_manager(self, **settings: Any) -> Any:
        if self.is_async:
            return AsyncProxyManager(for_asyncio(self.store), clock=self.clock, **settings)
        return ProxyManager(self.store, clock=self.clock, **settings)

    def limit(self, limits: Any = "1/second", **settings: Any) -> OutboundLimit:
        settings = {"key": "api", "manager": self.manager, "jitter": without_jitter, **settings}
        return OutboundLimit(limits, clock=self.clock, **settings)

    async def do(self, limit: OutboundLimit, verb: str, *arguments: Any) -> Any:
        return await settled(getattr(limit, f"a{verb}" if self.is_async else verb)(*arguments))

    async def acquire(self, limit: OutboundLimit, request: Any = None) -> Any:
        return await self.do(limit, "acquire", request)

    async def learn(self, limit: OutboundLimit, status: int, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        await self.do(limit, "learn", "api", status, named)

    async def wait(self, limits: str = "1/second") -> int:
        probe = await settled(self.manager.bucket(KEY, limits).estimate_ability_to_consume(1))
        nanos: int = probe.nanos_to_wait_for_refill
        return nanos


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def store() -> ScriptedStore:
    return ScriptedStore()


@pytest.fixture(params=["sync", "asyncio"])
def face(request: pytest.FixtureRequest, store: ScriptedStore, clock: ManualClock) -> Face:
    return Face(request.param, store, clock)


# Turns


async def test_each_waits_for_its_turn(face: Face) -> None:
    limit = face.limit()
    for _ in range(4):
        assert await face.acquire(limit) == "api"
    assert face.clock.slept == [SECOND] * 3


@pytest.mark.parametrize("by", ["argument", "variable"])
async def test_nobody_waits_where_it_is_switched_off(face: Face, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = face.limit(enabled=by != "argument")
    if by == "variable":
        monkeypatch.setenv("RATELIMIT_ENABLED", "false")
    for _ in range(3):
        assert await face.acquire(limit) is None
    assert limit.remaining_hold() == 0
    assert face.clock.slept == []
    assert len(face.store) == 0
    monkeypatch.delenv("RATELIMIT_ENABLED", raising=False)
    assert await face.acquire(limit) == (None if by == "argument" else "api")


async def test_a_list_of_limits_is_several_limits(face: Face) -> None:
    limit = face.limit(["3/hour", "2/minute"], max_wait=None)
    for _ in range(4):
        await face.acquire(limit)
    assert face.clock.slept == [30 * SECOND, 1170 * SECOND]


async def test_a_turn_that_is_too_far_off_is_refused_at_once_and_takes_nothing(face: Face) -> None:
    limit = face.limit(max_wait=2)
    await settled(face.manager.bucket(KEY, "1/second").consume_ignoring_rate_limits(3))
    with pytest.raises(RateLimitExceeded) as refusal:
        await face.acquire(limit)
    assert (refusal.value.key, refusal.value.retry_after) == ("api", 3.0)
    assert refusal.value.probe.nanos_to_wait_for_refill == 3 * SECOND
    assert await settled(face.manager.bucket(KEY, "1/second").available_tokens()) == -2
    assert face.clock.slept == []
    face.clock.advance(1)
    assert await face.acquire(limit)
    assert face.clock.slept == [2 * SECOND]


async def test_without_a_wait_a_turn_is_now_or_never(face: Face) -> None:
    limit = face.limit("2/second", max_wait=0)
    assert [await face.acquire(limit) for _ in range(2)] == ["api"] * 2
    with pytest.raises(RateLimitExceeded) as refusal:
        await face.acquire(limit)
    assert (refusal.value.retry_after, refusal.value.probe.remaining_tokens) == (0.5, 0)
    face.clock.advance(0.5)
    await face.acquire(limit)
    await face.learn(limit, 429, Retry_After="30")
    with pytest.raises(RateLimitExceeded) as refusal:
        await face.acquire(limit)
    assert (refusal.value.retry_after, face.clock.slept) == (30, [])


async def test_without_a_bound_any_wait_is_waited(face: Face) -> None:
    limit = face.limit("1/hour", max_wait=None)
    for _ in range(3):
        await face.acquire(limit)
    assert face.clock.slept == [3600 * SECOND] * 2


async def test_the_request_says_what_it_counts_under_and_costs(face: Face) -> None:
    def key(request: dict[str, Any]) -> str | None:
        return request.get("key")

    def cost(request: dict[str, Any]) -> Any:
        return request.get("cost", 1)

    limit = face.limit("10/second", key=key, cost=cost)
    requests = [{"key": "a", "cost": 10}, {"key": "b", "cost": 20}, {"cost": 50}, {"key": "a", "cost": 0}]
    assert [await face.acquire(limit, request) for request in requests] == ["a", "b", None, "a"]
    assert face.clock.slept == [SECOND]
    with pytest.raises(InvalidArgumentError, match="cost must be an int"):
        await face.acquire(limit, {"key": "a", "cost": -1})
    with pytest.raises(InvalidArgumentError, match="key must be a str or bytes"):
        await face.acquire(limit, {"key": 5})


async def test_a_key_of_bytes_stands_behind_the_prefix(face: Face) -> None:
    limit = face.limit(key=b"\xff", prefix="out:")
    assert await face.acquire(limit) == b"\xff"
    assert face.store.get(b"out:\xff") is not None


async def test_a_limit_without_limits_has_those_of_the_manager(face: Face) -> None:
    manager = face.make_manager(configuration="1/minute")
    limit = OutboundLimit(None, key="api", manager=manager, clock=face.clock, jitter=without_jitter)
    await face.acquire(limit)
    await face.acquire(limit)
    assert face.clock.slept == [60 * SECOND]
    await face.learn(limit, 429)
    assert face.clock.now_nanos() + await face.wait() >= NOW + 61 * SECOND


@pytest.mark.parametrize(
    ("policy", "outcome"),
    [(OnError.RAISE, StoreUnavailableError), (OnError.ALLOW, None), (OnError.DENY, RateLimitExceeded)],
)
async def test_a_store_that_fails_is_dealt_with_as_the_manager_says(
    face: Face, store: ScriptedStore, policy: OnError, outcome: type[Exception] | None
) -> None:
    limit = face.limit(manager=face.make_manager(on_error=policy))
    store.fail()
    if outcome is None:
        await face.acquire(limit)
        return
    with pytest.raises(outcome) as failure:
        await face.acquire(limit)
    assert getattr(failure.value, "retry_after", 1.0) == 1.0


async def test_a_cancelled_wait_gives_its_tokens_back() -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "1/hour")
    limit = OutboundLimit("1/hour", key="api", max_wait=None, manager=manager)
    bucket = manager.bucket(KEY, "1/hour")
    await limit.aacquire()
    waiter = asyncio.create_task(limit.aacquire())
    while await bucket.available_tokens() != -1:
        await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert await bucket.available_tokens() == 0


async def test_first_come_is_first_served() -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "100/second burst 1")
    limit = OutboundLimit("100/second burst 1", key="api", manager=manager)
    order: list[int] = []

    async def call(number: int) -> None:
        await limit.aacquire()
        order.append(number)

    await asyncio.gather(*map(call, range(12)))
    assert order == list(range(12))


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"key": 5}, "key must be"),
        ({"cost": 0}, "cost must be"),
        ({"max_wait": -1}, "max_wait must be 0 or more"),
        ({"max_hold": -1}, "max_hold must be above 0"),
        ({"max_hold": "5"}, "max_hold must be a timedelta"),
        ({"default_hold": float("nan")}, "default_hold must be"),
        ({"manager": 5}, "manager must be"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    settings: dict[str, Any] = {"key": "api", **wrong}
    with pytest.raises(InvalidArgumentError, match=complaint):
        OutboundLimit("1/second", **settings)


def test_limits_that_cannot_be_are_refused() -> None:
    with pytest.raises(InvalidConfigurationError):
        OutboundLimit("1/fortnight", key="api")


async def test_a_manager_of_the_other_kind_is_refused(face: Face) -> None:
    limit = face.limit()
    limit.check_face(asynchronous=face.is_async)
    with pytest.raises(InvalidArgumentError, match="manager must be of the kind"):
        limit.check_face(asynchronous=not face.is_async)
    with pytest.raises(InvalidArgumentError, match="manager must be of the kind"):
        await settled(limit.acquire() if face.is_async else limit.aacquire())


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://API.example.com:8443/v1?x=1", "api.example.com"), ("http://[::1]/", "::1"), ("/relative", "")],
)
def test_the_host_of_a_request(url: str, host: str) -> None:
    assert host_of(SimpleNamespace(url=url)) == host


# What answers say

DATE = "Tue, 14 Nov 2023 22:13:20 GMT"  # NOW
IN_A_MINUTE = "Tue, 14 Nov 2023 22:14:20 GMT"
EPOCH = NOW // SECOND


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (200, {}, None),
        (429, {}, None),
        (429, {"Retry-After": "30"}, 30),
        (503, {"Retry-After": " 30 "}, 30),
        (429, {"Retry-After": "0"}, 0),
        (429, {"Retry-After": IN_A_MINUTE}, 60),
        (429, {"Retry-After": IN_A_MINUTE, "Date": "Tue, 14 Nov 2023 22:14:10 GMT"}, 10),
        (429, {"Retry-After": "Tuesday, 14-Nov-23 22:14:20 GMT"}, 60),
        (429, {"Retry-After": "Tue Nov 14 22:14:20 2023"}, 60),
        (429, {"Retry-After": "Tue, 14 Nov 2023 22:14:20 -0000"}, 60),
        (429, {"Retry-After": "Tue, 14 Nov 2023 22:00:00 GMT"}, 0),
        (301, {"Retry-After": "30"}, None),
        (200, {"Retry-After": "30"}, None),
        (429, {"Retry-After": "-1"}, None),
        (429, {"Retry-After": "1.5"}, 1.5),
        (429, {"Retry-After": "2.0"}, 2),
        (429, {"Retry-After": "30s"}, 30),
        (429, {"Retry-After": "1m30s"}, 90),
        (429, {"Retry-After": "2023-11-14T22:14:20Z"}, 60),
        (403, {"Retry-After": "60"}, 60),
        (529, {"Retry-After": "60"}, 60),
        (403, {}, None),
        (429, {"Retry-After-Ms": "1500", "Retry-After": "2"}, 1.5),
        (429, {"X-Ms-Retry-After-Ms": "20"}, 0.02),
        (429, {"X-Retry-After": f"{EPOCH + 30}"}, 30),
        (429, {"Retry-After": "nan"}, None),
        (429, {"Retry-After": "1e3"}, None),
        (429, {"Retry-After": "inf"}, None),
        (429, {"Retry-After": "0x10"}, None),
        (429, {"Retry-After": "5 5"}, None),
        (429, {"Retry-After": "s"}, None),
        (429, {"Retry-After": "\u0663"}, None),
        (429, {"Retry-After": "soon"}, None),
        (429, {"Retry-After": "5, 7"}, 7),
        (429, {"Retry-After": "5, soon"}, None),
        # RateLimit
        (200, {"RateLimit": '"default";r=0;t=30'}, 30),
        (200, {"RateLimit": '"default";r=1;t=30'}, None),
        (200, {"RateLimit": '"a";r=0;t=30, "b";r=0;t=40;pk=:cHk=:, "c";r=5;t=50'}, 40),
        (200, {"RateLimit": '"default";r=0;t=0'}, 0),
        (429, {"RateLimit": '"default";r=0'}, None),
        (429, {"RateLimit": "default;r=0;t=30"}, None),
        (429, {"RateLimit": '"default";r=0.0;t=30'}, None),
        (429, {"RateLimit": '"default";r=0;t=-30'}, None),
        (429, {"RateLimit": '"default";r=?0;t=30'}, None),
        (429, {"RateLimit": '("default");r=0;t=30'}, None),
        (429, {"RateLimit": '"default;r=0;t=30'}, None),
        (200, {"RateLimit": "limit=10, remaining=0, reset=30"}, 30),
        (200, {"RateLimit": "limit=10, remaining=1, reset=30"}, None),
        (429, {"RateLimit": "limit=10, remaining=0"}, None),
        (429, {"RateLimit": "limit=10, remaining=0, reset=-5"}, None),
        (429, {"RateLimit": "limit=10, remaining=(0 1), reset=(5)"}, None),
        (429, {"RateLimit": "remaining, reset"}, None),
        (429, {"RateLimit": '"d\u00e9faut";r=0;t=30'}, None),
        (200, {"RateLimit": '"default";r=0;t=30', "Age": "5"}, None),
        (200, {"RateLimit": '"default";r=0;t=30', "Age": "0"}, 30),
        # Retry-After goes first, where it is one
        (429, {"RateLimit": '"default";r=0;t=30', "Retry-After": "5"}, 5),
        (200, {"RateLimit": '"default";r=0;t=30', "Retry-After": "5"}, 30),
        (429, {"RateLimit": '"default";r=0;t=30', "Retry-After": "soon"}, 30),
        # The older triples
        (200, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "30"}, 30),
        (200, {"x-rate-limit-remaining": "0", "x-rate-limit-reset": "30"}, 30),
        (200, {"RateLimit-Remaining": "0", "RateLimit-Reset": "30"}, 30),
        (200, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "0.25"}, 0.25),
        (200, {"X-RateLimit-Remaining": "1", "X-RateLimit-Reset": "30"}, None),
        (200, {"X-RateLimit-Remaining": "0"}, None),
        (200, {"X-RateLimit-Remaining": "", "X-RateLimit-Reset": "60"}, None),
        (429, {"X-RateLimit-Remaining": "", "X-RateLimit-Reset": "60"}, None),
        (200, {"X-RateLimit-Reset": "30"}, None),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{EPOCH + 30}"}, 30),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{EPOCH + 30}.5"}, 30.5),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{EPOCH + 30}000"}, 30),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{EPOCH - 30}"}, 0),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": f"{EPOCH + 30}", "Date": IN_A_MINUTE}, 0),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "6m0s"}, 360),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "-30"}, None),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "nan"}, None),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "30, 40"}, None),
        (403, {"X-RateLimit-Remaining": "-1", "X-RateLimit-Reset": "30"}, None),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "9" * 5000}, None),
        (403, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "1/2"}, None),
    ],
)
def test_how_long_an_answer_says_to_stay_away(status: int, headers: dict[str, str], seconds: float | None) -> None:
    nanos = nanos_to_hold(status, fields_of(headers), NOW)
    assert nanos == (None if seconds is None else seconds * SECOND)


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        # GitHub: the primary limit, a secondary one, a secondary one without a time, an answer that is forbidden
        (403, {"x-ratelimit-limit": "60", "x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{EPOCH + 30}"}, 30),
        (403, {"x-ratelimit-remaining": "4999", "x-ratelimit-reset": f"{EPOCH + 30}", "retry-after": "60"}, 60),
        (429, {"x-ratelimit-remaining": "14", "x-ratelimit-reset": f"{EPOCH + 30}"}, None),
        (403, {"x-ratelimit-remaining": "4999", "x-ratelimit-reset": f"{EPOCH + 30}"}, None),
        # Shopify
        (429, {"X-Shopify-Shop-Api-Call-Limit": "40/40", "Retry-After": "2.0"}, 2),
        (200, {"X-Shopify-Shop-Api-Call-Limit": "40/40"}, None),
        # Atlassian: minutes, without a number that is left
        (429, {"X-RateLimit-Reset": "2023-11-14T22:15Z", "X-RateLimit-NearLimit": "true"}, 100),
        (429, {"X-RateLimit-Reset": "2023-11-14T22:15Z", "Retry-After": "91"}, 91),
        (200, {"X-RateLimit-Reset": "2023-11-14T22:15Z", "X-RateLimit-NearLimit": "true"}, None),
        (403, {"X-RateLimit-Reset": "2023-11-14T22:15Z"}, None),
        # Docker Hub
        (429, {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}, 21_600),
        (200, {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "0;w=21600"}, None),
        (200, {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600"}, None),
        (429, {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600"}, None),
        # OpenAI, Groq
        (429, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360),
        (429, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "7.66s"}, 7.66),
        (
            429,
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "20ms",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "1h2m3s",
            },
            3723,
        ),
        (429, {"x-ratelimit-remaining-requests": "59", "x-ratelimit-reset-requests": "1s"}, None),
        (429, {"x-ratelimit-remaining-tokens": "-1", "x-ratelimit-reset-tokens": "0"}, None),
        (200, {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, None),
        # Anthropic
        (
            429,
            {
                "anthropic-ratelimit-requests-remaining": "999",
                "anthropic-ratelimit-requests-reset": "2023-11-14T22:20:00Z",
                "anthropic-ratelimit-input-tokens-remaining": "0",
                "anthropic-ratelimit-input-tokens-reset": "2023-11-14T22:13:50Z",
            },
            30,
        ),
        (429, {"retry-after": "17", "anthropic-ratelimit-requests-remaining": "0"}, 17),
        # Discord
        (
            200,
            {
                "X-RateLimit-Remaining": "0",
                "X-RateLimit-Reset": f"{EPOCH + 2}.5",
                "X-RateLimit-Reset-After": "1.25",
            },
            1.25,
        ),
        (429, {"Retry-After": "64.57", "X-RateLimit-Scope": "shared"}, 64.57),
        # Slack, Stripe, X, Reddit, Vimeo
        (429, {"Retry-After": "30"}, 30),
        (429, {"Stripe-Rate-Limited-Reason": "global-rate"}, None),
        (429, {"x-rate-limit-remaining": "0", "x-rate-limit-reset": f"{EPOCH + 900}"}, 900),
        (200, {"x-ratelimit-remaining": "0.0", "x-ratelimit-reset": "41"}, 41),
        (429, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "2023-11-14T22:14:20+00:00"}, 60),
    ],
)
def test_what_well_known_providers_say(status: int, headers: dict[str, str], seconds: float | None) -> None:
    nanos = nanos_to_hold(status, fields_of(headers), NOW)
    assert nanos == (None if seconds is None else round(seconds * SECOND))


def test_an_endless_number_is_a_long_time() -> None:
    assert (nanos_to_hold(429, {"retry-after": "9" * 5000}, NOW) or 0) > 10**18


def test_fields_that_occur_twice_are_one_list() -> None:
    class Several(dict[str, str]):
        def items(self) -> Any:
            return [("RateLimit", '"a";r=0;t=3'), ("ratelimit", '"b";r=0;t=4')]

    assert nanos_to_hold(200, fields_of(Several()), NOW) == 4 * SECOND


NAMES = [
    *("Retry-After", "Retry-After-Ms", "X-Retry-After", "RateLimit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
    *("X-RateLimit-Reset-After", "RateLimit-Remaining", "RateLimit-Reset", "Date", "Age"),
    *("X-RateLimit-Remaining-Tokens", "X-RateLimit-Reset-Tokens"),
    *("Anthropic-RateLimit-Tokens-Remaining", "Anthropic-RateLimit-Tokens-Reset"),
]
PIECES = [
    *("0", "30", '"a"', ";r=0", ";t=30", ";t=", ",", "(", ")", ";", "=", ":", "?1", "@5", '%"', " ", "-", "9" * 20),
    *("s", "ms", "h", ".", "T", "Z", "+", ";w=60", "2023-11-14", "limit=1", "remaining=0", "reset=5"),
]
VALUES = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.floats(-(10**10), 10**11).map(lambda at: formatdate(at, usegmt=True)),
    st.integers(-(10**25), 10**25).map(str),
)


@given(st.sampled_from([200, 403, 429, 503]), st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_whatever_is_sent_is_a_time_or_ignored(status: int, headers: dict[str, str]) -> None:
    nanos = nanos_to_hold(status, fields_of(headers), NOW)
    assert nanos is None or 0 <= nanos < 2**63


@given(st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_field_as_servers_write_it_is_understood(left: int, window: int, other: int) -> None:
    headers = {"RateLimit": f'"burst";r={left};t={window}, "daily";r=7;t={other};pk=:YWJj:'}
    assert nanos_to_hold(200, fields_of(headers), NOW) == (None if left else window * SECOND)


# Holding back


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry_After": "30"}, 30),
        (200, {"RateLimit": '"default";r=0;t=30'}, 30),
        (503, {}, 0),
        (500, {"Retry_After": "30"}, 0),
        (429, {"Retry_After": "31536000"}, 3600),
        (403, {"Retry_After": "60"}, 60),
        (403, {}, 0),
        (403, {"X_RateLimit_Remaining": "0", "X_RateLimit_Reset": "9999-12-31T23:59:59Z"}, 3600),
        (429, {"X_RateLimit_Remaining_Tokens": "0", "X_RateLimit_Reset_Tokens": "99999d"}, 3600),
        (429, {"Retry_After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 3600),
        (429, {"Retry_After": "-5"}, 1),
        (429, {"Retry_After": "nan"}, 1),
    ],
)
async def test_an_answer_holds_everybody_back(face: Face, status: int, headers: dict[str, str], seconds: int) -> None:
    await face.learn(face.limit("1/second burst 5"), status, **headers)
    assert await face.wait("1/second burst 5") == seconds * SECOND


@pytest.mark.parametrize(
    ("limits", "settings", "seconds"),
    [
        ("10/second burst 50", {}, 1),
        ("100/20s; 1000/hour", {}, 20),
        ("1000/hour", {}, 60),
        ("100/ms", {}, 1),
        ("10/second", {"default_hold": 7}, 7),
        ("10/second", {"default_hold": 7, "max_hold": 5}, 5),
    ],
)
async def test_a_429_that_does_not_say_holds_for_a_period(
    face: Face, limits: str, settings: dict[str, Any], seconds: int
) -> None:
    await face.learn(face.limit(limits, **settings), 429)
    assert await face.wait(limits) == seconds * SECOND


async def test_eight_who_are_told_the_same_hold_back_once(face: Face) -> None:
    managers = [face.make_manager() for _ in range(8)]
    for manager in managers:
        await face.learn(face.limit("10/second", manager=manager), 429, Retry_After="30")
    assert await face.wait("10/second") == 30 * SECOND
    later = face.limit("10/second", manager=managers[0])
    await face.acquire(later)
    await face.acquire(later)
    assert face.clock.slept == [30 * SECOND, SECOND // 10]


async def test_a_shorter_hold_does_not_end_a_longer_one(face: Face) -> None:
    limit = face.limit()
    await face.learn(limit, 429, Retry_After="30")
    await face.learn(limit, 429, Retry_After="5")
    await face.learn(face.limit(), 429, Retry_After="10")
    assert await face.wait() == 30 * SECOND


@pytest.mark.parametrize(("part", "seconds", "expected"), [(0.5, 20, 21), (1, 20, 22), (1, 3600, 3610), (0, 20, 20)])
async def test_a_hold_is_longer_by_a_part_of_a_tenth(face: Face, part: float, seconds: int, expected: int) -> None:
    await face.learn(face.limit(jitter=lambda: part), 429, Retry_After=str(seconds))
    assert await face.wait() == expected * SECOND


async def test_people_can_hold_back_too(face: Face) -> None:
    limit = face.limit()
    await face.do(limit, "hold_back", "api", 7)
    assert await face.wait() == 7 * SECOND
    assert limit.remaining_hold() == 7
    face.clock.advance(8)
    assert limit.remaining_hold() == 0
    with pytest.raises(InvalidArgumentError, match="duration must be above 0"):
        await face.do(limit, "hold_back", "api", 0)


async def test_nothing_is_learned_for_a_request_that_is_not_limited(face: Face) -> None:
    await face.do(face.limit(), "learn", None, 429, {})
    assert len(face.store) == 0


async def test_holds_that_are_over_are_forgotten(face: Face) -> None:
    limit = face.limit()
    for number in range(5):
        await face.do(limit, "hold_back", str(number), 1)
        face.clock.advance(2)
    assert list(limit._holds) == ["4"]


async def test_where_the_bucket_cannot_be_told_this_process_is_held_back(
    face: Face, store: ScriptedStore, caplog: pytest.LogCaptureFixture
) -> None:
    limit = face.limit(max_wait=31)
    store.fail()
    await face.learn(limit, 429, Retry_After="30")
    assert "only this process is held back for the key 'api'" in caplog.text
    assert await face.wait() == 0
    await face.acquire(limit)
    assert face.clock.slept == [30 * SECOND]
    store.fail()
    await face.learn(limit, 429, Retry_After="32")
    with pytest.raises(RateLimitExceeded) as refusal:
        await face.acquire(limit)
    assert refusal.value.retry_after == 32


async def test_a_hold_that_the_bucket_missed_is_told_again(face: Face, store: ScriptedStore) -> None:
    limit = face.limit()
    store.fail()
    await face.learn(limit, 429, Retry_After="30")
    await face.learn(limit, 429, Retry_After="5")
    assert await face.wait() == 30 * SECOND


async def test_tokens_that_are_put_in_do_not_end_a_hold_of_this_process(face: Face) -> None:
    limit = face.limit()
    await face.learn(limit, 429, Retry_After="30")
    await settled(face.manager.bucket(KEY, "1/second").reset())
    await face.acquire(limit)
    assert face.clock.now_nanos() == NOW + 30 * SECOND


class Interrupting(ManualClock):
    """Runs something in the middle of a sleep."""

    def __init__(self) -> None:
        super().__init__(NOW)
        self.during: list[tuple[int, Callable[[], Any]]] = []

    def sleep(self, nanos: int) -> None:
        if self.during:
            after, do = self.during.pop(0)
            super().sleep(after)
            do()
            nanos -= after
        super().sleep(nanos)


@pytest.fixture
def interrupting() -> Interrupting:
    return Interrupting()


def test_who_sleeps_when_a_hold_begins_waits_for_a_new_turn(interrupting: Interrupting) -> None:
    clock = interrupting
    face = Face("sync", MemoryStore(clock=clock), clock)
    limit = face.limit(max_wait=60)
    limit.acquire()
    clock.during = [(SECOND // 2, lambda: limit.learn("api", 429, {"Retry-After": "10"}))]
    limit.acquire()
    assert clock.now_nanos() == NOW + SECOND // 2 + 10 * SECOND
    limit.acquire()  # and nobody else comes at the same time
    assert clock.now_nanos() == NOW + SECOND // 2 + 11 * SECOND


def test_who_sleeps_when_a_hold_begins_that_is_too_long_is_refused(interrupting: Interrupting) -> None:
    clock = interrupting
    face = Face("sync", MemoryStore(clock=clock), clock)
    limit = face.limit(max_wait=5)
    limit.acquire()
    clock.during = [(SECOND // 2, lambda: limit.learn("api", 429, {"Retry-After": "10"}))]
    with pytest.raises(RateLimitExceeded) as refusal:
        limit.acquire()
    assert refusal.value.retry_after == 9.5
    assert clock.now_nanos() == NOW + SECOND


async def test_tasks_that_sleep_when_a_hold_begins_come_one_by_one_after_it() -> None:
    manager = AsyncProxyManager(AsyncMemoryStore(), "5/second burst 1")
    limit = OutboundLimit("5/second burst 1", key="api", manager=manager, jitter=without_jitter)
    loop = asyncio.get_running_loop()
    times: list[float] = []

    async def call() -> None:
        await limit.aacquire()
        times.append(loop.time())

    await limit.aacquire()
    waiting = [asyncio.create_task(call()) for _ in range(3)]
    while await manager.bucket(KEY, "5/second burst 1").available_tokens() != -3:
        await asyncio.sleep(0)
    begin = loop.time()
    await limit.alearn("api", 429, {"Retry-After": "1"})
    await asyncio.gather(*waiting)
    assert min(times) >= begin + 1
    assert max(times) >= begin + 1 + 2 / 5


def test_a_sleep_that_is_longer_than_it_should_be_refuses_nobody() -> None:
    class Oversleeping(ManualClock):
        def sleep(self, nanos: int) -> None:
            super().sleep(nanos)
            self.advance(nanos=1000)

    clock = Oversleeping(NOW)
    face = Face("sync", MemoryStore(clock=clock), clock)
    limit = face.limit(max_wait=1)
    limit.learn("api", 429, {"Retry-After": "1"})
    limit.acquire()
    clock.set(NOW + SECOND)
    limit.acquire()
    assert clock.slept == [SECOND, SECOND]


async def test_a_reservation_is_told_and_not_slept_on(clock: ManualClock) -> None:
    face = Face("sync", MemoryStore(clock=clock), clock)
    limit = face.limit(max_wait=2, key=lambda request: request)
    assert [limit.reserve("api") for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RateLimitExceeded) as refusal:
        limit.reserve("api")
    assert refusal.value.retry_after == 3
    assert limit.reserve(None) == 0
    assert clock.slept == []
    limit.hold_back("other", 2)
    assert limit.reserve("other") == 2
    limit.hold_back("third", 5)
    with pytest.raises(RateLimitExceeded) as refusal:
        limit.reserve("third")
    assert refusal.value.retry_after == 5


def test_threads_that_are_told_at_once_hold_back_once() -> None:
    clock = ManualClock(NOW)
    face = Face("sync", MemoryStore(clock=clock), clock)
    limit = face.limit("10/second")
    barrier = threading.Barrier(8)

    def learn() -> None:
        barrier.wait()
        limit.learn("api", 429, {"Retry-After": "30"})

    threads = [threading.Thread(target=learn) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bucket = face.manager.bucket(KEY, "10/second")
    assert bucket.estimate_ability_to_consume(1).nanos_to_wait_for_refill == 30 * SECOND


# Over Redis


@pytest.mark.redis
@pytest.mark.parametrize("kind", ["sync", "asyncio"])
async def test_what_one_manager_has_learned_holds_back_another(redis_url: str, kind: str) -> None:
    make: Any = ProxyManager if kind == "sync" else AsyncProxyManager
    async with closing(make.from_url(redis_url)) as one, closing(ProxyManager.from_url(redis_url)) as other:
        learning = OutboundLimit("10/second", key="api", manager=one)
        if kind == "sync":
            learning.learn(learning.acquire(), 429, {"Retry-After": "100"})
        else:
            await learning.alearn(await learning.aacquire(), 429, {"Retry-After": "100"})
        with pytest.raises(RateLimitExceeded) as refusal:
            OutboundLimit("10/second", key="api", max_wait=30, manager=other).acquire()
        assert 30 < (refusal.value.retry_after or 0) <= 110.1


@pytest.mark.redis
async def test_a_fleet_that_is_told_at_once_while_others_consume_is_held_once(redis_url: str) -> None:
    async def learn(manager: AsyncProxyManager) -> None:
        limit = OutboundLimit("1000/second", key="api", manager=manager, jitter=without_jitter)
        for _ in range(10):
            await manager.bucket(KEY, "1000/second").try_consume()
        await limit.alearn("api", 429, {"Retry-After": "100"})

    managers = [AsyncProxyManager.from_url(redis_url) for _ in range(8)]
    await asyncio.gather(*map(learn, managers))
    probe = await managers[0].bucket(KEY, "1000/second").estimate_ability_to_consume(1)
    assert 0 < probe.nanos_to_wait_for_refill <= 100 * SECOND
    for manager in managers:
        await manager.aclose()
