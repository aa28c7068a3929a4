"""Several buckets as one: what an ``all_of`` asks, and what it does around that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ratelimit.checks import max_wait_nanos, timeout_seconds
from ratelimit.core.commands import (
    Command,
    GiveBack,
    ProbeConsumption,
    Settle,
    TakeSnapshot,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.numbers import MAX, NANOS_PER_SECOND, NEVER, Duration
from ratelimit.core.results import CombinedProbe, ConsumptionProbe, Snapshot, VerboseResult
from ratelimit.engine.observing import Decision, report_decision
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Course, Part, Question
from ratelimit.engine.several.one_by_one import OneByOne
from ratelimit.engine.several.parts import Call, Courses, place_of
from ratelimit.engine.several.waiting import waited_for
from ratelimit.engine.several.without_store import answers_without_store, settled_without_store
from ratelimit.errors import (
    BucketNotFoundError,
    ContentionError,
    CorruptStateError,
    RateLimitError,
    StoreError,
)
from ratelimit.keys import Key
from ratelimit.runtime.steps import Steps

Shares = tuple[tuple[BucketProxy, int], ...]
"""Buckets, and how many tokens of each one of the whole is worth."""

FAILURES: Final = (StoreError, ContentionError, CorruptStateError)
"""What ``on_error`` is asked about."""


@dataclass(frozen=True, slots=True)
class VerboseCombinedProbe(CombinedProbe):
    """An answer about several buckets that shows each of them as well.

    :param results: each part of the answer, with its bucket right after the decision.
    """

    results: tuple[VerboseResult[ConsumptionProbe], ...] = ()

    @classmethod
    def showing(cls, keys: Sequence[Key], results: Sequence[VerboseResult[ConsumptionProbe]]) -> VerboseCombinedProbe:
        """Return the answer for buckets that each would give one of these."""
        probe = CombinedProbe.of(keys, [result.value for result in results])
        pairs = zip(results, probe.parts, strict=True)
        shown = [result if result.value is part else replace(result, value=part) for result, part in pairs]
        return cls(
            probe.consumed,
            probe.refused_by,
            probe.nanos_to_wait_for_refill,
            probe.parts,
            probe.degraded,
            tuple(shown),
        )


@dataclass(slots=True)
class SeveralBuckets:
    """Buckets that are charged together, or not at all.

    :param spread: whether the tokens are taken from one bucket after the other, and given back where one refuses.
    :param shows: whether answers about tokens show each bucket as well.
    :ivar keys: the keys of the buckets in the store.
    :ivar home: the pipeline of the last bucket, where questions meet others.
    :ivar place: which questions they meet there.
    :ivar timeout: how long a question may take, in seconds.
    """

    shares: Shares
    spread: bool
    shows: bool = False
    home: Any = field(init=False)
    keys: list[bytes] = field(init=False)
    place: bytes = field(init=False)
    timeout: float = field(init=False)

    def __post_init__(self) -> None:
        proxies = [proxy for proxy, _ in self.shares]
        self.home = proxies[-1].pipeline
        self.keys = [proxy.target.stored_key for proxy in proxies]
        self.place = place_of(self.keys)
        self.timeout = min([proxy.timeout for proxy in proxies])

    def only(self, places: Iterable[int]) -> SeveralBuckets:
        """Return some of the buckets, whose questions meet those about all of them, and know what these have seen."""
        some = replace(self, shares=tuple([self.shares[place] for place in places]))
        some.home, some.place, some.timeout = self.home, self.place, self.timeout
        return some

    def try_consume(self, verb: str, timeout: Duration | None, courses: Courses | None = None) -> Steps[CombinedProbe]:
        """Consume the tokens of all buckets if all of them are there."""
        return self._probed(verb, TryConsumeAndReturnRemaining, timeout, courses)

    def try_for(self, wait: Any, timeout: Duration | None, courses: Courses) -> Steps[CombinedProbe]:
        """Try to consume for a caller that waits, and report to listeners only how that ends.

        :param wait: says whether an answer ``is_over``, the last one, and for how long the caller has ``waited``.
        """
        return self._probed("consume", TryConsumeAndReturnRemaining, timeout, courses, wait)

    def estimate(self, timeout: Duration | None) -> Steps[CombinedProbe]:
        """Return whether all tokens could be consumed now, and consume none."""
        return self._probed("estimate_ability_to_consume", ProbeConsumption, timeout)

    def snapshot(self, timeout: Duration | None) -> Steps[tuple[Snapshot, ...]]:
        """Return the states of all buckets; at one time, unless they are spread."""
        answers = yield from self.states(timeout)
        for (proxy, _), answer in zip(self.shares, answers, strict=True):
            if answer is None:
                raise BucketNotFoundError(proxy.target.key)
        return tuple(answers)  # type: ignore[arg-type]  # none of them is None

    def states(self, timeout: Duration | None) -> Steps[list[Snapshot | None]]:
        """Return the states of all buckets; None for a key that is not limited."""
        commands = [TakeSnapshot() for _ in self.shares]
        return self._answers(commands, self._deadline(timeout), Courses.of(len(commands)), [])

    def settle(self, settlements: Sequence[Settle], timeout: Duration | None, courses: Courses) -> Steps[bool]:
        """Settle what each bucket was charged; return False, and change nothing, where a debt could never be paid."""
        deadline, begun = self._deadline(timeout), self.home.monotonic()
        commands = [Verbose(settlement) for settlement in settlements]
        try:
            answers: list[VerboseResult[int]] = yield from self._answers(commands, deadline, courses, [])
        except RateLimitError as error:
            failure = courses.whole.failure or error
            if isinstance(failure, FAILURES):
                self._report_settlements(settlements, None, courses, failure, begun)
            raise
        self._report_settlements(settlements, answers, courses, courses.whole.failure, begun)
        return not any(answer.value == NEVER for answer in answers)

    def give_back(self, timeout: Duration | None) -> Steps[None]:
        """Undo a consumption, of the last bucket first; where one fails, the others get theirs back all the same."""
        deadline, failure = self._deadline(timeout), None
        for proxy, tokens in reversed(self.shares):
            try:
                yield from proxy.layer(Question.of(proxy.target, proxy.terms, GiveBack(tokens), deadline))  # type: ignore[arg-type]  # a layer looks the terms up
            except RateLimitError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def consume(self, max_wait: Duration | None, timeout: Duration | None) -> Steps[bool]:
        """Wait for the tokens, and consume them; return False where that would take longer than ``max_wait``."""
        longest = NEVER if max_wait is None else max_wait_nanos(max_wait)
        waited = yield from waited_for(self, [longest] * len(self.shares), timeout)
        return waited is not None and waited.probe.consumed

    def seconds(self, timeout: Duration | None) -> float:
        """Return how long a question may take, in seconds: its own timeout, or the shortest of the buckets'."""
        return self.timeout if timeout is None else timeout_seconds(timeout)

    def consume_in_turn(self, max_waits: Sequence[int]) -> Steps[CombinedProbe]:
        """Wait for the tokens no longer than each bucket that refuses allows, and consume them.

        :param max_waits: for each bucket, the longest wait because of it that is accepted, in nanoseconds.
        """
        waited = yield from waited_for(self, max_waits, None)
        # Its turn has not come in time: the last try shows what there is.
        return (yield from self.try_consume("consume", None)) if waited is None else waited.probe

    def _deadline(self, timeout: Duration | None) -> float:
        seconds = self.seconds(timeout)
        for proxy, _ in self.shares:
            # Each of them raises an error if its manager is closed.
            proxy.pipeline.begin()
        return self.home.deadline(seconds)  # type: ignore[no-any-return]

    def _probed(
        self,
        verb: str,
        command: Callable[[int], Command[Any]],
        timeout: Duration | None,
        courses: Courses | None = None,
        wait: Any = None,
    ) -> Steps[CombinedProbe]:
        deadline, begun = self._deadline(timeout), self.home.monotonic()
        commands, limited = [command(tokens) for _, tokens in self.shares], list[BucketProxy]()
        if self.shows:
            commands = [Verbose(command) for command in commands]
        courses = courses or Courses.of(len(commands))
        course = courses.whole
        try:
            answers = yield from self._answers(commands, deadline, courses, limited)
        except RateLimitError as error:
            failure = course.failure or error
            # Only failures of the store are reported. A wrong argument or a closed manager concerns the caller alone.
            if isinstance(failure, FAILURES):
                self._report(verb, None, course, limited=limited, error=failure, begun=begun)
            raise
        keys = [proxy.target.key for proxy, _ in self.shares]
        probe = VerboseCombinedProbe.showing(keys, answers) if self.shows else CombinedProbe.of(keys, answers)
        if wait is None or wait.is_over(probe):
            waited = 0 if wait is None else wait.waited
            self._report(verb, probe, course, limited=limited, error=course.failure, begun=begun, waited=waited)
        return probe

    def _answers(
        self, commands: Sequence[Command[Any]], deadline: float, courses: Courses, limited: list[BucketProxy]
    ) -> Steps[list[Any]]:
        """Return an answer for each bucket, from the store or without it.

        :param limited: gets the buckets that are decided about together here.
        """
        if self.spread:
            return (yield from OneByOne(self.shares).answers(commands, deadline, courses))
        parts: list[Part | None] = []
        for (proxy, _), command, course in zip(self.shares, commands, courses.parts, strict=True):
            terms = proxy.terms
            if terms is None:
                begun = self.home.monotonic()
                terms = yield from proxy.manner.find_terms(proxy.target.key)
                # The lookup is the caller's own code, so that its time does not count.
                deadline += self.home.monotonic() - begun
            if terms is not None:
                limited.append(proxy)
            course.charged = terms is not None
            parts.append(None if terms is None else Part(proxy.target, terms, command))
        call = tuple([part for part in parts if part is not None])
        found = iter((yield from self._decided(call, deadline, courses, limited)) if call else ())
        return [
            command.answer_without_limit() if part is None else next(found)
            for part, command in zip(parts, commands, strict=True)
        ]

    def _decided(
        self, call: Call, deadline: float, courses: Courses, proxies: Sequence[BucketProxy]
    ) -> Steps[list[Any]]:
        course = courses.whole
        question = Question(call, deadline, courses.holds, course)
        own = [each for each in courses.parts if each.charged]
        try:
            found: list[Any] = yield from self.home.several.decide(self.place, question)
        except FAILURES as error:
            course.failure = error
            if course.interruption is not None:
                raise
            instead = settled_without_store if _settles(call) else answers_without_store
            found = instead(proxies, question, error, own)
            course.degraded = True
        else:
            if course.round_trips:
                for proxy in proxies:
                    proxy.pipeline.fallback.store_answers()
        return found

    def _report(
        self,
        verb: str,
        probe: CombinedProbe | None,
        course: Course,
        *,
        limited: Sequence[BucketProxy],
        error: Exception | None,
        begun: float,
        waited: int = 0,
    ) -> None:
        """Report the decision to the listener of each bucket, as one about that bucket.

        :param limited: the buckets that were decided about; those that are asked one by one report their own decisions.
        """
        duration = round((self.home.monotonic() - begun) * NANOS_PER_SECOND)
        for number, (proxy, tokens) in enumerate(self.shares):
            pipeline = proxy.pipeline
            if pipeline.listener is None or not any(one is proxy for one in limited):
                continue
            part: ConsumptionProbe | None = None if probe is None else probe.parts[number]
            charged = part is not None and part.consumed and verb != "estimate_ability_to_consume"
            decision = Decision(
                key=proxy.target.key,
                verb=verb,
                tokens=tokens,
                consumed=tokens if charged else 0,
                remaining=None if part is None or part.remaining_tokens == MAX else part.remaining_tokens,
                wait_nanos=0 if probe is None else waited if charged else probe.nanos_to_wait_for_refill,
                duration_nanos=duration,
                round_trips=course.round_trips,
                degraded=course.degraded,
                error=error,
                asynchronous=pipeline.face.asynchronous,
                refused_by=() if probe is None else probe.refused_by,
            )
            report_decision(pipeline.listener, decision)

    def _report_settlements(
        self,
        settlements: Sequence[Settle],
        answers: Sequence[VerboseResult[int]] | None,
        courses: Courses,
        error: Exception | None,
        begun: float,
    ) -> None:
        """Report to the listener of each bucket what was settled there."""
        duration = round((self.home.monotonic() - begun) * NANOS_PER_SECOND)
        is_done = answers is not None and not any(answer.value == NEVER for answer in answers)
        for number, ((proxy, _), settlement, own) in enumerate(
            zip(self.shares, settlements, courses.parts, strict=True)
        ):
            pipeline = proxy.pipeline
            if pipeline.listener is None:
                continue
            answer = None if answers is None else answers[number]
            decision = Decision(
                key=proxy.target.key,
                verb="settle",
                tokens=settlement.used,
                consumed=settlement.excess if is_done else 0,
                remaining=None if answer is None or answer.available_tokens == MAX else answer.available_tokens,
                wait_nanos=0 if answer is None else answer.value,
                duration_nanos=duration,
                round_trips=courses.whole.round_trips,
                degraded=courses.whole.degraded,
                error=error,
                asynchronous=pipeline.face.asynchronous,
                given_back=settlement.rest if is_done and own.charged else 0,
            )
            report_decision(pipeline.listener, decision)


def _settles(parts: Call) -> bool:
    """Return whether a question settles what was charged before."""
    command = parts[0].command
    return type(command) is Verbose and type(command.command) is Settle
