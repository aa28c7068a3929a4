"""What a store is.

``tests/stores/test_contract.py`` states what every store must do, and runs over each of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from ratelimit.core.algorithm import State
from ratelimit.core.expiration import Expiration
from ratelimit.runtime.steps import Steps

T = TypeVar("T")


class Lost(NamedTuple):
    """The answer to a swap that lost: what is stored instead, None where nothing is."""

    state: bytes | None


class Decided(NamedTuple):
    """The answer of a store that decides: whether it has, and what was stored before."""

    done: bool
    before: bytes | None


class Store(Protocol):
    """Bytes under keys, changed only by compare-and-swap.

    Errors are ``StoreError`` or one of its kinds, with ``in_doubt`` set where the request may have been carried out.
    A store may have ``unique_readings``, which says of ``now_nanos`` what it says of a :class:`ratelimit.Clock`; and
    ``keys(prefix)``, a list of the keys that begin with these bytes, for :func:`ratelimit.testing.reset_all`.
    """

    def get(self, key: bytes) -> bytes | None:
        """The state under the key; None where there is none, or an empty value.

        The beginning will do of a value that is longer than any state, as it will in ``Lost`` and ``Decided``.
        """
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


@runtime_checkable
class DecidingStore(Protocol):
    """A store that can also decide by itself, which spares a bucket under contention the swaps that are lost.

    It is elsewhere, and may be slow or gone: what it is asked for it answers until a deadline, by ``time.monotonic``,
    or raises ``StoreTimeoutError``. None: as long as its connections wait. Methods without ``Steps`` are awaited where
    the store is an ``AsyncStore``.
    """

    def get(self, key: bytes, *, deadline: float | None = None) -> Any:
        """See :meth:`Store.get`."""
        ...

    def swap(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None = None
    ) -> Any:
        """See :meth:`Store.swap`."""
        ...

    def delete(self, key: bytes, *, deadline: float | None = None) -> Any:
        """See :meth:`Store.delete`."""
        ...

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> Any:
        """See :meth:`Store.now_nanos`."""
        ...

    def known_now(self, key: bytes) -> int | None:
        """The time as ``now_nanos`` tells it; None where that would have to ask for it. A ``get`` brings it along."""
        ...

    def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Any:
        """Carry out what :func:`ratelimit.engine.script_arguments.request` says, and return what was there before.

        A bucket that the store cannot decide exactly is left untouched. The call must not be repeated when the reply
        was lost.
        """
        ...

    def swapping(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]:
        """Return the steps of ``swap`` for callers that are steps themselves."""
        ...

    def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided]:
        """``decide`` in steps."""
        ...


@runtime_checkable
class UpdatingStore(Protocol):
    """A store in this process, which keeps states as they are: there is nothing to swap, and nothing to await."""

    def update(
        self,
        key: bytes,
        transition: Callable[[State | None, int], tuple[State | None, T]],
        expiration: Expiration,
        now: int | None,
        *,
        must_exist: bool,
    ) -> tuple[T, bool] | None:
        """Apply a function to what is under the key; no other writer can come in between.

        :param transition: takes the state (None: nothing is there) and the time, and returns the state to store (None:
            nothing) and an answer.
        :param now: the time to apply it at; None: the time by this store's clock.
        :param must_exist: return None where nothing is there.
        :returns: the answer, and whether the bucket was made, or its configuration replaced.
        """
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
