"""Bucket4j's format of states: big-endian bytes, which ``docs/bytes.md`` describes field by field."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final, NoReturn

from ratelimit.core.algorithm import LONGEST_STATE
from ratelimit.core.numbers import MIN
from ratelimit.core.token_bucket import modified_utf8
from ratelimit.core.token_bucket.bandwidth import MOST_BANDWIDTHS, Bandwidth, BucketConfiguration
from ratelimit.core.token_bucket.state import BandwidthState, BucketState
from ratelimit.errors import CorruptStateError, InvalidConfigurationError, UnsupportedStateError
from ratelimit.keys import Key

_INT: Final = struct.Struct(">i")
_LONG: Final = struct.Struct(">q")
_BYTE: Final = struct.Struct(">B")
_SHORT: Final = struct.Struct(">H")
_BANDWIDTH: Final = struct.Struct(">iqqqqBqBB")  # format, capacity, initial, period, tokens, ..., has id
_NUMBERS_HEADER: Final = struct.Struct(">iii")  # kind of arithmetic, format, count
_STATISTICS: Final = struct.Struct(">iq")  # format, consumed tokens
_VERSION: Final = struct.Struct(">Bq")  # whether there is one, version

_KNOWN_PREFIXES: Final = 1024
_FORMAT_AT: Final = 3  # the last byte of the format of a state
_BANDWIDTHS_AT: Final = 11  # the last byte of the number of bandwidths
_NUMBERS_OF_ONE: Final = 24  # bytes of the numbers of a bandwidth
_TAIL: Final = _STATISTICS.size  # bytes after these numbers
_TAIL_WITH_VERSION: Final = _STATISTICS.size + _VERSION.size

_FORMAT_WITHOUT_VERSION: Final = 1
_FORMAT_WITH_VERSION: Final = 2
FORMATS: Final = _FORMAT_WITHOUT_VERSION, _FORMAT_WITH_VERSION
"""The formats of a state; see ``docs/bytes.md`` for those of other algorithms."""

_INTEGERS_OF_64_BITS: Final = 3
_NOT_ALIGNED: Final = MIN


def encode(state: BucketState) -> bytes:
    """Return the bytes of a state."""
    configuration, version, consumed, states = state
    prefix, numbers = layout(configuration, version is not None)
    values = [number for one in states for number in one]
    if version is None:
        return prefix + numbers.pack(*values, 1, consumed)
    return prefix + numbers.pack(*values, 1, consumed, 1, version)


@lru_cache(maxsize=1024)
def layout(configuration: BucketConfiguration, has_version: bool) -> tuple[bytes, struct.Struct]:
    """Return the bytes of a state up to its numbers, and the layout of these: bandwidths, statistics, and version."""
    count = 3 * len(configuration)
    prefix = (
        _INT.pack(_FORMAT_WITH_VERSION if has_version else _FORMAT_WITHOUT_VERSION)
        + _encode_configuration(configuration)
        + _NUMBERS_HEADER.pack(_INTEGERS_OF_64_BITS, 1, count)
    )
    return prefix, struct.Struct(f">{count}qiqBq" if has_version else f">{count}qiq")


_known_prefixes: dict[bytes, tuple[BucketConfiguration, struct.Struct]] = {}
"""The beginnings of states that were decoded: nearly all states of a service share the same few configurations."""


@lru_cache(maxsize=1024)
def _encode_configuration(configuration: BucketConfiguration) -> bytes:
    parts = [_INT.pack(1), _INT.pack(len(configuration))]
    for bandwidth in configuration:
        first = bandwidth.first_refill_millis
        parts.append(
            _BANDWIDTH.pack(
                1,
                bandwidth.capacity,
                bandwidth.initial_tokens,
                bandwidth.refill_period_nanos,
                bandwidth.refill_tokens,
                bandwidth.refill_intervally,
                _NOT_ALIGNED if first is None else first,
                bandwidth.adaptive_initial_tokens,
                bandwidth.id is not None,
            )
        )
        if bandwidth.id is not None:
            id = modified_utf8.encode(bandwidth.id)
            parts += [_SHORT.pack(len(id)), id]
    return b"".join(parts)


def decode(state: bytes, key: Key = "") -> BucketState:
    """Return the state that these bytes hold; bytes after its end are ignored.

    :param key: where the bytes were found, for the error.
    :raises CorruptStateError: where the bytes hold none; UnsupportedStateError for a format that is not known.
    """
    if _BANDWIDTHS_AT < len(state) <= LONGEST_STATE and state[_BANDWIDTHS_AT] > 0:
        has_version = state[_FORMAT_AT] == _FORMAT_WITH_VERSION
        tail = _NUMBERS_OF_ONE * state[_BANDWIDTHS_AT] + (_TAIL_WITH_VERSION if has_version else _TAIL)
        known = _known_prefixes.get(state[:-tail])
        if known is not None:
            configuration, numbers = known
            values = numbers.unpack_from(state, len(state) - tail)
            count = 3 * len(configuration.bandwidths)
            if values[count] == 1 and (not has_version or values[count + 2] == 1):
                states = tuple([BandwidthState(*values[i : i + 3]) for i in range(0, count, 3)])
                return BucketState(configuration, values[-1] if has_version else None, values[count + 1], states)
    return _decode(state, key)


def _decode(state: bytes, key: Key) -> BucketState:
    reader = _Reader(state, key)
    if len(state) > LONGEST_STATE:
        reader.fail(f"it has more than {LONGEST_STATE} bytes")
    format = reader.format("a state", latest=_FORMAT_WITH_VERSION)
    begin = reader.position
    bandwidths = reader.skip_configuration()
    configuration = _decode_configuration(state[begin : reader.position])
    if isinstance(configuration, str):
        reader.fail(configuration)
    kind, numbers_format, count = reader.read(_NUMBERS_HEADER)
    if kind != _INTEGERS_OF_64_BITS:
        reader.fail(f"an unknown kind of arithmetic, {kind}")
    reader.check_format("numbers", numbers_format)
    if not 3 * bandwidths <= count <= len(state) // 8:
        reader.fail(f"{count} numbers for {bandwidths} bandwidths in {len(state)} bytes")
    numbers = reader.read(struct.Struct(f">{count}q"))
    statistics_format, consumed = reader.read(_STATISTICS)
    reader.check_format("statistics", statistics_format)
    version = None
    if format == _FORMAT_WITH_VERSION and reader.read(_BYTE) != (0,):
        (version,) = reader.read(_LONG)
    states = tuple(BandwidthState(*numbers[i : i + 3]) for i in range(0, 3 * bandwidths, 3))
    prefix, layout_of_numbers = layout(configuration, version is not None)
    if len(_known_prefixes) >= _KNOWN_PREFIXES:
        _known_prefixes.clear()
    _known_prefixes[prefix] = configuration, layout_of_numbers
    return BucketState(configuration, version, consumed, states)


class _Reader:
    """A position in the bytes of a state, and what to raise when they are not what they should be."""

    __slots__ = ("data", "key", "position")

    def __init__(self, data: bytes, key: Key) -> None:
        self.data = data
        self.key = key
        self.position = 0

    def fail(self, reason: str) -> NoReturn:
        raise CorruptStateError(self.key, self.data, reason)

    def read(self, layout: struct.Struct) -> tuple[int, ...]:
        begin = self.position
        self.skip(layout.size)
        return layout.unpack_from(self.data, begin)

    def skip(self, length: int) -> None:
        self.position += length
        if self.position > len(self.data):
            self.fail(f"the data ends after {len(self.data)} bytes, where {self.position} or more are needed")

    def format(self, of: str, latest: int = 1) -> int:
        (format,) = self.read(_INT)
        self.check_format(of, format, latest)
        return format

    def check_format(self, of: str, format: int, latest: int = 1) -> None:
        if not 1 <= format <= latest:
            known = "1" if latest == 1 else f"1 to {latest}"
            raise UnsupportedStateError(self.key, self.data, f"{of} in format {format}, known is {known}", format)

    def skip_configuration(self) -> int:
        """Find the end of the configuration, checking formats and lengths; return the number of bandwidths."""
        self.format("a configuration")
        (bandwidths,) = self.read(_INT)
        if bandwidths < 1:
            self.fail(f"a configuration of {bandwidths} bandwidths")
        if bandwidths > MOST_BANDWIDTHS:
            self.fail(f"a configuration of {bandwidths} bandwidths, where {MOST_BANDWIDTHS} are the most")
        # However large the number, this ends at the end of the data at the latest.
        for _ in range(bandwidths):
            format, *_, has_id = self.read(_BANDWIDTH)
            self.check_format("a bandwidth", format)
            if has_id:
                self.skip(*self.read(_SHORT))
        return bandwidths


@lru_cache(maxsize=1024)
def _decode_configuration(data: bytes) -> BucketConfiguration | str:
    """Return the configuration in bytes whose lengths have been checked, or what is wrong with it.

    The result is kept, because nearly all states of a service carry the same few configurations, and because these are
    compared by identity first.
    """
    reader = _Reader(data, "")
    reader.read(_INT)
    (count,) = reader.read(_INT)
    bandwidths = []
    for _ in range(count):
        _format, capacity, initial, period, tokens, intervally, first, adaptive, has_id = reader.read(_BANDWIDTH)
        id = None
        if has_id:
            (length,) = reader.read(_SHORT)
            begin = reader.position
            reader.skip(length)
            try:
                id = modified_utf8.decode(data[begin : reader.position])
            except ValueError as error:
                return str(error)
        first_refill = None if first == _NOT_ALIGNED else first
        bandwidths.append(
            Bandwidth.unchecked(capacity, tokens, period, initial, bool(intervally), first_refill, bool(adaptive), id)
        )
    try:
        return BucketConfiguration(*bandwidths)
    except InvalidConfigurationError as error:
        return error.message
