"""Limits as dependencies of FastAPI, on routes, routers and applications.

::

    configure(app, manager="redis://localhost:6379/0")


    @app.get("/search", dependencies=[Depends(RateLimit("10/minute"))])
    async def search() -> list[str]: ...

By itself, a dependency limits requests and adds the header fields to the answers that FastAPI makes from what an
endpoint returns. It reaches neither responses that an endpoint makes itself nor the OpenAPI document. :func:`configure`
reaches both: it adds a middleware.
"""

# No "from __future__ import annotations": FastAPI reads the annotations of RateLimit.__call__. As text it could not
# resolve them, because it looks names up in the globals of a function, and an object that is called has none.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Unpack

from ratelimit.engine.on_error import ErrorPolicy
from ratelimit.errors import InvalidArgumentError
from ratelimit.integrations.asgi import (
    TELLS,
    App,
    RateLimitMiddleware,
    Receive,
    Scope,
    Send,
    exempt,
    http_request,
    is_exempt,
    refuse,
    template_of,
)
from ratelimit.integrations.extras import needing
from ratelimit.integrations.http.answers import Answers, HttpAnswer
from ratelimit.integrations.http.decision import FIELDS_AGAIN, HttpDecision
from ratelimit.integrations.http.keys import RequestKey
from ratelimit.integrations.http.limiter import AsyncLimiter, LimiterSettings, fields_for
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule, RuleLimits, RuleSettings
from ratelimit.manager import AsyncProxyManager
from ratelimit.policy.rule import Names

with needing("fastapi"):
    from fastapi import FastAPI, HTTPException, Response, routing
    from fastapi.exception_handlers import http_exception_handler
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.requests import HTTPConnection

__all__ = ["RateLimit", "RequestRefused", "configure", "exempt"]

_CONFIGURATION: Final = "ratelimit.configuration"  # of an application, in the scope of its requests
_HANDLERS: Final = "starlette.exception_handlers"  # by class and by status, in the scope of a request


class RequestRefused(HTTPException):
    """A request is refused: by a limit (429), because it has no key (400), or because the store fails (503).

    The answer is a problem of RFC 9457, unless the application has a handler of its own for the status, for
    ``HTTPException`` or for this class. For such a handler the exception has the status and the header fields.

    :ivar decision: says by which rule.
    :ivar answer: what is sent where there is no such handler.
    """

    def __init__(self, decision: HttpDecision, answer: HttpAnswer) -> None:
        about_body = ("content-type", "content-length")
        headers = {name: value for name, value in answer.headers if name.lower() not in about_body}
        super().__init__(answer.status, headers=headers)
        self.decision = decision
        self.answer = answer


@dataclass(frozen=True, eq=False)
class _Configuration:
    """What the limits of an application have in common."""

    manager: AsyncProxyManager | str | None = None
    key: RequestKey | None = None
    settings: LimiterSettings = field(default_factory=LimiterSettings)


_DEFAULT: Final = _Configuration()


class RateLimit:
    """A limit to depend on: ``Depends(RateLimit("10/minute"))``, for HTTP and WebSockets.

    It returns the :class:`ratelimit.integrations.http.HttpDecision` about the request, or raises
    :class:`RequestRefused`. Without a name it counts for each route that depends on it; with ``name=``, for all of them
    together. A request pays for a bucket once, however often it meets it.

    Limits that are made alike are equal, so that ``app.dependency_overrides`` finds one by another.

    :param limits: a ``Rule``, or limits of which one is made with the settings of the rule: ``key=``, ``name=``,
        ``cost=`` and so on, see :class:`ratelimit.integrations.http.Rule`.
    :param manager: the manager that has the buckets, or its URL. None: the one that :func:`configure` has given the
        application, else that of the variable ``RATELIMIT_URL``, or Redis on this machine.
    :param answers: makes what clients are sent. None: as :func:`configure` says.
    :param on_error: what is decided where the store fails. None: as :func:`configure` says.
    :raises InvalidConfigurationError: for limits and settings that are not valid.
    :raises InvalidArgumentError: for settings beside a ``Rule``, and for a manager of sync code.
    """

    def __init__(
        self,
        limits: Rule | RuleLimits,
        *,
        manager: AsyncProxyManager | str | None = None,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
        **settings: Unpack[RuleSettings],
    ) -> None:
        self.rule = Rule.of(limits, **settings)
        self._manager = manager
        self._settings: LimiterSettings = {}
        if answers is not None:
            self._settings["answers"] = answers
        if on_error is not None:
            self._settings["on_error"] = on_error
        # One limiter for each configuration, since tests make several applications. This one is for those without.
        self._limiters = {_DEFAULT: self._limiter(_DEFAULT)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RateLimit) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self.rule)

    def _parts(self) -> tuple[object, ...]:
        return self.rule, self._manager, self._settings

    def __repr__(self) -> str:
        return f"RateLimit({self.rule!r})"

    async def __call__(self, connection: HTTPConnection, response: Response) -> HttpDecision:
        """Take the tokens of a request."""
        scope = connection.scope
        limiter = self._limiter_for(scope.get(_CONFIGURATION) or _DEFAULT)
        if is_exempt(scope):
            return HttpDecision()
        request = http_request(scope, connection)
        decision = await limiter.decide(request, _place(scope))
        if not decision:
            _handle_refusals(scope)
            raise RequestRefused(decision, limiter.answers.refusal(decision))
        if TELLS not in scope:
            self._show_fields(request, response, limiter.answers)
        return decision

    def _show_fields(self, request: HttpRequest, response: Response, answers: Answers) -> None:
        """Set the header fields where no middleware does, and set them again after each settlement."""
        if self.rule.deduct_when is not None:
            raise InvalidArgumentError("a rule with deduct_when needs the middleware: call configure(app)")

        # The function does not refer to the request, which refers to it: a circle would be collected late.
        def show(request: HttpRequest) -> None:
            response.headers.update(dict(fields_for(request, answers)))

        request.notes[FIELDS_AGAIN] = show
        show(request)

    def answers_for(self, app: FastAPI) -> Answers:
        """Return the answers that clients of an application get from this limit."""
        return self._limiter_for(configuration_of(app) or _DEFAULT).answers

    def _limiter_for(self, configuration: "_Configuration") -> AsyncLimiter:
        limiter = self._limiters.get(configuration)
        if limiter is None:
            limiter = self._limiters[configuration] = self._limiter(configuration)
        return limiter

    def _limiter(self, configuration: "_Configuration") -> AsyncLimiter:
        manager = configuration.manager if self._manager is None else self._manager
        settings: LimiterSettings = {**configuration.settings, **self._settings}
        return AsyncLimiter(self.rule.by(configuration.key), manager=manager, **settings)


def configure(
    app: FastAPI,
    *rules: Rule | RuleLimits,
    manager: AsyncProxyManager | str | None = None,
    key: RequestKey | None = None,
    **settings: Unpack[LimiterSettings],
) -> None:
    """Configure the limits of an application in one place. Call this once, before the first request.

    From then on all answers to limited requests have the header fields, including responses that an endpoint makes
    itself, answers to errors, and the accepts of WebSockets; and the limited operations have a 429 in the OpenAPI
    document. To this end the function adds a middleware by ``app.add_middleware``, and wraps ``app.openapi``.

    :param rules: limit all requests to the application; see
        :class:`ratelimit.integrations.asgi.RateLimitMiddleware`.
    :param manager: the manager that has the buckets of all limits that do not say otherwise, or its URL. None: that of
        the variable ``RATELIMIT_URL``, or Redis on this machine.
    :param key: whose bucket a request draws on, for all rules that do not say otherwise; ``client_ip()`` by default.
    :param settings: see :class:`ratelimit.integrations.http.LimiterSettings`.
    :raises InvalidConfigurationError: for arguments that are not valid, and where rules of one name differ in limits.
    :raises InvalidArgumentError: for an application that is configured already, and for a manager of sync code.
    """
    if configuration_of(app) is not None:
        raise InvalidArgumentError("an application must be configured once; this one is configured already")
    configuration = _Configuration(manager, key, settings)
    keyed = [Rule.of(rule).by(key) for rule in rules]
    # Make a limiter here too, so that a mistake is an error now, and not when the application starts.
    AsyncLimiter(*keyed, manager=manager, **settings)
    app.add_middleware(_ConfiguredMiddleware, *keyed, application=app, configuration=configuration)
    app.add_exception_handler(RequestRefused, _answered)  # type: ignore[arg-type]  # what a handler returns is awaited
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _document(app, document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation says to extend it


def configuration_of(app: FastAPI) -> "_Configuration | None":
    """Return what an application was configured with; None where it was not."""
    added: list[Any] = app.user_middleware
    for middleware in added:
        if middleware.cls is _ConfiguredMiddleware:
            configuration: _Configuration = middleware.kwargs["configuration"]
            return configuration
    return None


class _ConfiguredMiddleware(RateLimitMiddleware):
    """Limits all requests, and puts the configuration of the application into the scope of each."""

    def __init__(self, app: App, *rules: Rule, application: FastAPI, configuration: _Configuration) -> None:
        super().__init__(app, *rules, manager=configuration.manager, **configuration.settings)
        self._configuration = configuration
        _check_names(application, rules)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_CONFIGURATION] = self._configuration
        await super().__call__(scope, receive, send)


def _place(scope: Scope) -> str:
    """Return the route that a limit without a name counts for: ``GET /users/{id}``."""
    methods = getattr(scope.get("route"), "methods", None) or ("WEBSOCKET",)
    return f"{','.join(sorted(methods))} {template_of(scope) or ''}"


def _handle_refusals(scope: Scope) -> None:
    """Answer a refusal with its problem, unless the application has a handler of its own.

    An application that is not configured has no handler for refusals. The handlers of a request are in its scope.
    """
    handlers: tuple[dict[Any, Any], dict[Any, Any]] = scope.get(_HANDLERS) or ({}, {})
    by_class = handlers[0]
    if by_class.get(StarletteHTTPException) is http_exception_handler and HTTPException not in by_class:
        by_class.setdefault(RequestRefused, _answered)


def _check_names(app: FastAPI, rules: Sequence[Rule]) -> None:
    """Refuse rules of one name that differ, among those of the application and of its routes."""
    names = Names()
    for rule in rules:
        names.add(rule)
    for route in _routes(app):
        for limit in _limits_of(route.dependant):
            names.add(limit.rule, route.path_format)


async def _answered(_: HTTPConnection, error: RequestRefused) -> App:
    async def answer(scope: Scope, _: Receive, send: Send) -> None:
        await refuse(scope, send, error.answer)

    return answer


_PROBLEM: Final = "RateLimitProblem"
_FIELDS: Final = {
    "Retry-After": ("Seconds to wait before the next request.", "integer"),
    "RateLimit-Policy": ("The limits, as a list of structured fields: their names, quotas and windows.", "string"),
    "RateLimit": ("What is left of them, as a list of structured fields.", "string"),
    "X-RateLimit-Limit": ("The quota that is closest to its end.", "integer"),
    "X-RateLimit-Remaining": ("What is left of it.", "integer"),
    "X-RateLimit-Reset": ("When it is whole again.", "integer"),
}


def _document(app: FastAPI, document: dict[str, Any]) -> None:
    """Add a 429 to the operations that are limited. Doing it twice changes nothing."""
    outer = list(_limits_of_middleware(app))
    for route in _routes(app):
        limits = [*outer, *((limit.rule, limit.answers_for(app)) for limit in _limits_of(route.dependant))]
        for method in getattr(route, "methods", None) or ():  # WebSockets have none
            operation = document.get("paths", {}).get(route.path_format, {}).get(method.lower())
            request = HttpRequest(method, route.path_format, None, header=lambda _: None)
            answers = next((answers for rule, answers in limits if rule.is_about(request)), None)
            if operation is not None and answers is not None:
                operation["responses"].setdefault("429", _documented(answers))
                schemas = document.setdefault("components", {}).setdefault("schemas", {})
                schemas.setdefault(_PROBLEM, _problem_schema())


def _limits_of_middleware(app: FastAPI) -> Iterator[tuple[Rule, Answers]]:
    added: list[Any] = app.user_middleware
    for middleware in added:
        if issubclass(middleware.cls, RateLimitMiddleware):
            configuration = middleware.kwargs.get("configuration", _DEFAULT)
            answers = middleware.kwargs.get("answers") or configuration.settings.get("answers") or Answers()
            for rule in middleware.args:
                yield Rule.of(rule), answers


def _routes(app: FastAPI) -> Iterator[Any]:
    """Yield the routes, each with all that it depends on, also where a router was included."""
    # Before FastAPI 0.130 or so, the routes themselves had what they depend on.
    each = getattr(routing, "iter_route_contexts", iter)
    for route in each(app.routes):
        if isinstance(getattr(route, "original_route", route), routing.APIRoute | routing.APIWebSocketRoute):
            yield route


def _limits_of(dependant: Any) -> list[RateLimit]:
    limits: list[RateLimit] = []
    for inner in dependant.dependencies:
        if isinstance(inner.call, RateLimit):
            limits.append(inner.call)
        limits += _limits_of(inner)
    return limits


def _documented(answers: Answers) -> dict[str, Any]:
    names = ["Retry-After"]
    names += ["RateLimit-Policy", "RateLimit"] if answers.standard else []
    names += ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"] if answers.x_ratelimit else []
    fields = {name: _FIELDS[name] for name in names}
    return {
        "description": "Too Many Requests",
        "headers": {name: {"description": text, "schema": {"type": kind}} for name, (text, kind) in fields.items()},
        "content": {answers.content_type: {"schema": {"$ref": f"#/components/schemas/{_PROBLEM}"}}},
    }


def _problem_schema() -> dict[str, Any]:
    return {
        "title": _PROBLEM,
        "description": "A problem of RFC 9457.",
        "type": "object",
        "required": ["type", "title", "status"],
        "properties": {
            "type": {"title": "Type", "type": "string", "format": "uri-reference"},
            "title": {"title": "Title", "type": "string"},
            "status": {"title": "Status", "type": "integer"},
            "violated-policies": {"title": "Violated Policies", "type": "array", "items": {"type": "string"}},
        },
    }
