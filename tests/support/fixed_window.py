"""A second algorithm, for tests of the seam: so many tokens in each window, and windows that begin at whole periods.

A debt is carried over into the windows that follow. The bytes hold the time of the last change, so that no two writers
store the same ones.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Final, NamedTuple

from ratelimit.core.algorithm import Algorithm, Level, State, Surplus, out_of_range, register
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import MAX, MIN, NEVER, wrap
from ratelimit.errors import CorruptStateError
from ratelimit.keys import Key

FORMAT: Final = 77
# Format, capacity, length, whether there is a version, version, tokens consumed, begin, tokens used, last change.
_LAYOUT: Final = struct.Struct(">iqqBqqqqq")


@dataclass(frozen=True, slots=True)
class FixedWindow:
    """So many tokens in each window of this length; configuration and limit in one."""

    algorithm: ClassVar[Algorithm]

    capacity: int
    window_nanos: int

    def __iter__(self) -> Iterator[FixedWindow]:
        yield self

    def __len__(self) -> int:
        return 1

    def __str__(self) -> str:
        return f"{self.capacity}/{self.window_nanos} ns fixed"


class Window(NamedTuple):
    """What is left of the present window, and when it began."""

    current_size: int
    begin: int


class WindowState(NamedTuple):
    """A bucket of this algorithm; ``used`` is above the capacity in debt, and below 0 where tokens were forced in."""

    configuration: FixedWindow
    configuration_version: int | None
    consumed_tokens: int
    begin: int
    used: int
    changed_at: int

    @property
    def bandwidth_states(self) -> tuple[Window, ...]:
        return (Window(self.available_tokens, self.begin),)

    @property
    def available_tokens(self) -> int:
        return max(MIN, min(MAX, self.configuration.capacity - self.used))

    @property
    def is_new_when_full(self) -> bool:
        return self.used >= 0

    @property
    def reserves_beyond_capacity(self) -> bool:
        return True

    def refilled(self, now: int) -> WindowState:
        capacity, length = self.configuration.capacity, self.configuration.window_nanos
        windows = max(0, (now - self.begin) // length)
        used = max(min(self.used, 0), self.used - windows * capacity)
        return self._replace(begin=self.begin + windows * length, used=used, changed_at=max(self.changed_at, now))

    def refilled_and_consumed(self, tokens: int, now: int) -> WindowState | None:
        state = self.refilled(now)
        return state.consumed(tokens) if tokens <= state.available_tokens else None

    def consumed(self, tokens: int) -> WindowState:
        return self._using(self.used + tokens)._replace(consumed_tokens=wrap(self.consumed_tokens + tokens))

    def reserved(self, tokens: int, wait: int, now: int) -> tuple[WindowState, tuple[Surplus, ...]]:
        state = self.consumed(tokens)
        if not wait:
            return state, ()
        # All of the tokens are used in one window: what was left of those before it is given up.
        windows, capacity = self._windows_until(tokens), self.configuration.capacity
        surplus = max(0, windows * capacity + min(tokens, capacity) - state.used)
        return state._using(state.used + surplus), ((surplus, 0),) if surplus else ()

    def cancelled(self, tokens: int, noted: int, surplus: tuple[Surplus, ...]) -> WindowState | None:
        later = max(0, wrap(self.consumed_tokens - noted))
        if later and self.available_tokens < 0:
            return None
        more = 0 if later else sum(whole for whole, _ in surplus)
        state = self._using(max(min(self.used, later), self.used - tokens - more))
        return state._replace(consumed_tokens=wrap(self.consumed_tokens - tokens))

    def given_back(self, tokens: int) -> WindowState:
        return self.added(tokens)._replace(consumed_tokens=wrap(self.consumed_tokens - tokens))

    def added(self, tokens: int) -> WindowState:
        return self._using(max(min(self.used, 0), self.used - tokens))

    def force_added(self, tokens: int) -> WindowState:
        return self._using(self.used - tokens)

    def reset(self) -> WindowState:
        return self._using(0)

    def held_back(self, nanos: int, now: int) -> WindowState | None:
        if self.nanos_until(1, now, check_capacity=False) >= nanos:
            return None
        windows = -(-(now + nanos - self.begin) // self.configuration.window_nanos)
        return self._using(max(self.used, windows * self.configuration.capacity))

    def nanos_until(self, tokens: int, now: int, *, check_capacity: bool) -> int:
        windows = self._windows_until(tokens)
        if check_capacity and tokens > self.configuration.capacity:
            return NEVER
        return min(NEVER, self.begin + windows * self.configuration.window_nanos - now) if windows else 0

    def nanos_until_full(self, now: int) -> int:
        return self.nanos_until(self.configuration.capacity, now, check_capacity=False)

    def shows(self, before: State | None, now: int) -> bool:
        known = before.changed_at if isinstance(before, WindowState) else None
        return now not in (known, None) and self.changed_at == now

    def _using(self, used: int) -> WindowState:
        return self._replace(used=max(MIN, min(MAX, used)))

    def _windows_until(self, tokens: int) -> int:
        """Return how many windows have to end before these tokens are there."""
        return max(0, -(-(tokens + self.used - self.configuration.capacity) // self.configuration.capacity))


def initial(configuration: FixedWindow, version: int | None, now: int) -> WindowState:
    return WindowState(configuration, version, 0, now - now % configuration.window_nanos, 0, now)


def replaced(
    state: State, configuration: FixedWindow, version: int | None, inheritance: TokensInheritance, now: int
) -> WindowState:
    new = initial(configuration, version, now)._replace(consumed_tokens=state.consumed_tokens)
    if inheritance is TokensInheritance.RESET or not isinstance(state, WindowState):
        return new
    old = state.configuration.capacity
    if inheritance is TokensInheritance.PROPORTIONALLY:
        return new._using(state.used * configuration.capacity // old)
    grown = max(0, configuration.capacity - old) if inheritance is TokensInheritance.ADDITIVE else 0
    return new._using(max(0, configuration.capacity - state.available_tokens - grown))


def encode(state: WindowState) -> bytes:
    (capacity, length), version = (state.configuration.capacity, state.configuration.window_nanos), state[1]
    return _LAYOUT.pack(FORMAT, capacity, length, version is not None, version or 0, *state[2:])


def decode(data: bytes, key: Key) -> WindowState:
    if len(data) < _LAYOUT.size:
        raise CorruptStateError(key, data, f"a window of {len(data)} bytes, where {_LAYOUT.size} are needed")
    _, capacity, length, has_version, version, *numbers = _LAYOUT.unpack_from(data)
    if capacity < 1 or length < 1:
        raise out_of_range(data, key)
    return WindowState(FixedWindow(capacity, length), version if has_version else None, *numbers)


def share_of(configuration: FixedWindow, share: Fraction) -> FixedWindow:
    tokens = configuration.capacity * share
    capacity = max(1, math.floor(tokens))
    return FixedWindow(
        capacity, configuration.window_nanos if tokens >= 1 else math.ceil(configuration.window_nanos / tokens)
    )


def levels(configuration: FixedWindow, windows: tuple[Window, ...], now: int) -> tuple[Level, ...]:
    ((size, begin),) = windows
    state = WindowState(configuration, None, 0, begin, configuration.capacity - size, now)
    next_token = state.nanos_until(max(0, size) + 1, now, check_capacity=True)
    return (Level(configuration, size, next_token, state.nanos_until_full(now)),)


FIXED_WINDOW: Final = Algorithm(
    name="a fixed window",
    formats=(FORMAT,),
    initial=initial,
    replaced=replaced,
    encode=encode,
    decode=decode,
    share_of=share_of,
    levels=levels,
)

FixedWindow.algorithm = FIXED_WINDOW
register(FIXED_WINDOW)
