"""A middleware for Starlette, or any other ASGI application on asyncio, and requests made from ASGI's scopes.

::

    app.add_middleware(RateLimitMiddleware, "100/minute", Rule("5/minute", routes=["/login"], name="login"))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, Unpack
from weakref import WeakKeyDictionary

from ratelimit.errors import InvalidArgumentError
from ratelimit.integrations.http.answers import Headers, HttpAnswer
from ratelimit.integrations.http.limiter import AsyncLimiter, LimiterSettings, decision_about, fields_for
from ratelimit.integrations.http.request import HttpRequest
from ratelimit.integrations.http.response import HttpResponse
from ratelimit.integrations.http.routes import canonical
from ratelimit.integrations.http.rules import Rule, RuleLimits
from ratelimit.integrations.marks import marked
from ratelimit.keys import brief
from ratelimit.manager import AsyncProxyManager

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

EndpointT = TypeVar("EndpointT", bound=Callable[..., Any])

TELLS: Final = "ratelimit.tells"
"""The key that a middleware sets in the scope of a request to say that it adds the header fields to the answer."""

_EXEMPT: Final = "_ratelimit_exempt"
# One entry for each exempt endpoint. While there is none, no time is spent to find out where a request goes.
_exempted: list[bool] = []

_STARTS: Final = ("http.response.start", "websocket.accept", "websocket.http.response.start")
_DENIAL: Final = "websocket.http.response"
# A server turns any code into a 403 as long as the handshake has not been accepted.
_POLICY_VIOLATION: Final = 1008
_SWITCHING_PROTOCOLS: Final = 101


class RateLimitMiddleware:
    """Lets requests through to an application, or answers them itself; for HTTP and the handshakes of WebSockets.

    A refused request does not reach the application, and its body is not read. The handshake of a WebSocket is refused
    with the same answer where the server can send one (the extension ``websocket.http.response``), else with the 403
    that servers send for a close before the accept.

    Every other answer gets the header fields when it starts. They show all that has been decided by then, also by
    limits inside the application. Without rules, the middleware does nothing else. A field that the application has
    set itself stays as it is, so that several middlewares send each field once. Bodies are not touched. The decision is
    ``ratelimit`` in ``scope["state"]``, which Starlette has as ``request.state.ratelimit``.

    :param app: what is limited.
    :param rules: see :class:`ratelimit.integrations.http.AsyncLimiter`, also for the other arguments.

    The errors of a store pass through to the server where the policy is to raise them.
    """

    def __init__(
        self,
        app: App,
        *rules: Rule | RuleLimits,
        manager: AsyncProxyManager | str | None = None,
        **settings: Unpack[LimiterSettings],
    ) -> None:
        self.app = app
        self._limiter = AsyncLimiter(*rules, manager=manager, **settings)
        self._router = _router_within(app)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._limiter!r})"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        request = http_request(scope, router=self._router)
        if _exempted and is_exempt(scope, self._router):
            decision = decision_about(request)
        else:
            decision = await self._limiter.decide(request)
        if not decision:
            await refuse(scope, send, self._limiter.answers.refusal(decision))
            return
        scope[TELLS] = True
        await self.app(scope, receive, self._telling(request, send))

    def _telling(self, request: HttpRequest, send: Send) -> Send:
        async def tell(message: Message) -> None:
            if message["type"] in _STARTS:
                if decision_about(request).waits_for_response:
                    await self._limiter.deduct(request, lambda: http_response(message))
                fields = fields_for(request, self._limiter.answers)
                if fields:
                    message = {**message, "headers": _with_fields(message.get("headers") or (), fields)}
            await send(message)

        return tell


async def refuse(scope: Scope, send: Send, answer: HttpAnswer) -> None:
    """Send an answer in place of the application's."""
    if scope["type"] == "websocket" and _DENIAL not in (scope.get("extensions") or ()):
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION})
        return
    answering = "http.response" if scope["type"] == "http" else _DENIAL
    await send({"type": f"{answering}.start", "status": answer.status, "headers": _raw(answer.headers)})
    await send({"type": f"{answering}.body", "body": answer.body})


def http_request(scope: Scope, native: object = None, router: object = None) -> HttpRequest:
    """Return the request of a scope of the type ``http`` or ``websocket``, and give the scope a ``state`` if need be.

    Its user is the ``user`` that Starlette's ``AuthenticationMiddleware`` has put there.

    :param native: what the framework calls a request; None: the scope.
    :param router: the application of Starlette that has the routes; used while the scope does not name one.
    """
    client = scope.get("client")
    return HttpRequest(
        method=scope.get("method", "GET"),
        path=_path(scope),
        peer=(client[0] or None) if client else None,
        header=lambda name: _header(scope, name),
        native=scope if native is None else native,
        find_route=lambda: template_of(scope, router),
        find_routes=lambda: _templates_of(_outermost(scope, router)),
        find_user=lambda: _user(scope),
        notes=scope.setdefault("state", {}),
    )


def http_response(message: Message) -> HttpResponse:
    """Return the response that a message begins; an accepted WebSocket has the status 101."""
    return HttpResponse(message.get("status", _SWITCHING_PROTOCOLS), lambda name: _header(message, name), message)


def _path(scope: Scope) -> str:
    """Return the path that the application's routes are matched with: the part below the mount point."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if path.startswith(root) and path[len(root) :][:1] in ("", "/"):
        path = path[len(root) :]
    return path or "/"


def _header(scope: Scope | Message, name: str) -> str | None:
    wanted = name.encode("latin-1")
    values: list[str] = [value.decode("latin-1") for found, value in scope.get("headers") or () if found == wanted]
    return ", ".join(values) if values else None


def _user(scope: Scope) -> object:
    user = scope.get("user")
    if not getattr(user, "is_authenticated", False):
        return None
    try:
        return user.identity  # type: ignore[union-attr]  # an authenticated user is not None
    except (AttributeError, NotImplementedError):  # Starlette's users need not have it
        return getattr(user, "username", user)


def _router_within(app: object) -> object:
    """Return the application with routes from inside middlewares, each of which keeps the next one as ``app``."""
    while app is not None and not hasattr(app, "routes"):
        app = getattr(app, "app", None)
    return app


def exempt(endpoint: EndpointT) -> EndpointT:
    """Exempt an endpoint of Starlette or FastAPI: no middleware or dependency of this library limits it.

    Put this decorator next to the function, below the one that registers the route.

    :raises InvalidArgumentError: for what is not callable.
    """
    if not callable(endpoint):
        raise InvalidArgumentError(f"exempt must be given an endpoint; got {brief(endpoint)}")
    _exempted.append(True)
    return marked(endpoint, _EXEMPT, True)


def is_exempt(scope: Scope, router: object = None) -> bool:
    """Return whether a request goes to an endpoint that is exempt."""
    endpoint = scope.get("endpoint") or _sought(scope, router).endpoint
    return getattr(endpoint, _EXEMPT, False)


def _outermost(scope: Scope, router: object) -> Any:
    """Return the outermost application of Starlette that a request has reached, else the one that a caller knows of."""
    return scope.get("router") or scope.get("app") or router


def template_of(scope: Scope, router: object = None) -> str | None:
    """Return the template of the route as Starlette, or FastAPI, knows it; None where there is none.

    Below a mount, a route knows only its own part of the template. There, and before a route has been found, the
    template is looked up from the outermost router on.
    """
    if "app_root_path" not in scope:  # mounts put it there
        route = _own(scope.get("fastapi", {}).get("effective_route_context") or scope.get("route"))
        template = getattr(route, "path_format", None)
        if isinstance(template, str):
            return template
    return _sought(scope, router).template


class _Found(NamedTuple):
    """Where a request goes: the template of its route and its endpoint, as far as there are any."""

    template: str | None = None
    endpoint: object = None


def _sought(scope: Scope, router: object) -> _Found:
    routes = getattr(_outermost(scope, router), "routes", ())
    root = scope.get("app_root_path", scope.get("root_path", ""))
    outermost = {name: scope[name] for name in ("type", "path", "method", "headers") if name in scope}
    return _found(routes, {**outermost, "root_path": root, "path_params": {}})


# For each application, how many routes it had and their templates. The number shows whether routes were added.
_known_templates: WeakKeyDictionary[Any, tuple[int, frozenset[str]]] = WeakKeyDictionary()


def _templates_of(router: Any) -> frozenset[str]:
    """Return the templates of all routes of an application."""
    routes: Sequence[Any] = getattr(router, "routes", ())
    if not routes:
        return frozenset()
    count, templates = _known_templates.get(router, (0, frozenset[str]()))
    if count != len(routes):
        templates = frozenset(map(canonical, _each_template(routes)))
        _known_templates[router] = len(routes), templates
    return templates


def _each_template(routes: Sequence[Any]) -> Iterator[str]:
    for route in _each(routes):
        own: str = getattr(route, "path_format", "")
        inner: Sequence[Any] = getattr(route, "routes", None) or ()
        if not inner:
            yield own
        for rest in _each_template(inner):
            yield own.removesuffix("/{path}") + rest


def _found(routes: Sequence[Any], scope: Scope) -> _Found:
    """Return the first route that matches; else the first one that matches except for its method."""
    partial: Any = None
    for route in _each(routes):
        match, child = route.matches(scope)
        if match.name == "FULL":
            return _joined(route, {**scope, **child})
        if match.name == "PARTIAL" and partial is None:
            partial = route
    return _Found() if partial is None else _joined(partial, scope)


def _joined(route: Any, scope: Scope) -> _Found:
    own: str = getattr(route, "path_format", "")  # a Host has none
    inner: Sequence[Any] = getattr(route, "routes", None) or ()
    if not inner:
        return _Found(own or None, scope.get("endpoint"))
    rest = _found(inner, scope)
    return rest if rest.template is None else rest._replace(template=own.removesuffix("/{path}") + rest.template)


def _each(routes: Sequence[Any]) -> Iterator[Any]:
    """Yield routes as they match, also those of a router that a FastAPI application includes."""
    for route in routes:
        included = getattr(route, "effective_route_contexts", None)
        if included is None:
            yield route
        else:
            yield from map(_own, included())


def _own(route: Any) -> Any:
    """Return the route itself, where FastAPI has wrapped one of Starlette's."""
    return getattr(route, "starlette_route", None) or route


def _raw(headers: Headers) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]


def _with_fields(headers: Iterable[tuple[bytes, bytes]], fields: Headers) -> list[tuple[bytes, bytes]]:
    """Return headers, with those of the fields added that they lack."""
    headers = list(headers)
    names = {name.lower() for name, _ in headers}
    return [*headers, *((name, value) for name, value in _raw(fields) if name not in names)]
