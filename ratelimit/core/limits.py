"""Limits as callers give them, of whatever algorithm."""

from __future__ import annotations

from typing import Any

from ratelimit.core.algorithm import Algorithm, Configuration
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration


def configuration_of(limits: Any) -> Configuration:
    """Return the configuration that limits stand for.

    :param limits: a configuration of any algorithm, which is returned as it is; or a bandwidth, the text of limits, or
        a list of those, which stand for a token bucket.
    :raises InvalidConfigurationError: for anything else.
    """
    if isinstance(getattr(limits, "algorithm", None), Algorithm):
        return limits
    return BucketConfiguration.of(limits)
