"""Buckets of this process that stand in for shared ones, and the books about what was consumed of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple
from weakref import ref

from ratelimit.core.algorithm import State
from ratelimit.core.commands import Cancel, Settle, Terms, execute
from ratelimit.core.numbers import wrap
from ratelimit.engine.question import Course, Question, Target
from ratelimit.runtime import fork_safety
from ratelimit.runtime.bounded import BoundedMap

_ENTRY_BYTES: Final = 1_500  # of a local bucket, roughly: its state, some ten small objects, a place in a dictionary


class _UnderWay(NamedTuple):
    """A debt that a question carries to the store.

    :ivar debt: refers to it for as long as there is somebody to say what has become known of it.
    :ivar course: of the question that carries it.
    """

    debt: ref[Debt]
    tokens: int
    course: Course


class _Books(NamedTuple):
    """What was consumed of a local bucket; replaced as a whole, so that no interruption leaves them half written.

    :ivar uncharged: tokens that are not charged to the shared bucket, as far as is known.
    :ivar under_way: which of them are being charged.
    """

    uncharged: int = 0
    under_way: tuple[_UnderWay, ...] = ()

    def looked_through(self) -> _Books:
        """Return the books without the debts whose carrier was interrupted.

        They are to be charged by another, unless the store was asked: then it may have them already.
        """
        if all(one.debt() is not None for one in self.under_way):
            return self
        # A dead reference: the caller that carried the debt was interrupted before it could settle it.
        lost = [one.tokens for one in self.under_way if one.debt() is None and was_asked(one.course)]
        return _Books(self.uncharged - sum(lost), tuple(one for one in self.under_way if one.debt() is not None))

    def without(self, debt: Debt, charged: int) -> _Books:
        """Return the books after the end of a debt."""
        return _Books(self.uncharged - charged, tuple(one for one in self.under_way if one.debt() is not debt))

    @property
    def free(self) -> int:
        """Tokens that are not charged, and that nobody is charging."""
        return self.uncharged - sum(one.tokens for one in self.under_way)


_NOTHING: Final = _Books()


@dataclass(slots=True, eq=False)
class _Local:
    """A bucket that stands in for a shared one, and the books about it."""

    target: Target
    terms: Terms
    state: State
    books: _Books = _NOTHING


@dataclass(slots=True, eq=False, weakref_slot=True)
class Debt:
    """Tokens that were consumed of a local bucket, and are on their way to the shared one."""

    local: _Local
    tokens: int


class LocalBuckets:
    """Buckets of this process in place of shared ones; the least recently used are forgotten first.

    :param now: gives the time for a stored key.
    :param limit_bytes: roughly the memory that they may take.
    """

    def __init__(self, now: Callable[[bytes], int], limit_bytes: int) -> None:
        self._now = now
        self._buckets = BoundedMap[_Local](limit_bytes, _weight)
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self.forget_debts)

    def __bool__(self) -> bool:
        return bool(self._buckets.values)

    def decide(self, question: Question, share: Fraction, *, in_doubt: bool) -> Any:
        """Return the answer of the local bucket.

        :param share: of the limits that the local bucket has.
        :param in_doubt: whether the store may have decided as well, so that nothing is to be charged to it.
        """
        ((target, terms, command),) = question.parts
        key = target.stored_key
        with self._lock:
            now = self._now(key)
            local = self._buckets.values.get(key)
            # Without the store no process knows of the others, so that each of them gets a share of the limits only.
            own = terms._replace(configuration=terms.configuration.algorithm.share_of(terms.configuration, share))
            before = own.initial(now) if local is None else local.state.refilled(now)
            after, answer = execute(command, own, before, now)
            if local is None:
                local = _Local(target, terms, before)
                self._buckets.put(key, local)
            books = local.books
            if after is not None and not in_doubt:
                consumed = wrap(after.consumed_tokens - before.consumed_tokens)
                books = _Books(books.uncharged + consumed, books.under_way)
            # From here until the answer is in the course there is no call, at which a signal might be let in.
            local.terms, local.state, local.books = terms, after or before, books
            if not in_doubt:
                question.course.local_answer = answer
            self._buckets.values.move_to_end(key)
            self._buckets.shrink(least=1)
            return answer

    def give_back(self, target: Target, tokens: int) -> None:
        """Undo a consumption of the local bucket, if it is still there."""
        with self._lock:
            local = self._buckets.values.get(target.stored_key)
            if local is not None:
                self._credit(local, local.state.given_back(tokens), tokens)

    def settle_reservation(self, target: Target, command: Settle) -> int:
        """Settle a reservation of the local bucket, if that is still there; return what the command answers.

        What was used beyond the reservation is charged to the shared bucket later, as all that is consumed here is.
        """
        if command.rest:
            self.give_back(target, command.rest)
            return 0
        key = target.stored_key
        with self._lock:
            local = self._buckets.values.get(key)
            if local is None:
                return 0
            now = self._now(key)
            after, wait = command.decide(local.state.refilled(now), now)
            if after is not None:
                books = local.books._replace(uncharged=local.books.uncharged + command.excess)
                # Both in one step, at which no signal is let in.
                local.state, local.books = after, books
            return wait

    def cancel(self, target: Target, command: Cancel) -> None:
        """Undo a reservation of the local bucket, if that is still there.

        Its tokens are not charged to the shared bucket either.
        """
        key = target.stored_key
        with self._lock:
            local = self._buckets.values.get(key)
            if local is not None:
                state = local.state.refilled(self._now(key))
                self._credit(local, command.decide(state, 0)[0] or state, command.tokens)

    def _credit(self, local: _Local, state: State, tokens: int) -> None:
        books = local.books
        # Tokens that are on their way to the store stay in the books, because the store may have them by now.
        books = books._replace(uncharged=books.uncharged - max(0, min(tokens, books.free)))
        # Both in one step, at which no signal is let in.
        local.state, local.books = state, books

    def debt(self, key: bytes, course: Course) -> Debt | None:
        """Return what was consumed of a local bucket, now on its way to the store; None where that is nothing.

        :param course: of the question that carries it.
        """
        with self._lock:
            local = self._buckets.values.get(key)
            if local is None or local.books.uncharged <= 0:
                return None
            books = local.books.looked_through()
            debt = Debt(local, books.free)
            under_way = () if debt.tokens <= 0 else (_UnderWay(ref(debt), debt.tokens, course),)
            local.books = books._replace(under_way=books.under_way + under_way)
            return debt if under_way else None

    def forget(self, key: bytes) -> None:
        """Drop a local bucket and what was consumed of it, because the shared one was removed."""
        with self._lock:
            self._buckets.drop(key)

    def forget_debts(self) -> None:
        """Owe nothing in a forked process, because the debts are the parent's to charge."""
        for local in self._buckets.values.values():
            local.books = _NOTHING

    def settle(self, debt: Debt, *, charged: bool) -> None:
        """Take note of the end of a debt.

        :param charged: whether the store has it, or may have it.
        """
        with self._lock:
            debt.local.books = debt.local.books.without(debt, debt.tokens if charged else 0)

    def debts(self) -> Iterator[tuple[Debt, Course]]:
        """Yield the debt of each local bucket that has one, and the course on which it is to be charged."""
        with self._lock:
            keys = [key for key, local in self._buckets.values.items() if local.books.uncharged]
        for key in keys:
            course = Course()
            if (debt := self.debt(key, course)) is not None:
                yield debt, course


def was_asked(course: Course) -> bool:
    """Return whether the store was asked, on behalf of the question itself or of one that carries it."""
    return bool(course.round_trips or course.carried)


def _weight(key: bytes, _: _Local) -> int:
    return _ENTRY_BYTES + 2 * len(key)
