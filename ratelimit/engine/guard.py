"""What is around an exchange: who is told of it, and what is answered where the store fails.

A store that fails is an error of each call, or, as :class:`ratelimit.engine.on_error.OnError` says, an answer without
the store. Of these the local one keeps books: what it has handed out is charged to the shared bucket by the next
decision about the same key that the store answers, in the same swap, and for keys that nobody asks for by a sweep
beside the callers, which begins when the store has answered for the first time. What was in doubt is never charged
again: the store may have it. A local bucket stays when the store is back, so that one that fails on and off fills no
bucket anew.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple, TypeVar
from weakref import ref

from ratelimit.core.commands import (
    Book,
    Cancel,
    Command,
    ConsumeAsMuchAsPossible,
    ConsumeIgnoringRateLimits,
    EstimateAbilityToConsume,
    GiveBack,
    Plan,
    Reserve,
    Reserved,
    Synchronize,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
    execute,
)
from ratelimit.core.numbers import MAX, NEVER, wrap
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, VerboseResult
from ratelimit.core.token_bucket.share import share_of
from ratelimit.core.token_bucket.state import BucketState
from ratelimit.engine.listener import Decision, Listener
from ratelimit.engine.on_error import RETRY_NANOS, ErrorPolicy, OnError
from ratelimit.engine.swapping import Backend, Call, Exchange, Target
from ratelimit.errors import (
    BucketNotFoundError,
    ContentionError,
    CorruptStateError,
    InvalidArgumentError,
    RateLimitError,
    StoreError,
)
from ratelimit.keys import Key, brief, shown
from ratelimit.runtime import fork_safety
from ratelimit.runtime.clock import monotonic, steady_clock
from ratelimit.runtime.steps import Steps

T = TypeVar("T")

_ENTRY_BYTES: Final = 1_500  # of a local bucket, roughly: its state, some ten small objects, a place in a dictionary
_QUIET_SECONDS: Final = 60.0  # between two log records about a store that fails on and off
_SECONDS_BETWEEN_SWEEPS: Final = 1.0
_FAILURES_OF_A_SWEEP: Final = 5  # in a row: the store is down again

_VERBS: Final[dict[type[Command[Any]], str]] = {
    TryConsume: "try_consume",
    TryConsumeAndReturnRemaining: "try_consume_and_return_remaining",
    ConsumeAsMuchAsPossible: "try_consume_as_much_as_possible",
    Reserve: "consume",
    ConsumeIgnoringRateLimits: "consume_ignoring_rate_limits",
    EstimateAbilityToConsume: "estimate_ability_to_consume",
}

_logger = logging.getLogger("ratelimit")


class _UnderWay(NamedTuple):
    """A debt that an exchange carries to the store.

    :ivar debt: refers to it for as long as there is somebody who will say what came of it.
    :ivar call: the call that carries it.
    """

    debt: ref[Debt]
    tokens: int
    call: Call


class _Books(NamedTuple):
    """What was consumed of a local bucket; replaced as a whole, so that no interruption leaves them half written.

    :ivar uncharged: tokens that are not charged to the shared bucket, as far as is known.
    :ivar under_way: which of them are being charged.
    """

    uncharged: int = 0
    under_way: tuple[_UnderWay, ...] = ()

    def looked_through(self) -> _Books:
        """The books without the debts whose carrier was interrupted.

        They are to be charged by another, unless the store was asked: then it may have them already.
        """
        if all(one.debt() is not None for one in self.under_way):
            return self
        lost = [one.tokens for one in self.under_way if one.debt() is None and _was_asked(one.call)]
        return _Books(self.uncharged - sum(lost), tuple(one for one in self.under_way if one.debt() is not None))

    def without(self, debt: Debt, charged: int) -> _Books:
        """The books after the end of a debt."""
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
    plan: Plan
    state: BucketState
    books: _Books = _NOTHING


@dataclass(slots=True, eq=False, weakref_slot=True)
class Debt:
    """Tokens that were consumed of a local bucket, and are on their way to the shared one."""

    local: _Local
    tokens: int


class LocalBuckets:
    """Buckets of this process in the place of shared ones; the least recently used are forgotten first.

    :param now: what time it is; None: by the machine's monotonic clock.
    :param limit_bytes: roughly the memory that they may take.
    """

    def __init__(self, now: Callable[[bytes], int] | None, limit_bytes: int) -> None:
        steady = steady_clock()
        self._now = now or (lambda _key: steady())
        self._limit = limit_bytes
        self._size = 0
        self._buckets: OrderedDict[bytes, _Local] = OrderedDict()
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self.forget_debts)

    def __bool__(self) -> bool:
        return bool(self._buckets)

    def decide(self, target: Target, plan: Plan, share: Any, command: Command[T], call: Call, *, in_doubt: bool) -> T:
        """The answer of the local bucket.

        :param in_doubt: whether the store may have decided as well, so that nothing is to be charged to it.
        """
        key = target.stored_key
        with self._lock:
            now = self._now(key)
            local = self._buckets.get(key)
            state = None if local is None else local.state
            own = plan._replace(configuration=share_of(plan.configuration, share))
            before = BucketState.initial(own.configuration, own.version, now) if state is None else state.refilled(now)
            after, answer = execute(command, own, before, now)
            if local is None:
                local, weight = _Local(target, plan, before), _weight(key)
                self._buckets[key] = local
                self._size += weight
            books = local.books
            if after is not None and not in_doubt:
                consumed = wrap(after.consumed_tokens - before.consumed_tokens)
                books = _Books(books.uncharged + consumed, books.under_way)
            # From here to the end of what the shield gets there is no call, at which a signal might be let in.
            local.plan, local.state, local.books = plan, after or before, books
            if call.shield is not None and not in_doubt:
                call.shield.local_answers.append(answer)
            self._buckets.move_to_end(key)
            while self._size > self._limit and len(self._buckets) > 1:
                self._drop(next(iter(self._buckets)))
            return answer

    def _drop(self, key: bytes) -> None:
        weight = _weight(key)
        del self._buckets[key]
        self._size -= weight

    def give_back(self, target: Target, tokens: int) -> None:
        """Undo a consumption of the local bucket, if it is still there."""
        with self._lock:
            local = self._buckets.get(target.stored_key)
            if local is not None:
                books = local.books
                state, books = (
                    local.state.given_back(tokens),
                    books._replace(uncharged=books.uncharged - max(0, min(tokens, books.free))),
                )
                local.state, local.books = state, books

    def cancel(self, target: Target, command: Cancel) -> None:
        """Undo a reservation of the local bucket, if that is still there.

        Its tokens are not charged to the shared bucket either.
        """
        key = target.stored_key
        with self._lock:
            local = self._buckets.get(key)
            if local is not None:
                books, state = local.books, local.state.refilled(self._now(key))
                state = command.decide(state, 0)[0] or state
                books = books._replace(uncharged=books.uncharged - max(0, min(command.tokens, books.free)))
                local.state, local.books = state, books

    def debt(self, key: bytes, call: Call) -> Debt | None:
        """What was consumed of a local bucket, now on its way to the store; None where that is nothing.

        :param call: the one that carries it.
        """
        with self._lock:
            local = self._buckets.get(key)
            if local is None or local.books.uncharged <= 0:
                return None
            books = local.books.looked_through()
            debt = Debt(local, books.free)
            under_way = () if debt.tokens <= 0 else (_UnderWay(ref(debt), debt.tokens, call),)
            local.books = books._replace(under_way=books.under_way + under_way)
            return debt if under_way else None

    def forget(self, key: bytes) -> None:
        """Drop a local bucket, and what was consumed of it: the shared one has been removed."""
        with self._lock:
            if key in self._buckets:
                self._drop(key)

    def forget_debts(self) -> None:
        """In a forked process: they are the parent's to charge."""
        for local in self._buckets.values():
            local.books = _NOTHING

    def settle(self, debt: Debt, *, charged: bool) -> None:
        """Take note of the end of a debt.

        :param charged: whether the store has it, or may have it.
        """
        with self._lock:
            debt.local.books = debt.local.books.without(debt, debt.tokens if charged else 0)

    def debts(self, call: Callable[[], Call]) -> Iterator[tuple[Debt, Call]]:
        """The debts of all local buckets, and the calls that are to carry them."""
        with self._lock:
            keys = [key for key, local in self._buckets.items() if local.books.uncharged]
        for key in keys:
            carrying = call()
            if (debt := self.debt(key, carrying)) is not None:
                yield debt, carrying


def _weight(key: bytes) -> int:
    return _ENTRY_BYTES + 2 * len(key)


class Guard:
    """The policy of a manager, its listener, and its local buckets.

    :param spawn: runs steps beside the caller.
    :param described: the manager, with its store, as logs name it.
    :param asynchronous: whether callers are tasks.
    """

    def __init__(
        self,
        listener: Listener | None,
        local: LocalBuckets,
        spawn: Callable[[Steps[None]], None],
        described: str,
        *,
        asynchronous: bool,
    ) -> None:
        self.listener = listener
        self._local = local
        self._spawn = spawn
        self._described = described
        self._asynchronous = asynchronous
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._end_sweep)
        self._sweeping = False
        self._swept_at = float("-inf")
        self._in_debt = False  # whether there may be something to sweep
        self._degraded = 0  # decisions, since the store has answered last
        self._degraded_since = 0.0
        self._logged_at = float("-inf")
        self._is_announced = False  # that the store fails

    def run(  # noqa: PLR0917  # an exchange, and a policy
        self,
        policy: ErrorPolicy,
        exchange: Exchange,
        backend: Backend,
        target: Target,
        plan: Plan,
        command: Command[T],
        call: Call,
    ) -> Steps[T]:
        """Do the exchange, and what is to be done around it."""
        begun = backend.monotonic()
        observed = _observed(command) if self.listener is not None and command.is_decision else command
        debt = self._local.debt(target.stored_key, call) if self._local and not command.only_reads else None
        error: Exception | None = None
        try:
            if debt is None:
                answer: Any = yield from exchange(backend, target, plan, observed, call)
            else:
                answer = yield from self._charging(debt, exchange, backend, target, plan, observed, call)
        except (StoreError, ContentionError, CorruptStateError) as failure:
            error = failure
            try:
                answer = self._answer_without_store(policy, target, plan, observed, call, failure)
            except RateLimitError:
                self._tell(command, target.key, None, backend.monotonic() - begun, call, failure)
                raise
            call.degraded = True
        else:
            if (self._degraded or self._in_debt) and call.round_trips:
                self._recovered(exchange, backend)
        self._tell(command, target.key, answer, backend.monotonic() - begun, call, error)
        return _unobserved(command, answer)  # type: ignore[no-any-return]  # that of the command

    def _charging(  # noqa: PLR0917  # an exchange
        self,
        debt: Debt,
        exchange: Exchange,
        backend: Backend,
        target: Target,
        plan: Plan,
        command: Command[Any],
        call: Call,
    ) -> Steps[Any]:
        """The exchange, which charges a debt along with it."""
        try:
            outcome = yield from exchange(backend, target, plan, Synchronize(debt.tokens, command, booking=True), call)
        except BaseException as error:
            was_asked = _was_asked(call) or isinstance(error, StoreError)
            self._local.settle(debt, charged=was_asked and _is_in_doubt(error))
            raise
        self._local.settle(debt, charged=True)
        return outcome.answer

    def _answer_without_store(  # noqa: PLR0917  # a policy, and an exchange
        self, policy: ErrorPolicy, target: Target, plan: Plan, command: Command[Any], call: Call, error: RateLimitError
    ) -> Any:
        if not command.is_decision:
            raise error
        chosen = policy if isinstance(policy, OnError) else policy(target.key, error)
        if not isinstance(chosen, OnError):
            raise InvalidArgumentError(f"on_error must give an OnError, not {brief(chosen)}") from error
        if chosen.kind == "raise":
            raise error
        if chosen.kind == "allow":
            answer = command.answer_without_limit()
            call.charged = False
        elif chosen.kind == "deny":
            try:
                answer = command.answer_refused(RETRY_NANOS)
            except NotImplementedError:
                raise error from None
        elif isinstance(command, GiveBack):
            answer = None
            self._local.give_back(target, command.tokens)
        else:
            call.charged = not _is_in_doubt(error)
            answer = self._local.decide(target, plan, chosen.share, command, call, in_doubt=_is_in_doubt(error))
        self._log_degraded(target.key, chosen, error)
        if isinstance(answer, ConsumptionProbe | EstimationProbe | VerboseResult):
            if isinstance(answer, VerboseResult) and isinstance(answer.value, ConsumptionProbe | EstimationProbe):
                answer = replace(answer, value=replace(answer.value, degraded=True))
            return replace(answer, degraded=True)
        return answer

    def _log_degraded(self, key: Key, chosen: OnError, error: RateLimitError) -> None:
        now = monotonic()
        with self._lock:
            if not self._degraded:
                self._degraded_since = now
            self._degraded += 1
            self._in_debt |= chosen.kind == "local"
            logs = now - self._logged_at >= _QUIET_SECONDS
            if logs:
                self._logged_at, self._is_announced = now, True
        if logs:
            _logger.warning(
                "the store fails (%s); decisions are made without it, by on_error=%s, for the key %s and others of %s",
                type(error).__name__ if isinstance(error, CorruptStateError) else _bounded(_reason(error)),
                chosen.kind,
                shown(key),
                self._described,
            )

    def _recovered(self, exchange: Exchange, backend: Backend) -> None:
        now = monotonic()
        with self._lock:
            degraded, self._degraded = self._degraded, 0
            since = self._degraded_since
            logs, self._is_announced = self._is_announced and bool(degraded), self._is_announced and not degraded
            sweeps = self._in_debt and not self._sweeping and now - self._swept_at >= _SECONDS_BETWEEN_SWEEPS
            if sweeps:
                self._swept_at = now
        if logs:
            _logger.info(
                "the store answers again; %d decisions were made without it in %.1f s, by %s",
                degraded,
                now - since,
                self._described,
            )
        if sweeps:
            with suppress(RuntimeError):  # no thread to be had: the next one that the store answers tries again
                self._spawn(self._sweep(exchange, backend))

    def _sweep(self, exchange: Exchange, backend: Backend) -> Steps[None]:
        if self._sweeping:
            return
        self._sweeping = True
        try:
            self._in_debt = False
            yield from self.charge_all(exchange, backend)
        except RateLimitError:  # the next one that the store answers begins anew
            self._in_debt = True
        finally:
            self._sweeping = False

    def _end_sweep(self) -> None:
        """In a forked process the thread that sweeps is missing, and the debts were the parent's."""
        self._sweeping = self._in_debt = False

    def charge_all(self, exchange: Exchange, backend: Backend) -> Steps[None]:
        """Charge what was consumed of all local buckets.

        :raises RateLimitError: the first, where some could not be charged; after several in a row at once.
        """
        failure: RateLimitError | None = None
        in_a_row = 0
        for debt, call in self._local.debts(backend.own_call):
            local = debt.local
            try:
                yield from exchange(backend, local.target, local.plan, Book(debt.tokens), call)
            except (BucketNotFoundError, CorruptStateError):  # there is nothing to charge it to
                self._local.settle(debt, charged=True)
            except BaseException as error:
                self._local.settle(debt, charged=_is_in_doubt(error))
                in_a_row += 1
                if not isinstance(error, RateLimitError) or in_a_row >= _FAILURES_OF_A_SWEEP:
                    raise
                failure = failure or error
            else:
                self._local.settle(debt, charged=True)
                in_a_row = 0
        if failure is not None:
            raise failure

    def interrupted(self, key: Key, tokens: int, error: BaseException) -> None:
        """A wait was cut short."""
        if self.listener is not None:
            try:
                self.listener.on_interrupted(key, tokens, error)
            except Exception:
                _logger.exception("a listener has failed")

    def cancel_locally(self, target: Target, command: Cancel) -> None:
        """Undo a reservation that was made in a local bucket."""
        self._local.cancel(target, command)

    def _tell(  # noqa: PLR0917  # all that there is to tell
        self, command: Command[Any], key: Key, answer: Any, seconds: float, call: Call, error: Exception | None
    ) -> None:
        """Tell the listener.

        :param answer: to the observed command; None where there is none.
        """
        inner: Command[Any] = command.command if isinstance(command, Verbose) else command
        verb = _VERBS.get(type(inner))
        if self.listener is None or verb is None:
            return
        tokens = inner.limit if isinstance(inner, ConsumeAsMuchAsPossible) else inner.tokens  # type: ignore[attr-defined]  # all of these verbs have some
        consumed, remaining, wait = _seen(inner, tokens, answer)
        if remaining == MAX:  # of no bucket
            remaining = None
        decision = Decision(
            key,
            verb,
            tokens,
            consumed,
            remaining,
            wait,
            round(seconds * 1e9),
            call.round_trips,
            call.degraded,
            error,
            self._asynchronous,
        )
        try:
            self.listener.on_decision(decision)
        except Exception:
            _logger.exception("a listener has failed")


def _was_asked(call: Call) -> bool:
    return bool(call.round_trips or call.carried)


def _is_in_doubt(error: BaseException) -> bool:
    """Whether the store may have done what ended so; also where nobody has waited for the end."""
    return bool(getattr(error, "in_doubt", not isinstance(error, RateLimitError)))


def _observed(command: Command[Any]) -> Command[Any]:
    """A command that decides the same, and shows what is left."""
    if type(command) is TryConsume:
        return TryConsumeAndReturnRemaining(command.tokens)
    if isinstance(command, Verbose | TryConsumeAndReturnRemaining | EstimateAbilityToConsume | GiveBack):
        return command
    return Verbose(command)


def _unobserved(command: Command[Any], answer: Any) -> Any:
    """The answer to the command itself."""
    if type(command) is TryConsume:
        return bool(answer)
    if isinstance(answer, VerboseResult) and not isinstance(command, Verbose):
        return answer.value
    return answer


def _seen(command: Command[Any], tokens: int, answer: Any) -> tuple[int, int | None, int]:
    """Tokens consumed, tokens left, and the wait."""
    remaining: int | None = None
    wait = 0
    if isinstance(answer, VerboseResult):
        remaining, answer = answer.available_tokens, answer.value
    if isinstance(answer, ConsumptionProbe | EstimationProbe):
        consumed = tokens if isinstance(answer, ConsumptionProbe) and answer.consumed else 0
        return consumed, answer.remaining_tokens, answer.nanos_to_wait_for_refill
    if answer is None:
        return 0, None, 0
    if isinstance(command, ConsumeAsMuchAsPossible):
        return answer, remaining, 0
    if isinstance(command, Reserve | ConsumeIgnoringRateLimits):
        wait = answer.wait if isinstance(answer, Reserved) else answer
        return (0 if wait == NEVER else tokens), remaining, wait
    return (tokens if answer else 0), remaining, wait


def _reason(error: RateLimitError) -> str:
    """Return what has happened, without the key, which the log names by itself."""
    return error.message if isinstance(error, StoreError) else str(error)


def _bounded(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
