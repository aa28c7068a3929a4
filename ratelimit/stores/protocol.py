"""What a store is.

``tests/stores/test_contract.py`` states what every store must do, and runs over each of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NamedTuple, Protocol


class Lost(NamedTuple):
    """The answer to a swap that lost: what is stored instead, None where nothing is."""

    state: bytes | None


class Store(Protocol):
    """Bytes under keys, changed only by compare-and-swap.

    Errors are ``StoreError`` or one of its kinds, with ``in_doubt`` set where the request may have been carried out.
    """

    def get(self, key: bytes) -> bytes | None:
        """The state under the key; None where there is none."""
        ...

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Put ``after`` in the place of ``before``, and let it expire after ``ttl_millis``.

        :param before: what must be stored, to the byte; None: nothing.
        :param ttl_millis: 0 or less: it does not expire, also where the old one would have.
        :returns: None when done; else what is stored instead.
        """
        ...

    def delete(self, key: bytes) -> None:
        """Forget what is stored under the key, if anything."""
        ...

    def now_nanos(self, key: bytes) -> int:
        """The time by this store's own clock, for decisions about this key: nanoseconds since the epoch."""
        ...

    def close(self) -> None:
        """Close what the store itself has opened."""
        ...


class AsyncStore(Protocol):
    """The same, awaited."""

    async def get(self, key: bytes) -> bytes | None:
        """See :meth:`Store.get`."""
        ...

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """See :meth:`Store.swap`."""
        ...

    async def delete(self, key: bytes) -> None:
        """See :meth:`Store.delete`."""
        ...

    def now_nanos(self, key: bytes) -> int | Awaitable[int]:
        """See :meth:`Store.now_nanos`; to be awaited only where the time has to be asked for."""
        ...

    async def aclose(self) -> None:
        """Close what the store itself has opened."""
        ...
