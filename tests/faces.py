"""Both faces behind one: what is awaitable is awaited."""

from __future__ import annotations

import inspect
from typing import Any


async def settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class Settled:
    """An object of either face, whose methods are all awaited."""

    def __init__(self, face: Any) -> None:
        self.face = face

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.face, name)

        async def call(*arguments: Any, **keywords: Any) -> Any:
            return await settled(method(*arguments, **keywords))

        return call
