"""Limits as callers give them, of whatever algorithm."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, TypeAlias

from ratelimit.core.algorithm import Algorithm, Configuration
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.core.token_bucket.bandwidth import Limits as TokenBucketLimits


class _OfAnAlgorithm(Protocol):
    """A configuration, as type checkers see it."""

    algorithm: ClassVar[Algorithm]


Limits: TypeAlias = TokenBucketLimits | _OfAnAlgorithm
"""Whatever callers may give for limits: those of a token bucket, or a configuration of any other algorithm."""


def configuration_of(limits: Any) -> Configuration:
    """Return the configuration that limits stand for.

    :param limits: a configuration of any algorithm, which is returned as it is; or a bandwidth, the text of limits, or
        a list of those, which stand for a token bucket.
    :raises InvalidConfigurationError: for anything else.
    """
    if isinstance(getattr(limits, "algorithm", None), Algorithm):
        return limits
    return BucketConfiguration.of(limits)
