"""Bucket4j's token bucket: its limits, its state, its arithmetic and its bytes."""

from __future__ import annotations

from typing import Final

from ratelimit.core.algorithm import Algorithm, Everyday, register
from ratelimit.core.token_bucket import codec, everyday, share, state
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
    everyday=Everyday(everyday.head_of, everyday.consumed),
    script="decide",
)

BucketConfiguration.algorithm = TOKEN_BUCKET
register(TOKEN_BUCKET)
