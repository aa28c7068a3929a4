"""For the tests of services that use this library: a clock to move, a store that fails on command, full buckets."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any

from ratelimit.core.numbers import Duration, to_nanos
from ratelimit.errors import InvalidArgumentError, StoreError, StoreUnavailableError
from ratelimit.keys import brief
from ratelimit.manager import AsyncProxyManager, ProxyManager
from ratelimit.runtime.copies import OfThisProcess
from ratelimit.stores.memory import AsyncSwappingMemoryStore, SwappingMemoryStore
from ratelimit.stores.protocol import Lost, Swap

__all__ = [
    "AsyncSwappingMemoryStore",
    "ManualClock",
    "ScriptedStore",
    "SwappingMemoryStore",
    "areset_all",
    "reset_all",
]


class ManualClock(OfThisProcess):
    """A clock that stands still until it is moved; for both faces, and safe for threads.

    :param nanos: the time it shows, in nanoseconds since the epoch.
    :param advance_on_sleep: whether a sleep moves it by its length; otherwise a sleep ends at once and moves nothing.
    :ivar slept: the sleeps asked for, in nanoseconds.
    :ivar unique_readings: see :class:`ratelimit.Clock`; False, since a clock that stands still shows one time to all.
        A test in which only one manager decides, and moves the clock in between, may set it.
    """

    _advice = "make one in each process"

    def __init__(self, nanos: int, *, advance_on_sleep: bool = True) -> None:
        self.slept: list[int] = []
        self.unique_readings = False
        self._nanos = nanos
        self._advance_on_sleep = advance_on_sleep
        self._lock = Lock()

    def now_nanos(self) -> int:
        """The time it shows."""
        return self._nanos

    def set(self, nanos: int) -> None:
        """Show another time, an earlier one perhaps."""
        with self._lock:
            self._nanos = nanos

    def advance(self, seconds: Duration = 0, *, nanos: int = 0) -> None:
        """Move on by seconds (a number or a ``timedelta``), by nanoseconds, or both."""
        with self._lock:
            self._nanos += to_nanos(seconds) + nanos

    def sleep(self, nanos: int) -> None:
        """Take note of the sleep, and end it at once."""
        with self._lock:
            self.slept.append(nanos)
            if self._advance_on_sleep:
                self._nanos += nanos

    async def asleep(self, nanos: int) -> None:
        """Take note of the sleep, let other tasks run, and end it."""
        self.sleep(nanos)
        await asyncio.sleep(0)


def reset_all(manager: ProxyManager | None = None) -> None:
    """Remove all buckets of a manager: all keys of its store that begin with its prefix.

    :param manager: None: all managers that the integrations of this process have made, of URLs or by default, those for
        asyncio too. Their prefix is ``ratelimit:``.
    :raises InvalidArgumentError: for a manager without a prefix, for one over a store that cannot list its keys, and
        for one of asyncio.
    :raises StoreError: where the store fails.
    :raises RuntimeError: with None in a running event loop, where there are managers for asyncio.
    """
    if manager is not None:
        _reset(manager)
        return
    made, made_for_asyncio = _of_integrations()
    if made_for_asyncio:
        if _loop_runs():
            raise RuntimeError("reset_all() cannot wait in a running event loop; await areset_all() there")
        # This loop does not become the current one of the thread.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(_areset_and_disconnect(made_for_asyncio))
    for each in made:
        _reset(each)


async def areset_all(manager: AsyncProxyManager | None = None) -> None:
    """Remove all buckets of a manager of asyncio, see :func:`reset_all`.

    :param manager: None: all managers that the integrations of this process have made, those for sync code too.
    """
    if manager is not None:
        await _areset(manager)
        return
    made, made_for_asyncio = _of_integrations()
    for one in made_for_asyncio:
        await _areset(one)
    for each in made:
        _reset(each)


def _reset(manager: ProxyManager) -> None:
    if not isinstance(manager, ProxyManager):
        raise InvalidArgumentError(f"manager must be a ProxyManager; got {brief(manager)}")
    for key in _listing(manager)(manager.prefix):
        manager.remove(key.removeprefix(manager.prefix))


async def _areset(manager: AsyncProxyManager) -> None:
    if not isinstance(manager, AsyncProxyManager):
        raise InvalidArgumentError(f"manager must be an AsyncProxyManager; got {brief(manager)}")
    for key in await _listing(manager)(manager.prefix):
        await manager.remove(key.removeprefix(manager.prefix))


async def _areset_and_disconnect(managers: list[AsyncProxyManager]) -> None:
    for each in managers:
        await _areset(each)
        # Connections belong to this event loop, which ends; in another the store opens others.
        await each.store.aclose()


def _listing(manager: ProxyManager | AsyncProxyManager) -> Callable[[bytes], Any]:
    """Return what lists the keys of a manager's store."""
    if not manager.prefix:
        raise InvalidArgumentError(
            f"manager must have a prefix, or keys would be removed that are not buckets; got {brief(manager)}"
        )
    listing: Callable[[bytes], Any] | None = getattr(manager.store, "keys", None)
    if listing is None:
        raise InvalidArgumentError(f"the manager's store must have keys(prefix); got {brief(manager)}")
    return listing


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _of_integrations() -> tuple[list[ProxyManager], list[AsyncProxyManager]]:
    from ratelimit.policy.managers import managers_made  # most tests have no integrations

    return managers_made()


_Outcome = Callable[[bytes, Callable[[], Any], Callable[[Lost], Any]], Any]
"""Answers a swap: it gets the key, what carries the swap out, and what makes the answer of a loss."""


class ScriptedStore(SwappingMemoryStore):
    """A store in memory whose next swaps follow a script; the swaps after those succeed or lose as usual.

    The scripted outcomes are used in order, one for each swap. A swap under several keys at once, that of ``all_of``,
    counts as one; where it loses, it does so under the first of its keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self._script: deque[_Outcome] = deque()

    def lose_swaps(self, times: int = 1, *, state: bytes | None) -> None:
        """Let another writer win the next swaps, and leave this state (None: the bucket is removed)."""

        def lose(key: bytes, _: Callable[[], Any], lost: Callable[[Lost], Any]) -> Any:
            if state is None:
                self.delete(key)
            else:
                self.put(key, state)
            return lost(Lost(state))

        self._script.extend([lose] * times)

    def lose_replies(self, times: int = 1) -> None:
        """Carry the next swaps out, and answer that the reply was lost."""

        def lose(key: bytes, carry_out: Callable[[], Any], _: Callable[[Lost], Any]) -> Any:
            carry_out()
            raise StoreUnavailableError(key, "the reply was lost, as scripted", in_doubt=True)

        self._script.extend([lose] * times)

    def lose_requests(self, times: int = 1) -> None:
        """Do not carry the next swaps out, and answer that the reply was lost."""
        self.fail(StoreUnavailableError(b"", "the request was lost, as scripted", in_doubt=True), times)

    def fail(self, error: Exception | None = None, times: int = 1) -> None:
        """Answer the next swaps with an error, a ``StoreUnavailableError`` when None is given."""
        scripted = error or StoreUnavailableError(b"", "the store failed, as scripted")
        if not isinstance(scripted, StoreError):
            raise InvalidArgumentError(f"a store fails with a StoreError, not with {error!r}")

        def fail(key: bytes, *_: object) -> Any:
            raise type(scripted)(key, scripted.message, scripted.in_doubt)

        self._script.extend([fail] * times)

    def swap(self, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> Lost | None:
        """Swap as scripted; once the script is used up, swap as every store does."""
        carry_out = partial(super().swap, key, before, after, ttl_millis)
        return self._next()(key, carry_out, lambda loss: loss)  # type: ignore[no-any-return]

    def swap_all(self, swaps: Sequence[Swap]) -> list[Lost | None] | None:
        """Swap under several keys as scripted; once the script is used up, as every store does."""
        carry_out = partial(super().swap_all, swaps)
        others = [None] * (len(swaps) - 1)
        return self._next()(swaps[0].key, carry_out, lambda loss: [loss, *others])  # type: ignore[no-any-return]

    def _next(self) -> _Outcome:
        try:
            return self._script.popleft()
        except IndexError:
            return self._do

    @staticmethod
    def _do(_key: bytes, carry_out: Callable[[], Any], _lost: Callable[[Lost], Any]) -> Any:
        return carry_out()
