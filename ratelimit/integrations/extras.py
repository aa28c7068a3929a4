"""The error of an integration whose framework or client is not installed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def needing(extra: str) -> Generator[None]:
    """Import packages of an extra of this distribution within this block.

    :raises ImportError: where a package is missing; its message says what to install.
    """
    try:
        yield
    except ImportError as error:
        missing, command = error.name or "a package", f"pip install 'ratelimit-redis[{extra}]'"
        raise ImportError(f"{missing} is not installed; run: {command}", name=error.name) from error
