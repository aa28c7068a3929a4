"""What objects print, for logs and debuggers: managers and stores name their server, and never a password."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import redis
import redis.asyncio

from ratelimit import (
    AsyncMemoryStore,
    AsyncProxyManager,
    AsyncRedisStore,
    MemoryStore,
    OnError,
    ProxyManager,
    RedisStore,
)
from ratelimit.integrations import asgi, wsgi
from ratelimit.integrations.http import AsyncLimiter, Limiter, Rule
from ratelimit.testing import ScriptedStore


def limits_of(_: str) -> str:
    return "3/hour"


MANAGERS: list[tuple[Any, str]] = [
    (
        ProxyManager.from_url("redis://me:secret@localhost:6380/3", "100/minute", prefix="users:"),
        "ProxyManager(RedisStore(localhost:6380/3), '100/minute', prefix='users:')",
    ),
    (
        AsyncProxyManager.from_url("rediss://:secret@[::1]:6380", ["10/minute", "5/second"]),
        "AsyncProxyManager(AsyncRedisStore([::1]:6380/0), '10/minute; 5/second')",
    ),
    (ProxyManager.from_url("unix://:secret@/run/redis.sock?db=2"), "ProxyManager(RedisStore(unix:/run/redis.sock/2))"),
    (
        ProxyManager.from_url("redis+sentinel://:secret@a:1,b:2/main/4?sentinel_password=secret", prefix=b"u"),
        "ProxyManager(RedisStore(main/4 by Sentinel at a:1,b:2), prefix=b'u')",
    ),
    (
        ProxyManager.from_url("redis+cluster://me:secret@nodes:7000"),
        "ProxyManager(RedisStore(cluster at nodes:7000))",
    ),
    (
        AsyncProxyManager.from_url("redis+cluster://me:secret@nodes:7000"),
        "AsyncProxyManager(AsyncRedisStore(cluster at nodes:7000))",
    ),
    (ProxyManager(MemoryStore(), "3/hour"), "ProxyManager(MemoryStore(), '3/hour')"),
    (AsyncProxyManager(AsyncMemoryStore(), prefix="p:"), "AsyncProxyManager(AsyncMemoryStore(), prefix='p:')"),
    (RedisStore(redis.Redis(password="secret")), "RedisStore(localhost:6379/0)"),
    (AsyncRedisStore(redis.asyncio.Redis(host="h", db=1, password="secret")), "AsyncRedisStore(h:6379/1)"),
    (ScriptedStore(), "ScriptedStore()"),
]


@pytest.mark.parametrize(("thing", "printed"), MANAGERS, ids=[printed for _, printed in MANAGERS])
def test_managers_and_stores_say_where_their_buckets_are(thing: object, printed: str) -> None:
    assert repr(thing) == printed


def test_limits_that_are_looked_up_and_long_ones_are_short() -> None:
    assert "limits_of" in repr(ProxyManager(MemoryStore(), limits_of))
    assert len(repr(ProxyManager(MemoryStore(), "1/hour", prefix="x" * 10_000))) < 400


def test_a_manager_is_not_kept_alive_by_what_prints_it() -> None:
    gc.disable()
    try:
        manager = ProxyManager(MemoryStore(), "3/hour")
        gone = weakref.ref(manager)
        repr(manager)
        del manager
        assert gone() is None
    finally:
        gc.enable()


def test_the_log_of_an_outage_names_the_manager_and_the_server(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    url = "redis://me:secret@localhost:1/2"
    with ProxyManager.from_url(url, "3/hour", prefix="users:", on_error=OnError.ALLOW) as manager:
        assert manager.try_consume("7")
    (record,) = caplog.records
    assert record.message.startswith("the store fails (Redis cannot be reached")
    assert record.message.endswith(
        "for the key '7' and others of ProxyManager(RedisStore(localhost:1/2), '3/hour', prefix='users:')"
    )
    assert record.message.count("'7'") == 1
    assert "secret" not in record.message


def test_the_log_of_its_end_names_them_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ratelimit")
    store = ScriptedStore()
    manager = ProxyManager(store, "3/hour", on_error=OnError.ALLOW)
    store.fail()
    assert manager.try_consume("7")
    assert manager.try_consume("7")
    assert caplog.messages[-1].endswith(", by ProxyManager(ScriptedStore(), '3/hour')")


LIMITER = "Limiter(Rule('3/hour', key=client_ip(), name='api'), manager={manager}, namespace='shop')"


def test_limiters_and_middlewares_show_their_rules() -> None:
    rule = Rule("3/hour", name="api")
    url = "redis://me:secret@localhost:6380/3"
    by_url = Limiter(rule, manager=url, namespace="shop")
    assert repr(by_url) == LIMITER.format(manager="'redis://***@localhost:6380/3'")
    manager = ProxyManager(MemoryStore())
    assert repr(Limiter(rule, manager=manager, namespace="shop")) == LIMITER.format(
        manager="ProxyManager(MemoryStore())"
    )
    assert repr(AsyncLimiter(enabled=False)) == "AsyncLimiter(enabled=False)"
    app: Any = print
    for middleware in (asgi.RateLimitMiddleware, wsgi.RateLimitMiddleware):
        shown = repr(middleware(app, rule, manager=url, namespace="shop"))
        assert shown.startswith("RateLimitMiddleware(")
        assert LIMITER.format(manager="'redis://***@localhost:6380/3'") in shown
