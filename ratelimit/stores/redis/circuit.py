"""When a server has failed several times in a row, it is left alone for a while.

Each request to a server that is gone costs its caller a timeout, and a server that is overloaded gets more load by it.
After some failures in a row the circuit to the server is open: requests fail at once. When the pause is over, one
caller tries the server; the others go on to fail until it has answered. Each trial that fails doubles the pause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ratelimit.errors import InvalidConfigurationError, StoreTimeoutError, StoreUnavailableError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic

_SHORTEST_FAILURE = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class CircuitBreaker:
    """When a server is left alone, and for how long.

    :param failures: so many in a row open the circuit: connections that failed, and requests that were not answered in
        time. What a server answers, an error perhaps, is no failure.
    :param shortest_pause: seconds before it is tried again for the first time; between half of it and all of it, by
        chance, so that the instances of a service do not come back all at once.
    :param longest_pause: what the pause grows to, twice as long each time.
    :raises InvalidConfigurationError: for fewer than 1 failure, or pauses that are not above 0 or not in order.
    """

    failures: int = 5
    shortest_pause: float = 0.1
    longest_pause: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.failures, int) or isinstance(self.failures, bool) or self.failures < 1:
            raise InvalidConfigurationError(f"failures must be an int of 1 or more, not {self.failures!r}", "failures")
        if not 0 < self.shortest_pause <= self.longest_pause < float("inf"):
            raise InvalidConfigurationError(
                "the pauses must be numbers of seconds above 0, the shortest one first, not "
                f"{self.shortest_pause!r} and {self.longest_pause!r}",
                "shortest_pause",
            )


class CircuitState(Enum):
    """Whether a server is asked."""

    CLOSED = "closed"
    """It is."""
    OPEN = "open"
    """It has failed, and is left alone."""
    HALF_OPEN = "half-open"
    """It has failed, and one caller is trying it, or the next one will."""


class CircuitStatus(NamedTuple):
    """How a circuit is at present.

    :param failures: in a row, up to now.
    :param retry_after: seconds until the server is tried again; 0 unless it is left alone.
    :param last_error: what the last failure was, in words; None where there was none since the last success.
    """

    state: CircuitState
    failures: int
    retry_after: float
    last_error: str | None


class Circuit:
    """The state of one server, as this process sees it; safe for threads.

    :ivar failures: in a row; of interest to who reports a success, which changes nothing while there are none.
    :ivar is_open: whether :meth:`admit` has to be asked before a request.
    :ivar heard_at: when a request began that was answered.
    """

    __slots__ = (
        *("_breaker", "_last_error", "_lock", "_monotonic", "_pause", "_retry_at", "_trying"),
        *("failures", "heard_at", "is_open"),
    )

    def __init__(self, breaker: CircuitBreaker | None, monotonic: Callable[[], float] = monotonic) -> None:
        self._breaker = breaker
        self._monotonic = monotonic
        self.failures = 0
        self.is_open = False
        self.heard_at = float("-inf")
        self._pause = 0.0
        self._retry_at = 0.0
        self._trying = False
        self._last_error: str | None = None
        self._lock = fork_safety.lock()

    def admit(self, key: bytes, deadline: float | None = None) -> None:
        """Let a request through, if it is the one that tries the server.

        :param deadline: of the request. Who tries the server may be cancelled, and tell nothing; then another one will,
            but not before this, or the longest pause from now.
        :raises StoreUnavailableError: otherwise; nothing was sent.
        """
        with self._lock:
            if self._breaker is None or not self.is_open:
                return
            now = self._monotonic()
            left = self._retry_at - now
            if left <= 0:
                patience = 0.0 if deadline is None else min(deadline - now, self._breaker.longest_pause)
                self._retry_at = now + max(self._pause, patience)
                self._trying = True
                return
        raise StoreUnavailableError(
            key,
            f"Redis has failed {self.failures} times in a row and is not asked for another {left:.3f} s"
            f" (last: {self._last_error})",
        )

    def left(self) -> None:
        """Let another one try the server, where whoever tried it was interrupted."""
        if self._trying:
            self._retry_at = self._monotonic()

    def excuses(self, error: Exception, begun: float) -> bool:
        """Whether this is the fault of a caller who could not wait, while the server does answer others."""
        now = self._monotonic()
        return (
            isinstance(error, StoreTimeoutError)
            and now - begun < _SHORTEST_FAILURE
            and now - self.heard_at < 2 * _SHORTEST_FAILURE
        )

    def failed(self, error: Exception) -> None:
        """Take note of a failure."""
        with self._lock:
            self.failures += 1
            self._last_error = getattr(error, "message", None) or str(error)  # ours say the key as well: it is not it
            breaker = self._breaker
            if breaker is None or self.failures < breaker.failures:
                return
            if self.is_open and not self._trying:  # it was on its way before: no news
                return
            self._pause = min(self._pause * 2 or breaker.shortest_pause, breaker.longest_pause)
            self._retry_at = self._monotonic() + self._pause * fork_safety.chance.uniform(0.5, 1)
            self._trying = False
            self.is_open = True

    def succeeded(self) -> None:
        """The server has answered."""
        with self._lock:
            self.failures = 0
            self._pause = 0.0
            self._last_error = None
            self._trying = False
            self.is_open = False

    def status(self) -> CircuitStatus:
        """How it is at present."""
        fork_safety.check()
        with self._lock:
            is_left_alone = self.is_open and not self._trying
            left = max(0.0, self._retry_at - self._monotonic()) if is_left_alone else 0.0
            state = CircuitState.CLOSED
            if self.is_open:
                state = CircuitState.OPEN if left else CircuitState.HALF_OPEN
            return CircuitStatus(state, self.failures, left, self._last_error)
