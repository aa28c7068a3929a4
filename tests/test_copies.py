"""Copies and pickles of what users put into sessions, settings and queues: they work, or say what to do instead."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any, Protocol

import pytest
import redis
import redis.asyncio

import ratelimit
from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    AsyncRedisStore,
    Bandwidth,
    BandwidthState,
    BucketConfiguration,
    BucketNotFoundError,
    CircuitBreaker,
    ContentionError,
    CorruptStateError,
    CountingListener,
    Decision,
    Expiration,
    InvalidArgumentError,
    InvalidConfigurationError,
    Lost,
    MemoryStore,
    OnError,
    Optimization,
    ProxyManager,
    RateLimitError,
    RateLimitExceeded,
    Recovery,
    RedisStore,
    ReservationOverflowError,
    SlidingWindow,
    SlidingWindows,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    SystemClock,
    TokensInheritance,
    UnsupportedStateError,
    all_of,
)
from ratelimit.runtime.steps import run
from ratelimit.testing import ManualClock, ScriptedStore

MANAGER = ProxyManager.from_url("memory://", "5/minute")
BUCKET = MANAGER.bucket("user:42")
ALL_OF = all_of(BUCKET, MANAGER.bucket("tenant"))
ABUCKET = AsyncProxyManager.from_url("memory://", "5/minute").bucket("user:42")

VALUES: list[Any] = [
    Bandwidth.parse("10/second burst 50"),
    BandwidthState(1, 2, 3),
    BucketConfiguration.parse("5/minute; 10/hour intervally"),
    SlidingWindow(5, per=60),
    SlidingWindows(SlidingWindow(5, per=60), SlidingWindow(90, per=3600)),
    CircuitBreaker(failures=7),
    ProxyManager.from_url("redis://localhost:1/0").circuits(),
    Decision("user:42", "consume", 1, 1, 4, 0, 5, 1, False, None, False),
    Expiration.after_refill(5),
    Lost(b"state"),
    OnError.local(1 / 2),
    Optimization.delaying(3, 1),
    Recovery.RAISE,
    TokensInheritance.AS_IS,
    BUCKET.try_consume_and_return_remaining(),
    all_of(BUCKET).try_consume_and_return_remaining(),
    BUCKET.estimate_ability_to_consume(1),
    BUCKET.verbose.try_consume(),
    BUCKET.snapshot(),
    ALL_OF.try_consume_and_return_remaining(),
]
ERRORS: list[RateLimitError] = [
    RateLimitError("message"),
    BucketNotFoundError("user:42"),
    ContentionError("user:42", 3),
    CorruptStateError("user:42", b"state", "reason"),
    InvalidArgumentError("message"),
    InvalidConfigurationError("message", "field"),
    RateLimitExceeded("user:42", 1.5),
    ReservationOverflowError("message"),
    StoreError("user:42", "message", in_doubt=True),
    StoreTimeoutError("user:42", "message"),
    StoreUnavailableError("user:42", "message"),
    UnsupportedStateError("user:42", b"state", "reason", 7),
]
SHARED: list[Any] = [
    MANAGER,
    ProxyManager(MemoryStore(), "5/minute"),
    AsyncProxyManager(AsyncMemoryStore(), "5/minute"),
    BUCKET,
    BUCKET.verbose,
    ABUCKET,
    ABUCKET.verbose,
    BUCKET.reserve(1),
    ABUCKET.reserve(1),
    ALL_OF,
    all_of(ABUCKET),
    all_of(BUCKET).reserve(),
    all_of(ABUCKET).reserve(),
    MemoryStore(),
    AsyncMemoryStore(),
    ScriptedStore(),
    RedisStore(redis.Redis()),
    AsyncRedisStore(redis.asyncio.Redis()),
    CountingListener(),
    ManualClock(0),
]


def named(thing: object) -> str:
    return type(thing).__name__


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("value", VALUES, ids=named)
def test_values_are_copied_and_pickled(value: Any, again: Any) -> None:
    assert again(value) == value


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
@pytest.mark.parametrize("error", ERRORS, ids=named)
def test_errors_are_copied_and_pickled(error: RateLimitError, again: Any) -> None:
    same = again(error)
    assert (type(same), vars(same), str(same)) == (type(error), vars(error), str(error))


@pytest.mark.parametrize("thing", SHARED, ids=named)
def test_copies_of_what_a_process_shares_are_the_thing_itself(thing: Any) -> None:
    assert copy.copy(thing) is thing
    assert copy.deepcopy({"settings": [thing]})["settings"][0] is thing


@pytest.mark.parametrize("thing", SHARED[1:], ids=named)
def test_what_belongs_to_its_process_says_what_to_do_instead_of_pickling_it(thing: Any) -> None:
    with pytest.raises(TypeError, match=f"{named(thing)} cannot be pickled, as it belongs to its process; .*[a-z]"):
        pickle.dumps(thing)


def test_every_public_class_is_tried() -> None:
    tried = {type(each) for each in (*VALUES, *ERRORS, *SHARED, SystemClock())}
    tried |= {ratelimit.CircuitStatus, ratelimit.CircuitState}  # in what circuits() gives
    public = {getattr(ratelimit, name) for name in ratelimit.__all__}
    protocols = {one for one in public if isinstance(one, type) and Protocol in one.__mro__ and one not in tried}
    assert {one for one in public if isinstance(one, type)} - tried == protocols


@pytest.mark.parametrize("make", [ProxyManager, AsyncProxyManager])
def test_a_manager_made_by_url_is_pickled_with_all_that_it_was_given(make: Any) -> None:
    settings = {"prefix": "p:", "timeout": 0.25, "on_error": OnError.DENY, "configuration_version": 7}
    manager = make.from_url("redis://:secret@localhost:1/3?socket_timeout=0.5", "5/minute", **settings)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(manager))))
    assert type(again) is make
    assert again.store is not manager.store
    for name in ("_limits", "_prefix", "_settings"):
        assert getattr(again, name) == getattr(manager, name)
    assert again._timeout == 0.25


@pytest.mark.redis
def test_a_manager_goes_on_in_another_process(redis_url: str) -> None:
    with ProxyManager.from_url(redis_url, "3/hour") as manager:
        assert manager.try_consume("user:42", 2)
        program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).try_consume('user:42'))"
        done = subprocess.run(
            [sys.executable, "-c", program], input=pickle.dumps(manager), capture_output=True, check=False
        )
        assert done.stdout == b"True\n", done.stderr
        assert not manager.try_consume("user:42")


def paid(request: Any) -> bool:
    return bool(request.query)


def plan_of(key: str) -> str:
    return "paid" if key == "acme" else "free"


def test_rules_and_plans_are_pickled() -> None:
    http = pytest.importorskip("ratelimit.integrations.http")
    from tests.integrations.requests_of import request_of

    plans = http.Plans({"free": "20/hour", "paid": None}, plan_of, ttl=5)
    keys = [http.client_ip(), http.api_key(secret="s" * 32), http.user(), http.route(), http.method()]
    key = http.combined(*keys, http.header("x-tenant"))
    rule = http.Rule(plans, key=key, routes=["/a/{id}"], methods=["GET"], when=paid, cost=2)
    again = pickle.loads(pickle.dumps(rule))
    for name in ("name", "cost", "when", "methods", "routes"):
        assert getattr(again, name) == getattr(rule, name)
    for customer in ("acme", "other"):
        found = run(again.limits.limits_of(request_of(), customer))
        assert found == run(plans.limits_of(request_of(), customer))
    assert copy.deepcopy(rule).limits is plans
    limiter = http.Limiter(rule, manager=MANAGER)
    assert copy.deepcopy(limiter) is limiter
    with pytest.raises(TypeError, match=r"Limiter cannot be pickled.*; pickle its rules"):
        pickle.dumps(limiter)


def test_outbound_limits_are_pickled_without_what_this_process_knows() -> None:
    pytest.importorskip("http_sf")
    outbound = pytest.importorskip("ratelimit.integrations.outbound")
    limit = outbound.OutboundLimit(
        "10/second", key="api", cost=2, max_wait=7, prefix="o:", manager="redis://localhost:1"
    )
    limit.hold_back("api", 30)
    assert limit.remaining_hold() > 20
    assert copy.copy(limit) is copy.deepcopy(limit) is limit
    again = pickle.loads(pickle.dumps(limit))
    assert again.remaining_hold() == 0
    for name in ("_limits", "_key", "_cost", "_max_wait", "_max_hold", "_default_hold", "_prefix", "_manager"):
        assert getattr(again, name) == getattr(limit, name)
    assert again._jitter is limit._jitter
    with pytest.raises(TypeError, match=r"ProxyManager cannot be pickled.*; make it by from_url"):
        pickle.dumps(outbound.OutboundLimit("10/second", key="api", manager=ProxyManager(MemoryStore())))


def test_a_session_under_a_limit_is_pickled_and_copied() -> None:
    pytest.importorskip("http_sf")
    requests = pytest.importorskip("requests")
    from ratelimit.integrations.requests import OutboundLimit, RateLimitAdapter

    limit = OutboundLimit("10/second", key="api", manager="memory://")
    session = requests.Session()
    session.mount("http://", RateLimitAdapter(limit))
    adapter = copy.deepcopy(session).get_adapter("http://localhost/")
    assert adapter._limit is limit
    assert adapter is not session.get_adapter("http://localhost/")
    adapter = pickle.loads(pickle.dumps(session)).get_adapter("http://localhost/")
    assert adapter._limit.acquire() == "api"
    assert adapter._adapter.max_retries.total == 0


def test_a_transport_under_a_limit_says_what_to_pickle_instead() -> None:
    pytest.importorskip("http_sf")
    httpx = pytest.importorskip("httpx")
    from ratelimit.integrations.httpx import AsyncRateLimitTransport, OutboundLimit, RateLimitTransport

    limit = OutboundLimit("10/second", key="api", manager="memory://")
    inner = httpx.MockTransport(lambda _: httpx.Response(200))
    for transport in (RateLimitTransport(limit, inner), AsyncRateLimitTransport(limit, inner)):
        assert copy.deepcopy(transport) is transport
        with pytest.raises(TypeError, match=r"RateLimitTransport cannot be pickled.*; pickle the limit"):
            pickle.dumps(transport)
