"""Turns requests of Django into those of the core for HTTP, and answers of the core into responses of Django."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.urls import Resolver404, ResolverMatch, URLResolver, get_resolver, resolve

from ratelimit.errors import InvalidArgumentError
from ratelimit.integrations import http
from ratelimit.integrations.http import AsyncLimiter, Headers, HttpAnswer, Limiter, decision_about
from ratelimit.integrations.http.routes import canonical
from ratelimit.keys import brief
from ratelimit.runtime.steps import Steps

EXEMPT: Final = "_ratelimit_exempt"

exempted: Final[list[bool]] = []
"""One entry for each exempt view. While there is none, a middleware does not look up where requests go."""


def native_of(request: object) -> HttpRequest:
    """Return Django's own request, even if a request of REST framework wraps it."""
    native = request if isinstance(request, HttpRequest) else getattr(request, "_request", None)
    if not isinstance(native, HttpRequest):
        raise InvalidArgumentError(
            f"a view must be given a request first; got {brief(request)}: a method is limited by method_decorator"
        )
    return native


def http_request(request: HttpRequest, *, asynchronous: bool) -> http.HttpRequest:
    """Return a request as rules see it. The decision is kept as ``request.ratelimit``."""
    return http.HttpRequest(
        method=request.method or "GET",
        path=request.path_info or "/",  # without SCRIPT_NAME, as in urlpatterns
        peer=request.META.get("REMOTE_ADDR") or None,
        header=partial(_header, request),
        native=request,
        find_route=partial(_route, request),
        find_user=partial(_auser if asynchronous else _user, request),
        notes=vars(request),
        find_routes=partial(_routes, request),
    )


def answered(
    limiter: Limiter | AsyncLimiter, request: HttpRequest, respond: Callable[[], Any], place: str = ""
) -> Steps[HttpResponseBase]:
    """Return the response to a request: the application's, or a refusal.

    :param place: the view that is limited; empty for a middleware, whose rules do not count for views that are exempt.
    """
    asked = http_request(request, asynchronous=isinstance(limiter, AsyncLimiter))
    if not place and exempted and _is_exempt(request):
        decision: Any = decision_about(asked)
    else:
        decision = yield limiter.decide(asked, place)
    if not decision:
        return refusal(limiter.answers.refusal(decision))
    response: Any = yield respond()
    if isinstance(response, HttpResponseBase):  # Django itself complains about everything else
        # The middleware looks at the answer for all rules, also for views that have raised an exception.
        if decision_about(asked).waits_for_response:
            yield limiter.deduct(asked, partial(_http_response, response), limiter.rules if place else None)
        tell(response, limiter.answers.headers(decision_about(asked)))
    return response  # type: ignore[no-any-return]


def _http_response(response: HttpResponseBase) -> http.HttpResponse:
    return http.HttpResponse(response.status_code, response.headers.get, response)


def refusal(answer: HttpAnswer) -> HttpResponse:
    """Return an answer as a response."""
    return HttpResponse(answer.body, status=answer.status, headers=dict(answer.headers))


def tell(response: HttpResponseBase, headers: Headers) -> None:
    """Set header fields. They replace earlier ones, which were made when less had been decided."""
    for name, value in headers:
        response[name] = value


def _header(request: HttpRequest, name: str) -> str | None:
    return request.headers.get(name)


def _match(request: HttpRequest) -> ResolverMatch | None:
    """Return where a request goes. In a middleware Django has not looked it up yet, so this does."""
    if request.resolver_match is not None:
        return request.resolver_match
    try:
        return resolve(request.path_info, getattr(request, "urlconf", None))
    except Resolver404:
        return None


def _route(request: HttpRequest) -> str | None:
    match = _match(request)
    return None if match is None else f"/{match.route}"


def _routes(request: HttpRequest) -> frozenset[str]:
    return _templates_of(getattr(request, "urlconf", None) or settings.ROOT_URLCONF)


@lru_cache(maxsize=64)
def _templates_of(urlconf: Any) -> frozenset[str]:
    """Return the templates of all routes of a URLconf; regular expressions are left as they are."""
    return frozenset(canonical(f"/{route}") for route in _each_route(get_resolver(urlconf)))


def _each_route(resolver: URLResolver) -> Iterator[str]:
    for pattern in resolver.url_patterns:
        if isinstance(pattern, URLResolver):
            yield from (f"{pattern.pattern}{rest}" for rest in _each_route(pattern))
        else:
            yield str(pattern.pattern)


def _is_exempt(request: HttpRequest) -> bool:
    match = _match(request)
    return match is not None and getattr(match.func, EXEMPT, False)


def _user(request: HttpRequest) -> object:
    if not hasattr(request, "user"):
        raise ImproperlyConfigured(
            "a rule by user needs request.user: put django.contrib.auth.middleware.AuthenticationMiddleware before"
            " ratelimit.integrations.django.RateLimitMiddleware"
        )
    return _id(request.user)


async def _auser(request: HttpRequest) -> object:
    # request.user may look the session up with a blocking call, which Django forbids here.
    if hasattr(request, "auser"):
        return _id(await request.auser())
    return await sync_to_async(_user)(request)


def _id(user: Any) -> object:
    return user.pk if user is not None and user.is_authenticated else None
