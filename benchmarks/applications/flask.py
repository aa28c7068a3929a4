"""Applications of Flask, and one inside the middleware for any WSGI application."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final

from benchmarks.applications.calls import wsgi
from benchmarks.applications.common import (
    BODY,
    WITHOUT,
    Framework,
    Opened,
    bare,
    in_memory,
    limit_of,
    manager_for,
    ours,
    peer,
)
from benchmarks.model import Contender, Hit, Setup
from ratelimit import OnError


def _flask() -> Any:
    from flask import Flask

    return Flask("benchmark", static_folder=None)


def _index() -> tuple[bytes, int]:
    return BODY, 200


@contextmanager
def _flask_bare(_: Setup) -> Generator[Hit]:
    app = _flask()
    app.add_url_rule("/", view_func=_index)
    yield wsgi(app)


def _flask_ours(*, decorator: bool) -> Callable[[Setup], Opened]:
    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        from ratelimit.integrations.flask import RateLimiter

        app, limit = _flask(), limit_of(setup)
        with manager_for(setup) as manager:
            rules = () if decorator else (limit,)
            limiter = RateLimiter(*rules, app=app, manager=manager, on_error=OnError.DENY)
            app.add_url_rule("/", view_func=limiter.limit(limit)(_index) if decorator else _index)
            yield wsgi(app)

    return opened


@contextmanager
def _wsgi_ours(setup: Setup) -> Generator[Hit]:
    from ratelimit.integrations.wsgi import RateLimitMiddleware

    app = _flask()
    app.add_url_rule("/", view_func=_index)
    with manager_for(setup) as manager:
        yield wsgi(RateLimitMiddleware(app, limit_of(setup), manager=manager, on_error=OnError.DENY))


def _flask_limiter(*, decorator: bool, headers: bool = False) -> Callable[[Setup], Opened]:
    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        module, util = import_module("flask_limiter"), import_module("flask_limiter.util")
        app, limit = _flask(), limit_of(setup)
        limiter = module.Limiter(
            util.get_remote_address,
            app=app,
            default_limits=None if decorator else [limit],
            headers_enabled=headers,
            storage_uri=setup.url,
        )
        app.add_url_rule("/", view_func=limiter.limit(limit)(_index) if decorator else _index)
        try:
            yield wsgi(app)
        finally:
            if not in_memory(setup):
                limiter.storage.storage.close()

    return opened


FLASK: Final = Framework(
    "flask",
    "Flask",
    [
        bare(sync=_flask_bare),
        *WITHOUT,
        Contender(ours("extension"), _flask_ours(decorator=False)),
        Contender(ours("decorator"), _flask_ours(decorator=True)),
        Contender(ours("WSGI middleware"), _wsgi_ours),
        Contender(peer("flask-limiter"), _flask_limiter(decorator=False)),
        Contender(peer("flask-limiter decorator"), _flask_limiter(decorator=True)),
        Contender(peer("flask-limiter, headers", headers=True), _flask_limiter(decorator=False, headers=True)),
    ],
)
