"""Requests that are not HTTP's, for tests of policies, and a limiter of either face to decide about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ratelimit import AsyncMemoryStore, AsyncProxyManager, MemoryStore, ProxyManager
from ratelimit.policy import AsyncLimiter, Decision, Limiter
from ratelimit.testing import ManualClock
from tests.support.both_faces import settled

NOW = 1_700_000_000_000_000_000


@dataclass(frozen=True)
class Order:
    """A request: somebody orders something."""

    customer: str | None = "acme"
    pieces: int = 1
    urgent: bool = False


def customer(order: Order) -> str | None:
    """The key of the customer."""
    return order.customer


class Limits:
    """A limiter, its clock, and what is stored."""

    def __init__(self, *rules: Any, asynchronous: bool = False, over: Limits | None = None, **settings: Any) -> None:
        self.clock: ManualClock = ManualClock(NOW) if over is None else over.clock
        self.memory: MemoryStore = MemoryStore(clock=self.clock) if over is None else over.memory
        self.manager: ProxyManager | AsyncProxyManager
        self.limiter: Limiter[Order] | AsyncLimiter[Order]
        if asynchronous:
            self.manager = AsyncProxyManager(AsyncMemoryStore(self.memory), clock=self.clock)
            self.limiter = AsyncLimiter(*rules, manager=self.manager, **settings)
        else:
            self.manager = ProxyManager(self.memory, clock=self.clock)
            self.limiter = Limiter(*rules, manager=self.manager, **settings)

    async def decide(self, order: Order | None = None, place: str = "") -> Decision[Order]:
        return await settled(self.limiter.decide(Order() if order is None else order, place))

    async def admitted(self, *orders: Order) -> list[bool]:
        return [bool(await self.decide(order)) for order in orders]

    def consumed(self, key: str) -> int:
        """Tokens that the bucket says were consumed; 0 where there is none."""
        with ProxyManager(self.memory, "1/s", clock=self.clock) as witness:
            return witness.snapshot(key).consumed_tokens if self.memory.get(key.encode()) else 0
