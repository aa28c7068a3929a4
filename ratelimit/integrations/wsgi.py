"""A middleware for any WSGI application (PEP 3333).

::

    application = RateLimitMiddleware(application, "100/minute")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http.client import responses
from typing import Any, Final, Unpack
from weakref import WeakKeyDictionary
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from ratelimit.integrations.http.answers import Answers, Headers
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.integrations.http.limiter import Limiter, LimiterSettings, decision_about, decision_in
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.response import HttpResponse
from ratelimit.integrations.http.routes import canonical
from ratelimit.integrations.http.rules import Rule, RuleLimits
from ratelimit.manager import ProxyManager

NOTES: Final = "ratelimit.notes"
"""The name of a request's notes in its environment. Under a name without a dot they would have to be text."""


_INNER: Final = ("wsgi_app", "app", "_app")
_MOST_MIDDLEWARES: Final = 50


class RateLimitMiddleware:
    """Limits the requests to a WSGI application.

    A request that is refused is answered here: the application is not called, and the body not read. An answer of the
    application gets the header fields in addition, except those that it has set itself; its body passes untouched.

    :param app: the application. Where it is Flask's (``app.wsgi_app``), its router says which requests a rule with
        ``routes`` is about.
    :param rules: see :class:`ratelimit.integrations.http.Rule`; limits alone are for all requests, by the address of
        the peer.
    :param manager: the manager of the buckets, or its URL; None: that of the variable ``RATELIMIT_URL``, or localhost.
    :param settings: see :class:`ratelimit.integrations.http.LimiterSettings`.
    :raises InvalidConfigurationError: for limits that are not valid, and for two rules of one name that differ.
    :raises InvalidArgumentError: for a manager of asyncio.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *rules: Rule | RuleLimits,
        manager: ProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        self._app = app
        self._url_map = _url_map_within(app)
        self._limiter = Limiter(*rules, manager=manager, **settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._limiter!r})"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = http_request(environ)
        if self._url_map is not None:
            ask_router(request, self._url_map, lambda: _found(self._url_map, environ))
        answers = self._limiter.answers
        decision = self._limiter.decide(request)
        if not decision:
            status, fields, body = answers.refusal(decision)
            start_response(f"{status} {responses.get(status, 'Unknown')}", fields)
            return [] if request.method == "HEAD" else [body]

        def start(status: str, headers: Headers, *exc_info: Any) -> Callable[[bytes], object]:
            if decision_about(request).waits_for_response:
                self._limiter.deduct(request, lambda: http_response(status, headers))
            # The fields show all that has been decided by now: the application may have asked rules of its own.
            return start_response(status, _with_fields(headers, answers, decision_about(request)), *exc_info)

        return self._app(environ, start)


def http_request(environ: WSGIEnvironment) -> HttpRequest:
    """Return a request as rules see it.

    Its path is the part below the mount point of the application: ``PATH_INFO``, without ``SCRIPT_NAME``. Several
    slashes at its beginning count as one, as they do for Werkzeug's routes.
    """

    def header(name: str) -> str | None:
        variable = name.upper().replace("-", "_")
        if variable in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            return environ.get(variable) or None
        return environ.get(f"HTTP_{variable}")

    # Bytes travel as latin-1 in WSGI.
    path = environ.get("PATH_INFO", "").encode("latin-1", "replace").decode(errors="replace")
    return HttpRequest(
        method=environ["REQUEST_METHOD"].upper(),
        path="/" + path.lstrip("/"),
        peer=environ.get("REMOTE_ADDR") or None,
        header=header,
        native=environ,
        notes=environ.setdefault(NOTES, {}),
    )


def http_response(status: str, headers: Headers) -> HttpResponse:
    """Return a response as rules see it, from what an application has given to ``start_response``."""

    def header(name: str) -> str | None:
        values = [value for found, value in headers if found.lower() == name]
        return ", ".join(values) if values else None

    return HttpResponse(int(status.split(" ", 1)[0]), header)


def _url_map_within(app: Any) -> Any:
    """Return the map of routes of a Werkzeug application, from inside middlewares too; None if there is none.

    ``app.wsgi_app`` is a method of the application. A middleware keeps the application that it wraps as ``app``,
    ``_app`` or ``wsgi_app``.
    """
    for _ in range(_MOST_MIDDLEWARES):
        owner = getattr(app, "__self__", app)
        url_map = getattr(owner, "url_map", None)
        if url_map is not None:
            return url_map
        app = next((inner for name in _INNER if (inner := getattr(owner, name, None)) is not None), None)
        if app is None:
            return None
    return None


def ask_router(request: HttpRequest, url_map: Any, find_route: Callable[[], str | None]) -> None:
    """Give a request the routes of a Werkzeug application, and a way to find the one that it goes to."""
    request.find_route = find_route
    request.find_routes = lambda: _templates_of(url_map)


# For each map, how many routes it had and their templates. The number shows whether routes were added.
_known_templates: WeakKeyDictionary[Any, tuple[int, frozenset[str]]] = WeakKeyDictionary()


def _templates_of(url_map: Any) -> frozenset[str]:
    rules = list(url_map.iter_rules())
    count, templates = _known_templates.get(url_map, (-1, frozenset[str]()))
    if count != len(rules):
        templates = frozenset(canonical(rule.rule) for rule in rules)
        _known_templates[url_map] = len(rules), templates
    return templates


def _found(url_map: Any, environ: WSGIEnvironment) -> str | None:
    """Return the template of the route that Werkzeug finds for a request, whatever its method; None for none."""
    adapter = url_map.bind_to_environ(environ)
    for method in adapter.allowed_methods() or ():
        try:
            rule, _ = adapter.match(method=method, return_rule=True)
        except Exception:  # noqa: BLE001, S112  # Werkzeug raises for a redirection, and where nothing matches
            continue
        template: str = rule.rule
        return template
    return None


def decision_of(environ: WSGIEnvironment) -> HttpDecision:
    """Return what has been decided about a request so far; true, and without outcomes, where nothing has."""
    return decision_in(environ.get(NOTES, {}))


def _with_fields(headers: Headers, answers: Answers, decision: HttpDecision) -> Headers:
    own = {name.lower() for name, _ in headers}
    return headers + [(name, value) for name, value in answers.headers(decision) if name.lower() not in own]
