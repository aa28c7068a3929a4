"""The layer that answers where the store fails, as ``on_error`` says.

A local bucket keeps books of the tokens that it has handed out. The next decision about the same key that the store
answers charges them to the shared bucket, in the same swap. A sweep charges those of keys that nobody asks for: it runs
beside the callers, and begins when the store answers again. Tokens that the store may have already, because a reply was
lost, are not charged again. A local bucket stays when the store is back, so that a store that fails on and off does not
fill it each time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from ratelimit.core.commands import Book, Command, GiveBack, Settle, Synchronize, Verbose
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, VerboseResult
from ratelimit.engine.local_buckets import Debt, LocalBuckets, was_asked
from ratelimit.engine.on_error import RETRY_NANOS, ErrorPolicy, OnError
from ratelimit.engine.outage_log import OutageLog
from ratelimit.engine.question import Layer, Question
from ratelimit.errors import (
    BucketNotFoundError,
    ContentionError,
    CorruptStateError,
    InvalidArgumentError,
    RateLimitError,
    StoreError,
)
from ratelimit.keys import Key, brief
from ratelimit.runtime import fork_safety
from ratelimit.runtime.steps import Steps

_SECONDS_BETWEEN_SWEEPS: Final = 1.0
# After so many failures in a row the store counts as down again, and the sweep ends.
_FAILURES_OF_A_SWEEP: Final = 5


class Fallback:
    """What a manager does where its store fails.

    :param beneath: the layer that charges debts to the shared buckets.
    :param deadline: returns the deadline of a question that the manager itself asks now.
    :param spawn: runs steps beside the caller.
    :param monotonic: a clock of seconds.
    """

    def __init__(
        self,
        beneath: Layer,
        local: LocalBuckets,
        outages: OutageLog,
        *,
        deadline: Callable[[], float],
        spawn: Callable[[Steps[None]], None],
        monotonic: Callable[[], float],
    ) -> None:
        self.local = local
        self._beneath = beneath
        self._outages = outages
        self._deadline = deadline
        self._spawn = spawn
        self._monotonic = monotonic
        self._sweeping = False
        self._swept_at = float("-inf")
        self._in_debt = False  # whether there may be something to sweep
        self._lock = fork_safety.lock()
        fork_safety.call_in_child(self._end_sweep)

    def layer(self, inner: Layer, policy: ErrorPolicy) -> Layer:
        """Return the layer that answers by a policy where the layer below fails."""
        local = self.local

        def decide(question: Question) -> Steps[Any]:
            ((target, _, command),) = question.parts
            course = question.course
            debt = local.debt(target.stored_key, course) if local and not command.only_reads else None
            try:
                if debt is None:
                    answer: Any = yield from inner(question)
                else:
                    answer = yield from self._charging(inner, debt, question)
            except (StoreError, ContentionError, CorruptStateError) as error:
                course.failure = error
                answer = self.answer(policy, question, error)
                course.degraded = True
            else:
                # An answer without a round trip, such as a local decision, does not show that the store is back.
                if course.round_trips:
                    self.store_answers()
            return answer

        return decide

    def _charging(self, inner: Layer, debt: Debt, question: Question) -> Steps[Any]:
        """Ask the question, and charge a debt in the same swap."""
        ((_, _, command),) = question.parts
        try:
            outcome = yield from inner(question.asking(Synchronize(debt.tokens, command, booking=True)))
        except BaseException as error:
            # A question that never left has charged nothing. If the reply was lost, the store may have the debt, and a
            # second charge could take the tokens twice.
            asked = was_asked(question.course) or isinstance(error, StoreError)
            self.local.settle(debt, charged=asked and _is_in_doubt(error))
            raise
        self.local.settle(debt, charged=True)
        return outcome.answer

    def answer(self, policy: ErrorPolicy, question: Question, error: RateLimitError) -> Any:
        """Return the answer that the policy gives, or raise the error."""
        ((target, _, command),) = question.parts
        if not command.is_decision:
            raise error
        chosen = self.chosen(policy, target.key, error)
        if chosen.kind == "raise":
            raise error
        if chosen.kind == "allow":
            answer = command.answer_without_limit()
            question.course.charged = False
        elif chosen.kind == "deny":
            try:
                answer = command.answer_refused(RETRY_NANOS)
                question.course.charged = False
            except NotImplementedError:
                # The command cannot be refused, as consume_ignoring_rate_limits cannot.
                raise error from None
        else:
            in_doubt = _is_in_doubt(error)
            question.course.charged = not in_doubt
            if not (rest := _given_back(command)):
                answer = self.local.decide(question, chosen.share, in_doubt=in_doubt)
            else:
                answer = command.answer_without_limit()
                # In doubt, the shared bucket may have them back already.
                if not in_doubt:
                    self.local.give_back(target, rest)
        self.note_failure(target.key, chosen, error)
        return degraded(answer)

    @staticmethod
    def chosen(policy: ErrorPolicy, key: Key, error: RateLimitError) -> OnError:
        """Return what a policy says of an error."""
        chosen = policy if isinstance(policy, OnError) else policy(key, error)
        if not isinstance(chosen, OnError):
            raise InvalidArgumentError(f"on_error must give an OnError; got {brief(chosen)}") from error
        return chosen

    def note_failure(self, key: Key, chosen: OnError, error: RateLimitError) -> None:
        """Note that a policy has answered in place of the store."""
        self._in_debt |= chosen.kind == "local"
        self._outages.note_failure(key, chosen, error)

    def store_answers(self) -> None:
        """Note that the store answers, and begin a sweep if one is due."""
        if not self._outages.degraded and not self._in_debt:
            return
        self._outages.note_answer()
        now = self._monotonic()
        with self._lock:
            sweeps = self._in_debt and not self._sweeping and now - self._swept_at >= _SECONDS_BETWEEN_SWEEPS
            if sweeps:
                self._swept_at = now
        if sweeps:
            # Where no thread can be started, the next answer of the store tries again.
            with suppress(RuntimeError):
                self._spawn(self._sweep())

    def _sweep(self) -> Steps[None]:
        if self._sweeping:
            return
        self._sweeping = True
        try:
            # This comes before the sweep and not after it, because a debt that arises meanwhile sets it again.
            self._in_debt = False
            yield from self.charge_all()
        except RateLimitError:
            # The next answer of the store begins another sweep.
            self._in_debt = True
        finally:
            self._sweeping = False

    def _end_sweep(self) -> None:
        """Begin without a sweep in a forked process: the thread is missing there, and the debts were the parent's."""
        self._sweeping = self._in_debt = False

    def charge_all(self) -> Steps[None]:
        """Charge what was consumed of all local buckets.

        :raises RateLimitError: the first error, once all debts were tried; the last one, after several in a row.
        """
        failure: RateLimitError | None = None
        in_a_row = 0
        for debt, course in self.local.debts():
            question = Question.of(
                debt.local.target, debt.local.terms, Book(debt.tokens), self._deadline(), course=course
            )
            try:
                yield from self._beneath(question)
            except (BucketNotFoundError, CorruptStateError):
                # There is no bucket to charge it to.
                self.local.settle(debt, charged=True)
            except BaseException as error:
                self.local.settle(debt, charged=_is_in_doubt(error))
                in_a_row += 1
                if not isinstance(error, RateLimitError) or in_a_row >= _FAILURES_OF_A_SWEEP:
                    raise
                failure = failure or error
            else:
                self.local.settle(debt, charged=True)
                in_a_row = 0
        if failure is not None:
            raise failure


def _given_back(command: Command[Any]) -> int:
    """Return how many tokens a command puts back that were consumed; 0 for other commands."""
    inner: Command[Any] = command.command if isinstance(command, Verbose) else command
    if isinstance(inner, Settle):
        return inner.rest
    return inner.tokens if isinstance(inner, GiveBack) else 0


def _is_in_doubt(error: BaseException) -> bool:
    """Return whether the store may have carried out what ended with this error; so it may after an interruption."""
    return bool(getattr(error, "in_doubt", not isinstance(error, RateLimitError)))


def degraded(answer: Any) -> Any:
    """Return the answer, marked as not being the store's if its type has such a mark."""
    if isinstance(answer, ConsumptionProbe | EstimationProbe | VerboseResult):
        if isinstance(answer, VerboseResult) and isinstance(answer.value, ConsumptionProbe | EstimationProbe):
            answer = replace(answer, value=replace(answer.value, degraded=True))
        return replace(answer, degraded=True)
    return answer
