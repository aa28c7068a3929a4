"""Log records about a store that fails, and about its return: few, however many decisions are made without it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from ratelimit.engine.on_error import OnError
from ratelimit.errors import CorruptStateError, RateLimitError, StoreError
from ratelimit.keys import Key, shown
from ratelimit.runtime import fork_safety

# The shortest time between two records about a store that fails on and off.
_QUIET_SECONDS: Final = 60.0
_LONGEST_REASON: Final = 300  # characters

_logger = logging.getLogger("ratelimit")


class OutageLog:
    """Counts the decisions that were made without the store, and logs when that begins and ends. Safe for threads.

    :param described: the manager with its store, as the log names it.
    :param monotonic: a clock of seconds.
    :ivar degraded: decisions since the store has answered last.
    """

    def __init__(self, described: str, monotonic: Callable[[], float]) -> None:
        self.degraded = 0
        self._described = described
        self._monotonic = monotonic
        self._since = 0.0
        self._logged_at = float("-inf")
        self._is_announced = False
        self._lock = fork_safety.lock()

    def note_failure(self, key: Key, chosen: OnError, error: RateLimitError) -> None:
        """Note a decision that a policy has made in place of the store."""
        now = self._monotonic()
        with self._lock:
            if not self.degraded:
                self._since = now
            self.degraded += 1
            logs = now - self._logged_at >= _QUIET_SECONDS
            if logs:
                self._logged_at, self._is_announced = now, True
        if logs:
            _logger.warning(
                "the store fails (%s); decisions are made without it, by on_error=%s, for the key %s and others of %s",
                type(error).__name__ if isinstance(error, CorruptStateError) else _bounded(_reason(error)),
                chosen.kind,
                shown(key),
                self._described,
            )

    def note_answer(self) -> None:
        """Note that the store has answered."""
        now = self._monotonic()
        with self._lock:
            degraded, self.degraded = self.degraded, 0
            since = self._since
            # The return is logged only where the outage was.
            logs, self._is_announced = self._is_announced and bool(degraded), self._is_announced and not degraded
        if logs:
            _logger.info(
                "the store answers again; %d decisions were made without it in %.1f s, by %s",
                degraded,
                now - since,
                self._described,
            )


def _reason(error: RateLimitError) -> str:
    """Return what has happened, without the key, which the log names by itself."""
    return error.message if isinstance(error, StoreError) else str(error)


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
