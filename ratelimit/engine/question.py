"""What is asked."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ratelimit.errors import CorruptStateError, StoreError
from ratelimit.keys import Key


@contextmanager
def errors_named(key: Key) -> Generator[None]:
    """Let errors from a store name the key as the caller gave it, not as it is stored."""
    try:
        yield
    except (StoreError, CorruptStateError) as error:
        error.key = key
        raise
