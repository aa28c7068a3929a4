"""For the tests of services that use this library: time that moves when told to, and a store that fails on command."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from threading import Lock

from ratelimit.copies import OfThisProcess
from ratelimit.core.duration import Duration, to_nanos
from ratelimit.errors import InvalidArgumentError, StoreError, StoreUnavailableError
from ratelimit.stores.memory import MemoryStore
from ratelimit.stores.protocol import Lost


class ManualClock(OfThisProcess):
    """A clock that stands still until it is moved; for both faces, and safe for threads.

    :param nanos: the time it shows, in nanoseconds since the epoch.
    :param advance_on_sleep: whether a sleep moves it by its length; otherwise a sleep ends at once and moves nothing.
    :ivar slept: the sleeps asked for, in nanoseconds.
    :ivar unique_readings: see :class:`ratelimit.Clock`; False, since a clock that stands still shows one time to all.
        A test in which only one manager decides, and moves the clock in between, may set it.
    """

    _advice = "make one in each process"

    def __init__(self, nanos: int, *, advance_on_sleep: bool = True) -> None:
        self.slept: list[int] = []
        self.unique_readings = False
        self._nanos = nanos
        self._advance_on_sleep = advance_on_sleep
        self._lock = Lock()

    def now_nanos(self) -> int:
        """The time it shows."""
        return self._nanos

    def set(self, nanos: int) -> None:
        """Show another time, an earlier one perhaps."""
        with self._lock:
            self._nanos = nanos

    def advance(self, seconds: Duration = 0, *, nanos: int = 0) -> None:
        """Move on by seconds (a number or a ``timedelta``), by nanoseconds, or both."""
        with self._lock:
            self._nanos += to_nanos(seconds) + nanos

    def sleep(self, nanos: int) -> None:
        """Take note of the sleep, and end it at once."""
        with self._lock:
            self.slept.append(nanos)
            if self._advance_on_sleep:
                self._nanos += nanos

    async def asleep(self, nanos: int) -> None:
        """Take note of the sleep, let other tasks run, and end it."""
        self.sleep(nanos)
        await asyncio.sleep(0)


class ScriptedStore(MemoryStore):
    """A store in memory that does the next swaps as it is told, and the others as they are asked.

    What is scripted is done in order, one for each swap.
    """

    def __init__(self) -> None:
        super().__init__()
        self._script: deque[Callable[[bytes, bytes | None, bytes, int], Lost | None]] = deque()

    def lose_swaps(self, times: int = 1, *, state: bytes | None) -> None:
        """Let another writer win the next swaps, who leaves this state (None: removes the bucket)."""

        def lose(key: bytes, *_: object) -> Lost:
            if state is None:
                self.delete(key)
            else:
                self.put(key, state)
            return Lost(state)

        self._script.extend([lose] * times)

    def lose_replies(self, times: int = 1) -> None:
        """Carry the next swaps out, and answer that the reply was lost."""

        def lose(key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
            self._do(key, before, after, ttl_millis)
            raise StoreUnavailableError(key, "the reply was lost, as scripted", in_doubt=True)

        self._script.extend([lose] * times)

    def lose_requests(self, times: int = 1) -> None:
        """Do not carry the next swaps out, and answer that the reply was lost."""
        self.fail(StoreUnavailableError(b"", "the request was lost, as scripted", in_doubt=True), times)

    def fail(self, error: Exception | None = None, times: int = 1) -> None:
        """Answer the next swaps with an error, a ``StoreUnavailableError`` when None is given."""
        scripted = error or StoreUnavailableError(b"", "the store failed, as scripted")
        if not isinstance(scripted, StoreError):
            raise InvalidArgumentError(f"a store fails with a StoreError, not with {error!r}")

        def fail(key: bytes, *_: object) -> Lost | None:
            raise type(scripted)(key, scripted.message, scripted.in_doubt)

        self._script.extend([fail] * times)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """As scripted, or as every store does."""
        try:
            scripted = self._script.popleft()
        except IndexError:
            scripted = self._do
        return scripted(key, before, after, ttl_millis)

    def _do(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        return super().swap(key, before, after, ttl_millis)
