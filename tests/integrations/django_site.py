"""A site of Django in this process, whose settings last as long as the tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, Self

import django
import http_sf
from django.conf import settings
from django.contrib.sessions.backends.signed_cookies import SessionStore
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from ratelimit import AsyncProxyManager, MemoryStore, ProxyManager
from ratelimit.testing import ManualClock, ScriptedStore
from tests.support.both_faces import for_asyncio

NOW: Final = 1_700_000_000_000_000_000

LIMITING: Final = "ratelimit.integrations.django.RateLimitMiddleware"
SESSIONS: Final = "django.contrib.sessions.middleware.SessionMiddleware"
AUTHENTICATION: Final = "django.contrib.auth.middleware.AuthenticationMiddleware"

_SETTINGS: Final = {
    "ALLOWED_HOSTS": ["*"],
    "INSTALLED_APPS": ["django.contrib.auth", "django.contrib.contenttypes"],
    "AUTHENTICATION_BACKENDS": ["tests.integrations.django_site.Users"],
    "SESSION_ENGINE": "django.contrib.sessions.backends.signed_cookies",
    "LOGGING_CONFIG": None,
}


# Django is configured once in a process; whoever does it, these tests override what they need.
if not settings.configured:
    settings.configure(LOGGING_CONFIG=None)


@contextmanager
def overridden() -> Generator[None]:
    """Settings for the tests of a module."""
    settings.SECRET_KEY = "a secret of the tests"  # which cannot be overridden where there was none before
    django.setup()
    with override_settings(**_SETTINGS):
        yield


class Users:
    """Knows users without a database: all there can be."""

    def get_user(self, pk: int) -> Any:
        from django.contrib.auth.models import User

        return User(pk=pk)

    async def aget_user(self, pk: int) -> Any:
        return self.get_user(pk)


def session_of(user: int) -> str:
    """The cookie of a user that has logged in."""
    session = SessionStore()
    session.update(
        {
            "_auth_user_id": str(user),
            "_auth_user_backend": "tests.integrations.django_site.Users",
            "_auth_user_hash": Users().get_user(user).get_session_auth_hash(),
        }
    )
    session.save()
    assert session.session_key is not None
    return session.session_key


class Urls:
    """What ROOT_URLCONF may be beside a module: views by their paths."""

    def __init__(self, views: dict[str, Callable[..., Any]]) -> None:
        self.urlpatterns = [path(route, view) for route, view in views.items()]


class Site:
    """The site under some setting ``RATELIMIT``, spoken to by WSGI or ASGI, and what is stored.

    :param views: by their paths.
    :param middleware: whether it is limited by the middleware.
    :param before: other middlewares, which come first.
    :param store: has the buckets.
    :param more: other settings of Django.
    :param ratelimit: the setting.
    """

    def __init__(
        self,
        *,
        asynchronous: bool,
        views: dict[str, Callable[..., Any]] | None = None,
        middleware: bool = True,
        before: list[str] | None = None,
        store: ScriptedStore | None = None,
        more: dict[str, Any] | None = None,
        **ratelimit: Any,
    ) -> None:
        self.asynchronous = asynchronous
        self.clock = ManualClock(NOW)
        self.memory = MemoryStore(clock=self.clock) if store is None else store  # an empty one is false
        self.manager = ProxyManager(self.memory, clock=self.clock)
        self.amanager = AsyncProxyManager(for_asyncio(self.memory), clock=self.clock)
        self._settings = override_settings(
            ROOT_URLCONF=Urls(views or {"": self.view}),
            MIDDLEWARE=[*(before or []), *([LIMITING] if middleware else [])],
            RATELIMIT={"MANAGER": self.manager, "ASYNC_MANAGER": self.amanager} | ratelimit,
            **(more or {}),
        )
        self.cookies: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._settings.enable()
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.disable()

    @property
    def view(self) -> Callable[..., Any]:
        """A view of the site's face."""
        return ahello if self.asynchronous else hello

    @contextmanager
    def showing(self, **views: Callable[..., Any]) -> Generator[None]:
        """Have other views, by their paths; ``index`` is at the root."""
        urls = Urls({"" if name == "index" else name: view for name, view in views.items()})
        with override_settings(ROOT_URLCONF=urls):
            yield

    def get(self, path: str = "/", *, method: str = "GET", **options: Any) -> Any:
        """The response to a request."""
        client: Any = (AsyncClient if self.asynchronous else Client)(raise_request_exception=False)
        for name, value in self.cookies.items():
            client.cookies[name] = value
        response = client.generic(method, path, **options)
        return asyncio.run(response) if self.asynchronous else response

    def statuses(self, requests: int, path: str = "/", **options: Any) -> list[int]:
        return [self.get(path, **options).status_code for _ in range(requests)]

    def consumed(self, key: str) -> int:
        """Tokens that the bucket says were consumed; 0 where there is none."""
        if not self.memory.get(key.encode()):
            return 0
        return self.manager.bucket(key, "1/s").snapshot().consumed_tokens


def fields(response: Any) -> dict[str, list[tuple[str, dict[str, int]]]]:
    """The fields of draft-ietf-httpapi-ratelimit-headers, parsed."""
    names = ["RateLimit-Policy", "RateLimit"]
    return {
        name: http_sf.parse(response[name].encode(), tltype="list")  # type: ignore[misc]  # a list of items
        for name in names
        if name in response
    }


def hello(_: HttpRequest) -> HttpResponse:
    return HttpResponse("hello")


async def ahello(_: HttpRequest) -> HttpResponse:
    return HttpResponse("hello")
