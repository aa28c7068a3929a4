"""Waits that were cancelled while others stood behind them, so that their places stay empty.

Once all those behind have left as well, the tokens of such a place can come back after all. A process knows only of its
own waits; so where the waits of several processes alternate, places stay empty until their time is over.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ratelimit import forks
from ratelimit.core.commands import Cancel

_MOST_PLACES: Final = 10_000  # of one manager
_MOST_AT_ONCE: Final = 100  # in one request


class Place(NamedTuple):
    """A wait that was cancelled.

    :param until: when it would have been over, in seconds of the clock of deadlines.
    """

    cancel: Cancel
    until: float


@dataclass(slots=True)
class _Bucket:
    """What is known of one bucket.

    :param places: that are empty, in the order of their reservations.
    :param asking: how many requests about it are under way.
    :param undone: how often the end of its queue has moved.
    """

    places: list[Place] = field(default_factory=list)
    asking: int = 0
    undone: int = 0


class CancelledWaits:
    """The empty places in all buckets of a manager. Safe for threads."""

    def __init__(self) -> None:
        self._buckets: dict[bytes, _Bucket] = {}
        self._count = 0
        self._lock = forks.lock()
        forks.call_in_child(self._forget)

    def begin(self, key: bytes) -> int:
        """Note that the store will be asked, and return how often reservations have been undone."""
        with self._lock:
            bucket = self._buckets.setdefault(key, _Bucket())
            bucket.asking += 1
            return bucket.undone

    def end(self, key: bytes, begun: int, asked: list[Place], answers: list[bool], now: float) -> list[Place]:
        """Keep the places that stay empty, and return those to ask for next, the last reservation first.

        :param begun: what :meth:`begin` has returned.
        :param answers: of the store, for each place that it was asked for; none where it has failed.
        """
        with self._lock:
            bucket = self._buckets.setdefault(key, _Bucket())
            bucket.asking = max(0, bucket.asking - 1)
            bucket.undone += any(answers)
            left = [place for place, answer in zip(asked, answers, strict=False) if not answer]
            places = [place for place in bucket.places + left if place.until > now]
            places.sort(key=lambda place: place.cancel.noted)
            following: list[Place] = []
            if bucket.undone != begun:
                following = places[-_MOST_AT_ONCE:][::-1]
                del places[len(places) - len(following) :]
            self._count += len(places) - len(bucket.places)
            bucket.places = places
            if not (places or bucket.asking):
                del self._buckets[key]
            if self._count > _MOST_PLACES:
                self._forget()
            return following

    def _forget(self) -> None:
        """Let all places stay empty; in a forked process they are the parent's."""
        self._buckets.clear()
        self._count = 0
