"""The Lua scripts of ``lua/``: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple


class Script(NamedTuple):
    """A script and the SHA-1 by which a server knows it."""

    text: bytes
    sha: str


def load(name: str) -> Script:
    """The script of this name, without ``.lua``."""
    package = Path(__file__).parents[1]
    for directory in (package / "lua", package.parent / "lua"):
        path = directory / f"{name}.lua"
        if path.is_file():
            text = path.read_bytes()
            return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())
    raise FileNotFoundError(f"the script {name}.lua is missing from this installation of ratelimit-redis")
