"""A run in progress, and slices of it in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks import contenders
from benchmarks.contenders import GCRA, REDIS_PY, SKIP_SYNC, SOCKET
from benchmarks.measure import USED_UP, Turn, async_slice, expected, interleaved, sync_slice, use_up
from benchmarks.model import (
    NEVER_REACHED,
    OURS,
    PER_MINUTE,
    PLANS,
    Contender,
    Kind,
    Plan,
    Results,
    Sample,
    Setup,
    Table,
)
from benchmarks.server import Server

LIMITERS: Final = (OURS, GCRA, "textbook token bucket", "limits fixed window", "throttled-py token bucket")
"""The limiters of a scenario that takes long: ours, and the best of each kind of peer."""
SLIM: Final = (SOCKET, REDIS_PY, *LIMITERS)
"""These limiters beside the floors."""
FEW: Final = (SOCKET, OURS, GCRA, "limits fixed window", "throttled-py token bucket")
"""Those of a scenario that is measured with each plan."""
SEVERAL: Final = (SOCKET, OURS, "pyrate-limiter token bucket")
"""Those of a plan of several limits, which are decided in one step."""


@dataclass
class Run:
    """A run in progress.

    :param servers: the first one serves all scenarios, the others that of the server's time.
    """

    results: Results
    servers: list[Server]
    rounds: int
    seconds: float
    quick: bool
    tell: Callable[[str], None]

    @property
    def server(self) -> Server:
        return self.servers[0]

    @property
    def plans(self) -> tuple[Plan, ...]:
        return (NEVER_REACHED, PER_MINUTE) if self.quick else PLANS

    def table(self, id: str, family: str, title: str, primary: str = "rate") -> Table:
        return self.results.tables.setdefault(id, Table(id, family, title, primary))

    def chosen(self, which: Sequence[Contender], only: Sequence[str] = ()) -> list[Contender]:
        return [
            contender
            for contender in which
            if (contender.quick or not self.quick) and (not only or contender.name in only)
        ]

    def interleave(
        self, table: Table, which: Sequence[Contender], slice: Callable[[Contender], Sample], rounds: int | None = None
    ) -> None:
        self.interleave_all([Turn(table, contender, slice) for contender in which], rounds)

    def interleave_all(self, turns: Sequence[Turn], rounds: int | None = None) -> None:
        interleaved(turns, rounds or self.rounds, self.tell)


def syncs(run: Run, only: Sequence[str] = ()) -> list[Contender]:
    found = run.chosen([each for each in contenders.REDIS if each.sync], only)
    return [each for each in found if each.name != SKIP_SYNC or SKIP_SYNC in only]


def asyncios(run: Run, only: Sequence[str] = ()) -> list[Contender]:
    found = run.chosen([each for each in contenders.REDIS if each.asyncio], only)
    return [each for each in found if each.name != SKIP_SYNC or SKIP_SYNC in only]


def of_plan(plan: Plan) -> tuple[str, ...]:
    """Return those that take part in a plan of people's: where it has several limits, those that know several."""
    return FEW if len(plan.limits) == 1 else SEVERAL


def sync_round(
    run: Run,
    url: str,
    where: list[str],
    threads: int,
    plan: Plan = NEVER_REACHED,
) -> Callable[[Contender], Sample]:
    setup = Setup(url, plan.limits, threads, own_keys=len(where) == 1)

    def slice(contender: Contender) -> Sample:
        empty(run, contender, setup, plan)
        return sync_slice(contender, setup, where, threads, run.seconds, granted=expected(contender, plan))

    return slice


def async_round(
    run: Run,
    url: str,
    where: list[str],
    tasks: int,
    plan: Plan = NEVER_REACHED,
    *,
    seconds: float | None = None,
    loop: Callable[[], Any] | None = None,
    patient: bool = True,
) -> Callable[[Contender], Sample]:
    """Return a slice of asyncio.

    :param loop: makes another event loop than asyncio's own.
    :param patient: whether this library has as much time as its peers; otherwise it has 2 s, and errors are counted.
    """

    def slice(contender: Contender) -> Sample:
        hurried = contender.name == OURS and not patient
        setup = Setup(url, plan.limits, tasks, timeout=2.0) if hurried else Setup(url, plan.limits, tasks)
        empty(run, contender, setup, plan)
        length, granted = seconds or run.seconds, expected(contender, plan)
        with asyncio.Runner(loop_factory=loop) as runner:
            return runner.run(async_slice(contender, setup, where, tasks, length, granted=granted, counting=hurried))

    return slice


def empty(run: Run, contender: Contender, setup: Setup, plan: Plan) -> None:
    """Empty the server, but for the keys of a plan that are used up."""
    run.server.flush()
    spend(run.server, contender, setup, plan)


def spend(server: Server, contender: Contender, setup: Setup, plan: Plan) -> None:
    """Use up the first keys of a plan in the server, by using up one and copying it."""
    if plan.refused and contender.entrant.kind is not Kind.FLOOR:
        assert contender.sync is not None
        with contender.sync(setup) as hit:
            use_up(hit, ["user:spent"], plan)
        server.copy("user:spent", 0, USED_UP)


def on(number: int) -> str:
    return "one key" if number == 1 else f"{number:,} keys"
