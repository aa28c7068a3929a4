"""The switch of all integrations: the environment variable ``RATELIMIT_ENABLED``, or a test that overrides it."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

ENABLED_VARIABLE: Final = "RATELIMIT_ENABLED"

_OFF: Final = frozenset(["false", "0", "no", "off"])

_overridden: list[bool] = []


def is_enabled() -> bool:
    """Return whether integrations limit anything.

    They do unless ``RATELIMIT_ENABLED`` is ``false``, ``0``, ``no`` or ``off``, in upper or lower case. The variable is
    read at each decision, so that tests may set it at any time.
    """
    if _overridden:
        return _overridden[-1]
    value = os.environ.get(ENABLED_VARIABLE)
    return value is None or value.strip().lower() not in _OFF


@contextmanager
def enabled(enabled: bool) -> Generator[None]:
    """Switch all integrations of this process on or off for as long as the block runs, whatever the variable says."""
    _overridden.append(enabled)
    try:
        yield
    finally:
        _overridden.pop()
