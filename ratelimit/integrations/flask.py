"""An extension for Flask.

::

    limiter = RateLimiter("1000/hour", app=app)


    @app.get("/search")
    @limiter.limit("10/minute", name="search")
    def search(): ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from inspect import isclass, iscoroutinefunction
from typing import Any, Final, TypeVar, Unpack, cast

from ratelimit.errors import InvalidArgumentError
from ratelimit.integrations.extras import needing
from ratelimit.integrations.http.answers import HttpAnswer
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.integrations.http.keys import RequestKey
from ratelimit.integrations.http.limiter import Limiter, LimiterSettings
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.response import HttpResponse
from ratelimit.integrations.http.rules import Rule, RuleLimits, RuleSettings, checked_rules
from ratelimit.integrations.marks import marked
from ratelimit.integrations.wsgi import ask_router, decision_of
from ratelimit.integrations.wsgi import http_request as wsgi_request
from ratelimit.keys import brief
from ratelimit.manager import ProxyManager
from ratelimit.policy.managers import manager_of
from ratelimit.policy.rule import Names

with needing("flask"):
    from flask import Blueprint, Flask, Request, Response, current_app, request
    from werkzeug.exceptions import HTTPException, default_exceptions

T = TypeVar("T")

_EXTENSION: Final = "ratelimit"
_EXEMPT_OF: Final = "_ratelimit_exempt_of"


class RequestRefused(HTTPException):
    """Raised for a request that is refused.

    It answers with the status, header fields and body that :class:`ratelimit.integrations.http.Answers` makes.

    It is an instance also of Werkzeug's own exception for the status: ``@app.errorhandler(429)``, ``(503)`` and
    ``(400)`` are called with it, as is ``@app.errorhandler(RequestRefused)``.

    :ivar decision: why it is refused.
    """

    def __init__(self, decision: HttpDecision, answer: HttpAnswer) -> None:
        super().__init__(response=Response(answer.body, answer.status, answer.headers))
        self.decision = decision


@cache
def _refused_with(status: int) -> type[RequestRefused]:
    # Flask finds error handlers by the class, and by the status that the class has.
    bases = (RequestRefused, default_exceptions.get(status, HTTPException))
    return cast("type[RequestRefused]", type(RequestRefused.__name__, bases, {"code": status}))


@dataclass(slots=True, eq=False)
class _Installed:
    """What the extension keeps for one application."""

    extension: RateLimiter
    manager: ProxyManager | str | None
    limiters: dict[tuple[Rule, ...], Limiter] = field(default_factory=dict)


class RateLimiter:
    """Limits the requests to Flask applications: all of them by the rules given here, others by :meth:`limit`.

    A request has to satisfy all rules that are about it, those of the application first, then those of its blueprints,
    then those of its view. The rules given here are one decision, and each :meth:`limit` is another; if a later one
    refuses, what the request has paid is given back.

    The rules of the application count for all requests, including those that end with 404, except for views that are
    :meth:`exempt` and for the static files that Flask serves.

    :param rules: see :class:`ratelimit.integrations.http.Rule`; limits alone are for all requests, by the address of
        the peer.
    :param app: an application, as with :meth:`init_app`.
    :param manager: the manager that has the buckets, or its URL. None: the URL ``RATELIMIT_URL`` in the application's
        configuration, else that of the environment variable of this name, or localhost.
    :param key: whose bucket a request draws on, for all rules that do not say otherwise; ``client_ip()`` by default.
    :param settings: see :class:`ratelimit.integrations.http.LimiterSettings`.
    :raises InvalidConfigurationError: for limits that are not valid, and for two rules of one name that differ.
    :raises InvalidArgumentError: for a manager of asyncio.
    """

    def __init__(
        self,
        *rules: Rule | RuleLimits,
        app: Flask | None = None,
        manager: ProxyManager | str | None = None,
        key: RequestKey | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        self._key = key
        self._rules = checked_rules([Rule.of(rule).by(key) for rule in rules])
        self._names = Names()
        for rule in self._rules:
            self._names.add(rule)
        self._manager = _checked_manager(manager)
        # Make a limiter here too, so that a mistake is an error now, and not at the first request.
        self._answers = Limiter(manager="memory://", **settings).answers
        self._settings = settings
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, *, manager: ProxyManager | str | None = None) -> None:
        """Limit the requests to an application. Call this before you register other ``before_request`` functions.

        The application's configuration may contain ``RATELIMIT_URL``, see :class:`RateLimiter`, and
        ``RATELIMIT_ENABLED``: everything is admitted while that is False, in tests for example.

        :param manager: the manager that has the buckets of this application, in place of the extension's.
        :raises RuntimeError: for an application that has a ``RateLimiter`` already.
        """
        if _EXTENSION in app.extensions:
            raise RuntimeError("this application has a RateLimiter already: use that one")
        app.config.setdefault("RATELIMIT_ENABLED", True)
        app.config.setdefault("RATELIMIT_URL", None)
        app.extensions[_EXTENSION] = _Installed(self, self._manager if manager is None else _checked_manager(manager))
        app.before_request(lambda: self._admit_to_view(self._rules, ""))
        app.after_request(self._add_fields)

    def limit(self, limits: Rule | RuleLimits, **settings: Unpack[RuleSettings]) -> Callable[[T], T]:
        """Decorate a view, or call it with a blueprint: ``limiter.limit("100/hour")(blueprint)``.

        On a view the decorator must stand below ``route``, which would otherwise register the view without it. For a
        class of views, list it in the ``decorators`` of the class. A blueprint is limited together with those that are
        nested in it, except for their static files; limit it before it is registered.

        Without a name, a limit counts for the view, or for the blueprint. Limits of one ``name=`` share their buckets.

        :param limits: a :class:`ratelimit.integrations.http.Rule`, or its limits with its other settings.
        :raises InvalidConfigurationError: for settings that are not valid, and where a rule of the same name has
            other limits.
        :raises InvalidArgumentError: for settings beside a rule, and for what is not a view.
        """
        rule = Rule.of(limits, **settings).by(self._key)
        rules = (rule,)
        if rule.named:
            self._names.add(rule)

        def decorate(view: T) -> T:
            if isinstance(view, Blueprint):
                view.before_request(lambda: self._admit_to_view(rules, f"blueprint {view.name}"))
                return view
            function = _checked_view(view)
            if iscoroutinefunction(function):

                @wraps(function)
                async def acall(*args: Any, **kwargs: Any) -> Any:
                    self._admit(rules, request.endpoint or "")
                    return await function(*args, **kwargs)

                return cast("T", acall)

            @wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                self._admit(rules, request.endpoint or "")
                return function(*args, **kwargs)

            return cast("T", call)

        return decorate

    def exempt(self, view: T) -> T:
        """Exempt a view, or all views of a blueprint, from the rules of the application and of blueprints.

        Limits of its own still count: with both ``exempt`` and ``limit``, a view has only the limits of its own.

        :raises InvalidArgumentError: for what is neither a view nor a blueprint.
        """
        exempt: Any = view if isinstance(view, Blueprint) else _checked_view(view)
        # Kept on the view itself: functools.wraps copies it from there to the functions that other decorators make.
        return marked(exempt, _EXEMPT_OF, {*getattr(exempt, _EXEMPT_OF, ()), self})  # type: ignore[no-any-return]

    @property
    def decision(self) -> HttpDecision:
        """What has been decided about the current request so far."""
        return decision_of(request.environ)

    def _admit_to_view(self, rules: tuple[Rule, ...], place: str) -> None:
        if not self._is_exempt():
            self._admit(rules, place)

    def _admit(self, rules: tuple[Rule, ...], place: str) -> None:
        limiter = self._limiter(rules)
        if not rules or not current_app.config["RATELIMIT_ENABLED"]:
            return
        decision = limiter.decide(http_request(request), place)
        if not decision:
            answer = limiter.answers.refusal(decision)
            raise _refused_with(answer.status)(decision, answer)

    def _is_exempt(self) -> bool:
        """Return whether the view is exempt, or a blueprint that it is in, or it is Flask's own for static files."""
        endpoint = request.endpoint
        if endpoint is None:
            return False
        blueprints = [current_app.blueprints.get(name) for name in request.blueprints]
        owner = blueprints[0] if blueprints else current_app
        if owner is not None and owner.has_static_folder and endpoint.rpartition(".")[2] == "static":
            return True
        views = (current_app.view_functions.get(endpoint), *blueprints)
        return any(self in getattr(view, _EXEMPT_OF, ()) for view in views)

    def _limiter(self, rules: tuple[Rule, ...]) -> Limiter:
        """Return the limiter of the current application for these rules."""
        installed = current_app.extensions.get(_EXTENSION)
        if not isinstance(installed, _Installed) or installed.extension is not self:
            raise RuntimeError("this RateLimiter does not know the application: call init_app(app)")
        if rules not in installed.limiters:
            manager = installed.manager or current_app.config["RATELIMIT_URL"]
            installed.limiters[rules] = Limiter(*rules, manager=manager, **self._settings)
        return installed.limiters[rules]

    def _add_fields(self, response: Response) -> Response:
        if self.decision.waits_for_response:
            seen = HttpResponse(response.status_code, response.headers.get, response)
            self._limiter(self._rules).deduct(http_request(request), lambda: seen)
        for name, value in self._answers.headers(self.decision):
            response.headers.setdefault(name, value)
        return response


def http_request(request: Request) -> HttpRequest:
    """Return a request as rules see it; what is kept with it is kept in its WSGI environment."""
    seen = wsgi_request(request.environ)
    seen.native = request
    ask_router(seen, current_app.url_map, lambda: None if request.url_rule is None else request.url_rule.rule)
    return seen


def _checked_manager(manager: ProxyManager | str | None) -> ProxyManager | str | None:
    return manager if manager is None or isinstance(manager, str) else manager_of(manager)


def _checked_view(view: object) -> Callable[..., Any]:
    if isclass(view):
        raise InvalidArgumentError(f"for a class of views, list this in its decorators; got {brief(view)}")
    if not callable(view):
        raise InvalidArgumentError(f"what is exempt must be a view or a blueprint; got {brief(view)}")
    return view
