"""Decisions without the store, as far as an optimization allows; and what was handed out so is told to it later.

For each key a manager keeps the state that the store has last shown, less the tokens that were handed out here since.
What it may decide from that, it does; anything else is an exchange, which carries the tokens that the store does not
know of yet, in the same swap and before the command that it is about.

Four rules hold it together:

1. Tokens that were handed out are booked whatever the bucket holds by then, in debt if need be.
2. They are unsynchronized, or on their way in one exchange: never in two, never in none. Both kinds count against what
   may be handed out. An exchange that fails gives them back, also where its reply was lost: booked twice they cost
   their user some tokens until these come back, not booked they would be admitted beyond every bound.
3. What the store shows is taken over unless something newer has been seen meanwhile.
4. A read writes nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar
from weakref import ref

from ratelimit.core.commands import (
    Command,
    ConsumeAsMuchAsPossible,
    Plan,
    Reserve,
    Synchronize,
    Synchronized,
    TakeSnapshot,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.numbers import MIN, wrap
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.swapping import Backend, Call, Exchange, Target
from ratelimit.errors import RateLimitError, StoreError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps

T = TypeVar("T")

_OVERHEAD_BYTES: Final = 1_500  # of an entry: its state, some ten small objects, and a place in the dictionary, roughly
ASK: Final = object()
"""No answer: the store must be asked."""

_logger = logging.getLogger("ratelimit")


class _Sample(NamedTuple):
    """What the store had counted at a time, and how much of it this manager had consumed."""

    at: int
    consumed: int
    own: int


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of a bucket.

    :param target: of the exchange that was last begun; as is the plan.
    :param state: as the store had it, less what was handed out here since; None: the store must be asked.
    :param seen_at: when the store had it so.
    :param seen_consumed: what the store had counted then.
    :param pending: tokens that were handed out here, and that the store is not known to have.
    :param exchanges: those under way. One that was interrupted is gone without having said what came of it: it has
        failed, and its tokens are to be told by another.
    :param ended: exchanges that have succeeded.
    :param own: tokens that this manager has consumed in the store.
    :param empty_tokens: so many are not there before ``empty_until``.
    """

    target: Target
    plan: Plan
    weight: int
    state: BucketState | None = None
    seen_at: int = 0
    seen_consumed: int = 0
    pending: int = 0
    exchanges: tuple[ref[_Begun], ...] = ()
    ended: int = 0
    own: int = 0
    empty_tokens: int = 0
    empty_until: int = MIN
    samples: deque[_Sample] | None = None

    def idle(self) -> bool:
        """Whether nothing is lost when it is forgotten."""
        return not (self.pending or self.under_way())

    def under_way(self) -> list[_Begun]:
        """The exchanges that somebody waits for."""
        return [begun for exchange in self.exchanges if (begun := exchange()) is not None]

    @property
    def in_flight(self) -> int:
        """Tokens that are on their way to the store."""
        return sum(begun.carried for begun in self.under_way())

    @property
    def unsynchronized(self) -> int:
        """Tokens that were handed out here, and are on no way to the store."""
        return self.pending - self.in_flight

    def saw(self, outcome: Synchronized[Any]) -> None:
        """Take over what the store has shown."""
        self.state = outcome.state.consumed(self.pending) if self.pending else outcome.state
        self.seen_at, self.seen_consumed = outcome.now, outcome.state.consumed_tokens
        self.empty_until = MIN

    def sample(self, most: int) -> None:
        """Note what the store has counted, and what of it was one's own."""
        sample = _Sample(self.seen_at, self.seen_consumed, self.own)
        samples = deque(self.samples or (), most)
        if samples and (sample.at < samples[-1].at or sample.consumed < samples[-1].consumed):
            samples.clear()  # another clock, or another bucket
        if samples and sample.at == samples[-1].at:
            samples.pop()
        samples.append(sample)
        self.samples = samples

    def consumed_by_others(self, optimization: Optimization, now: int) -> int | None:
        """Tokens that others are expected to have consumed, which the store has not shown; None: who knows.

        Others may be as late in telling the store as oneself, so that they are counted from the last exchange but one.
        """
        samples = self.samples
        while samples and now - samples[0].at > optimization.max_sample_age_nanos:
            samples.popleft()
        if not samples or len(samples) < optimization.min_samples:
            return None
        first, last = samples[0], samples[-1]
        others = max(0, last.consumed - first.consumed - (last.own - first.own))
        return -(-others * (now - samples[-2].at) // (last.at - first.at))


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Begun:
    """An exchange under way: the tokens that it carries or has to be told of, and how many had ended before."""

    entry: _Entry
    target: Target
    plan: Plan
    carried: int
    not_carried: int
    ended: int


class Optimizer:
    """What a manager knows of its buckets, and has not told the store; the least recently used are forgotten first.

    A bucket with unsynchronized tokens is forgotten only when the store has been told. Safe for threads; the lock is
    held for arithmetic, and never while a store is waited for.

    :param exchange: what asks the store.
    :param limit_bytes: roughly the memory that it may take.
    """

    def __init__(self, exchange: Exchange, limit_bytes: int) -> None:
        self._exchange = exchange
        self._limit = limit_bytes
        self._size = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._forget_all)

    def optimized(self, optimization: Optimization | None) -> Exchange:
        """An exchange that asks the store only where the optimization wants that; None: always."""
        return self._exchange if optimization is None else partial(self._optimized, optimization)

    def forget(self, key: bytes) -> None:
        """Drop what is known of a bucket that has been removed, unsynchronized tokens included."""
        with self._lock:
            self._drop(key)

    def _forget_all(self) -> None:
        """Know nothing in a forked process: the tokens are the parent's to book, as are the exchanges in flight."""
        self._entries.clear()
        self._size = 0

    def sync(self, backend: Backend, key: bytes, call: Call | None = None) -> Steps[None]:
        """Tell the store what was handed out of a bucket, and learn what it holds; nothing where nothing is known."""
        call = call or backend.own_call()
        with self._lock:
            entry = self._entries.get(key)
            begun = None if entry is None else _begin(entry, carrying=True)
        if begun is not None:
            yield from self._ask(backend, begun, TakeSnapshot(), call, 0)

    def sync_all(self, backend: Backend) -> Steps[None]:
        """Tell the store all that was handed out and not told.

        :raises StoreError: at once, where the store fails; other errors when all keys have been tried.
        """
        with self._lock:
            keys = [key for key, entry in self._entries.items() if entry.unsynchronized]
        failure: RateLimitError | None = None
        for key in keys:
            try:
                yield from self.sync(backend, key)
            except RateLimitError as error:
                failure = failure or error
                if isinstance(error, StoreError):
                    break
        if failure is not None:
            with self._lock:
                left = [entry.unsynchronized for entry in self._entries.values() if entry.unsynchronized]
            _logger.warning("%d tokens of %d buckets could not be synchronized", sum(left), len(left))
            raise failure

    def _optimized(  # noqa: PLR0917  # an exchange, and before it what it may save
        self,
        optimization: Optimization,
        backend: Backend,
        target: Target,
        plan: Plan,
        command: Command[T],
        call: Call,
    ) -> Steps[T]:
        """As :func:`ratelimit.engine.swapping.exchange`, without the store where that is allowed."""
        if target.stored_key in self._entries:
            now = yield backend.now(target.stored_key)
            decided = ASK if now is None else self.decided(optimization, target.stored_key, plan, command, now)
            if decided is not ASK:
                return decided  # type: ignore[return-value]  # the answer of the command
        elif not (yield from self._make_room(backend, _weight(target, plan), call)):
            answer = yield from self._exchange(backend, target, plan, command, call)
            return answer  # type: ignore[no-any-return]  # that of the command
        with self._lock:
            begun = _begin(self._entry(target, plan), carrying=not command.only_reads)
        return (yield from self._ask(backend, begun, command, call, optimization.max_samples))

    def decided(self, optimization: Optimization, key: bytes, plan: Plan, command: Command[Any], now: int) -> Any:
        """The answer, where it needs no exchange; else ``ASK``. Nothing is sent, and nobody waited for."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry.state is None or entry.plan != plan:
                return ASK
            if abs(now - entry.seen_at) >= optimization.max_unsynchronized_nanos:  # a clock may go back a little
                return ASK
            if type(command) is TryConsume and command.tokens >= entry.empty_tokens and now < entry.empty_until:
                return False
            self._entries.move_to_end(key)
            try:
                return _decided(entry, entry.state.refilled(now), optimization, command, now)
            except ArithmeticError:  # foreign numbers, for the exchange to complain of
                return ASK

    def _ask(
        self,
        backend: Backend,
        begun: _Begun,
        command: Command[T],
        call: Call,
        samples: int,
    ) -> Steps[T]:
        """Ask the store; tokens on their way are seen through to the end, whoever is cancelled."""
        carried = begun.carried
        asking = Call(call.deadline, holds=True) if carried and not call.holds else call
        booking = bool(carried) or not command.only_reads
        asked = Synchronize(carried if booking else begun.not_carried, command, booking=booking)
        try:
            outcome: Synchronized[T] = yield from self._exchange(backend, begun.target, begun.plan, asked, asking)
        except BaseException as error:
            self._failed(begun, error)
            if isinstance(error, GeneratorExit):
                raise
            if asking is not call and asking.interruption not in (None, error):
                raise asking.interruption from error
            raise
        finally:
            call.round_trips = asking.round_trips
        self._succeeded(begun, outcome, samples)
        if asking is not call and asking.interruption is not None:
            raise asking.interruption
        return outcome.answer

    def _failed(self, begun: _Begun, error: BaseException) -> None:
        entry = begun.entry
        with self._lock:
            entry.exchanges = _without(entry, begun)
            if isinstance(error, RateLimitError) and not isinstance(error, StoreError):
                entry.state = None  # it has vanished, perhaps: what was known of it counts no more

    def _succeeded(self, begun: _Begun, outcome: Synchronized[Any], samples: int) -> None:
        entry, carried = begun.entry, begun.carried
        with self._lock:
            exchanges, own = _without(entry, begun), wrap(entry.own + carried + outcome.consumed)
            # Together, without a call at which a signal might be let in.
            entry.exchanges, entry.pending, entry.own = exchanges, entry.pending - carried, own
            alone = entry.ended == begun.ended
            entry.ended += 1
            if begun.not_carried:
                return  # a read, which must not put off when the tokens are booked
            if entry.state is None or alone or entry.seen_consumed <= outcome.state.consumed_tokens:
                entry.plan = begun.plan
                entry.saw(outcome)
                if samples:
                    entry.sample(samples)
            elif carried:  # what was seen meanwhile has them in it already
                entry.state = entry.state.given_back(carried)
                entry.empty_until = MIN

    def _entry(self, target: Target, plan: Plan) -> _Entry:
        entry = self._entries.get(target.stored_key)
        if entry is None:
            entry = _Entry(target, plan, _weight(target, plan))
            self._entries[target.stored_key] = entry
            self._size += entry.weight
        elif entry.plan != plan:
            entry.plan, entry.state = plan, None
        entry.target = target
        return entry

    def _drop(self, key: bytes) -> None:
        entry = self._entries.get(key)
        if entry is not None:
            del self._entries[key]
            self._size -= entry.weight

    def _make_room(self, backend: Backend, weight: int, call: Call) -> Steps[bool]:
        """Forget the least recently used; False where that cannot be done now."""
        while weight <= self._limit:
            with self._lock:
                if self._size + weight <= self._limit:
                    return True
                key, entry = next(iter(self._entries.items()))
                if entry.idle():
                    self._drop(key)
                    continue
                self._entries.move_to_end(key)
                begun = _begin(entry, carrying=True)
            try:
                yield from self._ask(backend, begun, TakeSnapshot(), Call(call.deadline), 0)
            except RateLimitError:
                return False  # it keeps its tokens, and the newcomer asks the store
            with self._lock:
                if not entry.idle() or self._entries.get(key) is not entry:
                    return False
                self._drop(key)
        return False


def _begin(entry: _Entry, *, carrying: bool) -> _Begun:
    under_way = entry.under_way()
    unsynchronized = entry.pending - sum(begun.carried for begun in under_way)
    carried, left = (unsynchronized, 0) if carrying else (0, unsynchronized)
    begun = _Begun(entry, entry.target, entry.plan, carried, left, entry.ended)
    entry.exchanges = (*map(ref, under_way), ref(begun))
    return begun


def _without(entry: _Entry, ended: _Begun) -> tuple[ref[_Begun], ...]:
    return tuple(ref(begun) for begun in entry.under_way() if begun is not ended)


def _decided(entry: _Entry, state: BucketState, optimization: Optimization, command: Command[Any], now: int) -> Any:
    """The answer, where the state may give it."""
    inner: Command[Any] = command.command if isinstance(command, Verbose) else command
    if inner.only_reads:
        return command.decide(state, now)[1] if optimization.max_unsynchronized_tokens else ASK
    if type(inner) not in _CONSUMING:
        return ASK
    after, answer = command.decide(state, now)
    if after is None:
        if isinstance(inner, TryConsume):
            entry.empty_tokens = inner.tokens
            entry.empty_until = now + state.nanos_until(inner.tokens, now, check_capacity=True)
        return answer
    consumed = wrap(after.consumed_tokens - state.consumed_tokens)
    if isinstance(inner, Reserve) or entry.pending + consumed > optimization.max_unsynchronized_tokens:
        return ASK
    if optimization.kind == "predicting":
        others = entry.consumed_by_others(optimization, now)
        if others is None or after.available_tokens < others:
            return ASK
    entry.state, entry.pending = after, entry.pending + consumed
    return answer


_CONSUMING: Final[frozenset[type]] = frozenset(
    {TryConsume, TryConsumeAndReturnRemaining, ConsumeAsMuchAsPossible, Reserve}
)


def _weight(target: Target, plan: Plan) -> int:
    return _OVERHEAD_BYTES + 2 * len(target.stored_key) + 300 * len(plan.configuration.bandwidths)
