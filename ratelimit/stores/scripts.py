"""The Lua scripts of ``lua/``: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple


class Script(NamedTuple):
    """A script of one key, the SHA-1 by which a server knows it, and how a command begins that calls it by that."""

    text: bytes
    sha: str
    call: tuple[str, str, int]


def load(name: str) -> Script:
    """The script of this name, without ``.lua``."""
    package = Path(__file__).parents[1]
    for directory in (package / "lua", package.parent / "lua"):
        path = directory / f"{name}.lua"
        if path.is_file():
            text = path.read_bytes()
            sha = hashlib.sha1(text, usedforsecurity=False).hexdigest()
            return Script(text, sha, ("EVALSHA", sha, 1))
    raise FileNotFoundError(f"the script {name}.lua is missing from this installation of ratelimit-redis")
