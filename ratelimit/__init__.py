"""Token buckets that every instance of every service shares through Redis.

::

    from ratelimit import ProxyManager

    manager = ProxyManager.from_url("redis://localhost:6379/0", "100/minute")
    if not manager.try_consume("user:42"):
        ...  # too many requests
"""

__distribution__ = "ratelimit-redis"  # before the imports: ratelimit.errors looks for it

from ratelimit.all_of import AllOf, AsyncAllOf, all_of
from ratelimit.bucket import AsyncBucket, AsyncVerboseBucket, Bucket, VerboseBucket
from ratelimit.core.expiration import Expiration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import NEVER
from ratelimit.core.results import CombinedProbe, ConsumptionProbe, EstimationProbe, Snapshot, VerboseResult
from ratelimit.core.sliding_window.configuration import SlidingWindow, SlidingWindows
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.core.token_bucket.state import BandwidthState
from ratelimit.engine.observing import Decision, Listener
from ratelimit.engine.on_error import OnError
from ratelimit.engine.optimization import Optimization
from ratelimit.errors import (
    BucketNotFoundError,
    ContentionError,
    CorruptStateError,
    InvalidArgumentError,
    InvalidConfigurationError,
    RateLimitError,
    RateLimitExceeded,
    ReservationOverflowError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
    UnsupportedStateError,
)
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.reservation import AsyncCombinedReservation, AsyncReservation, CombinedReservation, Reservation
from ratelimit.runtime.clock import Clock, SystemClock
from ratelimit.settings import Recovery
from ratelimit.stores.memory import AsyncMemoryStore, MemoryStore
from ratelimit.stores.protocol import AsyncStore, Lost, Store
from ratelimit.stores.redis.circuit import CircuitBreaker, CircuitState, CircuitStatus
from ratelimit.stores.redis.store import AsyncRedisStore, RedisStore
from ratelimit.telemetry.counting import CountingListener

__all__ = [
    "NEVER",
    "AllOf",
    "AsyncAllOf",
    "AsyncBucket",
    "AsyncCombinedReservation",
    "AsyncMemoryStore",
    "AsyncProxyManager",
    "AsyncRedisStore",
    "AsyncReservation",
    "AsyncStore",
    "AsyncVerboseBucket",
    "Bandwidth",
    "BandwidthState",
    "Bucket",
    "BucketConfiguration",
    "BucketNotFoundError",
    "CircuitBreaker",
    "CircuitState",
    "CircuitStatus",
    "Clock",
    "CombinedProbe",
    "CombinedReservation",
    "ConsumptionProbe",
    "ContentionError",
    "CorruptStateError",
    "CountingListener",
    "Decision",
    "EstimationProbe",
    "Expiration",
    "InvalidArgumentError",
    "InvalidConfigurationError",
    "Listener",
    "Lost",
    "MemoryStore",
    "OnError",
    "Optimization",
    "ProxyManager",
    "RateLimitError",
    "RateLimitExceeded",
    "Recovery",
    "RedisStore",
    "Reservation",
    "ReservationOverflowError",
    "SlidingWindow",
    "SlidingWindows",
    "Snapshot",
    "Store",
    "StoreError",
    "StoreTimeoutError",
    "StoreUnavailableError",
    "SystemClock",
    "TokensInheritance",
    "UnsupportedStateError",
    "VerboseBucket",
    "VerboseResult",
    "all_of",
]
