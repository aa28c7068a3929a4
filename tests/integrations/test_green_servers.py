"""Servers whose requests are served by greenlets: ``gunicorn -k gevent``, and those of eventlet."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from ratelimit import ProxyManager
from tests.integrations.gunicorns import ROOT, gunicorn, served, statuses
from tests.support import servers
from tests.support.proxies import Proxy
from tests.support.workers import patient

pytestmark = pytest.mark.redis

SILENCE = 1.0
"""Seconds: how long a decision waits for a silent server."""

# Nothing but time ends a decision about a server that is silent: there is no circuit that would open.
PROGRAM = """
import os

import redis
from flask import Flask

from ratelimit import OnError, ProxyManager, RedisStore
from ratelimit.integrations.flask import RateLimiter
from ratelimit.integrations.http import Rule
from ratelimit.integrations.wsgi import RateLimitMiddleware

client = redis.Redis.from_url(os.environ["RATELIMIT_URL"], max_connections=1000)
store = RedisStore(client, circuit_breaker=None)
manager = ProxyManager(store, "50/day", timeout=float(os.environ["TIMEOUT"]), on_error=OnError.ALLOW)
application = Flask(__name__)
limiter = RateLimiter(app=application, manager=manager)


@application.get("/")
@limiter.limit("50/day", name="inner")
def index():
    return "hello"


application.wsgi_app = RateLimitMiddleware(application.wsgi_app, Rule("80/day", name="outer"), manager=manager)
"""

# gunicorn has no worker of eventlet any more since version 26.
OWN_SERVER_OF_EVENTLET = """
import eventlet
eventlet.monkey_patch()
import eventlet.wsgi
from served import application
listener = eventlet.listen(("127.0.0.1", 0))
print("Listening at: http://%s:%d " % listener.getsockname(), flush=True)
eventlet.wsgi.server(listener, application)
"""

Serve = Callable[[str, float], AbstractContextManager[tuple[str, int]]]
"""Serves the program over the Redis of a URL, with decisions that take so many seconds at most."""


@pytest.fixture(params=["gevent", "gevent-preload", "eventlet"])
def serve(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    library, _, preload = request.param.partition("-")
    pytest.importorskip(library)
    pytest.importorskip("gunicorn")
    if library == "gevent" or importlib.util.find_spec("gunicorn.workers.geventlet"):

        def serving(url: str, timeout: float) -> AbstractContextManager[tuple[str, int]]:
            monkeypatch.setenv("TIMEOUT", str(timeout))
            return gunicorn(PROGRAM, tmp_path, redis_url=url, worker=library, preload=bool(preload))

        return serving

    def serving_itself(url: str, timeout: float) -> AbstractContextManager[tuple[str, int]]:
        (tmp_path / "served.py").write_text(PROGRAM)
        (tmp_path / "serving.py").write_text(OWN_SERVER_OF_EVENTLET)
        command = [sys.executable, "-W", "ignore", str(tmp_path / "serving.py")]
        environment = {"PYTHONPATH": str(ROOT), "RATELIMIT_URL": url, "TIMEOUT": str(timeout)}
        return served(command, tmp_path / "log", os.environ | environment)

    return serving_itself


def test_greenlets_admit_together_what_the_limits_say(serve: Serve, redis_url: str) -> None:
    with serve(patient(redis_url), 60) as address:
        assert statuses(address, "/", 120, at_once=30) == {200: 50, 429: 70}
    with ProxyManager.from_url(redis_url, "1/day") as manager:
        for name in ("inner", "outer"):  # what the inner one refuses, the outer one gets back
            assert manager.snapshot(f"{name}:127.0.0.1").consumed_tokens == 50


def test_a_silent_server_costs_all_requests_together_its_timeouts(serve: Serve, server: servers.RedisServer) -> None:
    with Proxy(server.port) as proxy, proxy.black_hole(), serve(f"redis://127.0.0.1:{proxy.port}", SILENCE) as address:
        begun = time.monotonic()
        assert statuses(address, "/", 20, at_once=20) == {200: 20}
        took = time.monotonic() - begun
    assert 2 * SILENCE <= took < 10 * SILENCE  # one after the other, of two processes, they would take 20
