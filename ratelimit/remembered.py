"""The states that a manager last saw, within bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock

_OVERHEAD_BYTES = 300  # of an entry: two bytes objects and a place in the dictionary, roughly


class Remembered:
    """The bytes last seen under each key; the least recently used go first. Safe for threads.

    What is remembered is only ever a guess that the store confirms: forgetting costs a round trip, no more.

    :param limit_bytes: roughly the memory that it may take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._size = 0
        self._states: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = Lock()

    def get(self, key: bytes) -> bytes | None:
        """The state last seen, or None."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def put(self, key: bytes, state: bytes | None) -> None:
        """Remember a state; None: forget the key."""
        with self._lock:
            old = self._states.pop(key, None)
            if old is not None:
                self._size -= _weight(key, old)
            if state is None:
                return
            self._states[key] = state
            self._size += _weight(key, state)
            while self._size > self._limit:
                self._size -= _weight(*self._states.popitem(last=False))


def _weight(key: bytes, state: bytes) -> int:
    return len(key) + len(state) + _OVERHEAD_BYTES
