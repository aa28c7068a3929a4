"""The layer that decides without the store, as far as an optimization allows, and reports to the store later.

For each key a manager keeps the state that the store has last shown, less the tokens that were handed out here since.
What it may decide from that, it does. Anything else asks the store, and carries the tokens that the store does not know
of yet, in the same swap and before the command itself.

Four rules hold it together:

1. Tokens that were handed out are booked whatever the bucket holds by then, in debt if need be.
2. Such tokens are either unsynchronized or on their way to the store in one question, never in two. Both kinds count
   against what may be handed out. If the question fails, its tokens are unsynchronized again, also where its reply was
   lost. They may then be booked twice, which costs their user some tokens until these come back; if they were not
   booked at all, what is admitted would have no bound.
3. The state that the store shows replaces the one that is kept, unless something newer has been seen meanwhile.
4. A read writes nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from weakref import ref

from ratelimit.core.algorithm import State
from ratelimit.core.commands import (
    Command,
    Reserve,
    Synchronize,
    Synchronized,
    TakeSnapshot,
    Terms,
    TryConsume,
    Verbose,
)
from ratelimit.core.numbers import MIN, wrap
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.question import Layer, Question, Target
from ratelimit.errors import RateLimitError, StoreError
from ratelimit.runtime import fork_safety
from ratelimit.runtime.bounded import BoundedMap
from ratelimit.runtime.steps import Steps

# An entry takes roughly this much: its state, some ten small objects, and a place in the dictionary.
_OVERHEAD_BYTES: Final = 1_500
ASK: Final = object()
"""Stands for no answer: the store must be asked."""

_logger = logging.getLogger("ratelimit")


class _Sample(NamedTuple):
    """What the store had counted at a time, and how much of it this manager had consumed."""

    at: int
    consumed: int
    own: int


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of a bucket.

    :param target: the target of the question that was asked last.
    :param terms: the terms of the questions that ``state`` may answer.
    :param state: the state that the store has shown, less what was handed out here since; None: the store must be
        asked.
    :param seen_at: the time of that state.
    :param seen_consumed: the tokens that the store had counted as consumed by then.
    :param pending: tokens that were handed out here, and that the store is not known to have.
    :param exchanges: weak references to the questions under way. A question that was interrupted disappears without an
        answer: it counts as failed, and another question has to report its tokens.
    :param ended: how many questions were answered.
    :param own: tokens that this manager has consumed in the store.
    :param empty_tokens: this number of tokens is not there before ``empty_until``.
    """

    target: Target
    terms: Terms
    weight: int
    state: State | None = None
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
        """Return whether nothing is lost when this entry is forgotten."""
        return not (self.pending or self.under_way())

    def under_way(self) -> list[_Begun]:
        """Return the questions that somebody waits for."""
        return [begun for exchange in self.exchanges if (begun := exchange()) is not None]

    @property
    def in_flight(self) -> int:
        """Tokens that are on their way to the store."""
        return sum(begun.carried for begun in self.under_way())

    @property
    def unsynchronized(self) -> int:
        """Tokens that were handed out here, and that no question carries to the store."""
        return self.pending - self.in_flight

    def saw(self, outcome: Synchronized[Any]) -> None:
        """Take over what the store has shown."""
        self.state = outcome.state.consumed(self.pending) if self.pending else outcome.state
        self.seen_at, self.seen_consumed = outcome.now, outcome.state.consumed_tokens
        self.empty_until = MIN

    def sample(self, most: int) -> None:
        """Note what the store has counted, and how much of it this manager has consumed."""
        sample = _Sample(self.seen_at, self.seen_consumed, self.own)
        samples = deque(self.samples or (), most)
        if samples and (sample.at < samples[-1].at or sample.consumed < samples[-1].consumed):
            samples.clear()  # another clock, or another bucket
        if samples and sample.at == samples[-1].at:
            samples.pop()
        samples.append(sample)
        self.samples = samples

    def consumed_by_others(self, optimization: Optimization, now: int) -> int | None:
        """Estimate how many tokens other processes took that the store has not shown; None: too few samples.

        Other processes may report to the store as late as this one does. So their tokens are counted from the last
        exchange but one.
        """
        samples = self.samples
        while samples and now - samples[0].at > optimization.max_sample_age_nanos:
            samples.popleft()
        if not samples or len(samples) < optimization.min_samples:
            return None
        first, last = samples[0], samples[-1]
        # The others' rate over all samples, times the time since the last sample but one, rounded up.
        others = max(0, last.consumed - first.consumed - (last.own - first.own))
        return -(-others * (now - samples[-2].at) // (last.at - first.at))


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Begun:
    """A question under way: the tokens that it carries to the store, and how many questions had ended before."""

    entry: _Entry
    target: Target
    terms: Terms
    carried: int
    not_carried: int
    ended: int


class LocalDecisions:
    """What a manager knows of its buckets and has not reported to the store.

    The least recently used buckets are forgotten first; a bucket with unsynchronized tokens only after they have been
    reported to the store. Safe for threads; the lock is held for arithmetic, and never during a request to the store.

    :param inner: asks the store.
    :param now: gives the time for a stored key; None where the store must be asked for it.
    :param deadline: returns the deadline of a question that the manager itself asks now.
    :param limit_bytes: roughly the memory that it may take.
    """

    def __init__(
        self, inner: Layer, now: Callable[[bytes], Any], deadline: Callable[[], float], limit_bytes: int
    ) -> None:
        self._inner = inner
        self._now = now
        self._deadline = deadline
        self._entries = BoundedMap[_Entry](limit_bytes, lambda _, entry: entry.weight)
        self._lock = fork_safety.lock()
        # In a forked process the tokens are the parent's to book, as are the questions in flight.
        fork_safety.call_in_child(self._entries.clear)

    def layer(self, optimization: Optimization) -> Layer:
        """Return the layer that asks the store only where an optimization wants that."""

        def decide(question: Question) -> Steps[Any]:
            ((target, terms, command),) = question.parts
            key = target.stored_key
            if key in self._entries.values:
                now = yield self._now(key)
                decided = ASK if now is None else self._decided(optimization, question, now)
                if decided is not ASK:
                    return decided
            elif not (yield from self._make_room(_weight(target, terms), question.deadline)):
                return (yield from self._inner(question))
            with self._lock:
                begun = _begin(self._entry(target, terms), carrying=not command.only_reads)
            return (yield from self._ask(begun, question, optimization.max_samples))

        return decide

    def forget(self, key: bytes) -> None:
        """Drop what is known of a bucket that has been removed, unsynchronized tokens included."""
        with self._lock:
            self._entries.drop(key)

    def sync(self, key: bytes, deadline: float) -> Steps[None]:
        """Report to the store what was handed out of a bucket, and learn what it holds.

        Do nothing for a bucket of which nothing is known.
        """
        with self._lock:
            entry = self._entries.values.get(key)
            begun = None if entry is None else _begin(entry, carrying=True)
        if begun is not None:
            yield from self._synchronized(begun, deadline)

    def sync_all(self) -> Steps[None]:
        """Report to the store all tokens that were handed out and not reported yet.

        :raises StoreError: at once, where the store fails; other errors when all keys have been tried.
        """
        with self._lock:
            keys = [key for key, entry in self._entries.values.items() if entry.unsynchronized]
        failure: RateLimitError | None = None
        for key in keys:
            try:
                yield from self.sync(key, self._deadline())
            except RateLimitError as error:
                failure = failure or error
                if isinstance(error, StoreError):
                    break
        if failure is not None:
            with self._lock:
                entries = self._entries.values.values()
                left = [entry.unsynchronized for entry in entries if entry.unsynchronized]
            _logger.warning("%d tokens of %d buckets could not be synchronized", sum(left), len(left))
            raise failure

    def _synchronized(self, begun: _Begun, deadline: float | None) -> Steps[None]:
        yield from self._ask(begun, Question.of(begun.target, begun.terms, TakeSnapshot(), deadline), 0)

    def _decided(self, optimization: Optimization, question: Question, now: int) -> Any:
        """Return the answer where it does not need the store, else ``ASK``. Nothing is sent, and nothing waits."""
        ((target, terms, command),) = question.parts
        with self._lock:
            entry = self._entries.values.get(target.stored_key)
            if entry is None or entry.state is None or entry.terms != terms:
                return ASK
            # The distance counts in both directions, because a clock may go back a little.
            if abs(now - entry.seen_at) >= optimization.max_unsynchronized_nanos:
                return ASK
            if type(command) is TryConsume and command.tokens >= entry.empty_tokens and now < entry.empty_until:
                return False
            self._entries.values.move_to_end(target.stored_key)
            try:
                return _decided(entry, entry.state.refilled(now), optimization, command, now)
            except ArithmeticError:
                # The stored numbers make no sense. The store is asked, so that the error can show its bytes.
                return ASK

    def _ask(self, begun: _Begun, question: Question, samples: int) -> Steps[Any]:
        """Ask the store; a question that carries tokens runs to its end, even if its caller is cancelled."""
        ((_, _, command),) = question.parts
        carried, course = begun.carried, question.course
        booking = bool(carried) or not command.only_reads
        asked = Synchronize(carried if booking else begun.not_carried, command, booking=booking)
        # A caller may be cancelled, but the tokens of others that its question carries must be seen through. So the
        # question has a course of its own, and the cancellation is raised afterwards.
        if carried and not question.holds:
            asking = Question.of(begun.target, begun.terms, asked, question.deadline, holds=True)
        else:
            asking = Question.of(
                begun.target, begun.terms, asked, question.deadline, holds=question.holds, course=course
            )
        own = asking.course
        try:
            outcome: Synchronized[Any] = yield from self._inner(asking)
        except BaseException as error:
            self._failed(begun, error)
            if isinstance(error, GeneratorExit):
                raise
            if own is not course and own.interruption not in (None, error):
                raise own.interruption from error
            raise
        finally:
            course.round_trips = own.round_trips
        self._succeeded(begun, outcome, samples)
        if own is not course and own.interruption is not None:
            raise own.interruption
        return outcome.answer

    def _failed(self, begun: _Begun, error: BaseException) -> None:
        entry = begun.entry
        with self._lock:
            entry.exchanges = _without(entry, begun)
            if isinstance(error, RateLimitError) and not isinstance(error, StoreError):
                # The bucket has vanished, perhaps: what was known of it counts no more.
                entry.state = None

    def _succeeded(self, begun: _Begun, outcome: Synchronized[Any], samples: int) -> None:
        entry, carried = begun.entry, begun.carried
        with self._lock:
            exchanges, own = _without(entry, begun), wrap(entry.own + carried + outcome.consumed)
            # These are set together, without a call in between, at which the handler of a signal might come in.
            entry.exchanges, entry.pending, entry.own = exchanges, entry.pending - carried, own
            # Answers may arrive in another order than the store gave them. This one is the newest if no other question
            # ended in between, or if it counts at least as many tokens as the last one seen.
            alone = entry.ended == begun.ended
            entry.ended += 1
            if begun.not_carried:
                # A read must not put off when the tokens are booked.
                return
            if entry.state is None or alone or entry.seen_consumed <= outcome.state.consumed_tokens:
                entry.terms = begun.terms
                entry.saw(outcome)
                if samples:
                    entry.sample(samples)
            elif carried:
                # What was seen meanwhile has these tokens in it already.
                entry.state = entry.state.given_back(carried)
                entry.empty_until = MIN

    def _entry(self, target: Target, terms: Terms) -> _Entry:
        entry = self._entries.values.get(target.stored_key)
        if entry is None:
            entry = _Entry(target, terms, _weight(target, terms))
            self._entries.put(target.stored_key, entry)
        elif entry.terms != terms:
            entry.terms, entry.state = terms, None
        entry.target = target
        return entry

    def _make_room(self, weight: int, deadline: float | None) -> Steps[bool]:
        """Forget the least recently used, and return whether there is room; False where that cannot be done now."""
        entries = self._entries
        while weight <= entries.limit:
            with self._lock:
                if entries.size + weight <= entries.limit:
                    return True
                key, entry = next(iter(entries.values.items()))
                if entry.idle():
                    entries.drop(key)
                    continue
                entries.values.move_to_end(key)
                begun = _begin(entry, carrying=True)
            try:
                yield from self._synchronized(begun, deadline)
            except RateLimitError:
                # The entry keeps its tokens, and the newcomer asks the store.
                return False
            with self._lock:
                if not entry.idle() or entries.values.get(key) is not entry:
                    return False
                entries.drop(key)
        return False


def _begin(entry: _Entry, *, carrying: bool) -> _Begun:
    under_way = entry.under_way()
    unsynchronized = entry.pending - sum(begun.carried for begun in under_way)
    carried, left = (unsynchronized, 0) if carrying else (0, unsynchronized)
    begun = _Begun(entry, entry.target, entry.terms, carried, left, entry.ended)
    entry.exchanges = (*map(ref, under_way), ref(begun))
    return begun


def _without(entry: _Entry, ended: _Begun) -> tuple[ref[_Begun], ...]:
    return tuple(ref(begun) for begun in entry.under_way() if begun is not ended)


def _decided(entry: _Entry, state: State, optimization: Optimization, command: Command[Any], now: int) -> Any:
    """Return the answer where the state may give it, and keep what it changes; else ``ASK``."""
    inner: Command[Any] = command.command if isinstance(command, Verbose) else command
    if inner.only_reads:
        return command.decide(state, now)[1] if optimization.max_unsynchronized_tokens else ASK
    if not inner.consumes:
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


def _weight(target: Target, terms: Terms) -> int:
    return _OVERHEAD_BYTES + 2 * len(target.stored_key) + 300 * len(terms.configuration)
