"""Limits by sliding windows: one window, or several of different lengths for one bucket."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, ClassVar, Final

from ratelimit.core.algorithm import Algorithm
from ratelimit.core.numbers import MAX, Duration, to_nanos
from ratelimit.core.token_bucket import limit_text
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief

MOST_WINDOWS: Final = 8
"""The most windows of a bucket: with as many entries as each may have, a state is within ``LONGEST_STATE``."""

GRID: Final = 64
"""Into how many parts a window is divided, where its tokens are counted by parts."""

EXACT_CAPACITY: Final = 64
"""The largest capacity whose tokens are counted to the nanosecond: there are never more entries than tokens."""


@dataclass(frozen=True, slots=True, init=False, repr=False)
class SlidingWindow:
    """At most ``capacity`` tokens in any span of time of this length, whenever it begins.

    It is a limit, and the configuration of a bucket that has no other. Several windows for one bucket are given as a
    list: ``[SlidingWindow(10, per=1), SlidingWindow(100, per=60)]``. They print themselves as text, which is taken
    wherever they are: ``"100/minute sliding"``.

    A used token counts for the length of the window. Windows of up to 64 tokens are exact to the nanosecond; of more,
    a token may count for up to a 64th of the length longer, and never for less.

    :param capacity: from 1 to 2**63 - 1.
    :param per: the length of the window: a ``timedelta`` or a number of seconds, a nanosecond or more.
    :ivar window_nanos: the length in nanoseconds.
    :raises InvalidConfigurationError: naming the value that is wrong, and what is allowed.
    """

    algorithm: ClassVar[Algorithm]
    """Sliding windows; set in ``ratelimit/core/sliding_window/__init__.py``."""

    capacity: int
    window_nanos: int
    grain: int = field(init=False, repr=False, compare=False)
    """The unit of time in which used tokens are noted, in nanoseconds."""

    def __init__(self, capacity: int, per: Duration) -> None:
        try:
            nanos = to_nanos(per)
        except (TypeError, ValueError) as error:
            raise InvalidConfigurationError(f"per {error}", "per") from None
        if nanos < 1:
            raise InvalidConfigurationError(f"per must be at least a nanosecond; got {brief(per)}", "per")
        self._set(capacity, nanos)

    @classmethod
    def of_nanos(cls, capacity: int, nanos: int) -> SlidingWindow:
        """Return the window of a length in nanoseconds.

        :raises InvalidConfigurationError: for a value out of range.
        """
        window = object.__new__(cls)
        window._set(capacity, nanos)
        return window

    def _set(self, capacity: int, nanos: int) -> None:
        for name, value in (("capacity", capacity), ("per", nanos)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX:
                unit = " nanoseconds" if name == "per" else ""
                raise InvalidConfigurationError(
                    f"{name} must be an int from 1 to 2**63 - 1{unit}; got {brief(value)}", name
                )
        object.__setattr__(self, "capacity", capacity)
        object.__setattr__(self, "window_nanos", nanos)
        object.__setattr__(self, "grain", 1 if capacity <= EXACT_CAPACITY else -(-nanos // GRID))

    @classmethod
    def parse(cls, text: str) -> SlidingWindow:
        """Read one window from its text form: ``"100/minute sliding"``.

        The grammar is in ``docs/choosing-limits.md``.

        :raises InvalidConfigurationError: showing the place in the text that is wrong.
        """
        return _from_spec(text, limit_text.parse_one(text))

    @property
    def windows(self) -> tuple[SlidingWindow, ...]:
        """This window, alone."""
        return (self,)

    def __iter__(self) -> Iterator[SlidingWindow]:
        yield self

    def __len__(self) -> int:
        return 1

    def __str__(self) -> str:
        """Return the text form; :meth:`parse` of it gives an equal window."""
        return limit_text.print_sliding(self.capacity, self.window_nanos)

    def __repr__(self) -> str:
        return f"SlidingWindow.parse({str(self)!r})"


@dataclass(frozen=True, slots=True, init=False, repr=False)
class SlidingWindows:
    """Two to eight sliding windows for one bucket; a token must be there in all of them.

    Wherever limits are taken, a list of windows, or their text, makes one.

    :raises InvalidConfigurationError: for another number of windows, and for two of the same length.
    """

    algorithm: ClassVar[Algorithm]
    """Sliding windows; set in ``ratelimit/core/sliding_window/__init__.py``."""

    windows: tuple[SlidingWindow, ...]

    def __init__(self, *windows: SlidingWindow) -> None:
        if not 2 <= len(windows) <= MOST_WINDOWS:
            raise InvalidConfigurationError(f"windows must be from 2 to {MOST_WINDOWS}; got {len(windows)}", "windows")
        lengths: set[int] = set()
        for window in windows:
            if not isinstance(window, SlidingWindow):
                raise InvalidConfigurationError(f"windows must be SlidingWindow; got {brief(window)}", "windows")
            if window.window_nanos in lengths:
                raise InvalidConfigurationError(
                    f"per must differ between sliding windows; got {brief(str(window))} after another of its length",
                    "per",
                )
            lengths.add(window.window_nanos)
        object.__setattr__(self, "windows", windows)

    @classmethod
    def parse(cls, text: str) -> SlidingWindows:
        """Read several windows from their text form: ``"10/second sliding; 100/minute sliding"``.

        :raises InvalidConfigurationError: showing the place in the text that is wrong.
        """
        specs = limit_text.parse_several(text)
        windows = [_from_spec(text, spec) for spec in specs]
        try:
            return cls(*windows)
        except InvalidConfigurationError as error:
            raise limit_text.error_at(text, error.message, _misplaced(windows, specs)) from None

    def __iter__(self) -> Iterator[SlidingWindow]:
        return iter(self.windows)

    def __len__(self) -> int:
        return len(self.windows)

    def __reduce__(self) -> tuple[Any, ...]:
        return SlidingWindows, self.windows

    def __str__(self) -> str:
        """Return the text form; :meth:`parse` of it gives equal windows."""
        return "; ".join(map(str, self.windows))

    def __repr__(self) -> str:
        return f"SlidingWindows.parse({str(self)!r})"


def windows_of(*windows: SlidingWindow) -> SlidingWindow | SlidingWindows:
    """Return the configuration of a bucket that has these windows.

    :raises InvalidConfigurationError: for too many windows, for none, and for two of the same length.
    """
    return windows[0] if len(windows) == 1 else SlidingWindows(*windows)


def parse(text: str) -> SlidingWindow | SlidingWindows:
    """Read one window or several from their text form.

    :raises InvalidConfigurationError: showing the place in the text that is wrong.
    """
    specs = limit_text.parse_several(text)
    return SlidingWindow.parse(text) if len(specs) == 1 else SlidingWindows.parse(text)


@lru_cache(maxsize=256)
def share_of(configuration: SlidingWindow | SlidingWindows, share: Fraction) -> SlidingWindow | SlidingWindows:
    """Return windows that let through no more than this share of others.

    A share of less than one token is one token in a window that is longer by as much.

    :param share: above 0 and at most 1.
    """
    parts: dict[int, SlidingWindow] = {}
    for window in configuration:
        tokens = window.capacity * share
        nanos = window.window_nanos if tokens >= 1 else min(MAX, math.ceil(window.window_nanos / tokens))
        part = SlidingWindow.of_nanos(max(1, math.floor(tokens)), nanos)
        # Windows that became of one length hold one token each.
        parts.setdefault(nanos, part)
    return windows_of(*parts.values())


def _from_spec(text: str, spec: limit_text.LimitSpec) -> SlidingWindow:
    if not spec.is_sliding:
        raise limit_text.error_at(text, "a sliding window must end with the word sliding", spec.span)
    capacity, nanos = spec.values["capacity"], spec.values["refill_period_nanos"]
    try:
        return SlidingWindow.of_nanos(capacity, nanos)
    except InvalidConfigurationError as error:
        field_name = "capacity" if error.field == "capacity" else "refill_period_nanos"
        raise limit_text.error_at(text, error.message, spec.spans[field_name]) from None


def _misplaced(windows: list[SlidingWindow], specs: list[limit_text.LimitSpec]) -> limit_text.Span:
    """Return where a window stands that another of its length comes before; else the first one that is too many."""
    seen: set[int] = set()
    for window, spec in zip(windows, specs, strict=True):
        if window.window_nanos in seen:
            return spec.span
        seen.add(window.window_nanos)
    return specs[MOST_WINDOWS if len(specs) > MOST_WINDOWS else 0].span
