"""A middleware for Starlette, or any other ASGI application on asyncio, and requests made of ASGI's scopes.

::

    app.add_middleware(RateLimitMiddleware, "100/minute", Rule("5/minute", routes=["/login"], name="login"))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, Final, TypeAlias

from ratelimit.integrations.http.answers import Answers, Headers, HttpAnswer
from ratelimit.integrations.http.limiter import AsyncLimiter, fields_for
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.rules import Rule, RuleLimits
from ratelimit.manager import AsyncProxyManager
from ratelimit.on_error import ErrorPolicy

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_STARTS: Final = ("http.response.start", "websocket.accept", "websocket.http.response.start")
_DENIAL: Final = "websocket.http.response"
_POLICY_VIOLATION: Final = 1008  # before a handshake is accepted servers make a 403 of any code


class RateLimitMiddleware:
    """Lets requests through to an application, or answers them itself; for HTTP and the handshakes of WebSockets.

    A refused request does not reach the application, and its body is not read. The handshake of a WebSocket is refused
    with the same answer where the server can send one (the extension ``websocket.http.response``), else with the 403
    that servers send for a close before the accept.

    Every other answer gets the header fields when it starts, from what has been decided by then, further in as well;
    without rules, that is all that is done. A field that the application has set itself stays as it is, so that several
    middlewares send each once. Bodies are not touched. The decision is ``ratelimit`` in ``scope["state"]``, which
    Starlette has as ``request.state.ratelimit``.

    :param app: what is limited.
    :param rules: see :class:`ratelimit.integrations.http.AsyncLimiter`, as for the others.

    The errors of a store pass through to the server where the policy is to raise them.
    """

    def __init__(
        self,
        app: App,
        *rules: Rule | RuleLimits,
        manager: AsyncProxyManager | str | None = None,
        answers: Answers | None = None,
        on_error: ErrorPolicy | None = None,
    ) -> None:
        self.app = app
        self._limiter = AsyncLimiter(*rules, manager=manager, answers=answers, on_error=on_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request = http_request(scope)
        decision = await self._limiter.decide(request)
        if not decision:
            await refuse(scope, send, self._limiter.answers.refusal(decision))
            return
        await self.app(scope, receive, self._telling(request, send))

    def _telling(self, request: HttpRequest, send: Send) -> Send:
        async def tell(message: Message) -> None:
            if message["type"] in _STARTS:
                fields = fields_for(request, self._limiter.answers)
                if fields:
                    message = {**message, "headers": _with_fields(message.get("headers") or (), fields)}
            await send(message)

        return tell


async def refuse(scope: Scope, send: Send, answer: HttpAnswer) -> None:
    """Send an answer in the place of the application's."""
    if scope["type"] == "websocket" and _DENIAL not in (scope.get("extensions") or ()):
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        return
    answering = "http.response" if scope["type"] == "http" else _DENIAL
    await send({"type": f"{answering}.start", "status": answer.status, "headers": _raw(answer.headers)})
    await send({"type": f"{answering}.body", "body": answer.body})


def http_request(scope: Scope, native: object = None) -> HttpRequest:
    """The request of a scope, of the type ``http`` or ``websocket``, whose ``state`` is made where there is none.

    Who has logged in is the ``user`` that Starlette's ``AuthenticationMiddleware`` has put there.

    :param native: what the framework calls a request; None: the scope.
    """
    client = scope.get("client")
    return HttpRequest(
        method=scope.get("method", "GET"),
        path=_path(scope),
        peer=(client[0] or None) if client else None,
        header=lambda name: _header(scope, name),
        native=scope if native is None else native,
        find_route=lambda: _route(scope),
        find_user=lambda: _user(scope),
        notes=scope.setdefault("state", {}),
    )


def _path(scope: Scope) -> str:
    """The path that the application's routes are matched with: below where it is mounted."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path.startswith(root) and path[len(root) :][:1] in ("", "/"):
        path = path[len(root) :]
    return path or "/"


def _header(scope: Scope, name: str) -> str | None:
    wanted = name.encode("latin-1")
    values: list[str] = [value.decode("latin-1") for found, value in scope.get("headers") or () if found == wanted]
    return ", ".join(values) if values else None


def _user(scope: Scope) -> object:
    user = scope.get("user")
    if not getattr(user, "is_authenticated", False):
        return None
    try:
        return user.identity  # type: ignore[union-attr]  # somebody, as it is authenticated
    except (AttributeError, NotImplementedError):  # which users of Starlette need not have
        return getattr(user, "username", user)


def _route(scope: Scope) -> str | None:
    """The template of the route as Starlette, or FastAPI, knows it.

    Routes know their own part of it only, below mounts. There, and before there is a route, it is looked for as the
    outermost router does.
    """
    if "app_root_path" not in scope:  # which mounts put there
        route = _own(scope.get("fastapi", {}).get("effective_route_context") or scope.get("route"))
        template = getattr(route, "path_format", None)
        if isinstance(template, str):
            return template
    routes = getattr(scope.get("router") or scope.get("app"), "routes", ())
    root = scope.get("app_root_path", scope.get("root_path", ""))
    outermost = {name: scope[name] for name in ("type", "path", "method", "headers") if name in scope}
    return _template(routes, {**outermost, "root_path": root, "path_params": {}})


def _template(routes: Sequence[Any], scope: Scope) -> str | None:
    """The template of the first route that matches; else of one that does but for the method."""
    partial: Any = None
    for route in _each(routes):
        match, child = route.matches(scope)
        if match.name == "FULL":
            return _joined(route, {**scope, **child})
        if match.name == "PARTIAL" and partial is None:
            partial = route
    return None if partial is None else _joined(partial, scope)


def _joined(route: Any, scope: Scope) -> str | None:
    own: str = getattr(route, "path_format", "")  # none for a host
    inner: Sequence[Any] = getattr(route, "routes", ())
    if not inner:
        return own or None
    rest = _template(inner, scope)
    return None if rest is None else own.removesuffix("/{path}") + rest


def _each(routes: Sequence[Any]) -> Iterator[Any]:
    """Routes as they match, also those of a router that a FastAPI application includes."""
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)
        if included is None:
            yield route
        else:
            yield from map(_own, included())


def _own(route: Any) -> Any:
    """The route itself, where FastAPI has wrapped one of Starlette's."""
    return getattr(route, "starlette_route", None) or route


def _raw(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _with_fields(headers: Iterable[tuple[bytes, bytes]], fields: Headers) -> list[tuple[bytes, bytes]]:
    """Headers, and those fields of which there is none yet."""
    headers = list(headers)
    names = {name.lower() for name, _ in headers}
    return [*headers, *((name, value) for name, value in _raw(fields) if name not in names)]
