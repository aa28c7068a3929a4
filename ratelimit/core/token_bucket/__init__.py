"""Bucket4j's token bucket: its limits, its state, its arithmetic and its bytes."""

from __future__ import annotations

from typing import Final

from ratelimit.core.algorithm import Algorithm, register
from ratelimit.core.token_bucket import codec, share, state
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.core.token_bucket.inheritance import replaced

TOKEN_BUCKET: Final = Algorithm(
    name="Bucket4j's token bucket",
    formats=codec.FORMATS,
    initial=state.BucketState.initial,
    replaced=replaced,
    encode=codec.encode,
    decode=codec.decode,
    share_of=share.share_of,
    levels=state.levels,
    script="decide",
)

BucketConfiguration.algorithm = TOKEN_BUCKET
register(TOKEN_BUCKET)
