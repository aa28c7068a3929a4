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
from ratelimit.core.token_bucket.state import BucketState, refilled_in_short

# When the bandwidth was last refilled, its tokens, its unfinished token; the format of the statistics, tokens consumed.
_NUMBERS: Final = Struct(">qqqiq")
_STATISTICS_FORMAT: Final = 1


class Head(NamedTuple):
    """What never changes of a bucket with such a configuration.

    :param prefix: the bytes of its state up to its numbers.
    :param suffix: the bytes after its numbers: its version.
    :param length: how many bytes its state has.
    :param greedy: the capacity, the refill tokens and the refill period of its bandwidth.
    :param is_new_when_full: whether a new bucket is full.
    """

    prefix: bytes
    suffix: bytes
    length: int
    greedy: tuple[int, int, int]
    is_new_when_full: bool


@lru_cache(maxsize=1024)
def head_of(configuration: BucketConfiguration, version: int | None) -> Head | None:
    """Return what never changes of such buckets; None where they are not everyday ones."""
    greedy = configuration.only_greedy
    if greedy is None:
        return None
    prefix, _ = codec.layout(configuration, version is not None)
    state = codec.encode(BucketState.initial(configuration, version, 0))
    suffix = state[len(prefix) + _NUMBERS.size :]
    return Head(prefix, suffix, len(state), greedy, configuration.starts_full)


def consumed(head: Head, stored: bytes, tokens: int, now: int) -> tuple[bytes, int, int] | bool | None:
    """Consume tokens; return the new bytes, the tokens that remain, and the nanoseconds until the bucket is full.

    :returns: False where there are too few tokens; None where the bucket is not an everyday one.
    """
    prefix, suffix, length, greedy, _ = head
    if len(stored) != length or not (stored.startswith(prefix) and stored.endswith(suffix)):
        return None
    last, size, part, statistics, counted = _NUMBERS.unpack_from(stored, len(prefix))
    capacity, rate, period = greedy
    if size > capacity or not 0 <= part < period or statistics != _STATISTICS_FORMAT:
        return None
    refilled = refilled_in_short(greedy, (last, size, part), now)
    if refilled is None:
        return None
    last, size, part = refilled
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
