"""The states that a manager last saw, within bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import NamedTuple

_OVERHEAD_BYTES = 400  # of an entry: two bytes objects, a tuple, and a place in the dictionary, roughly


class Seen(NamedTuple):
    """What a manager knows of a key: the state, None if nothing, and whether others have been seen to write it."""

    state: bytes | None
    by_others: bool


_NOTHING = Seen(None, by_others=False)


class Remembered:
    """The bytes last seen under each key, and whether others write it; the least recently used go first.

    What is remembered is only ever a guess that the store confirms: forgetting costs a round trip, no more. Safe for
    threads.

    :param limit_bytes: roughly the memory that it may take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._size = 0
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self._lock = Lock()

    def get(self, key: bytes) -> Seen:
        """What was last seen."""
        with self._lock:
            seen = self._seen.get(key)
            if seen is None:
                return _NOTHING
            self._seen.move_to_end(key)
            return seen

    def put(self, key: bytes, state: bytes | None, *, by_others: bool = False) -> None:
        """Remember a state; None: forget the key. Where others were seen to write once they are expected again."""
        with self._lock:
            old = self._seen.pop(key, None)
            if old is not None:
                self._size -= _weight(key, old)
                by_others = by_others or old.by_others
            if state is None:
                return
            seen = self._seen[key] = Seen(state, by_others)
            self._size += _weight(key, seen)
            while self._size > self._limit:
                self._size -= _weight(*self._seen.popitem(last=False))


def _weight(key: bytes, seen: Seen) -> int:
    return len(key) + len(seen.state or b"") + _OVERHEAD_BYTES
