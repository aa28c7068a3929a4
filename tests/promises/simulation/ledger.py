"""What was stored, answered and lost, and the rules that all of that keeps.

The ledger judges each write where it happens, at the store: by the bucket that it keeps there beside the bytes, and the
time that the decision had read. What a client is told is held against the write that its decision has made; where it
has made none, against the bucket that its last reply has shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

from ratelimit.core.algorithm import State, decode
from ratelimit.core.commands import (
    AddTokens,
    Command,
    Reserve,
    Reserved,
    Reset,
    Settle,
    Synchronize,
    Synchronized,
    Transition,
    Verbose,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.numbers import NEVER
from ratelimit.core.results import ConsumptionProbe, Snapshot, VerboseResult
from ratelimit.engine.question import Question
from ratelimit.errors import BucketNotFoundError, ContentionError, CorruptStateError, StoreError
from tests.promises.simulation.bucket import Bucket, Limits
from tests.promises.simulation.world import EPOCH, MILLISECOND, SECOND, ViolationError, World


class Remove(Command[None]):
    """Forgets the bucket; no command of the library's, but a verb."""

    def decide(self, state: State, now: int) -> Transition[None]:
        raise NotImplementedError

    def answer_without_limit(self) -> None:
        raise NotImplementedError

    def __str__(self) -> str:
        return "Remove()"


LONGEST_PAUSE_NANOS: Final = 16 * MILLISECOND

_ROUNDING: Final = 1e-6  # seconds, of clocks that are floats
_TRIPS: Final = 3
_TRIPS_PER_ATTEMPT: Final = 2
_MARGIN_NANOS: Final = 10 * SECOND  # for which an automatic expiration keeps a bucket that is full


@dataclass(slots=True, eq=False)
class Decision:
    """One command of one client, from its first request to its end.

    :ivar reading: the time that it has last read.
    :ivar trips: requests that it has sent.
    :ivar unanswered: those whose reply it did not get.
    :ivar shown: the bucket as its last reply has shown it, None where there was none.
    :ivar written: what it has stored, also what was lost since.
    :ivar is_forgotten: whether the store has forgotten something of that, so that a repetition may decide otherwise.
    :ivar outcome: "told" an answer, "failed" for certain, or in "doubt"; None: it is under way.
    """

    number: int
    client: str
    key: bytes
    command: Command[Any]
    question: Question
    reading: int = 0
    trips: int = 0
    unanswered: int = 0
    shown: Bucket | None = None
    written: list[Write] = field(default_factory=list)
    is_forgotten: bool = False
    outcome: str | None = None
    told_charge: int = 0

    def __str__(self) -> str:
        return f"{self.client} #{self.number} {plain(self.command)}"


class Write(NamedTuple):
    decision: Decision
    before: bytes | None
    after: bytes
    charge: int
    answer: Any


class Record(NamedTuple):
    """What is stored under a key, and what the ledger knows of it: the bucket, and all that was written into it.

    :param expires_at: in virtual time; None: never.
    """

    state: bytes
    expires_at: int | None
    bucket: Bucket
    writes: tuple[Write, ...]


@dataclass(slots=True)
class Account:
    """The tokens of a key, over all buckets that there were under it: admitted, and where they can have come from."""

    admitted: int = 0
    until: int = 0  # in virtual time, that of waits included
    added: int = 0
    lost: int = 0  # charged, and forgotten by the store since
    doubled: int = 0  # charged by a request that came late, and found again what it was to replace


class Ledger:
    """The books of a schedule.

    :param delegating: whether the store may decide, so that three round trips are enough.
    :param attempts: swaps that a decision may lose.
    :param oldest_reading: how far a reading of the clock may be behind when it arrives at the store.
    :param ahead: tokens that all clients together may hand out before they tell the store.
    :param calm: whether no request fails.
    :param unique_readings: whether no two readings of the clock are alike.
    """

    def __init__(
        self,
        world: World,
        limits: Limits,
        expiration: Expiration,
        *,
        delegating: bool,
        attempts: int,
        oldest_reading: int,
        ahead: int,
        calm: bool,
        unique_readings: bool,
    ) -> None:
        self.world = world
        self.limits = limits
        self.expiration = expiration
        self.most_trips = _TRIPS if delegating else _TRIPS_PER_ATTEMPT * attempts + 1
        self.oldest_reading = oldest_reading
        self.ahead = ahead
        self.calm = calm
        self.unique_readings = unique_readings
        self.decisions: list[Decision] = []
        self.accounts: dict[bytes, Account] = {}

    # What the store does.

    def now_of(self, decision: Decision) -> int:
        """The time of a decision, which must not be ahead of the server's."""
        return min(decision.reading, self.world.server_time)

    def written(self, record: Record | None, decision: Decision, state: bytes, ttl_millis: int) -> Record:
        """A decision has put a state in the place of a record."""
        now = self.now_of(decision)
        bucket = Bucket.initial(self.limits, now) if record is None else record.bucket
        outcome = bucket.after(decision.command, now)
        writes = () if record is None else record.writes
        account = self.account(decision.key)
        before = None if record is None else record.state
        if state != before and any(write.decision is decision for write in writes):
            if not self._recurring(decision, before, state, outcome.bucket):
                self.fail(decision, "is stored twice")
            account.doubled += abs(outcome.charge)
        elif decision.outcome == "told" and decision.unanswered and not decision.told_charge:
            # A strict request has come late: its repetition was refused, and the bucket has expired since.
            account.doubled += abs(outcome.charge)
        if record is not None and not outcome.stored:
            self.fail(decision, "has stored something, though there is nothing to store")
        write = Write(decision, before, state, outcome.charge, outcome.answer)
        decision.written.append(write)
        writes = (*writes, write)
        try:
            decoded = decode(state)
        except CorruptStateError as error:
            self.fail(decision, f"has stored what cannot be read: {error}")
        consumed = sum([write.charge for write in writes])
        if decoded.consumed_tokens != consumed:
            self.fail(decision, f"has stored {decoded.consumed_tokens} consumed tokens, not {consumed}")
        sizes = [state.current_size for state in decoded.bandwidth_states]
        if sizes != [level.tokens for level in outcome.bucket.levels]:
            levels = [level.tokens for level in outcome.bucket.levels]
            self.fail(decision, f"has stored {sizes} tokens, where there are {levels}")
        account.added += _added(plain(decision.command), bucket.refilled(now)) + max(0, -outcome.charge)
        expires_at = self.world.now + ttl_millis * MILLISECOND if ttl_millis > 0 else None
        return Record(state, expires_at, outcome.bucket, writes)

    def expired(self, key: bytes, record: Record) -> None:
        """A record has been kept for as long as it was to be."""
        assert record.expires_at is not None
        missing = record.bucket.refilled(EPOCH + record.expires_at - self.oldest_reading).missing()
        if self.expiration.kind == "automatic" and (missing or Bucket.initial(self.limits, EPOCH).missing()):
            raise ViolationError(f"{key!r} expires with {missing} tokens missing")
        self.account(key).lost += max(0, missing)
        _forget(record.writes)

    def removed(self, key: bytes, record: Record) -> None:
        """A record was removed."""
        self.account(key).lost += max(0, record.bucket.missing())
        _forget(record.writes)

    def failed_over(self, key: bytes, before: Record | None, after: Record | None) -> None:
        """The store has gone back to an earlier state."""
        kept = () if after is None else after.writes
        forgotten = [] if before is None else [write for write in before.writes if write not in kept]
        self.account(key).lost += sum([max(0, write.charge) for write in forgotten])
        _forget(forgotten)

    # What the clients are told.

    def begun(self, client: str, question: Question) -> Decision:
        ((target, _, command),) = question.parts
        decision = Decision(len(self.decisions), client, target.stored_key, command, question)
        self.decisions.append(decision)
        return decision

    def answered(self, decision: Decision, answer: Any) -> None:
        """A decision has ended with this answer."""
        decision.outcome = "told"
        command, answer = plain(decision.command), plain_answer(answer)
        account = self.account(decision.key)
        if isinstance(command, Remove):
            self._ended(decision)
            return
        is_of_repetition = decision.unanswered and decision.is_forgotten and answer != decision.written[-1].answer
        if decision.written and not is_of_repetition:
            charge, expected = decision.written[-1].charge, decision.written[-1].answer
        else:
            now = self.now_of(decision)
            bucket = Bucket.initial(self.limits, now) if decision.shown is None else decision.shown
            _, charge, expected, stored = bucket.after(decision.command, now)
            if stored:
                self.fail(decision, f"is told {answer!r}, though it has stored nothing")
        if answer != expected and not _is_as_seen_later(decision, answer, expected):
            self.fail(decision, f"is told {answer!r} instead of {expected!r}")
        decision.told_charge = charge
        if charge:
            account.admitted += charge
            wait = answer if isinstance(command, Reserve | Settle) and answer != NEVER else 0
            account.until = max(account.until, self.world.now + wait)
        self._ended(decision)

    def _recurring(self, decision: Decision, before: bytes | None, after: bytes, bucket: Bucket) -> bool:
        """Whether a swap that was sent twice was bound to be carried out twice.

        One of both came late, and found what it was to replace once more: others had given back as many tokens as it
        had taken, in the same period, so that nothing told the bucket from the former one.
        """
        same = any(
            (write.decision, write.before, write.after) == (decision, before, after) for write in decision.written
        )
        shows_time = self.unique_readings and any(level.at == decision.reading for level in bucket.levels)
        return same and decision.unanswered > 0 and not shows_time

    def failed(self, decision: Decision, error: BaseException) -> None:
        """A decision has ended with an error, or an interruption, or has been stopped."""
        if self.world.broken:
            return
        match error:
            case StoreError():
                in_doubt = error.in_doubt
                deadline = decision.question.deadline
                if self.calm and (deadline is None or self.world.monotonic() < deadline - _ROUNDING):
                    self.fail(decision, f"fails with {error!r}, though nothing is wrong")
            case ContentionError() | BucketNotFoundError():
                in_doubt = False
            case KeyboardInterrupt():
                in_doubt = error is not decision.question.course.interruption
            case GeneratorExit():
                in_doubt = True
            case _:
                self.fail(decision, f"fails with {error!r}")
        decision.outcome = "doubt" if in_doubt else "failed"
        if not in_doubt and any(write.charge for write in decision.written):
            self.fail(decision, f"fails with {error!r}, which tells no doubt, though it is charged")
        self._ended(decision)

    def _ended(self, decision: Decision) -> None:
        if decision.trips > self.most_trips + min(decision.unanswered, 1):
            self.fail(decision, f"takes {decision.trips} round trips")
        deadline = decision.question.deadline
        if deadline is not None and self.world.monotonic() > deadline + LONGEST_PAUSE_NANOS / SECOND:
            self.fail(decision, "ends after its deadline")

    # What must be so in the end.

    def close(self, records: dict[bytes, Record]) -> None:
        """Nothing will happen any more."""
        for decision in self.decisions:
            if decision.outcome is None:
                self.fail(decision, "does not end")
            if decision.outcome == "failed" and any(write.charge for write in decision.written):
                self.fail(decision, "has failed for certain, and is charged after that")
        for key, record in records.items():
            self._check_consumed(key, record)
        for key, account in self.accounts.items():
            self._check_admitted(key, account)

    def _check_consumed(self, key: bytes, record: Record) -> None:
        """All that was told is stored once; beside it there is only what is in doubt."""
        stored = decode(record.state).consumed_tokens
        told = doubtful_taken = doubtful_given = 0
        there = {write.decision for write in record.writes}
        for decision in self.decisions:
            if decision.key != key:
                continue
            if decision.outcome == "told" and (decision in there or not decision.written):
                told += decision.told_charge
            elif decision.outcome == "doubt" and decision in there:
                charge = decision.written[-1].charge
                doubtful_taken += max(0, charge)
                doubtful_given += max(0, -charge)
        doubled = self.account(key).doubled
        if not told - doubtful_given - doubled <= stored <= told + doubtful_taken + doubled:
            raise ViolationError(
                f"{key!r} has {stored} consumed tokens, where clients were told of {told}, and {doubtful_taken} taken"
                f" and {doubtful_given} given back are in doubt"
            )

    def _check_admitted(self, key: bytes, account: Account) -> None:
        """No more is admitted than was there at first, has come in by the server's clock, was added, or was lost."""
        nanos = max(account.until, self.world.now) + self.oldest_reading
        for level in Bucket.initial(self.limits, EPOCH).levels:
            there = level.most(nanos, self.ahead) + account.added + account.lost
            if account.admitted > there:
                raise ViolationError(f"{account.admitted} tokens of {key!r} are admitted, where there were {there}")

    def account(self, key: bytes) -> Account:
        return self.accounts.setdefault(key, Account())

    def fail(self, decision: Decision, what: str) -> NoReturn:
        raise ViolationError(f"{decision} {what}")


def plain(command: Command[Any]) -> Command[Any]:
    """A command without those around it that change nothing of what it does."""
    return plain(command.command) if isinstance(command, Verbose | Synchronize) else command


def plain_answer(answer: Any) -> Any:
    match answer:
        case VerboseResult():
            return plain_answer(answer.value)
        case Synchronized():
            return plain_answer(answer.answer)
        case Reserved():
            return answer.wait
        case list():
            return [plain_answer(one) for one in answer]
        case Snapshot():
            return None
        case ConsumptionProbe():
            return answer.consumed, answer.remaining_tokens
    return answer


def _forget(writes: Iterable[Write]) -> None:
    for write in writes:
        write.decision.is_forgotten = True


def _is_as_seen_later(decision: Decision, answer: Any, expected: Any) -> bool:
    """Whether the only difference is in tokens that remain, and those are what the bucket has shown at last.

    A decision of the store whose reply was lost is seen in the store later, when others may have taken more.
    """
    answers, wanted = (one if isinstance(one, list) else [one] for one in (answer, expected))
    if not decision.unanswered or decision.shown is None or not isinstance(answers[-1], tuple):
        return False
    admitted = [one[0] for one in answers] == [one[0] for one in wanted]
    return admitted and answers[-1][1] == max(0, decision.shown.tokens)


def _added(command: Command[Any], bucket: Bucket) -> int:
    """Tokens that a command puts in, beside those that it gives back."""
    match command:
        case AddTokens(tokens):
            return tokens
        case Reset():
            return max(0, bucket.missing())
    return 0
