"""Schedules of decisions about several buckets: the loop that swaps all of them, over the same bad network.

Each decision is about up to three calls that go together, each of which consumes or settles. The server notes what it
has charged on behalf of each decision, whenever that comes. The rules are few:

- a decision that is answered was charged just what its answer says, in every bucket, and once;
- one that fails without doubt was charged nothing, and one that fails in doubt all of it or nothing;
- what a bucket has counted is what the decisions were charged;
- a decision takes no more than three round trips where the server can decide and nothing goes wrong.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

from ratelimit.core.algorithm import State, decode, encode
from ratelimit.core.commands import (
    Command,
    ConsumeIgnoringRateLimits,
    GiveBack,
    Settle,
    Terms,
    TryConsumeAndReturnRemaining,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.several import execute_all
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.engine.face import Face
from ratelimit.engine.last_seen import LastSeen
from ratelimit.engine.question import Course, Part, Target
from ratelimit.engine.script_arguments import MUST_EXIST
from ratelimit.engine.several.deciding import Deciding
from ratelimit.engine.several.parts import Call
from ratelimit.engine.store_requests import Requests, requests_to
from ratelimit.errors import RateLimitError, StoreError
from ratelimit.runtime.steps import Steps, run
from ratelimit.stores.operations import Operation
from ratelimit.stores.protocol import DecidedAll, Lost, Swap
from tests.promises.simulation import script
from tests.promises.simulation.clients import Wait
from tests.promises.simulation.network import FAULTS, Faults, Network, Request, SimulatedStore
from tests.promises.simulation.world import APART, MILLISECOND, ViolationError, World
from tests.support.decision_paths import By, deciding_by, tuning

LIMITS: Final = {
    b"tenant": BucketConfiguration(Bandwidth.greedy(20, 0.05)),
    b"user 1": BucketConfiguration(Bandwidth.greedy(4, 0.03)),
    b"user 2": BucketConfiguration(Bandwidth.greedy(5, 2), Bandwidth.greedy(9, 7)),
    b"quota": BucketConfiguration(Bandwidth.intervally(6, 0.02)),
}
_COMMANDS: Final[dict[int, Callable[[int], Command[Any]]]] = {
    Operation.TRY_CONSUME: TryConsumeAndReturnRemaining,
    Operation.GIVE_BACK: GiveBack,
    Operation.CONSUME_IGNORING_RATE_LIMITS: ConsumeIgnoringRateLimits,
}
_CONSUMPTIONS: Final = tuple([TryConsumeAndReturnRemaining(tokens) for tokens in (1, 1, 2, 3)])
_SETTLEMENTS: Final = (Settle(1, 0), Settle(3, 1), Settle(1, 2), Settle(1, 4))
_GAPS: Final = (0, 100_000, MILLISECOND, 5 * MILLISECOND)


class Record(NamedTuple):
    state: bytes
    expires_at: int | None


@dataclass(slots=True, eq=False)
class Decision:
    """What a process decides, and what the server has charged on behalf of it.

    :ivar charged: by key, and by which bucket under that key, as buckets expire and are made again; whenever that was.
    :ivar told: what the answers say was charged.
    :ivar shown: for the network, which does not need it here.
    """

    name: str
    calls: tuple[Call, ...]
    trips: int = 0
    unanswered: int = 0
    shown: Any = None
    charged: Counter[tuple[bytes, int]] = field(default_factory=Counter[tuple[bytes, int]])
    told: Counter[bytes] | None = None
    in_doubt: bool = False
    over: bool = False

    def __str__(self) -> str:
        return self.name


class Server:
    """What is stored."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.term = 0
        self.records: dict[bytes, Record] = {}
        self.counted: Counter[bytes] = Counter()
        self.forgotten: Counter[bytes] = Counter()

    def bucket(self, _key: bytes) -> None:
        return None

    def state(self, key: bytes) -> bytes | None:
        record = self.records.get(key)
        if record is None:
            return None
        if record.expires_at is not None and record.expires_at <= self.world.now:
            self._forget(key)
            return None
        return record.state

    def swap_all(self, swaps: Sequence[Swap], decision: Decision) -> list[Lost | None] | None:
        found = [(swap, self.state(swap.key)) for swap in swaps]
        losses = [None if stored == swap.before else Lost(stored) for swap, stored in found]
        if any(losses):
            return losses
        for key, before, after, ttl_millis in swaps:
            if after is not None:
                self._write(decision, key, before, after, ttl_millis)
        return None

    def decide_all(self, keys: Sequence[bytes], arguments: tuple[bytes, ...], decision: Decision) -> DecidedAll:
        """Do what ``lua/decide_all.lua`` does, from the very arguments that it is sent."""
        befores = tuple(self.state(key) for key in keys)
        *rules, packed = arguments
        states: list[State | None] = []
        terms, expirations, now = [], [], 0
        for before, request in zip(befores, rules, strict=True):
            now, flags, kind, _, _ = struct.unpack_from(">qBBBH", request)
            template = decode(request[50:])
            if any(limit.refill_intervally for limit in template.configuration) or (
                before is None and flags & MUST_EXIST
            ):
                return DecidedAll(False, befores)
            terms.append(Terms(template.configuration, template.configuration_version))
            expirations.append(script._expiration(kind, struct.unpack_from(">q", request, 34)[0]))
            states.append(None if before is None else decode(before))
        changed: dict[int, State] = {}
        position = 0
        while position < len(packed):
            asked = list(struct.iter_unpack(">BBq", packed[position + 1 : position + 1 + 10 * packed[position]]))
            position += 1 + 10 * packed[position]
            places = [place - 1 for _, place, _ in asked]
            afters, _ = execute_all(
                [_COMMANDS[operation](tokens) for operation, _, tokens in asked],
                [terms[place] for place in places],
                [states[place] for place in places],
                now,
            )
            for place, after in zip(places, afters, strict=True):
                if after is not None:
                    states[place] = changed[place] = after
        for place, after in changed.items():
            ttl_millis = expirations[place].ttl_millis(after, now)
            self._write(decision, keys[place], befores[place], encode(after), ttl_millis)
        return DecidedAll(True, befores)

    def delete(self, key: bytes) -> None:
        if key in self.records:
            self._forget(key)

    def _forget(self, key: bytes) -> None:
        del self.records[key]
        del self.counted[key]
        self.forgotten[key] += 1

    def _write(self, decision: Decision, key: bytes, before: bytes | None, after: bytes, ttl_millis: int) -> None:
        charge = decode(after).consumed_tokens - (0 if before is None else decode(before).consumed_tokens)
        decision.charged[key, self.forgotten[key]] += charge
        self.counted[key] += charge
        check(decision)
        expires_at = self.world.now + ttl_millis * MILLISECOND if ttl_millis > 0 else None
        self.records[key] = Record(after, expires_at)
        if decode(after).consumed_tokens != self.counted[key]:
            raise ViolationError(f"{key!r} has counted {decode(after).consumed_tokens}, and not {self.counted[key]}")


def check(decision: Decision) -> None:
    """Check what was charged on behalf of a decision against what its caller was told.

    :raises ViolationError: where the two differ.
    """
    least, most = wanted(decision)
    charged = Counter[bytes]()
    # A bucket that is forgotten between a swap and its repetition is made again, and charged again; its first charge is
    # forgotten as well.
    for (key, _), charge in decision.charged.items():
        charged[key] = max(charged[key], charge, key=abs)
    if any(not least[key] <= charged[key] <= most[key] for key in charged):
        raise ViolationError(f"{decision} is charged {dict(charged)}, and has asked for {dict(most)}")
    if not decision.over or decision.in_doubt:
        return
    told = decision.told or Counter[bytes]()
    if any(charged[key] != told[key] for key in {*charged, *told}):
        raise ViolationError(f"{decision} is charged {dict(charged)}, and is told {dict(told)}")


def wanted(decision: Decision) -> tuple[Counter[bytes], Counter[bytes]]:
    """Return the least and the most that may be charged to each bucket."""
    least, most = Counter[bytes](), Counter[bytes]()
    for call in decision.calls:
        for target, _, command in call:
            least[target.stored_key] += min(0, charge_of(command))
            most[target.stored_key] += max(0, charge_of(command))
    return least, most


def charge_of(command: Command[Any]) -> int:
    """Return what a command charges if it is carried out; a settlement that gives back charges less than nothing."""
    match command:
        case TryConsumeAndReturnRemaining(tokens):
            return tokens
        case Settle(reserved, used):
            return used - reserved
    raise NotImplementedError(command)


class Store(SimulatedStore):
    """The surface of a store that can decide about several buckets."""

    def __init__(self, server: Server, known_now: Callable[[], int | None]) -> None:
        super().__init__(server, known_now)  # type: ignore[arg-type]  # only what follows is asked
        self._all = server

    def swap_all(self, swaps: Sequence[Swap], *, deadline: float | None = None) -> Any:
        return Request("swap", swaps[0].key, deadline, lambda decision: self._all.swap_all(swaps, decision))  # type: ignore[arg-type]

    def decide_all(self, keys: Sequence[bytes], arguments: tuple[bytes, ...], *, deadline: float | None = None) -> Any:
        return Request(
            "decide",
            keys[0],
            deadline,
            lambda decision: self._all.decide_all(keys, arguments, decision),  # type: ignore[arg-type]
        )

    def now_nanos(self, key: bytes, *, deadline: float | None = None) -> Any:
        return Request("time", key, deadline, lambda _: self._all.world.server_time)


@dataclass(slots=True, eq=False)
class Task:
    steps: Steps[Any]
    decision: Decision
    waits_for: Request | Wait | None = None


class Process:
    """A client with several decisions under way at once."""

    def __init__(self, world: World, network: Network, server: Server, plan: Plan, index: int) -> None:
        self.world = world
        self.network = network
        self.plan = plan
        self.index = index
        self.tasks: list[Task] = []
        self.requests: Requests = requests_to(
            Store(server, self._known_now),
            None,
            Face(False, self._pause, spawn=lambda _: None, finish=run, monotonic=world.monotonic),
            LastSeen(plan.memory),
            tuning()._replace(most_attempts=plan.attempts),
        )
        self.requests.unique_readings = not plan.grain
        self.deciding = Deciding(self.requests)
        self._targets = {key: Target(key, key, plan.expiration) for key in LIMITS}
        self._knows_time = world.random.random() < 0.5
        self._lag = 0

    def begin(self, name: str, asked: list[dict[bytes, Command[Any]]], timeout: float) -> None:
        calls = tuple(
            tuple(Part(self._targets[key], Terms(LIMITS[key]), command) for key, command in each.items())
            for each in asked
        )
        decision = Decision(name, calls)
        steps = self.deciding.together(calls, self.world.monotonic() + timeout, Course(), holds=True)
        task = Task(steps, decision)
        self.tasks.append(task)
        if self.world.tracing:
            self.world.note(f"{decision} begins: {asked}")
        self._resume(task, None, None)

    def interrupt(self) -> None:
        """One of the tasks is interrupted where it waits, as by a signal."""
        if self.tasks:
            task = self.world.random.choice(self.tasks)
            if isinstance(task.waits_for, Request):
                task.waits_for.settled = True
            task.waits_for = None
            if self.world.tracing:
                self.world.note(f"{task.decision} is interrupted")
            # Whoever interrupts a call does not hear what has become of it.
            task.decision.in_doubt = True
            self._resume(task, None, KeyboardInterrupt())

    def _resume(self, task: Task, value: Any, failure: BaseException | None) -> None:
        try:
            waits_for = task.steps.send(value) if failure is None else task.steps.throw(failure)
            while not isinstance(waits_for, Request | Wait):
                waits_for = task.steps.send(waits_for)
        except StopIteration as end:
            self._ended(task, end.value, None)
            return
        except (RateLimitError, KeyboardInterrupt) as error:
            self._ended(task, None, error)
            return
        task.waits_for = waits_for
        if isinstance(waits_for, Request):
            waits_for.decision = task.decision  # type: ignore[assignment]  # the network asks no more of it
            waits_for.answer = partial(self._replied, task)
            self.network.send(waits_for)
        else:
            self.world.after(waits_for.nanos, self._waited, task, waits_for)

    def _ended(self, task: Task, answers: list[Any] | None, error: BaseException | None) -> None:
        decision = task.decision
        self.tasks.remove(task)
        decision.over = True
        decision.in_doubt |= isinstance(error, StoreError) and error.in_doubt
        if answers is not None:
            decision.told = Counter()
            for call, found in zip(decision.calls, answers, strict=True):
                if isinstance(found, Exception):
                    decision.in_doubt |= getattr(found, "in_doubt", False)
                elif all(isinstance(answer, int) or answer.consumed for answer in found):
                    # A settlement answers a wait, and is never refused.
                    for target, _, command in call:
                        decision.told[target.stored_key] += charge_of(command)
        if self.world.tracing:
            self.world.note(f"{decision} ends, {error!r}, is told {decision.told}")
        if self.plan.is_bounded and decision.trips > 3:
            raise ViolationError(f"{decision} takes {decision.trips} round trips")
        check(decision)

    def _replied(self, task: Task, value: Any, failure: BaseException | None) -> None:
        if failure is None:
            self._knows_time = True
            self._lag = self.world.random.randint(0, self.plan.skew)
        self._resume(task, value, failure)

    def _waited(self, task: Task, wait: Wait) -> None:
        if task.waits_for is wait:
            self._resume(task, None, None)

    def _known_now(self) -> int | None:
        if not self._knows_time:
            return None
        now = self.world.server_time - self._lag
        grain, own = (self.plan.grain, 0) if self.plan.grain else (APART, self.index - APART)
        return now - now % grain + own

    def _pause(self, _nanos: int) -> Wait:
        return Wait(self.world.random.randrange(16 * MILLISECOND))


class Plan(NamedTuple):
    """What a seed stands for."""

    by: By
    faults: Faults
    expiration: Expiration
    grain: int
    skew: int
    memory: int
    attempts: int
    keys: tuple[bytes, ...]

    @property
    def is_bounded(self) -> bool:
        """Whether no decision takes more than three round trips."""
        return not self.faults and self.by is not By.SWAPS and b"quota" not in self.keys


def simulate(seed: int, *, tracing: bool = False) -> World:
    """Run the schedule of a seed.

    :raises ViolationError: where a rule is broken; it carries the trace.
    """
    world = World(seed, tracing=tracing)
    random = world.random
    plan = Plan(
        by=random.choice(tuple(By)),
        faults={} if random.random() < 0.25 else {name: random.choice((0, 0.03, 0.15)) for name in FAULTS},
        expiration=random.choice(
            (Expiration.automatic(), Expiration.none(), Expiration.after_refill(), Expiration.fixed(0.015))
        ),
        grain=random.choice((0, 0, 0, 0, MILLISECOND)),
        skew=random.choice((0, 10_000, 3 * MILLISECOND)),
        memory=random.choice((0, 1 << 20, 1 << 20)),
        attempts=random.choice((3, 20)),
        keys=random.choice((tuple(LIMITS)[:2], tuple(LIMITS)[:3], tuple(LIMITS))),
    )
    with deciding_by(plan.by):
        server = Server(world)
        network = Network(world, server, plan.faults)  # type: ignore[arg-type]  # it asks for a part of it
        processes = [Process(world, network, server, plan, index) for index in range(random.randint(2, 4))]
        at = 0
        for number in range(random.randint(5, 14)):
            at += random.choice(_GAPS) if random.random() < 0.5 else 0
            asked = []
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                keys = random.sample(plan.keys, random.randint(1, len(plan.keys)))
                commands = _SETTLEMENTS if random.random() < 0.3 else _CONSUMPTIONS
                asked.append({key: random.choice(commands) for key in keys})
            begin, timeout = at + random.randrange(400_000), random.choice((0.005, 0.05, 1.0))
            world.after(begin, random.choice(processes).begin, f"decision {number}", asked, timeout)
        if plan.faults:
            for _ in range(random.choice((0, 0, 1, 2))):
                world.after(random.randint(0, at + MILLISECOND), random.choice(processes).interrupt)
            for _ in range(random.choice((0, 0, 1))):
                world.after(random.randint(0, at + MILLISECOND), server.delete, random.choice(plan.keys))
        with _traced(world):
            world.run()
    return world


@contextmanager
def _traced(world: World) -> Generator[None]:
    try:
        yield
    except ViolationError as error:
        error.lines = world.lines
        raise
