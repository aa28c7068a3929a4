"""A request as rules and keys see it, whatever framework it has come through."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any


def _nobody() -> None:
    return None


def _no_routes() -> frozenset[str]:
    return frozenset()


@dataclass(slots=True, eq=False)
class HttpRequest:
    """What rules and keys may look at. Adapters make one for each request; nothing is computed before it is asked for.

    All other attributes are those of the framework's own request: ``lambda request: request.headers["x-tenant"]`` is a
    key for users of FastAPI, Flask or Django.

    :param method: in capitals; that of a WebSocket handshake is GET.
    :param path: as the application sees it, decoded, without the query.
    :param peer: the address that has connected, as text; None where there is none, as with a Unix socket.
    :param header: the value of a header by its name in lower case, several of them joined with ``", "``; None if there
        is none.
    :param native: the framework's own request, or scope, or environment.
    :param find_route: the template of the route, ``/users/{id}`` say; None where the framework does not know one.
    :param find_user: the user that has logged in, as the framework knows it; None for nobody.
    :param notes: what is kept with the request for as long as it lives, by all that limits it.
    :param find_routes: the templates of all routes that the framework's router can be asked about, as
        ``ratelimit.integrations.http.routes.canonical`` writes them; empty where it cannot be asked. A rule for one
        of these routes is about the requests for which ``find_route`` gives it; a rule for another one goes by the
        path.
    """

    method: str
    path: str
    peer: str | None
    header: Callable[[str], str | None]
    native: Any = None
    find_route: Callable[[], str | None] = _nobody
    find_user: Callable[[], object] = _nobody
    notes: MutableMapping[Any, Any] = field(default_factory=dict)
    find_routes: Callable[[], frozenset[str]] = _no_routes

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.native, name)
        except AttributeError:
            native = type(self.native).__name__
            raise AttributeError(f"neither HttpRequest nor {native} has {name!r}", name=name, obj=self) from None
