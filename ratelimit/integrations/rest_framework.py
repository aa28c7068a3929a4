"""For Django REST framework: throttles, and an exception handler.

They share setting, decisions and buckets with :mod:`ratelimit.integrations.django`, and use no cache.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ratelimit.core.limits import Limits, configuration_of
from ratelimit.errors import InvalidConfigurationError
from ratelimit.integrations.extras import needing

with needing("rest_framework"):
    from django.core.exceptions import ImproperlyConfigured
    from django.http.response import HttpResponseBase
    from rest_framework.exceptions import APIException
    from rest_framework.request import Request
    from rest_framework.settings import api_settings
    from rest_framework.throttling import BaseThrottle
    from rest_framework.views import exception_handler as default_exception_handler

    from ratelimit.integrations.django.conf import current, limiter
    from ratelimit.integrations.django.keys import client, user_or_client
    from ratelimit.integrations.django.requests import http_request, native_of, refusal

from ratelimit.integrations.http import Answers, HttpDecision, HttpRequest, RequestKey, Rule, decision_about
from ratelimit.integrations.http.decision import FIELDS_AGAIN
from ratelimit.integrations.http.rules import Cost, DeductWhen, Predicate, RuleLimits

__all__ = ["AnonRateLimit", "RateLimitThrottle", "Refused", "ScopedRateLimit", "UserRateLimit", "exception_handler"]


class Refused(APIException):
    """Raised where a request cannot be checked: the store has failed (503), or the request has no key (400)."""

    def __init__(self, decision: HttpDecision) -> None:
        problem = current().answers.problem(decision)
        super().__init__(problem.get("detail") or problem.get("title"), code="refused")
        self.status_code = problem["status"]
        self.wait = decision.retry_after  # REST framework turns this into Retry-After


class RateLimitThrottle(BaseThrottle):
    """Limits a view by a :class:`ratelimit.integrations.http.Rule` made of the attributes of the class.

    ::

        class Searches(RateLimitThrottle):
            limits = "10/minute burst 20"
            key = api_key(secret=...)

    A request that any throttle of this kind refuses has paid for none of them.

    :cvar limits: None: the rate of the scope in ``DEFAULT_THROTTLE_RATES``, which may be written in either way:
        ``100/hour``, ``10/second burst 50``, or a list of these. With a rate of None nothing is limited.
    :cvar scope: the name of the rate in ``DEFAULT_THROTTLE_RATES``.
    :cvar name: by default the scope. A class with limits of its own and without a name has buckets of its own.
    :cvar key: whose bucket it is; by default the user's, or that of the address of an anonymous client.
    :cvar cost: tokens of a request.
    :cvar deduct_when: says of a response whether its request has cost anything; this needs the middleware of
        :mod:`ratelimit.integrations.django`.
    :cvar exempt: requests for which this is true are not limited.
    :cvar version: of the limits; raise it whenever they change, so that live buckets get the new ones.
    :cvar enabled: False: the throttle lets every request through.
    """

    limits: RuleLimits | None = None
    scope: str | None = None
    name: str | None = None
    key: RequestKey = user_or_client
    cost: Cost = 1
    deduct_when: DeductWhen | None = None
    exempt: Predicate | None = None
    version: int | None = None
    enabled: bool = True

    _decision = HttpDecision()

    def allow_request(self, request: Request, view: Any) -> bool:
        """Return whether a request may go on.

        :raises Refused: where it may not, for a reason other than a limit.
        :raises ImproperlyConfigured: for limits that are not valid.
        """
        rule = self._rule()
        if rule is None or not current().enabled:
            return True
        deciding = limiter((rule,))
        # After a refusal nothing more is asked, although REST framework goes on to the next throttle.
        place = "" if rule.named else f"{type(self).__module__}.{type(self).__qualname__}"
        self._decision = deciding.decide(http_request(native_of(request), asynchronous=False), place)
        # REST framework sets the headers of the view on whatever response there will be.
        if hasattr(view, "headers"):
            _show_fields(self._decision, view, deciding.answers)
        if not self._decision and deciding.answers.problem(self._decision)["status"] != 429:
            raise Refused(self._decision)
        return bool(self._decision)

    def wait(self) -> float | None:
        """Return the seconds until the request may be sent again; None for never."""
        return self._decision.retry_after

    def _rule(self) -> Rule | None:
        # Callables are taken from the class, because an instance would make methods of them.
        cls = type(self)
        name, limits = cls.name, cls.limits
        if limits is None:
            name, limits = name or self.scope, _rate(cls.__name__, self.scope)
        try:
            if isinstance(limits, list | tuple):  # a list has no hash
                limits = configuration_of(limits)
            return (
                None
                if limits is None
                else _made(limits, name, cls.key, cls.cost, cls.deduct_when, cls.exempt, cls.version, cls.enabled)
            )
        except InvalidConfigurationError as error:
            raise ImproperlyConfigured(f"{cls.__name__} is not valid: {error}") from error


def _show_fields(decision: HttpDecision, view: Any, answers: Answers) -> None:
    """Set the header fields of a view, and set them again after each settlement."""

    def show(request: HttpRequest) -> None:
        view.headers.update(answers.headers(decision_about(request)))

    if decision.request is not None:
        decision.request.notes[FIELDS_AGAIN] = show
    view.headers.update(answers.headers(decision))


def _rate(throttle: str, scope: str | None) -> Limits | None:
    if scope is None:
        raise ImproperlyConfigured(f"{throttle} needs limits, or a scope")
    rates: Any = api_settings.DEFAULT_THROTTLE_RATES
    if scope not in rates:
        raise ImproperlyConfigured(f"DEFAULT_THROTTLE_RATES has no rate for the scope {scope!r} of {throttle}")
    rate: Limits | None = rates[scope]
    return rate


@lru_cache(maxsize=1024)
def _made(  # noqa: PLR0917  # as a class has them
    limits: RuleLimits,
    name: str | None,
    key: RequestKey,
    cost: Cost,
    deduct_when: DeductWhen | None,
    exempt: Predicate | None,
    version: int | None,
    enabled: bool,
) -> Rule:
    return Rule(
        limits,
        name=name,
        key=key,
        cost=cost,
        deduct_when=deduct_when,
        exempt=exempt,
        version=version,
        enabled=enabled,
    )


def _is_known(request: HttpRequest) -> bool:
    return request.find_user() is not None


class AnonRateLimit(RateLimitThrottle):
    """Limits anonymous clients, by address."""

    scope = "anon"
    key = staticmethod(client)
    exempt = staticmethod(_is_known)


class UserRateLimit(RateLimitThrottle):
    """Limits all clients: users by user, anonymous ones by address."""

    scope = "user"


class ScopedRateLimit(RateLimitThrottle):
    """Limits views that have a ``throttle_scope``, by the rate and under the name of that scope."""

    def allow_request(self, request: Request, view: Any) -> bool:
        """See :meth:`RateLimitThrottle.allow_request`."""
        self.scope = getattr(view, "throttle_scope", None)
        return not self.scope or super().allow_request(request, view)


def exception_handler(exc: Exception, context: dict[str, Any]) -> HttpResponseBase | None:
    """Answer requests that a limit refuses with a problem of RFC 9457, and others as REST framework does.

    It is for ``EXCEPTION_HANDLER`` in ``REST_FRAMEWORK``.
    """
    response: HttpResponseBase | None = default_exception_handler(exc, context)
    if isinstance(exc, APIException) and hasattr(exc, "wait"):
        decision = decision_about(http_request(native_of(context["request"]), asynchronous=False))
        if not decision:
            return refusal(current().answers.refusal(decision))
    return response
