"""Limits as dependencies of FastAPI, on routes, routers and applications.

::

    app = FastAPI()
    add_rate_limits(app)

    @app.get("/search", dependencies=[Depends(RateLimit("10/minute"))])
    async def search() -> list[str]: ...
"""

# No "from __future__ import annotations": FastAPI reads those of RateLimit.__call__, and as texts it could not resolve
# them, because it looks in the globals of a function, which an object that is called does not have.

from collections.abc import Iterator
from typing import Any, Final, Unpack

from ratelimit.integrations.asgi import (
    TELLING,
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
from ratelimit.integrations.http.rules import Rule, RuleLimits, RuleSettings, checked_rules
from ratelimit.manager import AsyncProxyManager
from ratelimit.on_error import ErrorPolicy

with needing("fastapi"):
    from fastapi import FastAPI, HTTPException, Response, routing
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

    The header fields are on refusals, and on answers made from what an endpoint returns. To have them on all others,
    see :func:`add_rate_limits`.

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
        self.answers = Answers() if answers is None else answers
        self._limiter = AsyncLimiter(self.rule, manager=manager, answers=self.answers, on_error=on_error)

    def __repr__(self) -> str:
        return f"RateLimit({self.rule!r})"

    async def __call__(self, connection: HTTPConnection, response: Response) -> HttpDecision:
        """Take the tokens of a request."""
        decision = await self._limiter.decide(http_request(connection.scope, connection))
        if not decision:
            _answer_refusals(connection.scope)
            raise RequestRefused(decision, self.answers.refusal(decision))
        if TELLING not in connection.scope:
            for name, value in self.answers.headers(decision):
                response.headers[name] = value
        return decision


def add_rate_limits(
    app: FastAPI,
    *rules: Rule | RuleLimits,
    manager: AsyncProxyManager | str | None = None,
    answers: Answers | None = None,
    on_error: ErrorPolicy | None = None,
) -> None:
    """Let an application tell of its limits: in the header fields of all its answers, and in its OpenAPI document.

    The first is done by a :class:`ratelimit.integrations.asgi.RateLimitMiddleware`, which has these rules and settings.
    The document gets a 429 for each operation that depends on a :class:`RateLimit` or is one of the rules', except
    where it has one already; an ``app.openapi`` of your own is to be set before.

    :raises InvalidConfigurationError: where two rules of one name differ in their limits.
    :raises RuntimeError: for an application that has begun to serve.
    """
    checked = checked_rules(rules)
    app.add_middleware(RateLimitMiddleware, *checked, manager=manager, answers=answers, on_error=on_error)
    own, generate = Answers() if answers is None else answers, app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        _document(app, [(rule, own) for rule in checked], document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend the document


async def _answered(_: HTTPConnection, error: RequestRefused) -> App:
    async def answer(scope: Scope, _: Receive, send: Send) -> None:
        await refuse(scope, send, error.answer)

    return answer


def _answer_refusals(scope: Scope) -> None:
    """Let the application answer refusals as we do, where it has no handler of its own.

    Dependencies run below the place that has looked the handlers up, so that what they are for this request alone can
    no longer be said. They are those of the application's running middleware, and only our own exception's is added.
    """
    handlers: dict[Any, Any] = scope.get("starlette.exception_handlers", ({}, {}))[0]
    if handlers.get(StarletteHTTPException) is http_exception_handler and HTTPException not in handlers:
        handlers.setdefault(RequestRefused, _answered)


_PROBLEM: Final = "RateLimitProblem"
_FIELDS: Final = {
    "Retry-After": ("Seconds to wait before the next request.", "integer"),
    "RateLimit-Policy": ("The limits, as a list of structured fields: their names, quotas and windows.", "string"),
    "RateLimit": ("What is left of them, as a list of structured fields.", "string"),
    "X-RateLimit-Limit": ("The quota that is closest to its end.", "integer"),
    "X-RateLimit-Remaining": ("What is left of it.", "integer"),
    "X-RateLimit-Reset": ("When it is whole again.", "integer"),
}


def _document(app: FastAPI, rules: list[tuple[Rule, Answers]], document: dict[str, Any]) -> None:
    """Add a 429 to the operations that are limited; done twice, it is the same."""
    for route in _routes(app):
        limits = [*rules, *((limit.rule, limit.answers) for limit in _limits_of(route.dependant))]
        for method in route.methods:
            operation = document.get("paths", {}).get(route.path_format, {}).get(method.lower())
            request = HttpRequest(method, route.path_format, None, header=lambda _: None)
            answers = next((answers for rule, answers in limits if rule.is_about(request)), None)
            if operation is not None and answers is not None:
                operation["responses"].setdefault("429", _documented(answers))
                schemas = document.setdefault("components", {}).setdefault("schemas", {})
                schemas.setdefault(_PROBLEM, _problem_schema())


def _routes(app: FastAPI) -> Iterator[Any]:
    """The routes for HTTP, each with all that it depends on, also where a router was included."""
    each = getattr(routing, "iter_route_contexts", iter)  # routes of older versions have that themselves
    for route in each(app.routes):
        if isinstance(getattr(route, "original_route", route), routing.APIRoute):
            yield route


def _limits_of(dependant: Any) -> Iterator[RateLimit]:
    for inner in dependant.dependencies:
        if isinstance(inner.call, RateLimit):
            yield inner.call
        yield from _limits_of(inner)


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
