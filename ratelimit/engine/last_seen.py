"""The states that a manager last saw, within bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from ratelimit.core.token_bucket.state import BucketState
from ratelimit.runtime import fork_safety

_OVERHEAD_BYTES = 400  # of an entry: two bytes objects, a tuple, and a place in the dictionary, roughly
_BUCKET_BYTES = 150  # of a state that is kept as numbers as well, and as many for each of its bandwidths, roughly


class Seen(NamedTuple):
    """What a manager knows of a key.

    :param state: what was stored there, None if nothing.
    :param bucket: the same as numbers, if they are at hand.
    :param lost: swaps lost to others, since one was won at the first attempt.
    :param undisturbed: decisions of the store itself, since one that others had come before.
    """

    state: bytes | None
    bucket: BucketState | None = None
    lost: int = 0
    undisturbed: int = 0


_NOTHING = Seen(None)


class Remembered:
    """The state last seen under each key, and how it was come by; the least recently used go first.

    What is remembered is only ever a guess that the store confirms: forgetting costs a round trip, no more. Safe for
    threads.

    :param limit_bytes: roughly the memory that it may take.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._size = 0
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self._lock = fork_safety.lock()

    def get(self, key: bytes) -> Seen:
        """What was last seen."""
        return self._seen.get(key, _NOTHING)

    def forget(self, key: bytes) -> None:
        """Expect nothing there."""
        self.put(key, _NOTHING)

    def put(self, key: bytes, seen: Seen) -> None:
        """Remember what was seen; where that is nothing the key is forgotten."""
        state = seen.state
        with self._lock:
            old = self._seen.get(key)
            if old is not None:
                if (
                    state is not None
                    and len(state) == len(old.state or b"")
                    and (seen.bucket is None) is (old.bucket is None)
                ):  # both weigh the same, as they usually do
                    self._seen[key] = seen
                    self._seen.move_to_end(key)
                    return
                self._drop(key, old)
            if state is None:
                return
            weight = _weight(key, seen)
            self._seen[key] = seen
            self._size += weight
            while self._size > self._limit:
                self._drop(*next(iter(self._seen.items())))

    def _drop(self, key: bytes, seen: Seen) -> None:
        weight = _weight(key, seen)
        # Between these two there is no call, at which the handler of a signal might come in.
        del self._seen[key]
        self._size -= weight


def _weight(key: bytes, seen: Seen) -> int:
    numbers = 0 if seen.bucket is None else _BUCKET_BYTES * (1 + len(seen.bucket.bandwidth_states))
    return len(key) + len(seen.state or b"") + _OVERHEAD_BYTES + numbers
