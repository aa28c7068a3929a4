"""Leave a server alone for a while when it has failed several times in a row.

Each request to a server that is gone costs its caller a timeout, and adds load to a server that is overloaded. After
some failures in a row the circuit to the server is open: requests fail at once. When the pause is over, one caller
tries the server; the requests of all others fail until it has answered. Each trial that fails doubles the pause.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ratelimit.errors import InvalidConfigurationError, StoreTimeoutError, StoreUnavailableError
from ratelimit.keys import brief
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic

_SHORTEST_FAILURE = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class CircuitBreaker:
    """When a server is left alone, and for how long.

    :param failures: how many failures in a row open the circuit: connections that could not be made or broke, and
        requests that were not answered in time. An error that the server itself answers does not count.
    :param shortest_pause: seconds before the server is tried again for the first time. Half of this or more is waited,
        at random, so that the instances of a service do not all come back at once.
    :param longest_pause: seconds that the pause, which doubles each time, grows to at most.
    :raises InvalidConfigurationError: for fewer than 1 failure, or pauses that are not above 0 or not in order.
    """

    failures: int = 5
    shortest_pause: float = 0.1
    longest_pause: float = 2.0

    def __post_init__(self) -> None:
        if not isinstance(self.failures, int) or isinstance(self.failures, bool) or self.failures < 1:
            raise _refusal("failures", "an int of 1 or more", self.failures)
        if not 0 < self.longest_pause < float("inf"):
            raise _refusal("longest_pause", "a finite number of seconds above 0", self.longest_pause)
        if not 0 < self.shortest_pause <= self.longest_pause:
            allowed = f"a number of seconds above 0, and at most longest_pause ({self.longest_pause!r})"
            raise _refusal("shortest_pause", allowed, self.shortest_pause)


def _refusal(field: str, allowed: str, value: object) -> InvalidConfigurationError:
    return InvalidConfigurationError(f"{field} must be {allowed}; got {brief(value)}", field)


class CircuitState(Enum):
    """Whether a server is asked."""

    CLOSED = "closed"
    """The server is asked."""
    OPEN = "open"
    """The server has failed, and is left alone."""
    HALF_OPEN = "half-open"
    """The server has failed, and one caller is trying it, or the next one will."""


class CircuitStatus(NamedTuple):
    """The state of a circuit at present.

    :param failures: how many failures in a row there were up to now.
    :param retry_after: seconds until the server is tried again; 0 unless it is left alone.
    :param last_error: the last failure in words; None where nothing has failed since the last success.
    """

    state: CircuitState
    failures: int
    retry_after: float
    last_error: str | None


class Circuit:
    """The state of one server, as this process sees it; safe for threads.

    :ivar monotonic: the clock by which pauses pass.
    :ivar failures: how many failures in a row there were. While it is 0, a success need not be reported.
    :ivar is_open: whether :meth:`admit` has to be asked before a request.
    :ivar heard_at: when the last request began that was answered.
    """

    __slots__ = (
        *("_breaker", "_last_error", "_lock", "_pause", "_retry_at", "_trying"),
        *("failures", "heard_at", "is_open", "monotonic"),
    )

    def __init__(self, breaker: CircuitBreaker | None, monotonic: Callable[[], float] = monotonic) -> None:
        self._breaker = breaker
        self.monotonic = monotonic
        self.failures = 0
        self.is_open = False
        self.heard_at = float("-inf")
        self._pause = 0.0
        self._retry_at = 0.0
        self._trying = False
        self._last_error: str | None = None
        self._lock = fork_safety.lock()

    def admit(self, key: bytes, deadline: float | None = None) -> None:
        """Let a request through if the circuit is closed, or if the request is the one that tries the server.

        :param deadline: of the request. A caller that tries the server may be cancelled without reporting an outcome.
            Then another one tries it, but not before this deadline, or before the longest pause from now.
        :raises StoreUnavailableError: for any other request; nothing was sent.
        """
        with self._lock:
            if self._breaker is None or not self.is_open:
                return
            now = self.monotonic()
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
        """Let another caller try the server, because the one that was trying it was interrupted."""
        if self._trying:
            self._retry_at = self.monotonic()

    def excuses(self, error: Exception, begun: float) -> bool:
        """Return whether a failure is due to a caller that could not wait, while the server does answer others."""
        now = self.monotonic()
        return (
            isinstance(error, StoreTimeoutError)
            and now - begun < _SHORTEST_FAILURE
            and now - self.heard_at < 2 * _SHORTEST_FAILURE
        )

    def failed(self, error: Exception) -> None:
        """Note a failure."""
        with self._lock:
            self.failures += 1
            # The text of a StoreError names a key as well, which has nothing to do with the failure.
            self._last_error = getattr(error, "message", None) or str(error)
            breaker = self._breaker
            if breaker is None or self.failures < breaker.failures:
                return
            if self.is_open and not self._trying:
                # The request was sent before the circuit opened, so that its failure says nothing new.
                return
            self._pause = min(self._pause * 2 or breaker.shortest_pause, breaker.longest_pause)
            self._retry_at = self.monotonic() + self._pause * fork_safety.chance.uniform(0.5, 1)
            self._trying = False
            self.is_open = True

    def succeeded(self) -> None:
        """Note that the server has answered."""
        with self._lock:
            self.failures = 0
            self._pause = 0.0
            self._last_error = None
            self._trying = False
            self.is_open = False

    def status(self) -> CircuitStatus:
        """Return the state at present."""
        fork_safety.check()
        with self._lock:
            is_left_alone = self.is_open and not self._trying
            left = max(0.0, self._retry_at - self.monotonic()) if is_left_alone else 0.0
            state = CircuitState.CLOSED
            if self.is_open:
                state = CircuitState.OPEN if left else CircuitState.HALF_OPEN
            return CircuitStatus(state, self.failures, left, self._last_error)
