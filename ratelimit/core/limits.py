"""Limits as callers give them, of whatever algorithm."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Final, Protocol, TypeAlias

from ratelimit.core.algorithm import Algorithm, Configuration
from ratelimit.core.sliding_window import configuration as sliding_window
from ratelimit.core.sliding_window.configuration import SlidingWindow, SlidingWindows, windows_of
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.core.token_bucket.limit_text import error_at, parse_several
from ratelimit.errors import InvalidConfigurationError
from ratelimit.keys import brief


class _OfAnAlgorithm(Protocol):
    """A configuration, as type checkers see it."""

    algorithm: ClassVar[Algorithm]

    def __hash__(self) -> int: ...


_Limit: TypeAlias = BucketConfiguration | Bandwidth | SlidingWindow | SlidingWindows | str

Limits: TypeAlias = _Limit | Sequence[_Limit] | _OfAnAlgorithm
"""What callers may give for limits: a configuration, a limit, the text form, or a list of these for one bucket."""

_LIMITS: Final = (BucketConfiguration, Bandwidth, SlidingWindow, SlidingWindows, str)
_ALLOWED: Final = (
    'text such as "100/minute", a Bandwidth, a BucketConfiguration, a SlidingWindow, or a list or tuple of these'
)
_ONE_KIND: Final = (
    "limits of one bucket must be all sliding or none; got both: make a bucket of each, and combine them by all_of(...)"
)


def configuration_of(limits: Any) -> Configuration:
    """Return the configuration that limits stand for.

    :param limits: a configuration of any algorithm, which is returned as it is; or a limit, the text of limits, or a
        list of those. Sliding windows cannot stand beside bandwidths.
    :raises InvalidConfigurationError: for anything else.
    """
    if isinstance(getattr(limits, "algorithm", None), Algorithm):
        return limits
    if isinstance(limits, str):
        return parse(limits)
    if isinstance(limits, Bandwidth):
        return BucketConfiguration(limits)
    if isinstance(limits, list | tuple) and all(isinstance(one, _LIMITS) for one in limits):
        return _together([limit for one in limits for limit in configuration_of(one)])
    raise InvalidConfigurationError(f"limits must be {_ALLOWED}; got {brief(limits)}", "configuration")


@lru_cache(maxsize=256)
def parse(text: str) -> Configuration:
    """Read limits from their text form, of whatever algorithm.

    Each text is parsed once: a callable that looks up a customer's limits returns the same few texts over and over.

    :raises InvalidConfigurationError: showing the place in the text that is wrong.
    """
    specs = parse_several(text)
    first = specs[0].is_sliding
    for spec in specs:
        if spec.is_sliding is not first:
            raise error_at(text, _ONE_KIND, spec.span)
    return sliding_window.parse(text) if first else BucketConfiguration.parse(text)


def _together(limits: list[Bandwidth | SlidingWindow]) -> Configuration:
    """Return the configuration of a bucket that has all of these limits."""
    windows = [limit for limit in limits if isinstance(limit, SlidingWindow)]
    if not windows:
        return BucketConfiguration(*limits)  # type: ignore[arg-type]  # there are no others
    if len(windows) < len(limits):
        raise InvalidConfigurationError(_ONE_KIND, "configuration")
    return windows_of(*windows)
