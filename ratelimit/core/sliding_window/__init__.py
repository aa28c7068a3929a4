"""Sliding windows: never more than so many tokens in any span of a length, whatever its phase."""

from __future__ import annotations

from typing import Final

from ratelimit.core.algorithm import Algorithm, register
from ratelimit.core.sliding_window import codec, state
from ratelimit.core.sliding_window.configuration import SlidingWindow, SlidingWindows, share_of
from ratelimit.core.sliding_window.inheritance import replaced

SLIDING_WINDOW: Final = Algorithm(
    name="a sliding window",
    formats=(codec.FORMAT,),
    initial=state.SlidingWindowState.initial,
    replaced=replaced,
    encode=codec.encode,
    decode=codec.decode,
    share_of=share_of,
    levels=state.levels,
)

SlidingWindow.algorithm = SlidingWindows.algorithm = SLIDING_WINDOW
register(SLIDING_WINDOW)
