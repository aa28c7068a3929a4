"""The commonest decision, from bytes to bytes: tokens are consumed from one greedy bandwidth that has enough of them.

It refills the bucket, consumes, finds out how long the bucket takes to be full, and writes the bytes of the new state:
all in one function, over what never changes of such a bucket. What it computes is what ``state`` and ``codec`` compute,
to the byte; where anything is unusual it returns None, and they do.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Final, NamedTuple

from ratelimit.core.numbers import MAX
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.core.token_bucket.state import BucketState

# When the bandwidth was last refilled, its tokens, its unfinished token; the format of the statistics, tokens consumed.
_NUMBERS: Final = Struct(">qqqiq")
_STATISTICS_FORMAT: Final = 1


class Head(NamedTuple):
    """What never changes of a bucket with such a configuration.

    :param prefix: the bytes of its state up to its numbers.
    :param suffix: those after its numbers: its version.
    :param is_new_when_full: whether a new bucket is full.
    """

    prefix: bytes
    suffix: bytes
    length: int
    begin: int
    capacity: int
    rate: int
    period: int
    is_new_when_full: bool


@lru_cache(maxsize=1024)
def head_of(configuration: BucketConfiguration, version: int | None) -> Head | None:
    """Return what never changes of such buckets; None where they are not everyday ones."""
    greedy = configuration.only_greedy
    if greedy is None:
        return None
    capacity, rate, period = greedy
    state = codec.encode(BucketState.initial(configuration, version, 0))
    begin = len(state) - _NUMBERS.size - (0 if version is None else codec.VERSION_SIZE)
    end = begin + _NUMBERS.size
    return Head(state[:begin], state[end:], len(state), begin, capacity, rate, period, configuration.starts_full)


def consumed(head: Head, stored: bytes, tokens: int, now: int) -> tuple[bytes, int, int] | bool | None:
    """Consume tokens; return the new bytes, the tokens that remain, and the nanoseconds until the bucket is full.

    :returns: False where there are too few tokens; None where the bucket is not an everyday one.
    """
    prefix, suffix, length, begin, capacity, rate, period, _ = head
    if len(stored) != length or not (stored.startswith(prefix) and stored.endswith(suffix)):
        return None
    last, size, part, statistics, counted = _NUMBERS.unpack_from(stored, begin)
    if size > capacity or not 0 <= part < period or statistics != _STATISTICS_FORMAT:
        return None
    if now > last:
        if size < capacity:
            # In token x nanosecond: whole periods of it are tokens, and the rest is the unfinished token.
            total = (now - last) * rate + part
            if total >= MAX:
                return None
            size += total // period
            part = total % period
            if size >= capacity:
                size, part = capacity, 0
        last = now
    if tokens > size:
        return False
    size -= tokens
    counted += tokens
    full = (capacity - size) * period
    if counted > MAX or full >= MAX:
        return None
    return (
        prefix + _NUMBERS.pack(last, size, part, _STATISTICS_FORMAT, counted) + suffix,
        size,
        (full - part) // rate if full > part else 0,
    )
