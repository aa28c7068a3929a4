"""What the tests of the integrations for ASGI have in common."""

from __future__ import annotations

from typing import Any

import http_sf

from ratelimit import AsyncMemoryStore, AsyncProxyManager
from tests.integrations.requests_of import Limits

PEER = "192.0.2.1"


class Stored(Limits):
    """What is stored, and an asyncio manager of it."""

    def __init__(self) -> None:
        super().__init__()
        self.amanager = AsyncProxyManager(AsyncMemoryStore(self.memory), clock=self.clock)


def parsed(response: Any, name: str) -> list[tuple[str, dict[str, Any]]]:
    """A field that is there once, as RFC 9651 has it."""
    every = getattr(response.headers, "get_list", None) or response.headers.get_all
    (value,) = every(name)
    return http_sf.parse(value.encode(), tltype="list")  # type: ignore[return-value]  # of strings
