"""Waiting for the tokens of a bucket, no longer than its caller accepts."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from ratelimit.bucket import AsyncBucket, Bucket, consuming
from ratelimit.core.commands import Reserved
from ratelimit.core.numbers import NANOS_PER_SECOND, NEVER
from ratelimit.core.results import ConsumptionProbe, VerboseResult
from ratelimit.engine.reserving import probe_of
from ratelimit.runtime.steps import Steps


def consumed(bucket: Bucket | AsyncBucket, tokens: int, max_wait: int | None) -> Steps[VerboseResult[ConsumptionProbe]]:
    """Take the tokens, and wait for them where that takes no longer than accepted.

    :param max_wait: in nanoseconds. None: as long as it takes; 0: not at all. Where the tokens would take longer,
        nothing is taken, and the probe says how long the wait would have been.
    """
    if max_wait == 0:
        return (yield bucket.verbose.try_consume_and_return_remaining(tokens))  # type: ignore[no-any-return]
    seconds = None if max_wait is None else Fraction(max_wait, NANOS_PER_SECOND)
    result: VerboseResult[Reserved] = yield consuming(bucket, tokens, seconds)
    taken = result.value.wait != NEVER
    probe = probe_of(result, 0 if taken else result.value.refused_wait, consumed=taken)
    return replace(result, value=probe)  # type: ignore[return-value, arg-type]  # its value is the probe now
