"""Choose between a swap and the script, by whether what a process remembers of a bucket is likely to be current.

Both ways take one round trip where nothing comes in between. A *swap* is computed here from the bytes that are
remembered, and takes the server the least time. But where another process has written the bucket since, the swap is
lost, and its round trip with it. The *script* is right whatever is stored. It takes the server about a third more time
than a swap, and this process less. So a swap pays only where it is nearly always won: one that is lost costs as much as
some fifty others gain.

- A key of which nothing is known is decided by the script, and so is a key that others write.
- Bytes that this process wrote last, or has seen once, are swapped. But where bytes that were seen once have mostly
  been found changed, as where the workers of a service share all keys, they are not swapped before they are proved.
- A swap that is lost takes the trust in its key away. From then on, about every seventh decision by the script asks for
  the state, and the next one looks whether it is still there. If so, the trust grows, and in the end the key is swapped
  again; else it falls further.
"""

from __future__ import annotations

from typing import Final

from ratelimit.engine.last_seen import UNKNOWN, Sighting

PROVED: Final = 1
"""The trust in bytes that nobody but this process is known to write."""

_LEAST_TRUST: Final = -64
_LOST_BY_CHANGE: Final = 16
_GAINED_BY_PROOF: Final = 8

# Of bytes that were seen once: a change counts as much as seven proofs, and where changes prevail they are not swapped.
_MOST_CHANGES: Final = 64
_CHANGES_THAT_PREVAIL: Final = 16
_CHANGE: Final = 7

# One in so many decisions by the script asks for the state, to learn whose the bucket is. It is a prime, because other
# writers may have a rhythm, too.
_ASK_ONE_IN: Final = 7

BUSY: Final = 8
"""Others write a bucket that is so often behind, so often that a strict request would mostly not be run.

Two strict requests in a row that were not run make a bucket a busy one, for which they are dropped for a while.
"""

_NOT_RUN: Final = 4
_BUSIEST: Final = 16


class Habit:
    """What has become of the bytes that a manager remembered.

    Threads change it without a lock: a change that is lost costs nothing but a guess.

    :ivar needed_trust: the trust that bytes need to be swapped.
    """

    __slots__ = ("_changes", "_turn", "needed_trust")

    def __init__(self) -> None:
        self.needed_trust = 0
        self._changes = 0
        self._turn = 0

    def proved(self, seen: Sighting) -> int:
        """Return the trust in a key whose bytes were found as they were remembered."""
        if seen.trust == 0:
            self._count(-1)
        return PROVED if seen.trust + _GAINED_BY_PROOF >= 0 else seen.trust + _GAINED_BY_PROOF

    def changed(self, seen: Sighting, times: int = 1) -> int:
        """Return the trust in a key whose bytes were found changed by others."""
        if seen.trust == 0:
            self._count(_CHANGE)
        return max(_LEAST_TRUST, min(seen.trust, UNKNOWN) - times * _LOST_BY_CHANGE)

    def _count(self, changes: int) -> None:
        self._changes = counted = max(0, min(_MOST_CHANGES, self._changes + changes))
        self.needed_trust = PROVED if counted >= _CHANGES_THAT_PREVAIL else 0

    def wants_to_see(self, seen: Sighting) -> bool:
        """Return whether a decision by the script is to show the state, for what can be learnt from it."""
        if seen.stored is not None or (seen.trust == UNKNOWN and self.needed_trust == 0):
            return True
        self._turn = turn = (self._turn + 1) % _ASK_ONE_IN
        return turn == 0


def busier(seen: Sighting) -> int:
    """Return how busy a bucket is after a strict request that was not run."""
    return min(_BUSIEST, seen.behind + _NOT_RUN)
