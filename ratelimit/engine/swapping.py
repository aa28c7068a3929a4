"""The only compare-and-swap loop.

It computes from what the manager remembers, swaps, and computes again from the winner's bytes whenever another writer
got there first. Where that happens twice, the store is asked to decide by itself, if it can; and it is asked at once
for as long as others are seen to write the bucket in between. Thus no decision takes more than three round trips: one
read or swap, one more swap, and then the store's own decision or, if the reply to that swap was lost, its repetition.

The loop is about contention; the one failure that it repairs is a reply that was lost. Four rules hold it together:

1. What is remembered never decides alone. An admission is decided by the swap; a rejection is computed again from a
   fresh read, or from bytes that this very exchange was shown by a swap that lost.
2. A swap whose reply was lost is sent again as it was. If it finds its own bytes in place it has succeeded, provided
   that no other writer can have written the same bytes: they must hold this exchange's own reading of a clock that no
   other writer reads alike. Otherwise nobody can say whether the swap was carried out, and the error says that it is in
   doubt. There is no such reading where tokens come by whole periods, where the clock is coarse, and where it is behind
   the last refill, since then time leaves no trace in the bytes.
3. A decision of the store whose reply was lost is not asked for again: nothing tells it from a second one. The error
   says that it is in doubt.
4. Where a store cannot decide, a pause between attempts is followed by a fresh read. A client that swaps from bytes
   older than its pause loses to those that did not pause, again and again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from ratelimit.core.commands import Command, Plan, execute
from ratelimit.core.expiration import Expiration
from ratelimit.core.token_bucket import codec
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.cancelled_waits import CancelledWaits
from ratelimit.engine.last_seen import Remembered, Seen
from ratelimit.engine.script_arguments import request
from ratelimit.errors import (
    BucketNotFoundError,
    ContentionError,
    CorruptStateError,
    RateLimitError,
    StoreError,
    StoreTimeoutError,
    StoreUnavailableError,
)
from ratelimit.keys import Key
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps
from ratelimit.stores.protocol import AsyncStore, Decided, DecidingStore, Lost, Store

if TYPE_CHECKING:
    from ratelimit.engine.shield import Shield

T = TypeVar("T")

_new = tuple.__new__  # of a named tuple: without the function that would only name its fields

_NOT_ASKED: Final = ()  # what the time is

_LOST_BEFORE_DELEGATION: Final = 2  # swaps
_TRIPS_BEFORE_DELEGATION: Final = 2  # of one exchange
_UNDISTURBED_BEFORE_SWAPS: Final = 16  # decisions of the store

_IMMEDIATE_ATTEMPTS: Final = 4
_SHORTEST_PAUSE_NANOS: Final = 500_000
_LONGEST_PAUSE_NANOS: Final = 16_000_000


class Call:
    """One call of a verb: until when it is to be answered, and what happened to it on its way.

    :param deadline: on the clock of ``Backend.monotonic``; None: as long as the store itself waits.
    :param holds: whether a cancellation that arrives while a request is in flight does not end the exchange with its
        outcome unknown: the request is seen through, and the cancellation is left in here.
    :ivar interruption: the cancellation that is held back.
    :ivar round_trips: how often the store was asked.
    :ivar carried: whether another call's exchange carries the command.
    :ivar degraded: whether the answer is not the store's, which has failed.
    :ivar charged: whether tokens of the answer were taken from a bucket, and can be given back.
    :ivar shield: keeps the tokens of a wait in sync code.
    """

    # Of the class until they are set, as mostly they are not: every decision makes a call.
    interruption: BaseException | None = None
    round_trips: int = 0
    carried: bool = False
    degraded: bool = False
    charged: bool = True
    shield: Shield | None = None

    def __init__(self, deadline: float | None = None, holds: bool = False) -> None:
        self.deadline = deadline
        self.holds = holds


@dataclass(slots=True)
class Backend:
    """What all buckets of a manager have in common.

    :param now: from the stored key to the time, in nanoseconds; None where a read has to bring it first.
    :param sleep: waits for a number of nanoseconds by the clock of the buckets.
    :param pause: waits for a number of nanoseconds between attempts, in real time.
    :param monotonic: the clock of deadlines, in seconds.
    :param timeout: how long a call may take where nothing else is said, in seconds; waiting for tokens is not in it.
    :param attempts: swaps that one decision may lose before it gives up.
    :param deciding: the store, if it can decide by itself.
    :param executing: the store's own way to execute commands, if it has one, and the time to do it at, unless that is
        the store's.
    :param unique_readings: whether no two readings of ``now`` are alike, in whichever process.
    :ivar begin: ``monotonic`` where a call of a verb begins; it raises once the manager is closed.
    :ivar own_executing: ``executing`` for calls that have begun, also once the manager is closed.
    """

    store: Store | AsyncStore
    now: Callable[[bytes], Any]
    sleep: Callable[[int], Any]
    pause: Callable[[int], Any]
    monotonic: Callable[[], float]
    timeout: float
    remembered: Remembered
    attempts: int
    deciding: DecidingStore | None
    executing: tuple[Callable[..., Any], Callable[[bytes], int] | None] | None
    unique_readings: bool
    cancelled: CancelledWaits = field(default_factory=CancelledWaits)
    begin: Callable[[], float] = field(init=False)
    own_executing: tuple[Callable[..., Any], Callable[[bytes], int] | None] | None = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.monotonic
        self.own_executing = self.executing

    def call(self, timeout: float | None = None, *, holds: bool = False) -> Call:
        """Begin a call of a verb."""
        fork_safety.check()
        return Call(self.begin() + (self.timeout if timeout is None else timeout), holds)

    def own_call(self, timeout: float | None = None) -> Call:
        """Begin a call of the manager's own, also when it is closed."""
        fork_safety.check()
        return Call(self.monotonic() + (self.timeout if timeout is None else timeout))

    def close(self) -> None:
        """Refuse every call of a verb that begins from now on; those that are under way go on.

        What a call begins with is replaced, so that none has to ask whether the manager is closed.
        """
        self.begin = _closed
        if self.executing is not None:
            self.executing = _closed, None


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


def _closed(*_: Any, **__: Any) -> Any:
    # Not a StoreError, which ``on_error`` would turn into an answer: the program is wrong, not the store.
    raise RateLimitError(
        "the manager is closed, and so are its buckets; make another manager, or close this one after its last call"
    )


Exchange = Callable[[Backend, Target, Plan, Command[Any], Call], Steps[Any]]
"""What takes a command to the store and gives its answer, alone or together with others."""


def exchange(  # noqa: C901, PLR0912, PLR0915  # the one loop: its parts would only hand its variables around
    backend: Backend, target: Target, plan: Plan, command: Command[T], call: Call
) -> Steps[T]:
    """Decide a command for a bucket, and store what it changes."""
    store, key, remembered = backend.store, target.stored_key, backend.remembered
    must_exist = target.must_exist_once_made and target.made
    seen = remembered.get(key)
    before, state, lost, _ = seen
    fresh = False  # whether ``before`` was shown to this very exchange
    attempts = 0
    deciding = backend.deciding
    may_delegate = deciding is not None
    try:
        now: Any = backend.now(key) if may_delegate else _NOT_ASKED
        if now is None or command.only_reads or (before is None and must_exist):
            call.round_trips += 1
            before, state, fresh = (yield asked(backend, store.get, call, key)), None, True
        while True:
            if before is None and must_exist:
                raise BucketNotFoundError(target.key)
            if not isinstance(now, int):
                now = backend.now(key)
                # It is asked for only where no read has brought it.
                now = yield asked(backend, store.now_nanos, call, key) if now is None else now
            if (
                may_delegate
                and (lost >= _LOST_BEFORE_DELEGATION or call.round_trips >= _TRIPS_BEFORE_DELEGATION)
                # What only reads is answered from its read, unless that shows a bucket to be made or to be replaced.
                and (attempts or not command.only_reads)
            ):
                may_delegate = False
                arguments = request(command, plan, target.expiration, now, must_exist=must_exist)
                if arguments is not None:
                    call.round_trips += 1
                    done, before = yield from _delegated(deciding, key, arguments, call)
                    state, fresh = None, True
                    if done:
                        return _explained(backend, target, plan, command, seen, before, now)
                    if call.interruption is not None:
                        raise call.interruption  # nothing was consumed
                    now = _NOT_ASKED
                    continue
            if state is None and before is not None:
                state = codec.decode(before, target.key)
            try:
                after, answer = execute(command, plan, state, now)
            except ArithmeticError as error:
                raise codec.out_of_range(before or b"", target.key) from error
            if after is None:
                if fresh:
                    undisturbed = seen.undisturbed if before == seen.state else 0
                    remembered.put(key, Seen(before, state, lost, undisturbed))
                    return answer
                call.round_trips += 1
                before, state, fresh = (yield asked(backend, store.get, call, key)), None, True
                now = _NOT_ASKED
                continue
            new = codec.encode(after)
            ttl = target.expiration.ttl_millis(after, now)
            call.round_trips += 1
            try:
                if call.holds:
                    loss = yield from _seen_through(asked(backend, store.swap, call, key, before, new, ttl), call)
                elif deciding is not None:
                    loss = yield from deciding.swapping(key, before, new, ttl, call.deadline)
                else:
                    loss = yield store.swap(key, before, new, ttl)
            except BaseException as error:  # noqa: BLE001  # raised again, unless it can be told what became of the swap
                is_own = backend.unique_readings and _holds_reading(state, after, now)
                swap = key, before, new, ttl
                loss = yield from _repeated(backend, target, swap, is_own, error, call)
            if loss is None:
                remembered.put(key, _new(Seen, (new, after, lost if attempts else 0, 0)))
                if state is None or state.configuration_version != after.configuration_version:
                    target.made = True
                return answer
            if call.interruption is not None:
                raise call.interruption  # nothing was consumed
            before, state, fresh = loss.state, None, True
            lost += 1
            attempts += 1
            late = _is_over(backend, call)
            if attempts >= backend.attempts or late:
                remembered.put(key, Seen(before, None, lost))
                if late:
                    raise StoreTimeoutError(target.key, f"there was no time left after {attempts} swaps that were lost")
                raise ContentionError(target.key, attempts)
            if attempts >= _IMMEDIATE_ATTEMPTS:
                yield backend.pause(_jittered_pause(attempts - _IMMEDIATE_ATTEMPTS))
                call.round_trips += 1
                before = yield asked(backend, store.get, call, key)
            now = _NOT_ASKED
    except (StoreError, CorruptStateError) as error:  # as errors_named does, at less cost
        error.key = target.key
        raise


def exchange_in_process(backend: Backend, target: Target, plan: Plan, command: Command[T], _call: Call) -> Steps[T]:
    """The same with a store that executes commands itself: there is nothing to wait for, and no step to take."""
    yield from ()
    return executed(backend.own_executing, target, plan, command)


def executed(executing: Any, target: Target, plan: Plan, command: Command[T]) -> T:
    """Execute a command in such a store.

    :param executing: ``executing`` of the backend where the call begins by this, else ``own_executing``.
    """
    execute, now_nanos = executing
    now = None if now_nanos is None else now_nanos(target.stored_key)
    try:
        done = execute(
            target.stored_key,
            command,
            plan,
            target.expiration,
            now,
            must_exist=target.must_exist_once_made and target.made,
        )
    except CorruptStateError as error:  # the same
        error.key = target.key
        raise
    if done is None:
        raise BucketNotFoundError(target.key)
    answer, made = done
    if made:
        target.made = True
    return answer  # type: ignore[no-any-return]  # whatever the command answers


def _delegated(deciding: Any, key: bytes, arguments: tuple[bytes, ...], call: Call) -> Steps[Decided]:
    """Let the store decide."""
    if not call.holds:
        return (yield from deciding.deciding(key, arguments, call.deadline))  # type: ignore[no-any-return]
    return (yield from _seen_through(deciding.decide(key, arguments, deadline=call.deadline), call))  # type: ignore[no-any-return]


def asked(backend: Backend, method: Callable[..., Any], call: Call, *arguments: Any) -> Any:
    """Ask the store by one of its methods, and until the deadline, if it knows deadlines."""
    return method(*arguments) if backend.deciding is None else method(*arguments, deadline=call.deadline)


def _explained(  # noqa: PLR0917  # all that an exchange is about
    backend: Backend, target: Target, plan: Plan, command: Command[T], seen: Seen, before: bytes | None, now: int
) -> T:
    """The answer to what the store has decided, which has told only what was there before.

    The store goes on to decide until nobody else has written for a while.
    """
    state = None if before is None else codec.decode(before, target.key)
    after, answer = execute(command, plan, state, now)
    stored = before if after is None else codec.encode(after)
    undisturbed = seen.undisturbed + 1 if before == seen.state else 0
    lost = 0 if undisturbed >= _UNDISTURBED_BEFORE_SWAPS else _LOST_BEFORE_DELEGATION
    backend.remembered.put(target.stored_key, Seen(stored, after or state, lost, undisturbed))
    if state is None or (after is not None and state.configuration_version != after.configuration_version):
        target.made = True
    return answer


def _repeated(  # noqa: PLR0917  # the same
    backend: Backend,
    target: Target,
    swap: tuple[bytes, bytes | None, bytes, int],
    is_own: bool,
    failure: BaseException,
    call: Call,
) -> Steps[Lost | None]:
    """Swap once more, after a swap whose reply was lost.

    :param is_own: whether no other writer can have written the bytes that the swap stores.
    """
    if isinstance(failure, StoreError):
        if not failure.in_doubt or _is_over(backend, call):
            raise failure
    elif not call.holds or isinstance(failure, GeneratorExit):
        raise failure
    else:  # sync, or with a loop that is closing: there is no reply to wait for any more
        call.interruption = failure
    key, _, after, _ = swap
    call.round_trips += 1
    try:
        loss: Lost | None = yield asked(backend, backend.store.swap, call, *swap)
    except StoreError as error:
        error.in_doubt = True
        raise
    if loss is None:
        return None
    if is_own and loss.state == after:
        return None
    backend.remembered.put(key, Seen(loss.state))
    meanwhile = "while others were changing the bucket"
    if loss.state == after:
        meanwhile = "and the state that it was to store is there, which another writer may have stored"
    raise StoreUnavailableError(target.key, f"a reply of the store was lost {meanwhile}", in_doubt=True) from failure


def _is_over(backend: Backend, call: Call) -> bool:
    """Whether there is no time left to ask the store."""
    return call.deadline is not None and backend.monotonic() >= call.deadline


def _seen_through(pending: Any, call: Call) -> Steps[Any]:
    """Wait for a request that is in flight whatever cancels the task that waits; a sync one has ended already."""
    answering = asyncio.ensure_future(pending) if isawaitable(pending) else None
    while answering is not None:
        try:
            return (yield asyncio.shield(answering))
        except asyncio.CancelledError as error:
            if answering.cancelled():
                raise
            call.interruption = error
    return (yield pending)


def uninterrupted(steps: Steps[T], call: Call) -> Steps[T]:
    """Run steps of asyncio whatever cancels the task that they are in; a cancellation is left in the call."""
    value, failure = None, None
    while True:
        try:
            pending = steps.send(value) if failure is None else steps.throw(failure)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        try:
            value, failure = (yield from _seen_through(pending, call)), None
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001  # the steps handle it, or let it pass
            failure = error


def _holds_reading(before: BucketState | None, after: BucketState, now: int) -> bool:
    """Return whether the new state shows at what time it was computed, which the old one does not."""
    known = set() if before is None else {state.last_refill_time_nanos for state in before.bandwidth_states}
    return now not in known and any(now == state.last_refill_time_nanos for state in after.bandwidth_states)


def _jittered_pause(retry: int) -> int:
    return fork_safety.chance.randrange(min(_SHORTEST_PAUSE_NANOS << min(retry, 20), _LONGEST_PAUSE_NANOS))
