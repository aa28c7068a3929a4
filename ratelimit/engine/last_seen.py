"""What a manager has last seen in the store, within bounded memory.

It is only ever a guess that the store confirms: forgetting costs a round trip, and no more.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ratelimit.core.algorithm import State
from ratelimit.runtime import fork_safety
from ratelimit.runtime.bounded import BoundedMap

_OVERHEAD_BYTES: Final = 400  # of an entry: two bytes objects, a tuple, and a place in the dictionary, roughly
_BYTES_OF_A_BYTE: Final = 5  # what a stored byte takes here: itself, and its part of the state as numbers, roughly


UNKNOWN: Final = -1
"""The trust in a key of which nothing is known."""


class Sighting(NamedTuple):
    """What is known of a key.

    :param stored: the bytes that were stored; None: nothing was, or nobody knows what.
    :param state: the state that these bytes hold, if they have been decoded.
    :param trust: whether the bytes are likely to be there still: above 0 where a swap has shown that nobody else had
        written them, 0 where they were seen once, and below ``UNKNOWN`` where others write the bucket, the more the
        further below.
    :param behind: how often of late a strict request was not run, because its time was not later than the last refill.
    """

    stored: bytes | None
    state: State | None = None
    trust: int = 0
    behind: int = 0


NOTHING_SEEN: Final = Sighting(None, None, UNKNOWN)


class LastSeen:
    """The last sighting of each key; the least recently used are forgotten first. Safe for threads.

    :param limit_bytes: roughly the memory that it may take.
    :ivar get: gives the sighting under a key, or the one that is given beside it.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._sightings = BoundedMap[Sighting](limit_bytes, _weight)
        self._values = self._sightings.values
        self._lock = fork_safety.lock()
        # A method of the dictionary itself, because every decision calls it.
        self.get: Final = self._values.get

    def forget(self, key: bytes) -> None:
        """Expect nothing under a key."""
        self.put(key, NOTHING_SEEN)

    def put(self, key: bytes, sighting: Sighting) -> None:
        """Remember what was seen; a key of which nothing is known is forgotten."""
        values, stored = self._values, sighting.stored
        with self._lock:
            old = values.get(key)
            if old is not None and stored is not None and old.stored is not None and len(stored) == len(old.stored):
                # Both weigh the same, as they usually do.
                values[key] = sighting
                values.move_to_end(key)
                return
            if stored is None and sighting.trust >= UNKNOWN:
                self._sightings.drop(key)
            else:
                self._sightings.put(key, sighting)
                self._sightings.shrink()


def _weight(key: bytes, sighting: Sighting) -> int:
    return len(key) + len(sighting.stored or b"") * _BYTES_OF_A_BYTE + _OVERHEAD_BYTES
