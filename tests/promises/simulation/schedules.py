"""What a seed stands for, and the run of it."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from random import Random
from typing import Any, Final, NamedTuple

from ratelimit.core.commands import (
    AddTokens,
    Batch,
    Command,
    ConsumeAsMuchAsPossible,
    GetAvailableTokens,
    Reserve,
    Reset,
    Settle,
    TryConsume,
    TryConsumeAndReturnRemaining,
    Verbose,
)
from ratelimit.core.expiration import Expiration
from ratelimit.core.sliding_window.configuration import SlidingWindow, SlidingWindows
from ratelimit.core.token_bucket.bandwidth import Bandwidth, BucketConfiguration
from ratelimit.engine.optimization import Optimization
from tests.promises.simulation.bucket import Limits
from tests.promises.simulation.clients import Process, Settings
from tests.promises.simulation.ledger import Ledger, Remove
from tests.promises.simulation.network import FAULTS, SOCKET_TIMEOUT, Faults, Network
from tests.promises.simulation.server import Server
from tests.promises.simulation.world import EPOCH, MILLISECOND, SECOND, ViolationError, World
from tests.support.decision_paths import By, deciding_by
from tests.support.fixed_window import FixedWindow

_GREEDY: Final = Bandwidth.greedy(7, 0.03)
_INTERVALLY: Final = Bandwidth.intervally(6, 0.02)

LIMITS: Final[tuple[Limits, ...]] = (
    BucketConfiguration(_GREEDY),
    BucketConfiguration(Bandwidth.greedy(9, 2, initial_tokens=4)),
    BucketConfiguration(_INTERVALLY),
    BucketConfiguration(
        Bandwidth.intervally_aligned(5, 0.025, first_refill=datetime.fromtimestamp(EPOCH // SECOND, UTC))
    ),
    BucketConfiguration(_GREEDY, Bandwidth.intervally(20, 0.4)),
    BucketConfiguration(_GREEDY, Bandwidth.greedy(30, 3)),
)

WINDOWS: Final[tuple[Limits, ...]] = (
    FixedWindow(6, 20 * MILLISECOND),
    FixedWindow(5, 33 * MILLISECOND),
    FixedWindow(9, 2 * SECOND),
)
"""Limits of the second algorithm, which no server decides about alone."""

SLIDING: Final[tuple[Limits, ...]] = (
    SlidingWindow(6, per=0.02),
    SlidingWindow(9, per=2),
    SlidingWindow(65, per=0.03),
    SlidingWindows(SlidingWindow(5, per=0.01), SlidingWindow(12, per=0.1)),
)
"""Sliding windows, which no server decides about alone."""

_EXPIRATIONS: Final = (
    Expiration.automatic(),
    Expiration.automatic(),
    Expiration.none(),
    Expiration.after_refill(),
    Expiration.fixed(0.015),
)

_OPTIMIZATIONS: Final = (
    *(None, None, None, None),
    Optimization.skip_sync_on_zero(),
    Optimization.delaying(3, 0.01),
    Optimization.predicting(3, 0.01),
)

_KEYS: Final = (b"one", b"two")

_COMMANDS: Final[tuple[Command[Any], ...]] = (
    TryConsume(1),
    TryConsume(1),
    TryConsume(2),
    TryConsume(3),
    TryConsume(8),
    TryConsumeAndReturnRemaining(1),
    TryConsumeAndReturnRemaining(3),
    Verbose(TryConsume(2)),
    ConsumeAsMuchAsPossible(),
    ConsumeAsMuchAsPossible(2),
    Reserve(2),
    Reserve(4),
    Reserve(5, 20 * MILLISECOND),
    Settle(3, 1),
    Settle(1, 3),
    AddTokens(2),
    GetAvailableTokens(),
    Batch((TryConsume(1), TryConsume(1), TryConsume(3))),
    Batch((TryConsume(2),) * 3),
)

_GAPS: Final = (0, 100_000, MILLISECOND, 5 * MILLISECOND, 30 * MILLISECOND)
_LONG_GAP: Final = 14 * SECOND
_COARSE_GRAINS: Final = (100_000, MILLISECOND, 15_625_000)  # the last is that of Python 3.12 on Windows
_OLDEST_IN_FLIGHT: Final = 5 * SOCKET_TIMEOUT  # readings, when they arrive: timed out, repeated and late

_logger = logging.getLogger("ratelimit")


class Terms(NamedTuple):
    """What a seed stands for.

    :param forgetting: whether buckets are also reset and removed.
    :param faults: empty in a calm, when no request fails.
    :param stops: how many clients are stopped; likewise those that are interrupted, and failovers.
    """

    by: By
    settings: Settings
    clients: int
    keys: int
    decisions: int
    forgetting: bool
    faults: Faults
    stops: int
    interruptions: int
    failovers: int

    @classmethod
    def drawn(cls, random: Random, limits: tuple[Limits, ...]) -> Terms:
        calm = random.random() < 0.25
        faults = {} if calm else {name: random.choice((0, 0.03, 0.15)) for name in FAULTS}
        settings = Settings(
            limits=random.choice(limits),
            expiration=random.choice(_EXPIRATIONS),
            must_exist=random.random() < 0.15,
            optimization=random.choice(_OPTIMIZATIONS),
            skew=random.choice((0, 10_000, 3 * MILLISECOND, 40 * MILLISECOND)),
            grain=random.choice((*(0,) * 12, *_COARSE_GRAINS)),
            memory=random.choice((0, 1 << 20, 1 << 20, 1 << 20)),
            attempts=random.choice((3, 20)),
            timeout=random.choice((0.005, 0.05, 1.0)),
        )
        return cls(
            by=random.choice(tuple(By)),
            settings=settings,
            clients=random.randint(2, 4),
            keys=random.choice((1, 1, 1, 2)),
            decisions=random.randint(5, 14),
            forgetting=random.random() < 0.2,
            faults=faults,
            stops=0 if calm else random.choice((0, 0, 1, 2)),
            interruptions=0 if calm else random.choice((0, 0, 1, 3)),
            failovers=0 if calm else random.choice((0, 0, 0, 1, 2)),
        )


def simulate(seed: int, limits: tuple[Limits, ...] = LIMITS, *, tracing: bool = False) -> World:
    """Run the schedule of a seed.

    :param limits: those that it draws from.
    :raises ViolationError: where a rule is broken; it carries the trace.
    """
    world = World(seed, tracing=tracing)
    plan = Terms.drawn(world.random, limits)
    with deciding_by(plan.by), _silenced():
        try:
            _run(world, plan)
        except ViolationError as error:
            world.broken = True
            error.lines = world.lines
            raise
        except Exception as error:
            world.broken = True
            violation = ViolationError(f"{error!r} comes out")
            violation.lines = world.lines
            raise violation from error
    return world


def _run(world: World, plan: Terms) -> None:
    settings, random = plan.settings, world.random
    ahead = 0 if settings.optimization is None else settings.optimization.max_unsynchronized_tokens
    ledger = Ledger(
        world,
        settings.limits,
        settings.expiration,
        delegating=plan.by is not By.SWAPS and settings.limits.algorithm.script is not None,
        attempts=settings.attempts,
        oldest_reading=settings.skew + settings.grain + _OLDEST_IN_FLIGHT,
        ahead=ahead * (plan.clients + plan.stops),
        calm=not plan.faults,
        unique_readings=not settings.grain,
    )
    server = Server(world, ledger)
    network = Network(world, server, plan.faults)
    processes = [Process(world, ledger, network, settings, index) for index in range(plan.clients)]
    if world.tracing:
        world.note(f"{plan}")
    commands = (*_COMMANDS, Reset(), Remove()) if plan.forgetting else _COMMANDS
    at = 0
    for _ in range(plan.decisions):
        at += random.choice(_GAPS) if random.random() < 0.5 else 0
        at += _LONG_GAP if random.random() < 0.01 else 0
        process, key = random.choice(processes), _KEYS[random.randrange(plan.keys)]
        begin = at + random.randrange(400_000)
        world.after(begin, process.begin, key, random.choice(commands), random.random() < 0.8)
    for _ in range(plan.stops):
        world.after(random.randint(0, at + MILLISECOND), random.choice(processes).stop)
    for _ in range(plan.interruptions):
        world.after(random.randint(0, at + MILLISECOND), random.choice(processes).interrupt)
    for _ in range(plan.failovers):
        world.after(
            random.randint(0, at + MILLISECOND), server.fail_over, random.choice((0, MILLISECOND, 20 * MILLISECOND))
        )
    world.run()
    network.faults = {}
    for process in processes:
        process.synchronize()
    world.run()
    for process in processes:
        process.close()
    ledger.close(server.records)


@contextmanager
def _silenced() -> Generator[None]:
    """The library warns of tokens that it could not give back."""
    _logger.disabled = True
    try:
        yield
    finally:
        _logger.disabled = False
