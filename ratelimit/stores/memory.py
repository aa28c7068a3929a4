"""Stores in the memory of one process."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from ratelimit.core.algorithm import State, decode, encode, out_of_range
from ratelimit.core.expiration import Expiration
from ratelimit.core.numbers import NANOS_PER_MILLISECOND, NEVER
from ratelimit.errors import InvalidArgumentError
from ratelimit.keys import Key, brief
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import MONOTONIC_IS_FINE, Clock, has_unique_readings, steady_clock
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.stores.protocol import Lost, Swap

T = TypeVar("T")

_ADVICE: Final = "processes share buckets through Redis"


class _Entry:
    """What is held under a key: bytes, or a state that has not been needed as bytes yet.

    :ivar surely_until: before this time the entry has not expired; afterwards ``deadline`` says whether it has.
    :ivar written: what the deadline of a state is computed from: the expiration, the time of the decision, and that of
        the store. It is computed once it is needed, which it never is while the bucket is in use.
    """

    __slots__ = ("data", "deadline", "state", "surely_until", "written")

    def __init__(self, data: bytes | None = None, deadline: int | None = None) -> None:
        self.data = data
        self.state: State | None = None
        self.deadline = deadline
        self.surely_until = NEVER if deadline is None else deadline
        self.written: tuple[Expiration, int, int] | None = None

    def as_bytes(self) -> bytes:
        if self.data is None:
            self.data = encode(self.state)  # type: ignore[arg-type]  # it holds one of them
        return self.data

    def as_state(self, key: bytes) -> State:
        if self.state is None:
            self.state = decode(self.data, key)  # type: ignore[arg-type]  # the same
        return self.state

    def has_expired(self, now: int) -> bool:
        if now < self.surely_until:
            return False
        if self.written is not None:
            expiration, decided_at, written_at = self.written
            self.deadline = _deadline(written_at, expiration.ttl_millis(self.as_state(b""), decided_at))
            self.surely_until = NEVER if self.deadline is None else self.deadline
            self.written = None
        return self.deadline is not None and self.deadline <= now


def _deadline(now: int, ttl_millis: int) -> int | None:
    return now + ttl_millis * NANOS_PER_MILLISECOND if ttl_millis > 0 else None


class SwappingMemoryStore(OfThisProcess):
    """Buckets in the memory of this process that are swapped as bytes, as those on a server are; for tests.

    It is what doubles of stores are made from: every decision goes through ``get`` and ``swap``, and one about several
    buckets through ``swap_all``. Safe for threads.

    States that have expired are dropped, a few with every write, so that memory follows the keys that are in use.

    :param clock: what time it is, for decisions and for expiry; by default the machine's monotonic clock, which begins
        at the present wall time and is not disturbed when that is set.
    """

    _advice = _ADVICE

    def __init__(self, *, clock: Clock | None = None) -> None:
        self._now = steady_clock() if clock is None else clock.now_nanos
        self.unique_readings: bool = MONOTONIC_IS_FINE if clock is None else has_unique_readings(clock)
        self._entries: dict[bytes, _Entry] = {}
        self._queue: list[tuple[int, bytes]] = []
        self._queued: set[bytes] = set()
        self._lock = fork_safety.lock()

    def get(self, key: Key) -> bytes | None:
        """Return the bytes under the key; None where there are none."""
        fork_safety.check()
        with self._lock:
            entry = self._live(_bytes(key), self._now())
            return None if entry is None else entry.as_bytes()

    def put(self, key: Key, state: bytes) -> None:
        """Store bytes without expiry, whatever is there: for tests."""
        fork_safety.check()
        with self._lock:
            self._entries[_bytes(key)] = _Entry(state)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); return None when done, else what is there."""
        fork_safety.check()
        with self._lock:
            now = self._now()
            entry = self._live(key, now)
            current = None if entry is None else entry.as_bytes()
            if current != before:
                return Lost(current)
            entry = self._entries[key] = _Entry(after, _deadline(now, ttl_millis))
            self._tidy(key, entry, now)
            return None

    def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        """Carry out all of the swaps, or none; see ``ratelimit.stores.protocol.AtomicStore``."""
        fork_safety.check()
        with self._lock:
            now = self._now()
            found: list[Lost | None] = []
            for key, before, _, _ in swaps:
                entry = self._live(key, now)
                current = None if entry is None else entry.as_bytes()
                found.append(None if current == before else Lost(current))
            if any(found):
                return found
            for key, _, after, ttl_millis in swaps:
                if after is not None:
                    entry = self._entries[key] = _Entry(after, _deadline(now, ttl_millis))
                    self._tidy(key, entry, now)
            return None

    def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        fork_safety.check()
        with self._lock:
            self._entries.pop(key, None)

    def keys(self, prefix: bytes) -> list[bytes]:
        """List the keys that begin with a prefix, among them some that have expired."""
        with self._lock:
            return [key for key in self._entries if key.startswith(prefix)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def now_nanos(self, key: bytes) -> int:
        """Return the time by this store's clock."""
        return self._now()

    def close(self) -> None:
        """Do nothing: nothing was opened."""

    def __len__(self) -> int:
        """Return how many keys are held, among them some that have expired."""
        return len(self._entries)

    def _live(self, key: bytes, now: int) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is not None and entry.has_expired(now):
            del self._entries[key]
            return None
        return entry

    def _tidy(self, key: bytes, entry: _Entry, now: int) -> None:
        """Queue what has been written, and drop a few of those that have expired.

        Each key has one place in the queue, by a time until which it has surely not expired. The handler of a signal
        that comes in between the steps below may add another place, but not take one away.
        """
        if key not in self._queued and entry.surely_until < NEVER:
            heapq.heappush(self._queue, (entry.surely_until, key))
            self._queued.add(key)
        for _ in range(2):
            if not self._queue or self._queue[0][0] > now:
                return
            self._queued.discard(self._queue[0][1])
            _, due = heapq.heappop(self._queue)
            found = self._entries.get(due)
            if found is None:
                continue
            if found.has_expired(now):
                del self._entries[due]
            elif found.surely_until < NEVER:
                heapq.heappush(self._queue, (found.surely_until, due))
                self._queued.add(due)


class MemoryStore(SwappingMemoryStore):
    """Buckets in the memory of this process, for services of one process and for tests. Safe for threads.

    States that have expired are dropped, a few with every write, so that memory follows the keys that are in use.

    Decisions go through :meth:`update`, and neither through ``get`` nor through ``swap``: a class that makes these its
    own derives from :class:`ratelimit.testing.SwappingMemoryStore`.

    :param clock: what time it is, for decisions and for expiry; by default the machine's monotonic clock, which begins
        at the present wall time and is not disturbed when that is set.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _refuse_bypassed(cls, MemoryStore, SwappingMemoryStore)

    def update(
        self,
        key: bytes,
        transition: Callable[[State | None, int], tuple[State | None, T]],
        expiration: Expiration,
        now: int | None,
        *,
        must_exist: bool,
    ) -> tuple[T, bool] | None:
        """Apply a function to the state under the key; see ``ratelimit.stores.protocol.UpdatingStore``."""
        with self._lock:
            written_at = self._now()
            if now is None:
                now = written_at
            entry = self._entries.get(key)
            if entry is not None and written_at >= entry.surely_until:
                entry = self._live(key, written_at)
            if entry is None:
                if must_exist:
                    return None
                before = None
            else:
                before = entry.state or entry.as_state(key)
            try:
                after, answer = transition(before, now)
            except ArithmeticError as error:
                raise out_of_range(b"" if entry is None else entry.as_bytes(), key) from error
            if after is None:
                return answer, False
            if entry is None:
                entry = self._entries[key] = _Entry()
            entry.data, entry.state, entry.written = None, after, (expiration, now, written_at)
            entry.surely_until = written_at + expiration.shortest_ttl_nanos
            if key not in self._queued or self._queue[0][0] <= written_at:
                self._tidy(key, entry, written_at)
            return answer, before is None or before.configuration_version != after.configuration_version

    def update_all(
        self,
        keys: Sequence[bytes],
        transition: Callable[[list[State | None], int], tuple[list[State | None], T]],
        expirations: Sequence[Expiration],
        now: int | None,
    ) -> T:
        """Apply a function to the states under the keys; see ``ratelimit.stores.protocol.AtomicUpdatingStore``."""
        with self._lock:
            written_at = self._now()
            if now is None:
                now = written_at
            entries = [self._live(key, written_at) for key in keys]
            befores = [None if entry is None else entry.as_state(key) for key, entry in zip(keys, entries, strict=True)]
            afters, answer = transition(befores, now)
            for key, entry, after, expiration in zip(keys, entries, afters, expirations, strict=True):
                if after is None:
                    continue
                written = self._entries[key] = entry or _Entry()
                written.data, written.state, written.written = None, after, (expiration, now, written_at)
                written.surely_until = written_at + expiration.shortest_ttl_nanos
                self._tidy(key, written, written_at)
            return answer


class AsyncSwappingMemoryStore(OfThisProcess):
    """A :class:`SwappingMemoryStore` whose methods are awaited, for tests.

    :param store: a store to share with sync code of this process; by default one of its own.
    :param clock: what time it is for a store of its own; see :class:`ratelimit.MemoryStore`.
    """

    _advice = _ADVICE

    def __init__(self, store: SwappingMemoryStore | None = None, *, clock: Clock | None = None) -> None:
        self._store = store if store is not None else SwappingMemoryStore(clock=clock)
        self.unique_readings = self._store.unique_readings

    async def get(self, key: Key) -> bytes | None:
        """Return the bytes under the key; None where there are none."""
        return self._store.get(key)

    async def put(self, key: Key, state: bytes) -> None:
        """Store bytes without expiry, whatever is there: for tests."""
        self._store.put(key, state)

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before`` (None: nothing); return None when done, else what is there."""
        return self._store.swap(key, before, after, ttl_millis)

    async def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        """Carry out all of the swaps, or none; see ``ratelimit.stores.protocol.AtomicStore``."""
        return self._store.swap_all(swaps)

    async def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        self._store.delete(key)

    async def keys(self, prefix: bytes) -> list[bytes]:
        """List the keys that begin with a prefix, among them some that have expired."""
        return self._store.keys(prefix)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def now_nanos(self, key: bytes) -> int:
        """Return the time by this store's clock."""
        return self._store.now_nanos(key)

    async def aclose(self) -> None:
        """Do nothing: nothing was opened."""

    def __len__(self) -> int:
        """Return how many keys are held, among them some that have expired."""
        return len(self._store)


class AsyncMemoryStore(AsyncSwappingMemoryStore):
    """A :class:`MemoryStore` for asyncio.

    :param store: a store to share with sync code of this process; by default one of its own.
    :param clock: what time it is for a store of its own; see :class:`ratelimit.MemoryStore`.
    :raises InvalidArgumentError: for a store that is not a ``MemoryStore``.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _refuse_bypassed(cls, AsyncMemoryStore, AsyncSwappingMemoryStore)

    def __init__(self, store: MemoryStore | None = None, *, clock: Clock | None = None) -> None:
        if store is not None and not isinstance(store, MemoryStore):
            raise InvalidArgumentError(
                f"store must be a MemoryStore, or be given to an AsyncSwappingMemoryStore; got {brief(store)}"
            )
        own = store if store is not None else MemoryStore(clock=clock)
        super().__init__(own)
        self.update = own.update
        """There is nothing to await: see :meth:`MemoryStore.update`."""
        self.update_all = own.update_all
        """There is nothing to await: see :meth:`MemoryStore.update_all`."""


def _refuse_bypassed(cls: type, base: type, instead: type) -> None:
    """Refuse a class whose own ``get`` or ``swap`` no decision would ask.

    :raises TypeError: saying what to derive from.
    """
    own = [name for name in ("get", "swap") if getattr(cls, name) is not getattr(base, name)]
    if own:
        raise TypeError(
            f"{cls.__name__}.{own[0]} would be bypassed, since {base.__name__} decides by update(); "
            f"derive from ratelimit.testing.{instead.__name__}"
        )


def _bytes(key: Key) -> bytes:
    return key.encode() if isinstance(key, str) else key
