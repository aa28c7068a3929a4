"""The middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase

from ratelimit.integrations.django.conf import async_limiter, current, limiter
from ratelimit.integrations.django.requests import answered
from ratelimit.integrations.http import HttpDecision
from ratelimit.integrations.http.limiter import NOTE
from ratelimit.runtime.steps import arun, run


class RateLimitMiddleware:
    """Limits all requests by the rules of the setting ``RATELIMIT``, and shows all clients how much is left.

    It decides before the view is looked for, so that paths that do not exist count as well. ``request.ratelimit`` is
    the :class:`ratelimit.integrations.http.HttpDecision`. Rules by user need Django's ``AuthenticationMiddleware``
    before this one.

    It is sync under WSGI and async under ASGI, and needs no thread for either.

    :raises ImproperlyConfigured: when the server starts, for a setting that is not valid.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        # In Python 3.11 the function of inspect does not see Django's mark.
        self._asynchronous = iscoroutinefunction(get_response)  # pyright: ignore[reportDeprecated]
        if self._asynchronous:
            markcoroutinefunction(self)
        current()

    def __call__(self, request: HttpRequest) -> HttpResponseBase | Awaitable[HttpResponseBase]:
        now = current()
        if not now.enabled:
            vars(request)[NOTE] = HttpDecision()
            return self.get_response(request)  # type: ignore[no-any-return]
        respond = partial(self.get_response, request)
        if self._asynchronous:
            return arun(answered(async_limiter(now.rules), request, respond))
        return run(answered(limiter(now.rules), request, respond))
