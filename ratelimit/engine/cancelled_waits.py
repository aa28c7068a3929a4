"""Waits that were cancelled while others stood behind them, so that their places stay empty.

Once all those behind have left as well, the tokens of such a place can come back after all. A process knows only of its
own waits; so where the waits of several processes alternate, places stay empty until their time is over.
"""

from __future__ import annotations

from bisect import insort
from typing import Final, NamedTuple

from ratelimit.core.commands import Cancel
from ratelimit.runtime import fork_safety

# In all buckets of a manager, to bound its memory. Beyond it all are forgotten: the places then stay empty until their
# time is over.
_MOST_PLACES: Final = 10_000
# Steps in one request: a place has one for each bandwidth from which it has a surplus.
_MOST_AT_ONCE: Final = 100


class Place(NamedTuple):
    """A wait that was cancelled.

    :param until: when it would have been over, in seconds of the clock of deadlines.
    """

    cancel: Cancel
    until: float


def _order(place: Place) -> int:
    return place.cancel.noted


def _most_at_once(places: list[Place]) -> int:
    return max(1, _MOST_AT_ONCE // max([1, *[len(place.cancel.surplus) for place in places[-_MOST_AT_ONCE:]]]))


class _Bucket(NamedTuple):
    """What is known of one bucket.

    :param places: the empty places, in the order of their reservations.
    :param moved: the count of :meth:`CancelledWaits.moved` when the end of its queue last moved.
    """

    places: list[Place]
    moved: int


class CancelledWaits:
    """The empty places in all buckets of a manager. Safe for threads."""

    def __init__(self) -> None:
        self._buckets: dict[bytes, _Bucket] = {}
        self._count = 0
        self._moved = 0
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._forget)

    def moved(self) -> int:
        """Return how often the end of some queue has moved so far; to be read before the store is asked."""
        return self._moved

    def end(self, key: bytes, begun: int, asked: list[Place], answers: list[bool], now: float) -> list[Place]:
        """Keep the places that stay empty, and return those to ask for next, the last reservation first.

        There are some to ask for where the end of the queue has moved since the store was asked: by these answers, or
        by those to another thread or task.

        :param begun: what :meth:`moved` has returned.
        :param answers: the store's answer for each place that was asked for; empty where the store has failed.
        """
        with self._lock:
            known = self._buckets.pop(key, None)
            if any(answers):
                self._moved += 1
            moved = self._moved if known is None or any(answers) else known.moved
            places = [] if known is None else known.places
            count = len(places)
            for place, answer in zip(asked, answers, strict=False):
                if not answer:
                    insort(places, place, key=_order)
            over = 0
            # The place that was reserved first is due first.
            while over < len(places) and places[over].until <= now:
                over += 1
            del places[:over]
            # Places that became the last of the queue can be given back. They are taken out until the store answers.
            following: list[Place] = []
            if moved > begun:
                following = places[-_most_at_once(places) :][::-1]
                del places[len(places) - len(following) :]
            if places or following:
                self._buckets[key] = _Bucket(places, moved)
            self._count += len(places) - count
            if max(self._count, len(self._buckets)) > _MOST_PLACES:
                self._forget()
            return following

    def forget(self, key: bytes) -> None:
        """Drop the places in a bucket that has been removed."""
        with self._lock:
            known = self._buckets.pop(key, None)
            if known is not None:
                self._count -= len(known.places)

    def _forget(self) -> None:
        """Let all places stay empty; in a forked process they are the parent's."""
        self._buckets.clear()
        self._count = 0
