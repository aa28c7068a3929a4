"""Limits as dependencies of FastAPI, on routes, routers and applications.

::

    @app.get("/search", dependencies=[Depends(RateLimit("10/minute"))])
    async def search() -> list[str]: ...

A dependency reaches neither the answers that an endpoint has made itself, or that an error becomes, nor the OpenAPI
document. Therefore this module extends two methods of ``FastAPI``, for all applications with routes that depend on a
:class:`RateLimit`: ``build_middleware_stack``, so that all their answers have the header fields, and ``openapi``, so
that the document tells of the 429.
"""

# No "from __future__ import annotations": FastAPI reads those of RateLimit.__call__, and as texts it could not resolve
# them, because it looks in the globals of a function, which an object that is called does not have.

from collections.abc import Iterator
from functools import wraps
from typing import Any, Final, Unpack

from ratelimit.integrations.asgi import (
    App,
    RateLimitMiddleware,
    Receive,
    Scope,
    Send,
    http_request,
    refuse,
)
from ratelimit.integrations.extras import needing
from ratelimit.integrations.http.answers import Answers, HttpAnswer
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.integrations.http.limiter import AsyncLimiter
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule, RuleLimits, RuleSettings
from ratelimit.manager import AsyncProxyManager
from ratelimit.on_error import ErrorPolicy

with needing("fastapi"):
    from fastapi import FastAPI, HTTPException, routing
    from fastapi.exception_handlers import http_exception_handler
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.requests import HTTPConnection


class RequestRefused(HTTPException):
    """A request is refused: by a limit (429), for want of its key (400), or because the store fails (503).

    It is answered with a problem of RFC 9457; or by the application's own handler for the status, for ``HTTPException``
    or for this class, for which it has the status and the header fields.

    :ivar decision: says by which rule.
    :ivar answer: what is sent where there is no such handler.
    """

    def __init__(self, decision: HttpDecision, answer: HttpAnswer) -> None:
        about_body = ("content-type", "content-length")
        headers = {name: value for name, value in answer.headers if name.lower() not in about_body}
        super().__init__(answer.status, headers=headers)
        self.decision = decision
        self.answer = answer


class RateLimit:
    """A limit to depend on: ``Depends(RateLimit("10/minute"))``, for HTTP and WebSockets.

    It answers with the :class:`ratelimit.integrations.http.HttpDecision` about the request, or raises
    :class:`RequestRefused`. Where a request meets one of these twice, or two of the same name and key, it pays
    once.

    All answers to such a request have the header fields, once, and its operation a 429 in the OpenAPI document.

    :param limits: a ``Rule``, or limits of which one is made with the settings of the rule: ``key=``, ``name=``,
        ``cost=`` and so on, see :class:`ratelimit.integrations.http.Rule`.
    :param manager: see :class:`ratelimit.integrations.http.AsyncLimiter`, as for the others.
    :raises InvalidConfigurationError: for what cannot be.
    :raises InvalidArgumentError: for settings beside a ``Rule``.
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
        self._limiter = AsyncLimiter(self.rule, manager=manager, answers=answers, on_error=on_error)
        self.answers = self._limiter.answers

    def __repr__(self) -> str:
        return f"RateLimit({self.rule!r})"

    async def __call__(self, connection: HTTPConnection) -> HttpDecision:
        """Take the tokens of a request."""
        decision = await self._limiter.decide(http_request(connection.scope, connection))
        if not decision:
            raise RequestRefused(decision, self.answers.refusal(decision))
        return decision


def _extend(application: type[FastAPI]) -> None:
    """See the module."""
    build, generate = application.build_middleware_stack, application.openapi

    @wraps(build)
    def build_middleware_stack(self: FastAPI) -> Any:
        if not any(_limits_of(route.dependant) for route in _routes(self)):
            return build(self)
        handlers = self.exception_handlers
        if handlers.get(StarletteHTTPException) is http_exception_handler and HTTPException not in handlers:
            handlers.setdefault(RequestRefused, _answered)  # type: ignore[arg-type]  # what a handler gives is awaited
        return RateLimitMiddleware(build(self))

    @wraps(generate)
    def openapi(self: FastAPI) -> dict[str, Any]:
        document = generate(self)
        _document(self, document)
        return document

    application.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]
    application.openapi = openapi  # type: ignore[method-assign]


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
    """Add a 429 to the operations that are limited; done twice, it is the same."""
    outer = list(_limits_of_middleware(app))
    for route in _routes(app):
        limits = [*outer, *((limit.rule, limit.answers) for limit in _limits_of(route.dependant))]
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
        if middleware.cls is RateLimitMiddleware:
            for rule in middleware.args:
                yield Rule.of(rule), middleware.kwargs.get("answers") or Answers()


def _routes(app: FastAPI) -> Iterator[Any]:
    """The routes, each with all that it depends on, also where a router was included."""
    each = getattr(routing, "iter_route_contexts", iter)  # before FastAPI 0.130 or so, routes had that themselves
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


_extend(FastAPI)
