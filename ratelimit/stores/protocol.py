"""What a store must do, and what it may do besides; ``tests/stores/test_contract.py`` checks every store of ours."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from ratelimit.core.algorithm import State
from ratelimit.core.expiration import Expiration
from ratelimit.runtime.steps import Steps

T = TypeVar("T")


class Lost(NamedTuple):
    """The answer to a swap that lost: what is stored instead, None where nothing is."""

    state: bytes | None


class Store(Protocol):
    """Bytes under keys, changed only by compare-and-swap.

    A method that fails raises a ``StoreError``, with ``in_doubt`` set where the request may have been carried out. A
    store may have ``unique_readings``, which says of ``now_nanos`` what it says of a :class:`ratelimit.Clock`, and
    ``keys(prefix)``, a list of the keys that begin with these bytes, for :func:`ratelimit.testing.reset_all`.
    """

    def get(self, key: bytes) -> bytes | None:
        """Return the state under a key, or the beginning of a value longer than any state; None for none or empty."""
        ...

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Replace ``before`` (None: nothing) by ``after``, and return None; where anything else is stored, return that.

        ``after`` expires after ``ttl_millis``; if that is 0 or less it never does, even where ``before`` would have.
        """
        ...

    def delete(self, key: bytes) -> None:
        """Delete the state under a key; succeed also where nothing is stored."""
        ...

    def now_nanos(self, key: bytes) -> int:
        """Return the time of the store's clock for decisions about a key, in nanoseconds since the epoch."""
        ...

    def close(self) -> None:
        """Close what the store itself has opened."""
        ...


class AsyncStore(Protocol):
    """A :class:`Store` whose methods are awaited; ``now_nanos`` only where it has to ask for the time."""

    async def get(self, key: bytes) -> bytes | None:
        """Return the state under a key; see :meth:`Store.get`."""
        ...

    async def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Replace ``before`` by ``after``; see :meth:`Store.swap`."""
        ...

    async def delete(self, key: bytes) -> None:
        """Delete the state under a key; succeed also where nothing is stored."""
        ...

    def now_nanos(self, key: bytes) -> int | Awaitable[int]:
        """Return the time of the store's clock, or an awaitable of it; see :meth:`Store.now_nanos`."""
        ...

    async def aclose(self) -> None:
        """Close what the store itself has opened."""
        ...


class Decided(NamedTuple):
    """The answer of a store that decides.

    :param done: whether the store has decided.
    :param before: what was stored before.
    """

    done: bool
    before: bytes | None


@runtime_checkable
class DecidingStore(Protocol):
    """A store elsewhere, which knows deadlines, and can decide by itself where swaps would be lost to contention.

    Its ``get``, ``swap``, ``delete`` and ``now_nanos`` take the keyword ``deadline`` as well: a time of the clock
    ``time.monotonic`` by which they answer or raise ``StoreTimeoutError``; None: as long as the connections wait.
    ``swapping`` and ``deciding`` return the steps of ``swap`` and ``decide``, for callers that are steps themselves.
    ``known_now`` returns what ``now_nanos`` would; None where that would have to ask. A ``get`` brings the time along.
    """

    def decide(self, key: bytes, arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Any:
        """Carry out a request of ``ratelimit.engine.script_arguments``; return, or await, a :class:`Decided`.

        Where the request asks for a count, the answer may be the number of tokens that were consumed instead. A bucket
        that the store cannot decide exactly stays untouched. If a reply is lost, repeat only a strict request.
        """
        ...

    def known_now(self, key: bytes) -> int | None: ...
    def swapping(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, deadline: float | None
    ) -> Steps[Lost | None]: ...
    def deciding(self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None) -> Steps[Decided | int]: ...


class Usual(NamedTuple):
    """A request that swaps or decides by itself: nothing has to go along with it.

    :param command: the request, as the store knows it.
    :param done: the reply by which a swap is done.
    """

    command: Any
    done: Any = None


@runtime_checkable
class ExpressStore(DecidingStore, Protocol):
    """A deciding store that also shows its requests, so that a decision can be one request and one reply.

    ``usual_swap`` and ``usual_decision`` return the one request of ``swap`` and ``decide``, or None where it takes more
    than one request, or where something goes along with it. ``send_usual`` sends such a request in sync code and
    returns its reply. ``post_usual`` sends it in asyncio code: ``waiter.set_result`` gets a list of the reply, or
    ``waiter.set_exception`` a ``StoreError``. It returns False where the request cannot leave at once, and was not
    sent. ``swapped`` and ``decided`` return the steps of ``swap`` and ``decide`` from such a reply
    on; for ``swapped`` it is one by which the swap is not done.
    """

    def usual_swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Usual | None: ...
    def usual_decision(self, key: bytes, arguments: tuple[bytes, ...]) -> Usual | None: ...
    def send_usual(self, key: bytes, command: Any, deadline: float | None) -> Any: ...
    def post_usual(self, key: bytes, command: Any, waiter: Any, deadline: float | None) -> bool: ...
    def swapped(
        self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int, *, deadline: float | None, reply: Any
    ) -> Steps[Lost | None]: ...
    def decided(
        self, key: bytes, arguments: tuple[bytes, ...], deadline: float | None, reply: Any
    ) -> Steps[Decided | int]: ...


@runtime_checkable
class UpdatingStore(Protocol):
    """A store in this process, which keeps states as they are: nothing is swapped or awaited.

    ``update`` applies a function to what is under the key. The function takes the state (None: nothing is there) and
    the time, which is ``now`` or else this store's, and returns the state to store (None: nothing) and an answer. The
    answer is returned, and whether the bucket was made or its configuration replaced; or None where there is no bucket
    and it ``must_exist``.
    """

    def update(
        self,
        key: bytes,
        transition: Callable[[State | None, int], tuple[State | None, T]],
        expiration: Expiration,
        now: int | None,
        *,
        must_exist: bool,
    ) -> tuple[T, bool] | None: ...


class Swap(NamedTuple):
    """One of several swaps that are carried out together.

    :param before: what must be stored; None: nothing.
    :param after: what takes its place; None: it stays, and is only compared.
    :param ttl_millis: see :meth:`Store.swap`.
    """

    key: bytes
    before: bytes | None
    after: bytes | None
    ttl_millis: int


@runtime_checkable
class AtomicStore(Protocol):
    """A store that can swap under several keys at once, which :func:`ratelimit.all_of` needs.

    Where different keys may be on different servers, ``slot_of(key)`` returns what must be equal for keys to be changed
    together; without it, any keys are. The method of a :class:`DecidingStore` takes the keyword ``deadline`` as well.
    """

    def swap_all(self, swaps: Sequence[Swap]) -> Any:
        """Carry out all of the swaps, or none of them; return, or await, None when done.

        Where anything else is stored under one of the keys, none is carried out. The answer then has an entry for each
        swap: None where ``before`` is stored, or :class:`Lost`. Each key is there once.
        """
        ...


@runtime_checkable
class AtomicDecidingStore(Protocol):
    """A :class:`DecidingStore` that can decide about several buckets at once."""

    def decide_all(self, keys: Sequence[bytes], arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Any:
        """Carry out a request of ``ratelimit.engine.several.script_arguments``.

        Return, or await, a :class:`DecidedAll`. If there is a bucket that the store cannot decide exactly, all stay
        untouched. A request whose reply is lost is not to be repeated.
        """
        ...


class DecidedAll(NamedTuple):
    """The answer of a store that decides about several buckets.

    :param done: whether the store has decided.
    :param before: what was stored before, for each key.
    """

    done: bool
    before: tuple[bytes | None, ...]


@runtime_checkable
class AtomicUpdatingStore(Protocol):
    """An :class:`UpdatingStore` that can change several buckets at once.

    ``update_all`` applies a function to what is under the keys, as ``update`` does: it takes the states and the time,
    and returns the states to store (None: nothing) and an answer, which is returned.
    """

    def update_all(
        self,
        keys: Sequence[bytes],
        transition: Callable[[list[State | None], int], tuple[list[State | None], T]],
        expirations: Sequence[Expiration],
        now: int | None,
    ) -> T: ...
