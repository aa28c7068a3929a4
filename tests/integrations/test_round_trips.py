# No "from __future__ import annotations": FastAPI could not resolve what names a limit that a test has made.
"""What the decisions about a request cost over Redis, and which keys they touch there and in a cluster."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from flask import Flask
from werkzeug.test import Client as WerkzeugClient

from ratelimit import AsyncProxyManager, ProxyManager
from ratelimit.core.token_bucket import codec
from ratelimit.integrations.asgi import RateLimitMiddleware
from ratelimit.integrations.fastapi import RateLimit
from ratelimit.integrations.flask import RateLimiter
from ratelimit.integrations.http import AsyncLimiter, Limiter, Rule, header
from ratelimit.integrations.wsgi import RateLimitMiddleware as WsgiMiddleware
from ratelimit.stores.redis.server_time import FIRST_REPLIES
from tests.integrations.requests_of import request_of
from tests.support import servers
from tests.support.both_faces import Face, closing, settled
from tests.support.redis_monitor import monitored
from tests.support.servers import Cluster, ServerBinary
from tests.support.topologies import ask
from tests.support.workers import patient

pytestmark = pytest.mark.redis

DECISION = "EVALSHA"
WARM_UP = max(4, FIRST_REPLIES)
RULES = [
    Rule("1000/day", name="all", key=lambda _: "all"),
    Rule("100/day", name="address"),
    Rule("3/day", name="user", key=header("user")),
]


def empty() -> dict[str, str]:
    """What the applications answer."""
    return {}


@contextmanager
def counted(url: str) -> Generator[Callable[[], list[str]]]:
    """Give a function that returns what was sent since its last call, with scripts known to the server."""
    with monitored(url) as monitor:
        yield monitor.sent


def warm(limiter: Any) -> list[Any]:
    """Requests by which a manager comes to know the server's time and its scripts."""
    return [limiter.decide(request_of(user=f"warm up {number}")) for number in range(WARM_UP)]


def consumed(url: str) -> dict[str, int]:
    with redis.Redis.from_url(url) as client:
        keys: Any = client.keys("*")
        found = {key.decode(): client.get(key) for key in keys}
    return {key: codec.decode(data).consumed_tokens for key, data in found.items() if isinstance(data, bytes)}


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_all_rules_of_a_limiter_are_one_round_trip(face: Face, redis_url: str, count: int) -> None:
    async with closing(face.from_url(redis_url)) as manager:
        kind: Any = Limiter if face is ProxyManager else AsyncLimiter
        limiter = kind(*RULES[-count:], manager=manager)
        for decided in warm(limiter):
            await settled(decided)
        with counted(redis_url) as sent:
            for admitted in (True, True, True, False, False):
                assert bool(await settled(limiter.decide(request_of(user="1")))) is admitted
                assert len(sent()) == 1
        used = consumed(redis_url)
    assert used["user:1"] == 3
    for rule in RULES[-count:-1]:
        # Nothing was charged for the two that were refused.
        assert used[f"{rule.name}:{'all' if rule.name == 'all' else '192.0.2.1'}"] == WARM_UP + 3


@pytest.fixture(params=["asgi", "wsgi", "flask"])
def get(request: pytest.FixtureRequest, redis_url: str) -> Generator[Callable[[str], int]]:
    """Sends a request of a user to an application whose middleware has three rules, and returns the status."""
    if request.param == "asgi":
        api = FastAPI()
        api.add_middleware(RateLimitMiddleware, *RULES, manager=AsyncProxyManager.from_url(redis_url))
        api.get("/")(empty)
        with TestClient(api, client=("192.0.2.1", 1)) as client:
            yield lambda user: client.get("/", headers={"user": user}).status_code
        return
    app = Flask(__name__)
    app.get("/")(empty)
    with ProxyManager.from_url(redis_url) as manager:
        served: Any = WsgiMiddleware(app, *RULES, manager=manager) if request.param == "wsgi" else app
        if request.param == "flask":
            RateLimiter(*RULES, app=app, manager=manager)
        sending: Any = WerkzeugClient(served)
        address = {"REMOTE_ADDR": "192.0.2.1"}
        yield lambda user: sending.get("/", headers={"user": user}, environ_base=address).status_code


def test_all_rules_of_a_middleware_are_one_round_trip(get: Callable[[str], int], redis_url: str) -> None:
    # Connecting, loading the script, and learning the server's time.
    for number in range(WARM_UP):
        assert get(f"warm up {number}") == 200
    with counted(redis_url) as sent:
        assert [get("1") for _ in range(5)] == [200, 200, 200, 429, 429]
        assert sent() == [DECISION] * 5
    used = consumed(redis_url)
    assert (used["all:all"], used["address:192.0.2.1"], used["user:1"]) == (WARM_UP + 3, WARM_UP + 3, 3)


def test_dependencies_decide_one_after_the_other_and_give_back(redis_url: str) -> None:
    app = FastAPI()
    manager = AsyncProxyManager.from_url(redis_url)
    limits = [Depends(RateLimit(rule, manager=manager)) for rule in RULES[1:]]
    app.get("/", dependencies=limits)(empty)
    with TestClient(app, client=("192.0.2.1", 1)) as client:
        for number in range(WARM_UP):
            client.get("/", headers={"user": f"warm up {number}"})
        with counted(redis_url) as sent:
            counts = []
            for _ in range(4):
                status = client.get("/", headers={"user": "1"}).status_code
                counts.append((status, len(sent())))
    assert counts == [(200, 2)] * 3 + [(429, 3)]
    assert consumed(redis_url)["address:192.0.2.1"] == WARM_UP + 3


# In a cluster


@pytest.fixture(scope="module")
def cluster(server_binary: ServerBinary) -> Generator[Cluster]:
    with servers.cluster(server_binary) as cluster:
        yield cluster


async def test_rules_on_different_slots_of_a_cluster_are_asked_in_turn(face: Face, cluster: Cluster) -> None:
    async with closing(face.from_url(patient(cluster.url), timeout=5)) as manager:
        kind: Any = Limiter if face is ProxyManager else AsyncLimiter
        limiter = kind(*RULES, manager=manager, namespace=face.__name__)
        decisions = [await settled(limiter.decide(request_of(user="1"))) for _ in range(4)]
        assert [bool(decision) for decision in decisions] == [True, True, True, False]
        refused = decisions[-1]
        assert [outcome.limits[0].remaining for outcome in refused.outcomes] == [997, 97, 0]
        assert [outcome.rule.name for outcome in refused.refusals] == ["user"]
        for outcome in refused.outcomes:
            assert (await settled(outcome.bucket.snapshot())).consumed_tokens == 3


async def test_rules_on_one_slot_of_a_cluster_are_one_decision(face: Face, cluster: Cluster) -> None:
    prefix = f"{{{face.__name__}}}:"
    async with closing(face.from_url(patient(cluster.url), timeout=5, prefix=prefix)) as manager:
        kind: Any = Limiter if face is ProxyManager else AsyncLimiter
        limiter = kind(*RULES, manager=manager)
        for decided in warm(limiter):
            await settled(decided)
        node = next(node for node in cluster.nodes if ask(node, "KEYS", f"{prefix}*"))
        with counted(node.url) as sent:
            for admitted in (True, True, True, False):
                assert bool(await settled(limiter.decide(request_of(user="1")))) is admitted
                assert [name for name in sent() if name == DECISION] == [DECISION]


@pytest.mark.parametrize("key", ["{a}", "{a}:1", "x{a}", "{}{a}", "}{a}", "{{a}}"])
async def test_a_client_does_not_choose_the_slot_of_its_keys(cluster: Cluster, key: str) -> None:
    with ProxyManager.from_url(patient(cluster.url), timeout=5) as manager:
        limiter = Limiter(RULES[-1], manager=manager)
        stored: Any = limiter.decide(request_of(user=key)).outcomes[0].bucket.key
        store: Any = manager.store
    slot = ask(cluster.nodes[0], "CLUSTER KEYSLOT", stored)
    assert slot != ask(cluster.nodes[0], "CLUSTER KEYSLOT", "a")
    assert slot == store.slot_of(stored.encode())
