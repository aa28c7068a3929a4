"""A middleware for any WSGI application (PEP 3333).

::

    application = RateLimitMiddleware(application, "100/minute")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from http.client import responses
from typing import Any, Final
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from ratelimit.integrations.http.answers import Answers, Headers
from ratelimit.integrations.http.decision import HttpDecision
from ratelimit.integrations.http.limiter import Limiter, decision_about, decision_in
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule, RuleLimits
from ratelimit.manager import ProxyManager
from ratelimit.on_error import ErrorPolicy

NOTES: Final = "ratelimit.notes"
"""Where the notes of a request are kept in its environment. Without a dot, it would have to be text."""


class RateLimitMiddleware:
    """Limits the requests to a WSGI application.

    A request that is refused is answered here: the application is not called, and the body not read. An answer of the
    application gets the header fields in addition, except those that it has set itself; its body passes untouched.

    :param app: the application.
    :param rules: see :class:`Rule`; limits alone are for all requests, by the peer's address.
    :param manager: has the buckets; or its URL, or None for that of the variable ``RATELIMIT_URL``, or localhost.
    :param answers: what clients are told.
    :param on_error: what is decided where the store fails. None: as a manager of the caller's says, else
        :attr:`OnError.DENY`, which is answered with 503.
    :raises InvalidConfigurationError: for limits that cannot be, and two rules of one name with other limits.
    """

    def __init__(
        self,
        app: WSGIApplication,
        *rules: Rule | RuleLimits,
        manager: ProxyManager | str | None = None,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
    ) -> None:
        self._app = app
        self._limiter = Limiter(*rules, manager=manager, answers=answers, on_error=on_error)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = http_request(environ)
        answers = self._limiter.answers
        decision = self._limiter.decide(request)
        if not decision:
            status, fields, body = answers.refusal(decision)
            start_response(f"{status} {responses.get(status, 'Unknown')}", fields)
            return [] if request.method == "HEAD" else [body]

        def start(status: str, headers: Headers, *exc_info: Any) -> Callable[[bytes], object]:
            # Decided anew: the application may have rules of its own, and have asked them by now.
            return start_response(status, _with_fields(headers, answers, decision_about(request)), *exc_info)

        return self._app(environ, start)


def http_request(environ: WSGIEnvironment) -> HttpRequest:
    """A request as rules see it.

    Its path is that below the place where the application is mounted: ``PATH_INFO``, without ``SCRIPT_NAME``. Slashes
    that it begins with count as one, as they do for Werkzeug's routes.
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


def decision_of(environ: WSGIEnvironment) -> HttpDecision:
    """What has been decided about a request so far; true, and without outcomes, where nothing has."""
    return decision_in(environ.get(NOTES, {}))


def _with_fields(headers: Headers, answers: Answers, decision: HttpDecision) -> Headers:
    own = {name.lower() for name, _ in headers}
    return headers + [(name, value) for name, value in answers.headers(decision) if name.lower() not in own]
