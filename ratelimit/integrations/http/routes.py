"""Templates of routes: ``/users/{id}``, and which paths they are for.

The router of a framework knows best which requests it sends to a route. If an adapter can ask the router, a template
of a rule that the router has, too, is compared with the one that the router has found for the request. So nothing that
the router is lenient about (a newline at the end, a slash too many) gets past a rule. All other templates are matched
with the path here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from itertools import pairwise
from typing import Final

from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

# {id}, {id:int} and {rest:path} of Starlette, <id>, <int:id> and <path:rest> of Flask and Django. A converter of
# Werkzeug may have arguments: <any(a, b):name>.
_PARAMETER: Final = re.compile(r"\{(?P<name>\w+)(?::(?P<kind>\w+))?\}|<(?:(?P<converter>\w+)(?:\([^<>]*\))?:)?\w+>")
_PLAIN: Final = re.compile(r"[{}<>]")

_SEGMENT: Final = "{}"
_REST: Final = "{path}"


@lru_cache(maxsize=4096)
def canonical(template: str) -> str:
    """Return a template without the names and types of its parameters, in which frameworks differ.

    ``/users/{id}``, ``/users/{id:int}`` and ``/users/<int:id>`` become ``/users/{}``; a parameter that takes the rest
    of the path becomes ``{path}``.
    """
    return _PARAMETER.sub(lambda parameter: _REST if _takes_rest(parameter) else _SEGMENT, template)


def _takes_rest(parameter: re.Match[str]) -> bool:
    return "path" in (parameter["kind"], parameter["converter"])


class RouteTemplate:
    """A template of a rule, and the paths that it stands for."""

    __slots__ = ("_pattern", "canonical")

    def __init__(self, template: str) -> None:
        """Check a template and prepare its pattern.

        :raises InvalidConfigurationError: for a template that does not begin with a slash, that has braces which are
            not those of a parameter, or more than one parameter for the rest of the path.
        """
        if not template.startswith("/"):
            raise InvalidConfigurationError(f"a route must begin with a slash; got {brief(template)}", "routes")
        if _PLAIN.search(_PARAMETER.sub("", template)):
            raise InvalidConfigurationError(
                f"a parameter of a route must be written {{name}} or {{name:path}}; got {brief(template)}", "routes"
            )
        if sum(map(_takes_rest, _PARAMETER.finditer(template))) > 1:
            raise InvalidConfigurationError(
                f"a route must have at most one parameter for the rest of the path; got {brief(template)}", "routes"
            )
        self.canonical = canonical(template)
        self._pattern = _pattern(template)

    def matches(self, path: str) -> bool:
        """Return whether a path, decoded and without its query, is one that the template stands for."""
        return self._pattern.fullmatch(path) is not None


def _pattern(template: str) -> re.Pattern[str]:
    """Return the pattern of a template, which takes time in proportion to the path.

    Several parameters of one segment (``/{year}-{month}``) could be divided up in many ways. The first of them ends
    where the text after it comes first, which finds a match if there is one, and nothing is tried again: the group is
    atomic.
    """
    pattern, end = "", 0
    parameters = list(_PARAMETER.finditer(template))
    for parameter, following in pairwise([*parameters, None]):
        assert parameter is not None  # noqa: S101  # only the last one of the list is None
        pattern += re.escape(template[end : parameter.start()])
        end = len(template) if following is None else following.start()
        text = template[parameter.end() : end]
        if _takes_rest(parameter):
            pattern += f".*{re.escape(text)}"
        elif following is not None and "/" not in text:
            pattern += f"(?>[^/]+?{re.escape(text)})"
        else:
            pattern += f"[^/]+{re.escape(text)}"
    pattern += re.escape(template[end:])
    # The patterns of several frameworks end with a dollar sign, which lets a newline follow.
    return re.compile(f"{pattern}\n?", re.DOTALL)


def templates_of(routes: Collection[str]) -> tuple[RouteTemplate, ...]:
    """Return the templates of a rule.

    :raises InvalidConfigurationError: for text that is not a template.
    """
    return tuple(RouteTemplate(route) for route in routes)
