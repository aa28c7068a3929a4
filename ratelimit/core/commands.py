"""What can be done to a bucket: each command is a value, and a pure function of the state and the time.

``decide`` returns the state to store, or None where nothing is to be stored, and the answer of the verb. It is given a
state that has been refilled. What it computes and does not return is thrown away, so that a rejection stores not even
the refill.

Commands speak to :class:`~ratelimit.core.algorithm.State` only, and serve every algorithm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Final, Generic, NamedTuple, TypeVar

from ratelimit.core.algorithm import Configuration, State, Surplus
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import MAX, MIN, NEVER, wrap
from ratelimit.core.results import ConsumptionProbe, EstimationProbe, Snapshot, VerboseResult
from ratelimit.errors import InvalidArgumentError

T = TypeVar("T")

Transition = tuple[State | None, T]
"""What a command does to a bucket: the state to store (None: nothing), and the answer."""


class Command(ABC, Generic[T]):
    """One thing that can be done to a bucket."""

    __slots__ = ()

    only_reads: bool = False
    """True where no state is ever stored, so that the store is only read."""

    verb: ClassVar[str | None] = None
    """The name of the verb where decisions are reported to listeners; None: they are not."""

    consumes: ClassVar[bool] = False
    """True where tokens are taken only if they are there, or will be: a state in memory may decide that."""

    is_decision: bool = False
    """True where callers act upon the answer, so that there may be another one in its place where the store fails."""

    @abstractmethod
    def decide(self, state: State, now: int) -> Transition[T]:
        """Return what to store (None: nothing), and the answer.

        :param state: the bucket, refilled at this time.
        """

    def refill_and_decide(self, state: State, now: int) -> Transition[T]:
        """Refill the state at this time, and decide."""
        return self.decide(state.refilled(now), now)

    @abstractmethod
    def answer_without_limit(self) -> T:
        """Return the answer for a key that is not limited."""

    def answer_refused(self, wait: int) -> T:
        """Return the answer that lets nothing through, and says to come back after this wait; for decisions only.

        :raises NotImplementedError: where there is none: the command consumes in any case.
        """
        raise NotImplementedError


class Terms(NamedTuple):
    """What a bucket is made from when it is missing, and what replaces its configuration when its version is lower.

    A bucket that has no version counts as one of the lowest.
    """

    configuration: Configuration
    version: int | None = None
    inheritance: TokensInheritance = TokensInheritance.RESET

    def at(self, now: int) -> Terms:
        """Return the terms as they are stored at this time."""
        return self

    def replaces(self, state: State, now: int) -> bool:
        """Return whether these terms are newer, at this time, than those that the bucket was made on."""
        if self.version is None:
            return False
        return state.configuration_version is None or state.configuration_version < self.version

    def initial(self, now: int) -> State:
        """Return the state of a bucket that is made at this time, before any refill."""
        made: State = self.configuration.algorithm.initial(self.configuration, self.version, now)
        return made

    def replaced(self, state: State, now: int) -> State:
        """Return a state, refilled at this time, under these terms."""
        configuration, version, inheritance = self
        made: State = configuration.algorithm.replaced(state, configuration, version, inheritance, now)
        return made


# These are the last bits of a stored version where limits change with periods. lua/decide.lua has the same number.
_BITS_OF_A_PERIOD: Final = 24
_LARGEST_VERSION_OF_PERIODS: Final = 2 ** (63 - _BITS_OF_A_PERIOD) - 1


class PeriodicTerms(Terms):
    """Terms whose configuration changes with the periods of the calendar; :func:`terms_of` makes them.

    The stored version is the version of the terms and the number of the period in one. So whatever replaces limits of a
    lower version replaces those of an earlier period as well.
    """

    __slots__ = ()

    def at(self, now: int) -> Terms:
        """Return the terms as they are stored at this time: with the present period."""
        configuration, version, inheritance = self
        dated = configuration.dated(now)
        return Terms(dated.configuration, ((version or 0) << _BITS_OF_A_PERIOD) + dated.number, inheritance)

    def replaces(self, state: State, now: int) -> bool:
        """See :meth:`Terms.replaces`."""
        return self.at(now).replaces(state, now)

    def initial(self, now: int) -> State:
        """See :meth:`Terms.initial`."""
        return self.at(now).initial(now)

    def replaced(self, state: State, now: int) -> State:
        """Return a state under these terms; where only the period is another one, tokens stay as they are."""
        terms, stored = self.at(now), state.configuration_version
        if stored is not None and stored >> _BITS_OF_A_PERIOD == self.version:
            terms = terms._replace(inheritance=TokensInheritance.AS_IS)
        return terms.replaced(state, now)


def terms_of(configuration: Configuration, version: int | None, inheritance: TokensInheritance) -> Terms:
    """Return the terms of a configuration, which may change with the periods of the calendar.

    :raises InvalidArgumentError: for a version that leaves no room for the number of a period, where one is needed.
    """
    if not getattr(configuration, "has_periods", False):
        return Terms(configuration, version, inheritance)
    if version is None:
        # Only the period ever raises the version then.
        return PeriodicTerms(configuration, 0, TokensInheritance.AS_IS)
    if not 0 <= version <= _LARGEST_VERSION_OF_PERIODS:
        raise InvalidArgumentError(
            f"configuration_version must be from 0 to 2**39 - 1 with calendar quotas; got {version}"
        )
    return PeriodicTerms(configuration, version, inheritance)


def execute(command: Command[T], terms: Terms, state: State | None, now: int) -> Transition[T]:
    """Run a command against what is stored (None: nothing) at this time.

    A bucket that had to be made, or given another configuration, is stored even where the command stores nothing.
    """
    if state is None:
        made = terms.initial(now)
    elif terms.version is None or not terms.replaces(state, now):
        return command.refill_and_decide(state, now)
    else:
        made = terms.replaced(state.refilled(now), now)
    refilled = made.refilled(now)
    after, answer = command.decide(refilled, now)
    return refilled if after is None else after, answer


@dataclass(frozen=True, slots=True)
class TryConsume(Command[bool]):
    """Consume the tokens if all of them are there."""

    tokens: int

    verb = "try_consume"
    consumes = True
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[bool]:
        if self.tokens > state.available_tokens:
            return None, False
        return state.consumed(self.tokens), True

    def refill_and_decide(self, state: State, now: int) -> Transition[bool]:
        after = state.refilled_and_consumed(self.tokens, now)
        return after, after is not None

    def answer_without_limit(self) -> bool:
        return True

    def answer_refused(self, wait: int) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class TryConsumeAndReturnRemaining(Command[ConsumptionProbe]):
    """Consume the tokens if all of them are there; answer what is left and how long to wait."""

    tokens: int

    verb = "try_consume_and_return_remaining"
    consumes = True
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[ConsumptionProbe]:
        available = state.available_tokens
        if self.tokens > available:
            wait = state.nanos_until(self.tokens, now, check_capacity=True)
            return None, ConsumptionProbe(False, max(0, available), wait, state.nanos_until_full(now))
        after = state.consumed(self.tokens)
        return after, _consumed_probe(after, now)

    def refill_and_decide(self, state: State, now: int) -> Transition[ConsumptionProbe]:
        after = state.refilled_and_consumed(self.tokens, now)
        return self.decide(state.refilled(now), now) if after is None else (after, _consumed_probe(after, now))

    def answer_without_limit(self) -> ConsumptionProbe:
        return ConsumptionProbe(True, MAX, 0, 0)

    def answer_refused(self, wait: int) -> ConsumptionProbe:
        return ConsumptionProbe(False, 0, wait, wait)


def _consumed_probe(after: State, now: int) -> ConsumptionProbe:
    return ConsumptionProbe(True, max(0, after.available_tokens), 0, after.nanos_until_full(now))


@dataclass(frozen=True, slots=True)
class ProbeConsumption(Command[ConsumptionProbe]):
    """Answer whether the tokens could be consumed, what is there, and how long to wait; consume nothing."""

    tokens: int
    only_reads = True
    verb = "estimate_ability_to_consume"
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[ConsumptionProbe]:
        available = state.available_tokens
        wait = 0 if self.tokens <= available else state.nanos_until(self.tokens, now, check_capacity=True)
        return None, ConsumptionProbe(self.tokens <= available, max(0, available), wait, state.nanos_until_full(now))

    def answer_without_limit(self) -> ConsumptionProbe:
        return ConsumptionProbe(True, MAX, 0, 0)

    def answer_refused(self, wait: int) -> ConsumptionProbe:
        return ConsumptionProbe(False, 0, wait, wait)


@dataclass(frozen=True, slots=True)
class ConsumeAsMuchAsPossible(Command[int]):
    """Consume what is there, at most the limit."""

    limit: int = MAX

    verb = "try_consume_as_much_as_possible"
    consumes = True
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[int]:
        tokens = max(0, min(self.limit, state.available_tokens))
        return (state.consumed(tokens) if tokens else None), tokens

    def answer_without_limit(self) -> int:
        return self.limit

    def answer_refused(self, wait: int) -> int:
        return 0


class Reserved(NamedTuple):
    """The answer to a reservation: the wait, and what it takes to undo the reservation if the wait is cancelled.

    :param wait: in nanoseconds; NEVER: nothing was reserved.
    :param noted: what the bucket has counted as consumed right after the reservation; None: no bucket was charged.
    :param surplus: what was taken beside the tokens, by limit; empty: nothing.
    :param refused_wait: where nothing was reserved, how long the wait would have been, in nanoseconds.
    """

    wait: int
    noted: int | None = None
    surplus: tuple[Surplus, ...] = ()
    refused_wait: int = 0


@dataclass(frozen=True, slots=True)
class Reserve(Command[Reserved]):
    """Consume tokens on credit if they will be there soon enough; the caller uses them when the wait is over."""

    tokens: int
    longest_wait_nanos: int = NEVER

    verb = "consume"
    consumes = True
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[Reserved]:
        wait = state.nanos_until(self.tokens, now, check_capacity=not state.reserves_beyond_capacity)
        if wait == NEVER or wait > self.longest_wait_nanos:
            return None, Reserved(NEVER, refused_wait=wait)
        after, surplus = state.reserved(self.tokens, wait, now)
        return after, Reserved(wait, after.consumed_tokens, surplus)

    def answer_without_limit(self) -> Reserved:
        return Reserved(0)

    def answer_refused(self, wait: int) -> Reserved:
        return Reserved(NEVER, refused_wait=wait)


@dataclass(frozen=True, slots=True)
class Cancel(Command[bool]):
    """Undo a reservation whose owner has stopped waiting; answer whether it is undone.

    Where others have reserved after it, its place stays empty: they count on the times that they were given.

    :param noted: what the bucket had counted as consumed; see :class:`Reserved`.
    :param surplus: what was taken beside the tokens; see :class:`Reserved`.
    """

    tokens: int
    noted: int
    surplus: tuple[Surplus, ...] = ()

    def decide(self, state: State, now: int) -> Transition[bool]:
        after = state.cancelled(self.tokens, self.noted, self.surplus)
        return after, after is not None

    def answer_without_limit(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class ConsumeIgnoringRateLimits(Command[int]):
    """Consume the tokens whether they are there or not; answer how long the wait would have been (NEVER: too many)."""

    tokens: int

    verb = "consume_ignoring_rate_limits"
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[int]:
        wait = state.nanos_until(self.tokens, now, check_capacity=False)
        return (None if wait == NEVER else state.consumed(self.tokens)), wait

    def answer_without_limit(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class GiveBack(Command[None]):
    """Put tokens back that were consumed and not used, and count them as never consumed."""

    tokens: int

    is_decision = True

    def decide(self, state: State, now: int) -> Transition[None]:
        return state.given_back(self.tokens), None

    def answer_without_limit(self) -> None:
        return None

    def answer_refused(self, wait: int) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Settle(Command[int]):
    """Put the tokens that were used in the place of those that were reserved: give back the rest, or take the excess.

    The excess is taken whether it is there or not. Answer how long it would have had to wait; NEVER: it is too much,
    and nothing is changed.
    """

    reserved: int
    used: int

    verb = "settle"
    is_decision = True

    @property
    def rest(self) -> int:
        """The reserved tokens that were not used."""
        return max(0, self.reserved - self.used)

    @property
    def excess(self) -> int:
        """The tokens that were used beyond the reserved ones."""
        return max(0, self.used - self.reserved)

    @property
    def correction(self) -> GiveBack | ConsumeIgnoringRateLimits:
        """The command that does the same to a bucket."""
        return ConsumeIgnoringRateLimits(self.excess) if self.excess else GiveBack(self.rest)

    def decide(self, state: State, now: int) -> Transition[int]:
        after, wait = self.correction.decide(state, now)
        return after, wait or 0

    def answer_without_limit(self) -> int:
        return 0

    def answer_refused(self, wait: int) -> int:
        if self.excess:
            raise NotImplementedError
        return 0


@dataclass(frozen=True, slots=True)
class EstimateAbilityToConsume(Command[EstimationProbe]):
    """Answer whether the tokens could be consumed, and how long to wait for them."""

    tokens: int
    only_reads = True
    verb = "estimate_ability_to_consume"
    is_decision = True

    def decide(self, state: State, now: int) -> Transition[EstimationProbe]:
        available = state.available_tokens
        wait = 0 if self.tokens <= available else state.nanos_until(self.tokens, now, check_capacity=True)
        return None, EstimationProbe(self.tokens <= available, max(0, available), wait)

    def answer_without_limit(self) -> EstimationProbe:
        return EstimationProbe(True, MAX, 0)

    def answer_refused(self, wait: int) -> EstimationProbe:
        return EstimationProbe(False, 0, wait)


@dataclass(frozen=True, slots=True)
class GetAvailableTokens(Command[int]):
    """Answer how many tokens are there; negative in debt."""

    only_reads = True

    def decide(self, state: State, now: int) -> Transition[int]:
        return None, state.available_tokens

    def answer_without_limit(self) -> int:
        return MAX


@dataclass(frozen=True, slots=True)
class AddTokens(Command[None]):
    """Put tokens in, up to the capacity."""

    tokens: int

    def decide(self, state: State, now: int) -> Transition[None]:
        return state.added(self.tokens), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class ForceAddTokens(Command[None]):
    """Put tokens in, above the capacity if need be."""

    tokens: int

    def decide(self, state: State, now: int) -> Transition[None]:
        return state.force_added(self.tokens), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class HoldBack(Command[None]):
    """Let there be no token before this long from now; a wait that is longer already stays as it is.

    Repeating it changes nothing, so every process may apply the wait that one service has asked all of them for.
    """

    nanos: int

    def decide(self, state: State, now: int) -> Transition[None]:
        return state.held_back(self.nanos, now), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Reset(Command[None]):
    """Fill every limit to its capacity."""

    def decide(self, state: State, now: int) -> Transition[None]:
        return state.reset(), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class ReplaceConfiguration(Command[None]):
    """Put another configuration in the place of the stored one; the stored version stays."""

    configuration: Configuration
    inheritance: TokensInheritance

    def decide(self, state: State, now: int) -> Transition[None]:
        configuration, version = self.configuration, state.configuration_version
        return configuration.algorithm.replaced(state, configuration, version, self.inheritance, now), None

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class TakeSnapshot(Command[Snapshot | None]):
    """Answer the whole state; None where the key is not limited."""

    only_reads = True

    def decide(self, state: State, now: int) -> Transition[Snapshot | None]:
        snapshot = Snapshot(
            state.configuration, state.configuration_version, state.bandwidth_states, state.consumed_tokens
        )
        return None, snapshot

    def answer_without_limit(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Batch(Command[list[Any]]):
    """Run other commands one after another at the same time, and store what they leave together."""

    commands: tuple[Command[Any], ...]

    def decide(self, state: State, now: int) -> Transition[list[Any]]:
        stored: State | None = None
        answers: list[Any] = []
        for command, equal in groupby(self.commands):
            times = len(list(equal))
            if times > 1 and type(command) is TryConsume and command.tokens > 0:
                # Admit as many as there are tokens for, in one step.
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
    """Run another command; answer what it answers, and the bucket right after it."""

    __slots__ = ("command", "is_decision", "only_reads")

    def __init__(self, command: Command[T]) -> None:
        self.command = command
        self.only_reads = command.only_reads
        self.is_decision = command.is_decision

    def decide(self, state: State, now: int) -> Transition[VerboseResult[T]]:
        after, value = self.command.decide(state, now)
        return after, self._shown(value, state if after is None else after, now)

    def refill_and_decide(self, state: State, now: int) -> Transition[VerboseResult[T]]:
        after, value = self.command.refill_and_decide(state, now)
        return after, self._shown(value, state.refilled(now) if after is None else after, now)

    def _shown(self, value: T, shown: State, now: int) -> VerboseResult[T]:
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
    """Consume tokens that were handed out already: in debt if need be, but not beyond what 64 bits hold."""

    tokens: int

    def decide(self, state: State, now: int) -> Transition[None]:
        tokens = min(self.tokens, state.available_tokens - MIN)
        return (state.consumed(tokens) if tokens else None), None

    def answer_without_limit(self) -> None:
        return None


class Synchronized(NamedTuple, Generic[T]):
    """The answer of a :class:`Synchronize`.

    :param answer: that of the other command.
    :param state: the bucket after both.
    :param now: when the bucket was so.
    :param consumed: tokens that the other command consumed.
    """

    answer: T
    state: State
    now: int
    consumed: int


class Synchronize(Command[Synchronized[T]]):
    """Book tokens that were handed out without the store, then run another command; answer the bucket after both.

    :param booking: whether the tokens are stored; otherwise the command only reads, and sees the bucket without them.
    """

    __slots__ = ("booking", "command", "only_reads", "tokens")

    def __init__(self, tokens: int, command: Command[T], *, booking: bool) -> None:
        self.tokens = tokens
        self.command = command
        self.booking = booking
        self.only_reads = not booking and command.only_reads

    def decide(self, state: State, now: int) -> Transition[Synchronized[T]]:
        booked = Book(self.tokens).decide(state, now)[0] or state
        after, answer = self.command.decide(booked, now)
        if not self.booking:
            return None, Synchronized(answer, state, now, 0)
        shown = booked if after is None else after
        consumed = wrap(shown.consumed_tokens - booked.consumed_tokens)
        return (after if booked is state else shown), Synchronized(answer, shown, now, consumed)

    def answer_without_limit(self) -> Synchronized[T]:
        # Keys without limits are answered before anything is synchronised.
        raise NotImplementedError
