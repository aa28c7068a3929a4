"""The only compare-and-swap loop.

It computes from what the manager remembers, swaps, and computes again from the winner's bytes whenever another writer
got there first. It is about contention; the one failure that it repairs is a reply that was lost.

Three rules hold it together:

1. What is remembered never decides alone. An admission is decided by the swap; a rejection is computed again from a
   fresh read, or from bytes that this very exchange was shown by a swap that lost.
2. A pause between attempts is followed by a fresh read. A client that swaps from bytes older than its pause loses to
   those that did not pause, again and again.
3. A swap whose reply was lost is sent again as it was. If it finds its own bytes in place it has succeeded, provided
   that nobody else can have written the same bytes; else nobody can tell any more what became of it, and the caller is
   told just that. Bytes are one's own where they hold one's own reading of a fine clock, as all greedy bandwidths do;
   tokens that come by whole periods leave no such trace, so that there nobody else must have been seen to write.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, Final, NamedTuple, TypeVar

from ratelimit.core import codec
from ratelimit.core.commands import Command, Decision, Plan, execute
from ratelimit.core.duration import NANOS_PER_MILLISECOND
from ratelimit.core.expiration import Expiration
from ratelimit.core.state import BucketState
from ratelimit.drive import Steps
from ratelimit.errors import (
    BucketNotFoundError,
    ContentionError,
    Key,
    StoreError,
    StoreUnavailableError,
    errors_named,
)
from ratelimit.remembered import Remembered, Seen
from ratelimit.stores.protocol import AsyncStore, Lost, Store

T = TypeVar("T")

_IMMEDIATE_ATTEMPTS: Final = 4
_SHORTEST_PAUSE_NANOS: Final = 500_000
_LONGEST_PAUSE_NANOS: Final = 16_000_000


@dataclass(frozen=True, slots=True)
class Backend:
    """What all buckets of a manager have in common.

    :param now: from the stored key to the time, in nanoseconds.
    :param sleep: waits for a number of nanoseconds by the clock of the buckets.
    :param pause: waits for a number of nanoseconds between attempts, in real time.
    :param attempts: swaps that one decision may lose before it gives up.
    """

    store: Store | AsyncStore
    now: Callable[[bytes], Any]
    sleep: Callable[[int], Any]
    pause: Callable[[int], Any]
    remembered: Remembered
    attempts: int


@dataclass(slots=True)
class Target:
    """The bucket that an exchange is about.

    :param key: as the caller gave it, for errors.
    :param stored_key: as the store has it.
    :param must_exist_once_made: raise BucketNotFoundError where a bucket is missing that this handle has made.
    :param made: whether this handle has made the bucket, or replaced its configuration.
    """

    key: Key
    stored_key: bytes
    expiration: Expiration
    must_exist_once_made: bool = False
    made: bool = False


@dataclass(slots=True)
class Interruption:
    """Holds back a cancellation that arrives while a swap is in flight, until it is known what became of the swap."""

    error: BaseException | None = None


def exchange(
    backend: Backend, target: Target, plan: Plan, command: Command[T], interruption: Interruption | None = None
) -> Steps[T]:
    """Decide a command for a bucket, and store what it changes.

    :param interruption: where given, a cancellation of a swap in flight does not end the exchange with its outcome
        unknown: the swap is seen through, and the cancellation is left in here.
    """
    with errors_named(target.key):
        return (yield from _exchange(backend, target, plan, command, interruption))


def _exchange(
    backend: Backend, target: Target, plan: Plan, command: Command[T], interruption: Interruption | None
) -> Steps[T]:
    store, key, remembered = backend.store, target.stored_key, backend.remembered
    must_exist = target.must_exist_once_made and target.made
    before, by_others = remembered.get(key)
    fresh = False  # whether ``before`` was shown to this very exchange
    lost = 0
    if command.only_reads or (before is None and must_exist):
        before, fresh = (yield store.get(key)), True
    while True:
        if before is None and must_exist:
            raise BucketNotFoundError(target.key)
        now = yield backend.now(key)
        state, (after, answer) = _decided(target, plan, command, before, now)
        if after is None:
            if fresh:
                remembered.put(key, before, by_others=by_others)
                return answer
            known, before, fresh = before, (yield store.get(key)), True
            by_others |= before != known
            continue
        new = codec.encode(after)
        swap = _Swap(
            before, new, target.expiration.ttl_millis(after, now), _holds_reading(state, after, now), by_others
        )
        loss = yield from _swapped(backend, target, swap, interruption)
        if loss is None:
            remembered.put(key, new, by_others=by_others)
            target.made |= state is None or state.configuration_version != after.configuration_version
            return answer
        if interruption is not None and interruption.error is not None:
            raise interruption.error  # nothing was consumed
        before, fresh = loss.state, True
        by_others |= before is not None
        lost += 1
        if lost >= backend.attempts:
            remembered.put(key, before, by_others=by_others)
            raise ContentionError(target.key, lost)
        if lost >= _IMMEDIATE_ATTEMPTS:
            yield backend.pause(_jittered_pause(lost - _IMMEDIATE_ATTEMPTS))
            before = yield store.get(key)


def _decided(
    target: Target, plan: Plan, command: Command[T], before: bytes | None, now: int
) -> tuple[BucketState | None, Decision[T]]:
    """The state that the bytes hold, and what the command makes of it."""
    state = None if before is None else codec.decode(before, target.key)
    try:
        return state, execute(command, plan, state, now)
    except ArithmeticError as error:
        raise codec.out_of_range(before or b"", target.key) from error


class _Swap(NamedTuple):
    before: bytes | None
    after: bytes
    ttl_millis: int
    holds_reading: bool
    by_others: bool


def _swapped(backend: Backend, target: Target, swap: _Swap, interruption: Interruption | None) -> Steps[Lost | None]:
    """Swap; and when the reply was lost, once more."""
    key, before, after, ttl_millis = target.stored_key, swap.before, swap.after, swap.ttl_millis
    try:
        pending = backend.store.swap(key, before, after, ttl_millis)
        if interruption is None:
            return (yield pending)  # type: ignore[no-any-return]
        return (yield from _seen_through(pending, interruption))
    except StoreError as error:
        if not error.in_doubt:
            raise
        failure: BaseException = error
    except GeneratorExit:
        raise
    except BaseException as error:  # sync, or with a loop that is closing: there is no reply to wait for any more
        if interruption is None:
            raise
        interruption.error = failure = error
    try:
        loss: Lost | None = yield backend.store.swap(key, before, after, ttl_millis)
    except StoreError as error:
        error.in_doubt = True
        raise
    if loss is None or (loss.state == after and _is_ones_own(swap, backend.remembered.get(key))):
        return None
    raise StoreUnavailableError(
        target.key, "a reply of the store was lost while others were changing the bucket", in_doubt=True
    ) from failure


def _seen_through(pending: Any, interruption: Interruption) -> Steps[Lost | None]:
    """Wait for a swap that is in flight whatever cancels who waits for it; a sync one has ended already."""
    swapping = asyncio.ensure_future(pending) if isawaitable(pending) else None
    while swapping is not None:
        try:
            return (yield asyncio.shield(swapping))  # type: ignore[no-any-return]
        except asyncio.CancelledError as error:
            if swapping.cancelled():
                raise
            interruption.error = error
    return (yield pending)  # type: ignore[no-any-return]


def _is_ones_own(swap: _Swap, seen: Seen) -> bool:
    """Whether nobody else can have written the bytes that were found in place; other threads here are others, too."""
    return swap.holds_reading or not (swap.by_others or seen.by_others or seen.state == swap.after)


def _holds_reading(before: BucketState | None, after: BucketState, now: int) -> bool:
    """Whether the new state shows when it was computed, by a clock that no two clients read alike."""
    if now % NANOS_PER_MILLISECOND == 0:  # as clocks of milliseconds show it, and those that tests move
        return False
    known = set() if before is None else {state.last_refill_time_nanos for state in before.bandwidth_states}
    return now not in known and any(now == state.last_refill_time_nanos for state in after.bandwidth_states)


def _jittered_pause(retry: int) -> int:
    return random.randrange(min(_SHORTEST_PAUSE_NANOS << min(retry, 20), _LONGEST_PAUSE_NANOS))
