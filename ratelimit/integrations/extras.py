"""What an integration says where the package that it is for is not installed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def needing(extra: str) -> Generator[None]:
    """Import in here what an extra of this distribution brings.

    :raises ImportError: that says what to install, where something is missing.
    """
    try:
        yield
    except ImportError as error:
        missing, command = error.name or "a package", f"pip install 'ratelimit-redis[{extra}]'"
        raise ImportError(f"{missing} is not installed; run: {command}", name=error.name) from error
