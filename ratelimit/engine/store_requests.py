"""What the loop asks of a store and of clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from ratelimit.engine.delegation import Habit
from ratelimit.engine.face import Face
from ratelimit.engine.last_seen import LastSeen, Sighting
from ratelimit.runtime.clock import Clock, has_unique_readings
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import (
    AsyncStore,
    AtomicDecidingStore,
    AtomicStore,
    Decided,
    DecidingStore,
    ExpressStore,
    Lost,
    Store,
    Swap,
)


class Tuning(NamedTuple):
    """How the loop decides; tests set it, to send all decisions one way.

    :param most_attempts: swaps that one decision may lose before it gives up.
    :param swaps: whether bytes that are remembered are swapped, as long as they are likely to be current.
    :param delegates: whether the store is asked to decide, where it can.
    """

    most_attempts: int = 100
    swaps: bool = True
    delegates: bool = True


DEFAULT_TUNING: Final = Tuning()


@dataclass(slots=True)
class Requests:
    """What the loop asks of a store and of clocks.

    Every request takes a deadline, also where the store itself knows none.

    :param get: reads what is stored; as ``Store.get``.
    :param swap: swaps; as ``Store.swap``.
    :param swapping: swaps, in steps.
    :param now_nanos: asks for the time; as ``Store.now_nanos``.
    :param now: returns the time by which a key is decided about; None where a read has to bring it first.
    :param known_now: returns that time where it is known without asking a store that can decide; None elsewhere.
    :param delete: deletes; as ``Store.delete``.
    :param decide: lets the store decide; None where it cannot.
    :param deciding: lets the store decide, in steps.
    :param express: the store, where it shows its usual requests; None elsewhere.
    :param swap_all: swaps under several keys; None where the store cannot.
    :param decide_all: lets the store decide about several buckets; None where it cannot.
    :param pause: waits for a number of nanoseconds between attempts, in real time.
    :param monotonic: the clock of deadlines, in seconds.
    :param last_seen: gives what was last seen under a key, or the sighting beside it.
    :param remember: keeps what was seen under a key.
    :param unique_readings: whether no two readings of ``now`` are alike, in whichever process.
    :param habit: whether what the manager remembers is usually current.
    """

    get: Callable[..., Any]
    swap: Callable[..., Any]
    swapping: Callable[..., Steps[Lost | None]]
    now_nanos: Callable[..., Any]
    now: Callable[[bytes], Any]
    known_now: Callable[[bytes], Any]
    delete: Callable[..., Any]
    decide: Callable[..., Any] | None
    deciding: Callable[..., Steps[Decided | int]] | None
    express: ExpressStore | None
    pause: Callable[[int], Any]
    monotonic: Callable[[], float]
    unique_readings: bool
    last_seen: Callable[[bytes, Sighting], Sighting]
    remember: Callable[[bytes, Sighting], None]
    tuning: Tuning
    habit: Habit = field(default_factory=Habit)
    swap_all: Callable[..., Any] | None = None
    decide_all: Callable[..., Any] | None = None


def requests_to(
    store: Store | AsyncStore,
    clock: Clock | None,
    face: Face,
    last_seen: LastSeen,
    tuning: Tuning,
) -> Requests:
    """Return the requests to a store.

    :param clock: gives the time by which keys are decided about; None: the store gives it.
    """
    deciding = store if isinstance(store, DecidingStore) else None
    asks: Any = _WithDeadlines(store) if deciding is None else store
    by_clock = None if clock is None else now_of(clock)
    now = by_clock or (store.now_nanos if deciding is None else deciding.known_now)
    return Requests(
        get=asks.get,
        swap=asks.swap,
        swapping=asks.swapping,
        now_nanos=asks.now_nanos,
        delete=asks.delete,
        now=now,
        # The time of any other store may cost a request, or come as an awaitable. It is read only when it is needed.
        known_now=_nothing_known if deciding is None else now,
        decide=None if deciding is None else deciding.decide,
        deciding=None if deciding is None else deciding.deciding,
        express=store if isinstance(store, ExpressStore) else None,
        pause=face.pause,
        monotonic=face.monotonic,
        unique_readings=has_unique_readings(store if clock is None else clock),
        last_seen=last_seen.get,
        remember=last_seen.put,
        tuning=tuning,
        swap_all=asks.swap_all if isinstance(store, AtomicStore) else None,
        decide_all=deciding.decide_all if isinstance(deciding, AtomicDecidingStore) else None,
    )


class _WithDeadlines:
    """A store that knows no deadlines, asked as if it knew them."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def get(self, key: bytes, *, deadline: float | None) -> Any:
        return self._store.get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl: int, *, deadline: float | None) -> Any:
        return self._store.swap(key, before, after, ttl)

    def swapping(self, key: bytes, before: bytes | None, after: bytes, ttl: int, deadline: float | None) -> Steps[Any]:
        return (yield self._store.swap(key, before, after, ttl))

    def swap_all(self, swaps: Sequence[Swap], *, deadline: float | None) -> Any:
        return self._store.swap_all(swaps)

    def now_nanos(self, key: bytes, *, deadline: float | None) -> Any:
        return self._store.now_nanos(key)

    def delete(self, key: bytes, *, deadline: float | None) -> Any:
        return self._store.delete(key)


def now_of(clock: Clock) -> Callable[[bytes], int]:
    """Return a function that reads the time from a clock, whatever the key."""
    return lambda _key: clock.now_nanos()


def _nothing_known(_key: bytes) -> None:
    return None
