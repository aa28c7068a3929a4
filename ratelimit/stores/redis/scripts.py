"""The Lua scripts of ``lua/``, put together from their parts when they are loaded.

The files are inside the package in a wheel, and beside it in a checkout; either may be in a zip file. A server knows no
``require``, so a line ``-- include: NAME`` of a script or a part stands for the text of ``lua/NAME.lua``, or for
what ``_GENERATED`` makes under that name. It may stand within a function, and a part that is included twice is there
twice. Mind the limits of Lua 5.1: 200 local variables for a function, which a script itself is, and 60 that a function
takes from outside itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final, NamedTuple

from ratelimit.stores.operations import Operation

_INCLUDE: Final = re.compile(r"^ *-- include: (\w+)$", re.MULTILINE)
_STRING_OR_COMMENT: Final = re.compile(r"""('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|--.*""")
_BETWEEN_LINES: Final = re.compile(r"\s*\n\s*")


class Script(NamedTuple):
    """A script, its SHA-1, and the beginning of a command that calls it by that for one key."""

    text: bytes
    sha: str
    call: tuple[bytes, bytes, bytes]


def load(name: str) -> Script:
    """Read the script of this name, without ``.lua``, and put it together as servers are sent it."""
    text = without_comments(_assembled(_read(name))).encode()
    sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
    return Script(text, sha, (b"EVALSHA", sha.encode(), b"1"))


def without_comments(text: str) -> str:
    """Drop what a server does not need: comments, indentation and empty lines, a quarter to two thirds of a script.

    Strings stay as they are. Long brackets (``[[``), which could hold line breaks, are not allowed in ``lua/``.
    """
    code = _STRING_OR_COMMENT.sub(lambda found: found[1] or "", text)
    return _BETWEEN_LINES.sub("\n", code).strip()


def _assembled(text: str) -> str:
    return _INCLUDE.sub(lambda found: _assembled(_part(found[1])), text)


def _part(name: str) -> str:
    generated = _GENERATED.get(name)
    return _read(name) if generated is None else generated()


def _read(name: str) -> str:
    # This is a path or a place in a zip file: both know their parent.
    package: Any = files("ratelimit")
    for directory in (package / "lua", package.parent / "lua"):
        resource = directory / f"{name}.lua"
        if resource.is_file():
            return str(resource.read_text(encoding="utf-8"))
    raise FileNotFoundError(f"the script {name}.lua is missing from this installation of ratelimit-redis")


def _operation_numbers() -> str:
    """Declare a constant for the number of each operation."""
    names = ", ".join(operation.name for operation in Operation)
    return f"local {names} = {', '.join(str(operation.value) for operation in Operation)}"


def _operation_functions() -> str:
    """Declare the table of the functions that carry out the operations, each at its number."""
    entries = ", ".join(f"[{operation.value}] = {operation.name.lower()}" for operation in Operation)
    return f"local operation_functions = {{{entries}}}"


_GENERATED: Final[dict[str, Callable[[], str]]] = {
    "operation_functions": _operation_functions,
    "operation_numbers": _operation_numbers,
}
