"""What sliding windows inherit from those that they replace: the tokens that were used."""

from __future__ import annotations

from ratelimit.core.algorithm import State
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.sliding_window.configuration import SlidingWindow, SlidingWindows
from ratelimit.core.sliding_window.state import Entries, SlidingWindowState, Window, used


def replaced(
    state: State,
    configuration: SlidingWindow | SlidingWindows,
    version: int | None,
    inheritance: TokensInheritance,
    now: int,
) -> SlidingWindowState:
    """Return a state, refilled at this time under its old configuration, under other windows."""
    made = SlidingWindowState.initial(configuration, version, now)._replace(consumed_tokens=state.consumed_tokens)
    if inheritance is TokensInheritance.RESET or not isinstance(state, SlidingWindowState):
        return made
    windows = tuple([_inherited(state, limit, inheritance) for limit in configuration.windows])
    return made._replace(at=state.at, bandwidth_states=windows)


def _inherited(state: SlidingWindowState, limit: SlidingWindow, inheritance: TokensInheritance) -> Window:
    """Return what a new window begins with: tokens that were used go on counting.

    The old window of the same length is its predecessor; else the shortest of those that are longer, because its log
    reaches far enough; else the longest.
    """
    places = range(len(state.bandwidth_states))
    lengths = [old.window_nanos for old in state.configuration.windows]
    longer = [place for place in places if lengths[place] >= limit.window_nanos]
    place = min(longer, key=lengths.__getitem__) if longer else max(places, key=lengths.__getitem__)
    old, (size, entries) = state.configuration.windows[place], state.bandwidth_states[place]
    if inheritance is TokensInheritance.PROPORTIONALLY:
        return _carried(old, _scaled(entries, limit.capacity, old.capacity), limit, state.at)
    carried = _carried(old, entries, limit, state.at)
    grown = max(0, limit.capacity - old.capacity) if inheritance is TokensInheritance.ADDITIVE else 0
    # The log alone may leave more tokens than there were.
    return used(limit, carried, max(0, carried.current_size - min(limit.capacity, size + grown)), state.at)


def _scaled(entries: Entries, capacity: int, old_capacity: int) -> Entries:
    """Return entries of which each has its share of another capacity; their sum is rounded up."""
    scaled, total, passed = [], 0, 0
    for tick, count in entries:
        total += count
        reached = -(-total * capacity // old_capacity)
        if reached > passed:
            scaled.append((tick, reached - passed))
        passed = reached
    return tuple(scaled)


def _carried(old: SlidingWindow, entries: Entries, limit: SlidingWindow, at: int) -> Window:
    """Return the window in which the entries of another one count, as far as they reach into it."""
    counts: dict[int, int] = {}
    for tick, count in entries:
        time = tick * old.grain
        moved = -(-time // limit.grain)
        if moved * limit.grain + limit.window_nanos > at:
            counts[moved] = counts.get(moved, 0) + count
    window = Window(limit.capacity, ())
    for tick, count in counts.items():
        window = used(limit, window, count, tick * limit.grain)
    return window
