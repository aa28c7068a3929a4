"""The bytes of sliding windows, which ``docs/bytes.md`` describes field by field."""

from __future__ import annotations

import struct
from functools import lru_cache
from operator import lt
from typing import Final, NoReturn

from ratelimit.core.algorithm import LONGEST_STATE
from ratelimit.core.numbers import MAX, MIN
from ratelimit.core.sliding_window.configuration import MOST_WINDOWS, SlidingWindow, SlidingWindows, windows_of
from ratelimit.core.sliding_window.state import MOST_ENTRIES, SlidingWindowState, Window
from ratelimit.errors import CorruptStateError, InvalidConfigurationError
from ratelimit.keys import Key

FORMAT: Final = 64
"""The format of a state; ``docs/bytes.md`` has those of other algorithms."""

_HEAD: Final = struct.Struct(">iBBqq")  # format, whether there is a version, windows, tokens consumed, last change
_VERSION: Final = struct.Struct(">q")
_LIMIT: Final = struct.Struct(">qq")  # capacity, length
_WINDOW: Final = struct.Struct(">qBBq")  # tokens above the capacity, kind of entries, how many, first tick
_KINDS: Final = ("II", "QI", "IQ", "QQ")
"""Layouts of an entry: ticks after the first one, and tokens. The kind 1 has wide ticks, 2 has wide tokens."""

_NARROW: Final = 2**32


def encode(state: SlidingWindowState) -> bytes:
    """Return the bytes of a state."""
    configuration, version, consumed, at, windows = state
    limits = configuration.windows
    parts = [_HEAD.pack(FORMAT, version is not None, len(limits), consumed, at)]
    if version is not None:
        parts.append(_VERSION.pack(version))
    parts.append(_encode_limits(configuration))
    for limit, (size, entries) in zip(limits, windows, strict=True):
        if not entries:
            parts.append(_WINDOW.pack(size - limit.capacity, 0, 0, 0))
            continue
        first = entries[0][0]
        wide_ticks = entries[-1][0] - first >= _NARROW
        numbers = [number for tick, count in entries for number in (tick - first, count)]
        kind = wide_ticks + 2 * (max(numbers[1::2]) >= _NARROW)
        parts += [_WINDOW.pack(0, kind, len(entries), first), _layout(kind, len(entries)).pack(*numbers)]
    return b"".join(parts)


@lru_cache(maxsize=len(_KINDS) * (MOST_ENTRIES + 1))
def _layout(kind: int, count: int) -> struct.Struct:
    return struct.Struct(">" + _KINDS[kind] * count)


@lru_cache(maxsize=1024)
def _encode_limits(configuration: SlidingWindow | SlidingWindows) -> bytes:
    return b"".join([_LIMIT.pack(limit.capacity, limit.window_nanos) for limit in configuration])


@lru_cache(maxsize=1024)
def _decode_limits(data: bytes) -> SlidingWindow | SlidingWindows | str:
    """Return the windows in these bytes, or what is wrong with them; nearly all buckets of a service share them."""
    try:
        return windows_of(*[SlidingWindow.of_nanos(*limit) for limit in _LIMIT.iter_unpack(data)])
    except InvalidConfigurationError as error:
        return error.message


def decode(data: bytes, key: Key = "") -> SlidingWindowState:
    """Return the state that these bytes hold; bytes after its end are ignored.

    :param key: where the bytes were found, for the error.
    :raises CorruptStateError: where the bytes hold none.
    """
    reader = _Reader(data, key)
    if len(data) > LONGEST_STATE:
        reader.fail(f"it has more than {LONGEST_STATE} bytes")
    _, has_version, count, consumed, at = reader.read(_HEAD)
    version = reader.read(_VERSION)[0] if has_version else None
    if not 1 <= count <= MOST_WINDOWS:
        reader.fail(f"{count} sliding windows, where 1 to {MOST_WINDOWS} are allowed")
    configuration = _decode_limits(reader.bytes(_LIMIT.size * count))
    if isinstance(configuration, str):
        reader.fail(configuration)
    windows = tuple([_decode_window(limit, reader) for limit in configuration.windows])
    return SlidingWindowState(configuration, version, consumed, at, windows)


def _decode_window(limit: SlidingWindow, reader: _Reader) -> Window:
    above, kind, count, first = reader.read(_WINDOW)
    if kind >= len(_KINDS):
        reader.fail(f"an unknown kind of entries, {kind}")
    if count > MOST_ENTRIES:
        reader.fail(f"{count} entries in a window, where {MOST_ENTRIES} are the most")
    numbers = reader.read(_layout(kind, count))
    ticks, tokens = [first + after for after in numbers[::2]], numbers[1::2]
    if 0 in tokens or not all(map(lt, ticks, ticks[1:])):
        reader.fail("its entries are not in order")
    size = limit.capacity + above - sum(tokens)
    if above < 0 or (above and count) or not MIN <= size <= MAX or (ticks and ticks[-1] > MAX):
        reader.fail("its tokens are out of range")
    return Window(size, tuple(zip(ticks, tokens, strict=True)))


class _Reader:
    """A position in the bytes of a state, and what to raise when they are not what they should be."""

    __slots__ = ("data", "key", "position")

    def __init__(self, data: bytes, key: Key) -> None:
        self.data = data
        self.key = key
        self.position = 0

    def fail(self, reason: str) -> NoReturn:
        raise CorruptStateError(self.key, self.data, reason)

    def bytes(self, length: int) -> bytes:
        begin = self.position
        self.position += length
        if self.position > len(self.data):
            self.fail(f"the data ends after {len(self.data)} bytes, where {self.position} or more are needed")
        return self.data[begin : self.position]

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        return layout.unpack(self.bytes(layout.size))
