"""Buckets within one process."""

from __future__ import annotations

import heapq
import time
from threading import Lock

from ratelimit.clock import Clock
from ratelimit.core.duration import NANOS_PER_MILLISECOND
from ratelimit.errors import Key
from ratelimit.stores.protocol import Lost


class MemoryStore:
    """Buckets in the memory of this process, for services of one process and for tests. Safe for threads.

    States that have expired are dropped, a few with every write, so that memory follows the keys that are in use.

    :param clock: what time it is, for decisions and for expiry; by default the machine's monotonic clock, which begins
        at the present wall time and is not disturbed when that is set.
    """

    def __init__(self, *, clock: Clock | None = None) -> None:
        begin = time.time_ns() - time.monotonic_ns()
        self._now = clock.now_nanos if clock is not None else lambda: begin + time.monotonic_ns()
        self._states: dict[bytes, tuple[bytes, int | None]] = {}
        self._queue: list[tuple[int, bytes]] = []
        self._queued: set[bytes] = set()
        self._lock = Lock()

    def get(self, key: Key) -> bytes | None:
        """The state under the key; None where there is none."""
        with self._lock:
            return self._get(_bytes(key))

    def put(self, key: Key, state: bytes) -> None:
        """Store a state, whatever is there, without expiry: for tests."""
        with self._lock:
            self._states[_bytes(key)] = (state, None)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); None when done, else what is there."""
        with self._lock:
            current = self._get(key)
            if current != before:
                return Lost(current)
            deadline = self._now() + ttl_millis * NANOS_PER_MILLISECOND if ttl_millis > 0 else None
            self._states[key] = (after, deadline)
            if deadline is not None and key not in self._queued:
                self._queued.add(key)
                heapq.heappush(self._queue, (deadline, key))
            self._drop_expired(2)
            return None

    def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        with self._lock:
            self._states.pop(key, None)

    def now_nanos(self, key: bytes) -> int:
        """The time by this store's clock."""
        return self._now()

    def close(self) -> None:
        """Nothing was opened."""

    def __len__(self) -> int:
        """Keys that are held, among them some that have expired."""
        return len(self._states)

    def _get(self, key: bytes) -> bytes | None:
        state, deadline = self._states.get(key, (None, None))
        if deadline is not None and deadline <= self._now():
            del self._states[key]
            return None
        return state

    def _drop_expired(self, most: int) -> None:
        """Each key has at most one place in the queue, by a deadline that may have been put off since."""
        now = self._now()
        for _ in range(most):
            if not self._queue or self._queue[0][0] > now:
                return
            _, key = heapq.heappop(self._queue)
            self._queued.discard(key)
            _, deadline = self._states.get(key, (None, None))
            if deadline is None:
                continue
            if deadline <= now:
                del self._states[key]
            else:
                self._queued.add(key)
                heapq.heappush(self._queue, (deadline, key))


def _bytes(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else key


class AsyncMemoryStore:
    """The same for asyncio.

    :param store: a store to share with sync code of this process; by default one of its own.
    :param clock: as for :class:`MemoryStore`, for a store of its own.
    """

    def __init__(self, store: MemoryStore | None = None, *, clock: Clock | None = None) -> None:
        self._store = store if store is not None else MemoryStore(clock=clock)

    async def get(self, key: Key) -> bytes | None:
        """The state under the key; None where there is none."""
        return self._store.get(key)

    async def put(self, key: Key, state: bytes) -> None:
        """Store a state, whatever is there, without expiry: for tests."""
        self._store.put(key, state)

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); None when done, else what is there."""
        return self._store.swap(key, before, after, ttl_millis)

    async def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        self._store.delete(key)

    def now_nanos(self, key: bytes) -> int:
        """The time by this store's clock."""
        return self._store.now_nanos(key)

    async def aclose(self) -> None:
        """Nothing was opened."""

    def __len__(self) -> int:
        """Keys that are held, among them some that have expired."""
        return len(self._store)
