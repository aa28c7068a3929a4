"""Applications of Django and Django REST framework.

A process has one set of settings, which is in force while the bare application is open: it is the first to be opened,
and the last to be closed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from importlib import import_module
from typing import Any, Final

from benchmarks.applications.calls import asgi, wsgi
from benchmarks.applications.common import (
    BODY,
    PERIODS,
    WITHOUT,
    AsyncOpened,
    Framework,
    Opened,
    async_manager_for,
    bare,
    in_memory,
    limit_of,
    manager_for,
    ours,
    peer,
)
from benchmarks.model import AsyncHit, Contender, Hit, Setup


@contextmanager
def _django_settings(setup: Setup, **more: Any) -> Generator[None]:
    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            DATABASES={},
            LOGGING_CONFIG=None,
            MIDDLEWARE=[],
            REST_FRAMEWORK={
                "DEFAULT_AUTHENTICATION_CLASSES": [],
                "DEFAULT_PERMISSION_CLASSES": [],
                "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
                "UNAUTHENTICATED_USER": None,
            },
            RATELIMIT_VIEW="benchmarks.applications.django.refused_by_django_ratelimit",
            ROOT_URLCONF=(),
            SECRET_KEY="benchmark",
            USE_I18N=False,
        )
        django.setup()
        _forget_databases()
        logging.getLogger("django.request").setLevel(logging.CRITICAL)  # it logs every refusal otherwise
    from django.test.utils import override_settings

    cache = {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": setup.url}
    if in_memory(setup):
        cache = {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}
    limited = {"RULES": [limit_of(setup)], "ON_ERROR": "deny", **more}
    with override_settings(CACHES={"default": cache}, RATELIMIT=limited):
        yield


def _forget_databases() -> None:
    """Do without what Django does for databases at each request: under ASGI it does so in threads, which takes long."""
    from django.core.signals import request_finished, request_started
    from django.db import close_old_connections, reset_queries

    request_started.disconnect(reset_queries)
    request_started.disconnect(close_old_connections)
    request_finished.disconnect(close_old_connections)


def refused_by_django_ratelimit(_request: object, _error: Exception) -> Any:
    """The view that its middleware shows, which otherwise answers with 403."""
    from django.http import HttpResponse

    return HttpResponse(status=429)


def _django_view(*, asynchronous: bool) -> Callable[..., Any]:
    from django.http import HttpResponse

    def index(_: Any) -> HttpResponse:
        return HttpResponse(BODY)

    async def aindex(_: Any) -> HttpResponse:
        return HttpResponse(BODY)

    return aindex if asynchronous else index


def _django(view: Callable[..., Any], *middleware: str, asynchronous: bool) -> Any:
    """Return a handler whose requests know its only URL, so that other handlers may have other URLs."""
    from django.core.handlers.asgi import ASGIHandler, ASGIRequest
    from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
    from django.test.utils import override_settings
    from django.urls import path

    with override_settings(MIDDLEWARE=middleware):
        handler: Any = ASGIHandler() if asynchronous else WSGIHandler()
    request = ASGIRequest if asynchronous else WSGIRequest
    handler.request_class = type("Request", (request,), {"urlconf": (path("", view),)})
    return handler


_OUR_MIDDLEWARE: Final = "ratelimit.integrations.django.RateLimitMiddleware"
_THEIR_MIDDLEWARE: Final = "django_ratelimit.middleware.RatelimitMiddleware"


@contextmanager
def _django_bare(setup: Setup) -> Generator[Hit]:
    with manager_for(setup) as manager, _django_settings(setup, MANAGER=manager):
        yield wsgi(_django(_django_view(asynchronous=False), asynchronous=False))


@asynccontextmanager
async def _django_bare_async(setup: Setup) -> AsyncGenerator[AsyncHit]:
    async with async_manager_for(setup) as manager:
        with _django_settings(setup, ASYNC_MANAGER=manager):
            yield asgi(_django(_django_view(asynchronous=True), asynchronous=True))


def _django_ours(*, decorator: bool) -> Callable[[Setup], Opened]:
    @contextmanager
    def opened(setup: Setup) -> Generator[Hit]:
        yield wsgi(_django_limited(setup, decorator=decorator, asynchronous=False))

    return opened


def _django_ours_async(*, decorator: bool) -> Callable[[Setup], AsyncOpened]:
    @asynccontextmanager
    async def opened(setup: Setup) -> AsyncGenerator[AsyncHit]:
        yield asgi(_django_limited(setup, decorator=decorator, asynchronous=True))

    return opened


def _django_limited(setup: Setup, *, decorator: bool, asynchronous: bool) -> Any:
    from ratelimit.integrations.django import rate_limit

    view = _django_view(asynchronous=asynchronous)
    if decorator:
        return _django(rate_limit(limit_of(setup), name="decorator")(view), asynchronous=asynchronous)
    return _django(view, _OUR_MIDDLEWARE, asynchronous=asynchronous)


def _django_ratelimit(setup: Setup, *, asynchronous: bool) -> Any:
    (limit,) = setup.limits
    decorate = import_module("django_ratelimit.decorators").ratelimit(
        key="ip", rate=f"{limit.tokens}/{PERIODS[limit.seconds][0]}"
    )
    # Its decorator is for sync views only, and so Django calls them in threads where it is async.
    return _django(decorate(_django_view(asynchronous=False)), _THEIR_MIDDLEWARE, asynchronous=asynchronous)


@contextmanager
def _django_peer(setup: Setup) -> Generator[Hit]:
    yield wsgi(_django_ratelimit(setup, asynchronous=False))


@asynccontextmanager
async def _django_peer_async(setup: Setup) -> AsyncGenerator[AsyncHit]:
    yield asgi(_django_ratelimit(setup, asynchronous=True))


def _rest(throttle: type | None) -> Any:
    from rest_framework.response import Response
    from rest_framework.views import APIView

    class Index(APIView):
        throttle_classes = () if throttle is None else (throttle,)

        def get(self, _: Any) -> Response:
            return Response({"answer": "ok"})

    return _django(Index.as_view(), asynchronous=False)


@contextmanager
def _rest_bare(setup: Setup) -> Generator[Hit]:
    with manager_for(setup) as manager, _django_settings(setup, MANAGER=manager):
        yield wsgi(_rest(None))


@contextmanager
def _rest_ours(setup: Setup) -> Generator[Hit]:
    from ratelimit.integrations.http import client_ip
    from ratelimit.integrations.rest_framework import RateLimitThrottle

    yield wsgi(_rest(type("Throttle", (RateLimitThrottle,), {"limits": limit_of(setup), "key": client_ip()})))


@contextmanager
def _rest_own(setup: Setup) -> Generator[Hit]:
    """REST framework's own throttle, which keeps the times of all requests of a client in Django's cache."""
    from rest_framework.throttling import AnonRateThrottle

    yield wsgi(_rest(type("Throttle", (AnonRateThrottle,), {"rate": limit_of(setup)})))


DJANGO: Final = Framework(
    "django",
    "Django, WSGI",
    [
        bare(sync=_django_bare),
        *WITHOUT,
        Contender(ours("middleware"), _django_ours(decorator=False)),
        Contender(ours("decorator"), _django_ours(decorator=True)),
        Contender(peer("django-ratelimit"), _django_peer),
    ],
)

DJANGO_ASGI: Final = Framework(
    "django-asgi",
    "Django, ASGI",
    [
        bare(asyncio=_django_bare_async),
        *WITHOUT,
        Contender(ours("middleware"), asyncio=_django_ours_async(decorator=False)),
        Contender(ours("decorator"), asyncio=_django_ours_async(decorator=True)),
        Contender(peer("django-ratelimit"), asyncio=_django_peer_async),
    ],
)

REST_FRAMEWORK: Final = Framework(
    "rest-framework",
    "Django REST framework",
    [
        bare(sync=_rest_bare),
        *WITHOUT,
        Contender(ours("throttle"), _rest_ours),
        Contender(peer("REST framework's AnonRateThrottle"), _rest_own),
    ],
)
