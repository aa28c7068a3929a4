"""Processes whose decisions are under way at the same time, and may be interrupted or stopped anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

from ratelimit.core.commands import (
    Batch,
    Command,
    ConsumeAsMuchAsPossible,
    Reserve,
    Settle,
    TryConsume,
    TryConsumeAndReturnRemaining,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.inheritance import TokensInheritance
from ratelimit.core.numbers import NEVER
from ratelimit.engine.express import UNUSUAL, Express
from ratelimit.engine.face import Face
from ratelimit.engine.on_error import OnError
from ratelimit.engine.optimization import Optimization
from ratelimit.engine.pipeline import Pipeline
from ratelimit.engine.proxy import BucketProxy
from ratelimit.engine.question import Layer, Question, Target
from ratelimit.engine.reserving import settling
from ratelimit.engine.swapping import Swapping
from ratelimit.errors import RateLimitError, StoreError
from ratelimit.runtime.steps import Steps, run
from tests.promises.simulation.bucket import Limits
from tests.promises.simulation.ledger import LONGEST_PAUSE_NANOS, Decision, Ledger, Remove, plain, plain_answer
from tests.promises.simulation.network import Network, Request, SimulatedStore
from tests.promises.simulation.world import APART, SECOND, ViolationError, World
from tests.support.decision_paths import tuning

_NEW_READING: Final = 0.2  # how often a reply changes what its client makes of the server's clock


class Wait(NamedTuple):
    """A client waits for time to pass, not for a reply."""

    nanos: int


class Settings(NamedTuple):
    """What all clients of a schedule have in common.

    :param optimization: what clients may decide without the store.
    :param skew: how far a client's clock may be behind the server's, in nanoseconds.
    :param grain: what clients read is a multiple of it, in nanoseconds; 0: no two readings are alike.
    :param memory: bytes that a process may remember states in.
    :param attempts: swaps that a decision may lose.
    :param timeout: of a call, in seconds.
    """

    limits: Limits
    expiration: Expiration
    must_exist: bool
    optimization: Optimization | None
    skew: int
    grain: int
    memory: int
    attempts: int
    timeout: float


@dataclass(slots=True, eq=False)
class Task:
    """A verb under way.

    :ivar decision: the one that its requests are for.
    :ivar waits_for: the request, or the wait, that it is in.
    """

    steps: Steps[Any]
    decision: Decision | None = None
    waits_for: Request | Wait | None = None
    interrupted: bool = False


Witness = Callable[[Question, Steps[Any]], Steps[Any]]


class Witnessed(Pipeline):
    """A pipeline whose decisions by the store have a witness; questions do not go together in it."""

    def __init__(
        self, witnessed: Callable[[Question, Steps[Any]], Steps[Any]], *arguments: Any, **settings: Any
    ) -> None:
        self._witnessed = witnessed
        super().__init__(*arguments, **settings)

    def _decider(self, *_: Any, **__: Any) -> Layer:
        express = Express(Swapping(self.requests), self.requests)
        return lambda question: self._witnessed(question, by_express(express, question))


def by_express(express: Express, question: Question) -> Steps[Any]:
    """Decide as a manager does: by a usual request where there is one, and in the loop from its outcome on."""
    attempt = express.begin(question)
    if attempt.usual is not None:
        request = attempt.usual.command
        request.deadline = question.deadline
        try:
            reply = yield request
        except StoreError as error:
            attempt.outcome = error
        else:
            answer = express.answer(attempt, reply)
            if answer is not UNUSUAL:
                return answer
            attempt.outcome = reply
    return (yield from express.go_on(attempt))


class Process:
    """A client: its handles, what they remember together, and its tasks.

    It keeps accounts of its own, since its beginning: of tokens that callers have got, and those that it has told the
    store of and knows that it has.
    """

    def __init__(self, world: World, ledger: Ledger, network: Network, settings: Settings, index: int) -> None:
        self.world = world
        self.ledger = ledger
        self.network = network
        self.settings = settings
        self.index = index
        self.tasks: list[Task] = []
        self._running: Task | None = None
        self.start()

    def start(self) -> None:
        """Begin again, with nothing remembered."""
        settings, store = self.settings, SimulatedStore(self.network.server, self._known_now)
        self._lag = self.world.random.randint(0, settings.skew)
        self._knows_time = self.world.random.random() < 0.5
        face = Face(False, self._pause, spawn=self._begin, finish=run, monotonic=self.world.monotonic)
        self._pipeline = Witnessed(
            self._witnessed,
            store,
            face,
            clock=None,
            on_error=OnError.RAISE,
            listener=None,
            described="a client of the simulation",
            coalesces=False,
            optimization=settings.optimization,
            tuning=tuning()._replace(most_attempts=settings.attempts),
            memory_limit_bytes=settings.memory,
            timeout=settings.timeout,
        )
        self._pipeline.sleep = Wait
        self._pipeline.requests.unique_readings = not settings.grain
        self._buckets: dict[bytes, BucketProxy] = {}
        self._handed_out: Counter[bytes] = Counter()
        self._told: Counter[bytes] = Counter()
        self._excused = False

    def begin(self, key: bytes, command: Command[Any], deadline: bool) -> None:
        """Begin a verb; a reservation is waited for, as ``consume`` does."""
        bucket = self._bucket(key)
        if isinstance(command, Reserve):
            longest = None if command.longest_wait_nanos == NEVER else command.longest_wait_nanos / SECOND
            steps: Steps[Any] = bucket.consume(command.tokens, longest, None)
        elif isinstance(command, Settle):
            steps = settling(bucket, command, None)
        elif isinstance(command, Remove):
            steps = self._removed(bucket, command)
        else:
            question = bucket.question(command)
            steps = bucket.layer(question if deadline else question._replace(deadline=None))
        self._begin(self._counted(key, command, steps))

    def synchronize(self) -> None:
        """Tell the store what was handed out without it."""
        for bucket in self._buckets.values():
            self._begin(bucket.sync())

    def close(self) -> None:
        """All that was handed out is in the store, or was kept to be told later."""
        for key, tokens in self._handed_out.items():
            entry = self._pipeline.local_decisions._entries.values.get(key)
            kept = 0 if entry is None else entry.unsynchronized
            if tokens > self._told[key] + kept and not self._excused:
                raise ViolationError(
                    f"{self} has handed out {tokens} tokens of {key!r}, told the store of {self._told[key]}, and"
                    f" kept {kept}"
                )

    def _begin(self, steps: Steps[Any]) -> None:
        task = Task(steps)
        self.tasks.append(task)
        self._resume(task, None, None)

    def _counted(self, key: bytes, command: Command[Any], steps: Steps[Any]) -> Steps[None]:
        answer = yield from steps
        self._handed_out[key] += _handed_out(command, plain_answer(answer))

    def stop(self) -> None:
        """The process dies, wherever its tasks are, and another takes its place."""
        if self.world.tracing:
            self.world.note(f"{self} is stopped")
        for task in self.tasks:
            _abandon(task)
            self._running = task
            task.steps.close()
        self.tasks.clear()
        self.start()

    def interrupt(self) -> None:
        """One of the tasks is interrupted where it waits, as by a signal."""
        if not self.tasks:
            return
        task = self.world.random.choice(self.tasks)
        if self.world.tracing:
            self.world.note(f"{task.decision} is interrupted")
        if isinstance(task.waits_for, Request) and task.decision is not None:
            task.decision.unanswered += 1
        _abandon(task)
        task.interrupted = True
        self._resume(task, None, KeyboardInterrupt())

    def __str__(self) -> str:
        return f"client {self.index}"

    def _bucket(self, key: bytes) -> BucketProxy:
        bucket = self._buckets.get(key)
        if bucket is None:
            settings = self.settings
            target = Target(key, key, settings.expiration, settings.must_exist)
            bucket = self._buckets[key] = self._pipeline.bucket(
                target,
                settings.limits,
                version=None,
                inheritance=TokensInheritance.RESET,
                timeout=settings.timeout,
            )
        return bucket

    def _witnessed(self, question: Question, steps: Steps[Any]) -> Steps[Any]:
        """Take steps with the ledger as their witness."""
        ((target, _, command),) = question.parts
        task = self._running
        assert task is not None
        decision = task.decision = self.ledger.begun(str(self), question)
        if self.world.tracing:
            self.world.note(f"{decision} begins")
        try:
            answer = yield from steps
        except ViolationError:
            raise
        except BaseException as error:
            if self.world.tracing:
                self.world.note(f"{decision} ends with {error!r}")
            self.ledger.failed(decision, error)
            raise
        if self.world.tracing:
            self.world.note(f"{decision} is told {plain_answer(answer)}")
        self.ledger.answered(decision, answer)
        # What is settled was handed out by an earlier decision, or is not handed out at all.
        settles = plain(command)
        settled = settles.used - settles.reserved if isinstance(settles, Settle) else 0
        self._told[target.stored_key] += decision.told_charge - settled
        self._excused |= decision.outcome != "told" or isinstance(command, Remove)
        return answer

    def _removed(self, bucket: BucketProxy, command: Remove) -> Steps[None]:
        return self._witnessed(bucket.question(command), self._pipeline.remove(bucket.target, bucket.timeout))

    def _resume(self, task: Task, value: Any, failure: BaseException | None) -> None:
        self._running = task
        try:
            waits_for = task.steps.send(value) if failure is None else task.steps.throw(failure)
            while not isinstance(waits_for, Request | Wait):  # a step that has settled already
                waits_for = task.steps.send(waits_for)
        except (StopIteration, RateLimitError, KeyboardInterrupt) as error:
            self.tasks.remove(task)
            self._ended(task, error)
            return
        task.waits_for = waits_for
        if isinstance(waits_for, Request):
            waits_for.decision = task.decision
            waits_for.answer = partial(self._replied, task)
            self.network.send(waits_for)
        else:
            self.world.after(waits_for.nanos, self._waited, task, waits_for)

    def _ended(self, task: Task, error: BaseException) -> None:
        """A wait that was interrupted has given its tokens back, or tried to."""
        decision = task.decision
        if (
            task.interrupted
            and decision is not None
            and isinstance(plain(decision.command), Reserve)
            and decision.told_charge
            # Otherwise the charge is of tokens that were handed out before, and booked together with a refusal.
            and any(write.answer != NEVER for write in decision.written)
        ):
            self.ledger.fail(decision, f"ends with {error!r}, and its tokens are not given back")

    def _replied(self, task: Task, value: Any, failure: BaseException | None) -> None:
        if failure is None:
            self._knows_time = True
            if self.world.random.random() < _NEW_READING:
                self._lag = self.world.random.randint(0, self.settings.skew)
        self._resume(task, value, failure)

    def _waited(self, task: Task, wait: Wait) -> None:
        if task.waits_for is wait:
            self._resume(task, None, None)

    def _known_now(self) -> int | None:
        """A reading of this client's clock: behind the server's, or right; without a grain, no other client has it."""
        if not self._knows_time:
            return None
        now = self.world.server_time - self._lag
        grain, own = (self.settings.grain, 0) if self.settings.grain else (APART, self.index - APART)
        reading = now - now % grain + own
        decision = None if self._running is None else self._running.decision
        if decision is not None and decision.outcome is None:
            decision.reading = reading
        return reading

    def _pause(self, _nanos: int) -> Wait:
        """Return a pause whose length follows from the seed."""
        return Wait(self.world.random.randrange(LONGEST_PAUSE_NANOS))


def _handed_out(command: Command[Any], answer: Any) -> int:
    """Tokens that a caller has got."""
    match plain(command):
        case TryConsume(tokens) | Reserve(tokens):
            return tokens * int(answer)
        case TryConsumeAndReturnRemaining(tokens):
            return tokens * int(answer[0])
        case ConsumeAsMuchAsPossible():
            return int(answer)
        case Batch(commands):
            return sum(_handed_out(part, one) for part, one in zip(commands, answer, strict=True))
    return 0


def _abandon(task: Task) -> None:
    if isinstance(task.waits_for, Request):
        task.waits_for.settled = True
    task.waits_for = None
