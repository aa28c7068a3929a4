"""Requests for tests of the core for HTTP, and a limiter of either face to decide about them."""

from __future__ import annotations

from typing import Any

from ratelimit import AsyncMemoryStore, AsyncProxyManager, MemoryStore, ProxyManager
from ratelimit.integrations.http import Answers, AsyncLimiter, HttpDecision, HttpRequest, Limiter
from ratelimit.testing import ManualClock
from tests.support.both_faces import settled

NOW = 1_700_000_000_000_000_000


def request_of(
    path: str = "/", *, method: str = "GET", peer: str | None = "192.0.2.1", route: str | None = None, **headers: str
) -> HttpRequest:
    """A request; ``x_api_key="k"`` stands for the header ``x-api-key``."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpRequest(method, path, peer, named.get, find_route=lambda: route)


class Limits:
    """A limiter, its clock, and what is stored.

    :param over: whose store and clock it shares.
    :param store: what the manager has in the place of the memory.
    """

    def __init__(
        self, *rules: Any, asynchronous: bool = False, over: Limits | None = None, store: Any = None, **settings: Any
    ) -> None:
        self.clock: ManualClock = ManualClock(NOW) if over is None else over.clock
        self.memory: MemoryStore = MemoryStore(clock=self.clock) if over is None else over.memory
        self.answers: Answers = settings.get("answers") or Answers()
        self.manager: ProxyManager | AsyncProxyManager
        self.limiter: Limiter | AsyncLimiter
        if asynchronous:
            self.manager = AsyncProxyManager(AsyncMemoryStore(store or self.memory), clock=self.clock)
            self.limiter = AsyncLimiter(*rules, manager=self.manager, **settings)
        else:
            self.manager = ProxyManager(store or self.memory, clock=self.clock)
            self.limiter = Limiter(*rules, manager=self.manager, **settings)

    async def decide(self, request: HttpRequest | None = None) -> HttpDecision:
        return await settled(self.limiter.decide(request_of() if request is None else request))

    async def decide_at(self, place: str) -> HttpDecision:
        """Decide about a request by rules that stand at a place."""
        return await settled(self.limiter.decide(request_of(), place))

    def consumed(self, key: str) -> int:
        """Tokens that the bucket says were consumed; 0 where there is none."""
        with ProxyManager(self.memory, "1/s", clock=self.clock) as witness:
            return witness.snapshot(key).consumed_tokens if self.memory.get(key.encode()) else 0
