"""A store that fails while a test says so, and the errors that it fails with."""

from __future__ import annotations

from collections.abc import Sequence

from ratelimit import StoreError, StoreTimeoutError, StoreUnavailableError
from ratelimit.keys import Key
from ratelimit.stores.protocol import Lost, Swap
from ratelimit.testing import ScriptedStore

DOWN = StoreUnavailableError(b"", "the store is down")
IN_DOUBT = StoreTimeoutError(b"", "the store is silent", in_doubt=True)


class Unreliable(ScriptedStore):
    """Fails while it is down, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.down: StoreError | None = None
        self.asked = 0

    def get(self, key: Key) -> bytes | None:
        self._fail()
        return super().get(key)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        self._fail()
        return super().swap(key, before, after, ttl_millis)

    def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        self._fail()
        return super().swap_all(swaps)

    def _fail(self) -> None:
        self.asked += 1
        if self.down is not None:
            raise type(self.down)(self.down.key, self.down.message, self.down.in_doubt)
