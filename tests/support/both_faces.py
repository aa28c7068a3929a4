"""Both faces of the library, sync and asyncio, under one notation: what is awaitable is awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from ratelimit import AsyncMemoryStore, AsyncProxyManager, MemoryStore, ProxyManager
from ratelimit.stores.memory import AsyncSwappingMemoryStore, SwappingMemoryStore

T = TypeVar("T")

Manager = ProxyManager | AsyncProxyManager
Face = type[Manager]


def for_asyncio(store: SwappingMemoryStore) -> AsyncSwappingMemoryStore:
    """Return the face for asyncio of a store in memory."""
    return AsyncMemoryStore(store) if isinstance(store, MemoryStore) else AsyncSwappingMemoryStore(store)


async def settled(answer: Awaitable[T] | T) -> T:
    """Return the answer of a verb, of either face."""
    if isinstance(answer, Awaitable):
        return await answer
    return answer


@asynccontextmanager
async def closing(opened: T) -> AsyncGenerator[T]:
    """Close a manager or a client, of either face."""
    thing: Any = opened
    try:
        yield opened
    finally:
        await settled(thing.aclose() if hasattr(thing, "aclose") else thing.close())


class Settled:
    """An object of either face, whose methods are all awaited; a manager has all verbs of its buckets, key first."""

    def __init__(self, face: Any) -> None:
        self.face = face

    def __getattr__(self, name: str) -> Any:
        if not hasattr(self.face, name) and hasattr(self.face, "bucket"):
            return lambda key, *arguments, **keywords: getattr(Settled(self.face.bucket(key)), name)(
                *arguments, **keywords
            )
        method = getattr(self.face, name)

        async def call(*arguments: Any, **keywords: Any) -> Any:
            return await settled(method(*arguments, **keywords))

        return call
