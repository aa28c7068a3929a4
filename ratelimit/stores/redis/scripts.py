"""The Lua scripts of ``lua/``: inside the package in a wheel, beside it in a checkout; either may be in a zip file."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any, NamedTuple


class Script(NamedTuple):
    """A script of one key, the SHA-1 by which a server knows it, and how a command begins that calls it by that."""

    text: bytes
    sha: str
    call: tuple[bytes, bytes, bytes]


def load(name: str) -> Script:
    """Read the script of this name, without ``.lua``."""
    # This is a path or a place in a zip file: both know their parent.
    package: Any = files("ratelimit")
    for directory in (package / "lua", package.parent / "lua"):
        resource = directory / f"{name}.lua"
        if resource.is_file():
            text = resource.read_bytes()
            sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
            return Script(text, sha, (b"EVALSHA", sha.encode(), b"1"))
    raise FileNotFoundError(f"the script {name}.lua is missing from this installation of ratelimit-redis")
