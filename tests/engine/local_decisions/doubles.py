"""Optimizations, a store that counts, a clock that ticks, and calls at random, for tests of local decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from ratelimit import Optimization, ProxyManager
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.keys import Key
from ratelimit.stores.protocol import Lost
from ratelimit.testing import ManualClock, ScriptedStore, SwappingMemoryStore
from tests.support.both_faces import Settled, settled
from tests.support.inside import local_decisions_of

NOW = 1_700_000_000 * 10**9
SECOND = 10**9
LIMITS = "1/second burst 10"
SKIP = Optimization.skip_sync_on_zero()
DELAYING = Optimization.delaying(5, 2)
PREDICTING = Optimization.predicting(5, 2)
MANUAL = Optimization.manual()

Make = Callable[..., Settled]
"""Makes a manager by an optimization."""


class CountingStore(ScriptedStore):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.swaps = 0

    def get(self, key: Key) -> bytes | None:
        self.reads += 1
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self.swaps += 1
        return super().swap(key, before, after, ttl_millis)

    def asked(self) -> tuple[int, int]:
        """Return the reads and the swaps since the last call of this."""
        asked = self.reads, self.swaps
        self.reads = self.swaps = 0
        return asked


class TickingClock(ManualClock):
    """A clock that no two readings show alike, as those of real processes."""

    def now_nanos(self) -> int:
        self.advance(nanos=1)
        return super().now_nanos()


def stored(store: SwappingMemoryStore, clock: ManualClock) -> tuple[int, int]:
    """Return the tokens that are there, and those consumed so far, as the store has them."""
    snapshot = ProxyManager(store, LIMITS, clock=clock).snapshot("key")
    return snapshot.available_tokens, snapshot.consumed_tokens


async def close(face: Settled) -> None:
    manager: Any = face.face
    await settled(manager.aclose() if hasattr(manager, "aclose") else manager.close())


def unsynchronized(face: Settled | ProxyManager) -> dict[bytes, int]:
    """Return the tokens that a manager has handed out and the store does not know of, by stored key."""
    entries = local_decisions_of(face)._entries.values
    return {key: entry.unsynchronized for key, entry in entries.items()}


counts = st.integers(1, 12)
limits = st.sampled_from(["1/second burst 10", "10/3 seconds intervally", "5/second; 8/10 seconds id long"])
# How many tokens each of three managers may hand out, for how long, and whether it predicts.
budgets = st.lists(
    st.tuples(st.integers(1, 15), st.sampled_from([0.5, 2, 3600]), st.booleans()), min_size=3, max_size=3
)


def ask(manager: Any, verb: str, tokens: int) -> Any:
    if verb == "reserve":
        return manager.bucket("key").consume(tokens, max_wait=5)
    return getattr(manager.bucket("key"), verb)(tokens)


def admitted_by(text: str, elapsed: int) -> int:
    """Return the most that limits admit within so many nanoseconds of a bucket that is made at their beginning."""
    admitted = []
    for bandwidth in BucketConfiguration.parse(text):
        periods = elapsed // bandwidth.refill_period_nanos
        whole = elapsed * bandwidth.refill_tokens // bandwidth.refill_period_nanos
        came = periods * bandwidth.refill_tokens if bandwidth.refill_intervally else whole
        admitted.append(bandwidth.capacity + came)
    return min(admitted)
