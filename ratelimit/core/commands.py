"""What can be done to a bucket: each command is a value, and a pure function of the state and the time.

``decide`` answers with the state to store, or None where nothing is to be stored, and with the answer of the verb. The
state that it is given has been refilled; what it computes and does not hand back is thrown away, so that a rejection
stores not even the refill.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from ratelimit.core.numbers import MAX, MIN, NEVER, wrap
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, Snapshot, VerboseResult
from ratelimit.core.token_bucket.bandwidth import BucketConfiguration
from ratelimit.core.token_bucket.inheritance import TokensInheritance, replaced
from ratelimit.core.token_bucket.state import BucketState, Surplus

T = TypeVar("T")

Decision = tuple[BucketState | None, T]


class Command(ABC, Generic[T]):
    """One thing to do to a bucket."""

    __slots__ = ()

    only_reads: ClassVar[bool] = False
    """True where no state is ever stored, so that the store is only read."""

    is_decision: ClassVar[bool] = False
    """True where callers act upon the answer, so that there may be another one in its place where the store fails."""

    @abstractmethod
    def decide(self, state: BucketState, now: int) -> Decision[T]:
        """What to store (None: nothing), and the answer; the state has been refilled at this time."""

    def refill_and_decide(self, state: BucketState, now: int) -> Decision[T]:
        """Refill the state at this time, and decide."""
        return self.decide(state.refilled(now), now)

    @abstractmethod
    def answer_without_limit(self) -> T:
        """The answer for a key that is not limited."""

    def answer_refused(self, wait: int) -> T:
        """The answer that lets nothing through, and tells to come back after this wait; only of decisions.

        :raises NotImplementedError: where there is none: the command consumes in any case.
        """
        raise NotImplementedError


class Plan(NamedTuple):
    """What a bucket is made from when it is missing, and replaced by when its version is older or none."""

    configuration: BucketConfiguration
    version: int | None = None
    inheritance: TokensInheritance = TokensInheritance.RESET

    def replaces(self, state: BucketState) -> bool:
        """Whether the configuration of the plan is newer than that of the state."""
        if self.version is None:
            return False
        return state.configuration_version is None or state.configuration_version < self.version


def execute(command: Command[T], plan: Plan, state: BucketState | None, now: int) -> Decision[T]:
    """Run a command against what is stored (None: nothing) at this time.

    A bucket that had to be made, or given another configuration, is stored even where the command stores nothing.
    """
    if state is not None and (plan.version is None or not plan.replaces(state)):
        return command.refill_and_decide(state, now)
    refilled = _made(plan, state, now).refilled(now)
    after, answer = command.decide(refilled, now)
    return refilled if after is None else after, answer


def _made(plan: Plan, state: BucketState | None, now: int) -> BucketState:
    """The state that the plan puts in the place of the stored one."""
    if state is None:
        return BucketState.initial(plan.configuration, plan.version, now)
    state = replaced(state.refilled(now), plan.configuration, plan.inheritance, now)
    return state._replace(configuration_version=plan.version)


@dataclass(frozen=True, slots=True)
class TryConsume(Command[bool]):
    """Consume the tokens if all of them are there."""

    tokens: int

    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[bool]:
        if self.tokens > state.available_tokens:
            return None, False
        return state.consumed(self.tokens), True

    def refill_and_decide(self, state: BucketState, now: int) -> Decision[bool]:
        after = state.refilled_and_consumed(self.tokens, now)
        return after, after is not None

    def answer_without_limit(self) -> bool:
        return True

    def answer_refused(self, wait: int) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class TryConsumeAndReturnRemaining(Command[ConsumptionProbe]):
    """Consume the tokens if all of them are there, and tell what is left and how long to wait."""

    tokens: int

    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[ConsumptionProbe]:
        available = state.available_tokens
        if self.tokens > available:
            wait = state.nanos_until(self.tokens, now, check_capacity=True)
            return None, ConsumptionProbe(False, max(0, available), wait, state.nanos_until_full(now))
        after = state.consumed(self.tokens)
        return after, _consumed_probe(after, now)

    def refill_and_decide(self, state: BucketState, now: int) -> Decision[ConsumptionProbe]:
        after = state.refilled_and_consumed(self.tokens, now)
        return self.decide(state.refilled(now), now) if after is None else (after, _consumed_probe(after, now))

    def answer_without_limit(self) -> ConsumptionProbe:
        return ConsumptionProbe(True, MAX, 0, 0)

    def answer_refused(self, wait: int) -> ConsumptionProbe:
        return ConsumptionProbe(False, 0, wait, wait)


def _consumed_probe(after: BucketState, now: int) -> ConsumptionProbe:
    return ConsumptionProbe(True, max(0, after.available_tokens), 0, after.nanos_until_full(now))


@dataclass(frozen=True, slots=True)
class ConsumeAsMuchAsPossible(Command[int]):
    """Consume what is there, at most the limit."""

    limit: int = MAX

    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[int]:
        tokens = max(0, min(self.limit, state.available_tokens))
        return (state.consumed(tokens) if tokens else None), tokens

    def answer_without_limit(self) -> int:
        return self.limit

    def answer_refused(self, wait: int) -> int:
        return 0


class Reserved(NamedTuple):
    """The answer to a reservation: the wait, and what undoes the reservation if the wait is cancelled.

    :param wait: in nanoseconds; NEVER: nothing was reserved.
    :param noted: what the bucket has counted as consumed right after the reservation; None: no bucket was charged.
    :param surplus: what was taken beside the tokens, by bandwidth; empty: nothing.
    """

    wait: int
    noted: int | None = None
    surplus: tuple[Surplus, ...] = ()


@dataclass(frozen=True, slots=True)
class Reserve(Command[Reserved]):
    """Consume the tokens on credit if they will be there soon enough, to be used when the wait for them is over."""

    tokens: int
    longest_wait_nanos: int = NEVER

    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[Reserved]:
        wait = state.nanos_until(self.tokens, now, check_capacity=False)
        if wait == NEVER or wait > self.longest_wait_nanos:
            return None, Reserved(NEVER)
        after, surplus = state.reserved(self.tokens, wait, now)
        return after, Reserved(wait, after.consumed_tokens, surplus)

    def answer_without_limit(self) -> Reserved:
        return Reserved(0)

    def answer_refused(self, wait: int) -> Reserved:
        return Reserved(NEVER)


@dataclass(frozen=True, slots=True)
class Cancel(Command[bool]):
    """Undo a reservation whose owner has stopped waiting, and answer whether it is undone.

    Its place stays empty where others have reserved after it: they count on the times that they were given.

    :param noted: see :class:`Reserved`, likewise ``surplus``.
    """

    tokens: int
    noted: int
    surplus: tuple[Surplus, ...] = ()

    def decide(self, state: BucketState, now: int) -> Decision[bool]:
        after = state.cancelled(self.tokens, self.noted, self.surplus)
        return after, after is not None

    def answer_without_limit(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class ConsumeIgnoringRateLimits(Command[int]):
    """Consume the tokens whether they are there or not, and tell until when they would have been; NEVER: overflow."""

    tokens: int

    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[int]:
        wait = state.nanos_until(self.tokens, now, check_capacity=False)
        return (None if wait == NEVER else state.consumed(self.tokens)), wait

    def answer_without_limit(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class GiveBack(Command[None]):
    """Put tokens back that were consumed and not used, and count them as never consumed."""

    tokens: int

    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        return state.given_back(self.tokens), None

    def answer_without_limit(self) -> None:
        return None

    def answer_refused(self, wait: int) -> None:
        return None


@dataclass(frozen=True, slots=True)
class EstimateAbilityToConsume(Command[EstimationProbe]):
    """Tell whether the tokens could be consumed, and how long to wait for them."""

    tokens: int
    only_reads: ClassVar[bool] = True
    is_decision: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[EstimationProbe]:
        available = state.available_tokens
        wait = 0 if self.tokens <= available else state.nanos_until(self.tokens, now, check_capacity=True)
        return None, EstimationProbe(self.tokens <= available, max(0, available), wait)

    def answer_without_limit(self) -> EstimationProbe:
        return EstimationProbe(True, MAX, 0)

    def answer_refused(self, wait: int) -> EstimationProbe:
        return EstimationProbe(False, 0, wait)


@dataclass(frozen=True, slots=True)
class GetAvailableTokens(Command[int]):
    """Tell the tokens that are there; negative in debt."""

    only_reads: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[int]:
        return None, state.available_tokens

    def answer_without_limit(self) -> int:
        return MAX


@dataclass(frozen=True, slots=True)
class AddTokens(Command[None]):
    """Put tokens in, up to the capacity."""

    tokens: int

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        return state.added(self.tokens), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class ForceAddTokens(Command[None]):
    """Put tokens in, above the capacity if need be."""

    tokens: int

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        return state.force_added(self.tokens), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class HoldBack(Command[None]):
    """Let there be no token before this long from now; a wait that is longer already stays as it is.

    Done twice it does what it does once, so that many who are told the same by somebody may all say it.
    """

    nanos: int

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        return state.held_back(self.nanos, now), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Reset(Command[None]):
    """Fill every bandwidth to its capacity."""

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        return state.reset(), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class ReplaceConfiguration(Command[None]):
    """Put another configuration in the place of the stored one; the stored version stays."""

    configuration: BucketConfiguration
    inheritance: TokensInheritance

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        return replaced(state, self.configuration, self.inheritance, now), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class TakeSnapshot(Command[Snapshot | None]):
    """Tell the whole state; None where the key is not limited."""

    only_reads: ClassVar[bool] = True

    def decide(self, state: BucketState, now: int) -> Decision[Snapshot | None]:
        snapshot = Snapshot(
            state.configuration, state.configuration_version, state.bandwidth_states, state.consumed_tokens
        )
        return None, snapshot

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Batch(Command[list[Any]]):
    """Other commands, one after another at the same time; what is stored is what they leave together."""

    commands: tuple[Command[Any], ...]

    def decide(self, state: BucketState, now: int) -> Decision[list[Any]]:
        stored: BucketState | None = None
        answers: list[Any] = []
        for command, equal in groupby(self.commands):
            times = len(list(equal))
            if times > 1 and type(command) is TryConsume and command.tokens > 0:
                # As many as there are tokens for, in one step.
                admitted = max(0, min(times, state.available_tokens // command.tokens))
                if admitted:
                    stored = state = state.consumed(admitted * command.tokens)
                answers += [True] * admitted + [False] * (times - admitted)
                continue
            for _ in range(times):
                after, answer = command.decide(state, now)
                if after is not None:
                    stored = state = after
                answers.append(answer)
        return stored, answers

    def answer_without_limit(self) -> list[Any]:
        return [command.answer_without_limit() for command in self.commands]


class Verbose(Command[VerboseResult[T]]):
    """Another command, and with its answer the bucket right after it."""

    __slots__ = ("command", "is_decision", "only_reads")

    def __init__(self, command: Command[T]) -> None:
        self.command = command
        self.only_reads = command.only_reads  # type: ignore[misc]  # per instance here
        self.is_decision = command.is_decision  # type: ignore[misc]

    def decide(self, state: BucketState, now: int) -> Decision[VerboseResult[T]]:
        after, value = self.command.decide(state, now)
        return after, self._shown(value, state if after is None else after, now)

    def refill_and_decide(self, state: BucketState, now: int) -> Decision[VerboseResult[T]]:
        after, value = self.command.refill_and_decide(state, now)
        return after, self._shown(value, state.refilled(now) if after is None else after, now)

    def _shown(self, value: T, shown: BucketState, now: int) -> VerboseResult[T]:
        return VerboseResult(
            value=value,
            operation_time_nanos=now,
            available_tokens=shown.available_tokens,
            available_tokens_per_bandwidth=tuple(state.current_size for state in shown.bandwidth_states),
            full_refilling_time_nanos=shown.nanos_until_full(now),
            configuration=shown.configuration,
            bandwidth_states=shown.bandwidth_states,
        )

    def answer_without_limit(self) -> VerboseResult[T]:
        return VerboseResult(self.command.answer_without_limit(), 0, MAX, (), 0, None, ())

    def answer_refused(self, wait: int) -> VerboseResult[T]:
        return VerboseResult(self.command.answer_refused(wait), 0, 0, (), wait, None, ())


@dataclass(frozen=True, slots=True)
class Book(Command[None]):
    """Consume tokens that were handed out, whatever the bucket holds; in debt, but not beyond what 64 bits hold."""

    tokens: int

    def decide(self, state: BucketState, now: int) -> Decision[None]:
        tokens = min(self.tokens, state.available_tokens - MIN)
        return (state.consumed(tokens) if tokens else None), None

    def answer_without_limit(self) -> None:
        return None


class Synchronized(NamedTuple, Generic[T]):
    """What a Synchronize has shown: the answer, the bucket after it, when, and what the other command consumed."""

    answer: T
    state: BucketState
    now: int
    consumed: int


class Synchronize(Command[Synchronized[T]]):
    """Book tokens that were handed out elsewhere, then do another command, and show the bucket after both.

    :param booking: whether the tokens are stored; otherwise the command only reads, and sees the bucket without them.
    """

    __slots__ = ("booking", "command", "only_reads", "tokens")

    def __init__(self, tokens: int, command: Command[T], *, booking: bool) -> None:
        self.tokens = tokens
        self.command = command
        self.booking = booking
        self.only_reads = not booking and command.only_reads  # type: ignore[misc]  # per instance here

    def decide(self, state: BucketState, now: int) -> Decision[Synchronized[T]]:
        booked = Book(self.tokens).decide(state, now)[0] or state
        after, answer = self.command.decide(booked, now)
        if not self.booking:
            return None, Synchronized(answer, state, now, 0)
        shown = booked if after is None else after
        consumed = wrap(shown.consumed_tokens - booked.consumed_tokens)
        return (after if booked is state else shown), Synchronized(answer, shown, now, consumed)

    def answer_without_limit(self) -> Synchronized[T]:
        raise NotImplementedError  # such keys have been answered before
