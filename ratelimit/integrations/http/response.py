"""A response as rules see it, whatever framework it has come through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class HttpResponse:
    """What ``deduct_when`` of a rule may look at: the beginning of an answer.

    All other attributes are those of the framework's own response, where there is one: in Flask and Django
    ``lambda response: response.status_code == 401`` works as well.

    :param status: the status code.
    :param header: the value of a header by its name in lower case; None if there is none.
    :param native: the framework's own response; None in WSGI, and in ASGI the message ``http.response.start``.
    """

    status: int
    header: Callable[[str], str | None]
    native: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self.native, name)
        except AttributeError:
            native = type(self.native).__name__
            raise AttributeError(f"neither HttpResponse nor {native} has {name!r}", name=name, obj=self) from None
