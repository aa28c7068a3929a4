"""The state of a bucket that is limited by sliding windows: when how many tokens were used.

Each window keeps a log of its own. An entry says that so many tokens count as used at a time, a whole number of *ticks*
of the window's grain. Times are rounded up to a tick, so that a token never counts for less than the length of the
window. An entry is dropped as soon as that length has passed.

Tokens that are reserved are entries in the future, at the time when their owner uses them. They count from the moment
of the reservation. So whatever span is looked at, the entries in it were all counted when the last of them was made,
and there are never more of them than the capacity.

After a wait was granted, no token is there before that wait is over: what was free before is less than what was asked
for. So waits are served in their order, and of the entries only those within one window before the last one say when
the next wait is over. Older ones only say how many tokens are missing until then; they are merged where there are many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple

from ratelimit.core.algorithm import Level, State, Surplus
from ratelimit.core.numbers import MAX, MIN, NEVER, wrap
from ratelimit.core.sliding_window.configuration import GRID, SlidingWindow, SlidingWindows

Entries = tuple[tuple[int, int], ...]
"""Ticks and the tokens that count from then, in the order of the ticks, each of which is there once."""

MOST_ENTRIES: Final = 120
"""The most entries of a window; it bounds the bytes of a state, and the work that stored bytes can cause."""

_ENTRIES_OF_A_WINDOW: Final = GRID + 1
"""The most entries that are within one window, unless tokens were used that were not there."""


class Window(NamedTuple):
    """What is kept of one sliding window.

    :param current_size: the tokens that can be consumed; negative in debt.
    :param entries: the tokens that count as used: times in units of the window's grain, and tokens.
    """

    current_size: int
    entries: Entries


class SlidingWindowState(NamedTuple):
    """What is stored under a key: the windows, their version, tokens consumed so far, and a log for each window.

    :param at: the latest time that the bucket was changed at, in nanoseconds since the epoch. It never goes back.
    """

    configuration: SlidingWindow | SlidingWindows
    configuration_version: int | None
    consumed_tokens: int
    at: int
    bandwidth_states: tuple[Window, ...]

    @classmethod
    def initial(
        cls, configuration: SlidingWindow | SlidingWindows, version: int | None, now: int
    ) -> SlidingWindowState:
        """Return the state of a bucket that is made at this time."""
        return cls(
            configuration, version, 0, now, tuple([Window(limit.capacity, ()) for limit in configuration.windows])
        )

    @property
    def available_tokens(self) -> int:
        """The tokens that can be consumed, those of the scarcest window; negative in debt."""
        return min([window.current_size for window in self.bandwidth_states])

    @property
    def is_new_when_full(self) -> bool:
        """Whether this bucket is like a new one once it is full: yes, unless it holds more than its capacity."""
        pairs = zip(self.configuration.windows, self.bandwidth_states, strict=True)
        return all(window.current_size <= limit.capacity for limit, window in pairs)

    @property
    def reserves_beyond_capacity(self) -> bool:
        """Whether more than a window holds may be reserved: never, since that would be too many in one window."""
        return False

    def refilled(self, now: int) -> SlidingWindowState:
        """Return the state without the entries whose time is over; a clock that went back changes nothing."""
        configuration, version, consumed, at, windows = self
        at = max(at, now)
        pairs = zip(configuration.windows, windows, strict=True)
        refilled = tuple([_refilled(limit, window, at) for limit, window in pairs])
        return SlidingWindowState(configuration, version, consumed, at, refilled)

    def refilled_and_consumed(self, tokens: int, now: int) -> SlidingWindowState | None:
        """Refill and consume in one step; return None where the tokens are not all there."""
        state = self.refilled(now)
        return None if tokens > state.available_tokens else state.consumed(tokens)

    def consumed(self, tokens: int) -> SlidingWindowState:
        """Return the state with these tokens used now, whether they are there or not."""
        return self._used(tokens, self.at)

    def reserved(self, tokens: int, wait: int, now: int) -> tuple[SlidingWindowState, tuple[Surplus, ...]]:
        """Return the state with these tokens used when this wait is over, and that time in the place of a surplus."""
        due = max(self.at, now + wait)
        return self._used(tokens, due), ((due, 0),)

    def cancelled(self, tokens: int, noted: int, surplus: tuple[Surplus, ...]) -> SlidingWindowState:
        """Return the state without a reservation: its entry is known by its time.

        Those that were made later keep theirs. A call that comes now may be served in its place, which leaves every
        window within its capacity.

        :param surplus: the time at which the tokens were to be used. Under another algorithm something else was noted,
            and nothing of it is in the log.
        """
        if len(surplus) != 1:
            return self._counted(self.bandwidth_states, -tokens)
        ((due, _),) = surplus
        windows = []
        for limit, window in zip(self.configuration.windows, self.bandwidth_states, strict=True):
            place = bisect_left(window.entries, (_tick(limit, due),))
            is_there = place < len(window.entries) and due + limit.window_nanos > self.at
            windows.append(_less(window, tokens, (place,)) if is_there else window)
        return self._counted(tuple(windows), -tokens)

    def given_back(self, tokens: int) -> SlidingWindowState:
        """Return the state as if these tokens had not been used: the last ones that were. Waits keep their times."""
        pairs = zip(self.configuration.windows, self.bandwidth_states, strict=True)
        windows = []
        for limit, window in pairs:
            past = self._past(limit, window)
            windows.append(_less(window, tokens, range(past - 1, -1, -1)))
        return self._counted(tuple(windows), -tokens)

    def added(self, tokens: int) -> SlidingWindowState:
        """Return the state with these tokens put in, up to the capacity: so many less count as used."""
        pairs = zip(self.configuration.windows, self.bandwidth_states, strict=True)
        return self._counted(tuple([self._added(limit, window, tokens) for limit, window in pairs]), 0)

    def force_added(self, tokens: int) -> SlidingWindowState:
        """Return the state with these tokens put in, above the capacity if need be."""
        windows = []
        for limit, window in zip(self.configuration.windows, self.bandwidth_states, strict=True):
            added = self._added(limit, window, tokens)
            windows.append(added._replace(current_size=min(MAX, window.current_size + tokens)))
        return self._counted(tuple(windows), 0)

    def reset(self) -> SlidingWindowState:
        """Return the state in which nothing counts as used, and nothing is reserved."""
        return self._counted(tuple([Window(limit.capacity, ()) for limit in self.configuration.windows]), 0)

    def held_back(self, nanos: int, now: int) -> SlidingWindowState | None:
        """Return the state whose next token is not there before this long from now; None where that is so already.

        In the shortest window, whose grain is the finest, so many tokens count as used that the last of them are over
        at that time.
        """
        if self.nanos_until(1, now, check_capacity=False) >= nanos:
            return None
        limits, windows = self.configuration.windows, self.bandwidth_states
        place = min(range(len(limits)), key=lambda place: limits[place].window_nanos)
        limit, window = limits[place], windows[place]
        until = min(MAX, max(self.at, now) + nanos)
        first = -((limit.window_nanos - until) // limit.grain)
        # These count until then, or for longer.
        there = sum([count for tick, count in window.entries if tick >= first])
        missing = limit.capacity - there
        entries = bounded(_with(window.entries, first, missing)) if missing > 0 else window.entries
        held = Window(limit.capacity - sum([count for _, count in entries]), entries)
        return self._counted((*windows[:place], held, *windows[place + 1 :]), 0)

    def nanos_until(self, tokens: int, now: int, *, check_capacity: bool) -> int:
        """Return how long until this many tokens are there, to the nanosecond; NEVER beyond 64 bits.

        More than a window holds are never there at once. Without ``check_capacity``, the wait is that of somebody that
        takes all that the window holds each time, until there were enough.
        """
        pairs = zip(self.configuration.windows, self.bandwidth_states, strict=True)
        return max([_nanos_until(limit, window, tokens, now, check_capacity) for limit, window in pairs])

    def nanos_until_full(self, now: int) -> int:
        """Return how long until nothing counts as used in any window."""
        pairs = zip(self.configuration.windows, self.bandwidth_states, strict=True)
        return max([_nanos_until_full(limit, window, now) for limit, window in pairs])

    def shows(self, before: State | None, now: int) -> bool:
        """Return whether the state holds this reading of the clock, which the one that it comes from does not."""
        known = before.at if isinstance(before, SlidingWindowState) else None
        return self.at == now != known

    def _used(self, tokens: int, due: int) -> SlidingWindowState:
        pairs = zip(self.configuration.windows, self.bandwidth_states, strict=True)
        return self._counted(tuple([used(limit, window, tokens, due) for limit, window in pairs]), tokens)

    def _counted(self, windows: tuple[Window, ...], tokens: int) -> SlidingWindowState:
        configuration, version, consumed, at, _ = self
        return SlidingWindowState(configuration, version, wrap(consumed + tokens), at, windows)

    def _past(self, limit: SlidingWindow, window: Window) -> int:
        """Return how many entries are not in the future."""
        return bisect_left(window.entries, (_tick(limit, self.at) + 1,))

    def _added(self, limit: SlidingWindow, window: Window, tokens: int) -> Window:
        # Tokens of those that wait come last, so that these still count when they leave.
        past = self._past(limit, window)
        places = (*range(past - 1, -1, -1), *range(past, len(window.entries)))
        return _less(window, tokens, places)


def levels(configuration: SlidingWindow | SlidingWindows, windows: tuple[Window, ...], now: int) -> tuple[Level, ...]:
    """Return how full each window is, as if it stood alone."""
    return tuple([_level(*pair, now) for pair in zip(configuration.windows, windows, strict=True)])


def _level(limit: SlidingWindow, window: Window, now: int) -> Level:
    tokens, next_token = window.current_size, NEVER
    if tokens < limit.capacity:
        next_token = _nanos_until(limit, window, max(0, tokens) + 1, now, True)
    return Level(limit, tokens, next_token, _nanos_until_full(limit, window, now))


def used(limit: SlidingWindow, window: Window, tokens: int, due: int) -> Window:
    """Return a window with tokens that count as used at this time, but no more than 64 bits hold.

    Tokens above the capacity, which were put in by force, are used first, and not counted.
    """
    size, entries = window
    tokens = min(tokens, size - MIN)
    counted = tokens - max(0, size - limit.capacity)
    if counted <= 0:
        return Window(size - tokens, entries)
    return Window(size - tokens, bounded(_with(entries, _tick(limit, due), counted)))


def bounded(entries: Entries) -> Entries:
    """Return the entries, merged by pairs where there are too many.

    A merged entry has the later one's time, so that no token counts for less. The newest entries, which say when the
    next wait is over, stay as they are.
    """
    if len(entries) <= MOST_ENTRIES:
        return entries
    older, newest = entries[:-_ENTRIES_OF_A_WINDOW], entries[-_ENTRIES_OF_A_WINDOW:]
    merged = []
    for place in range(0, len(older), 2):
        pair = older[place : place + 2]
        merged.append((pair[-1][0], sum([count for _, count in pair])))
    return bounded((*merged, *newest))


def _tick(limit: SlidingWindow, time: int) -> int:
    """Return a time in units of the grain, rounded up."""
    return -(-time // limit.grain)


def _with(entries: Entries, tick: int, tokens: int) -> Entries:
    """Return the entries with one more, or with a larger one."""
    if not entries or entries[-1][0] < tick:
        return (*entries, (tick, tokens))
    place = bisect_left(entries, (tick,))
    found, count = entries[place]
    if found == tick:
        return (*entries[:place], (tick, count + tokens), *entries[place + 1 :])
    return (*entries[:place], (tick, tokens), *entries[place:])


def _less(window: Window, tokens: int, places: Iterable[int]) -> Window:
    """Return a window with fewer used tokens.

    :param places: which entries lose them, in this order.
    """
    size, entries = window
    counts = [count for _, count in entries]
    left = tokens
    for place in places:
        taken = min(counts[place], left)
        counts[place] -= taken
        left -= taken
    kept = [(tick, count) for (tick, _), count in zip(entries, counts, strict=True) if count]
    return Window(size + tokens - left, tuple(kept))


def _refilled(limit: SlidingWindow, window: Window, at: int) -> Window:
    size, entries = window
    # An entry counts while tick x grain + length > at.
    over = (at - limit.window_nanos) // limit.grain
    if not entries or entries[0][0] > over:
        return window
    gone = bisect_left(entries, (over + 1,))
    return Window(size + sum([count for _, count in entries[:gone]]), entries[gone:])


def _nanos_until(limit: SlidingWindow, window: Window, tokens: int, now: int, check_capacity: bool) -> int:
    size, entries = window
    if tokens <= size:
        return 0
    capacity, length = limit.capacity, limit.window_nanos
    if check_capacity and tokens > capacity:
        return NEVER
    at_once, due = min(tokens, capacity), now
    for tick, count in entries:
        if size >= at_once:
            break
        size += count
        due = tick * limit.grain + length
    due += (tokens - 1) // capacity * length
    # A time beyond 64 bits could not be stored.
    return NEVER if due > MAX else min(NEVER, due - now)


def _nanos_until_full(limit: SlidingWindow, window: Window, now: int) -> int:
    entries = window.entries
    return min(NEVER, entries[-1][0] * limit.grain + limit.window_nanos - now) if entries else 0
