"""The goals, each a ratio within one run."""

from __future__ import annotations

from typing import Final

from benchmarks import obstacles
from benchmarks.contenders import FORGETFUL, GCRA, ONE_AFTER_THE_OTHER, REDIS_PY, SKIP_SYNC, SOCKET
from benchmarks.goal import (
    Find,
    Goal,
    Measured,
    Relation,
    is_peer,
    of,
    ratio,
    times_as_long_as,
    to_one,
    to_other_table,
    value_of,
    worst,
)
from benchmarks.model import NEVER_REACHED, OURS, PER_DAY, PLANS, Entrant, Plan, Results
from benchmarks.obstacles import MANY
from benchmarks.several import BUCKETS, MILLISECONDS, table_id


def _uncontended(results: Results) -> Measured | None:
    """Return the round trips of a client that has seen all keys, from the tables of server time; the worst server's."""
    tables = [table for table in results.tables.values() if table.family == "server"]
    return max(
        (Measured(trips, table.title) for table in tables if (trips := table.median(OURS, "trips")) is not None),
        key=lambda measured: measured.value,
        default=None,
    )


def _server(name: str, *, native: bool | None = None) -> Find:
    """Return how to find the worst ratio to GCRA, among the limits and the servers.

    :param native: whether servers whose ``SET`` can compare are wanted, or all others; None: all of them.
    """

    def find(results: Results) -> Measured | None:
        found: list[Measured] = []
        for table in results.tables.values():
            if table.family == "server" and native in (None, table.id in results.native):
                measured = of(table, name, GCRA, "server_us")
                if measured is not None:
                    found.append(Measured(measured.value, f"{GCRA}, {table.title}"))
        return max(found, key=lambda measured: measured.value, default=None)

    return find


def _asking(entrant: Entrant) -> bool:
    return is_peer(entrant) and entrant.asks_redis


def _several(entrant: Entrant) -> bool:
    return is_peer(entrant) and entrant.several


def _of_plans(relation: Relation, id: str, metric: str = "rate", plans: tuple[Plan, ...] = PLANS) -> Find:
    """Return how to compare with the best library in the worst of the plans; by its rate it is the best."""
    parts = {plan.text: ratio(plan.table(id), metric=metric, chosen_by="rate") for plan in plans}
    return worst(relation, parts)


def _values_of_plans(id: str, metric: str) -> Find:
    return worst("<=", {plan.text: value_of(plan.table(id), metric) for plan in PLANS})


def _shared() -> list[Goal]:
    goals: list[Goal] = []
    for id, title, metric in (
        *((f"shared-{number}", f"{number} processes, 1,000 shared keys", "trips") for number in (2, 4, 8)),
        *((f"shared-asyncio-{number}", f"{number} asyncio processes, 1,000 shared keys", "asked") for number in (2, 4)),
    ):
        obstacle = obstacles.several_processes(id, title)
        asked = "mean round trips per decision" if metric == "trips" else "scripts or commands per decision"
        goals += [
            Goal(f"{title}: throughput to the best library", ">=", 1.5, _of_plans(">=", id), obstacle=obstacle),
            Goal(f"{title}: p99 to that of the same library", "<", 1, _of_plans("<", id, "p99_us"), obstacle=obstacle),
            Goal(f"{title}: {asked}", "<=", 1.05, _values_of_plans(id, metric), "{:.2f}", obstacle),
        ]
    return goals


def _many_keys() -> list[Goal]:
    goals: list[Goal] = []
    for processes in (1, 4):
        id, title = f"keys-{processes}-100000", f"{processes} process{'es' * (processes > 1)}, 100,000 keys"
        obstacle = obstacles.several_processes(id, title)
        goals += [
            Goal(f"{title}: throughput to the best library", ">=", 1.3, _of_plans(">=", id), obstacle=obstacle),
            Goal(
                f"{title}: mean round trips per decision", "<=", 1.05, _values_of_plans(id, "trips"), "{:.2f}", obstacle
            ),
        ]
    return goals


def _crowds_of_tasks() -> list[Goal]:
    goals: list[Goal] = []
    for tasks in (1_000, 10_000):
        id, title = f"asyncio-{tasks}-1000", f"asyncio, {tasks:,} tasks, 1,000 keys"
        obstacle = obstacles.each_takes([("asyncio-100-1000", "100 tasks"), (id, f"{tasks:,} tasks")])
        to_hundred = to_other_table(id, "asyncio-100-1000")
        goals += [
            Goal(f"{title}: throughput to that of 100 tasks", ">=", 1, to_hundred, obstacle=obstacle),
            Goal(f"{title}: errors at a timeout of 2 s", "<=", 0, value_of(id, "errors", max), "{:.0f}", obstacle),
        ]
    return goals


def _several_buckets() -> list[Goal]:
    goals: list[Goal] = []
    for buckets, bound in zip(BUCKETS, (0.7, 0.5, 0.35), strict=True):
        ids = {f"{milliseconds:g} ms": table_id(milliseconds, buckets) for milliseconds in MILLISECONDS}
        goals += [
            Goal(
                f"{buckets} buckets in one decision: mean round trips",
                "<=",
                1.1,
                worst("<=", {name: value_of(id, "trips") for name, id in ids.items()}),
                "{:.2f}",
                obstacles.several_buckets,
            ),
            Goal(
                f"{buckets} buckets in one decision, 1 ms more per round trip: time to that of one after the other",
                "<=",
                bound,
                times_as_long_as(table_id(1, buckets), ONE_AFTER_THE_OTHER),
                obstacle=obstacles.several_buckets,
            ),
        ]
    return goals


_BANDWIDTHS: Final = [(f"bandwidths-asyncio-{number}", f"{number} bandwidths") for number in (2, 4)]
_CROWD: Final = obstacles.several_processes(MANY, "32 processes, one key")
_MEMORY: Final = [("memory-1-1000", "in process, 1,000 keys"), ("memory-1-1", "in process, one key")]

GOALS: Final = (
    *_shared(),
    *_many_keys(),
    Goal(
        "asyncio, 100 tasks, 1,000 keys: throughput to the best library",
        ">=",
        6,
        _of_plans(">=", "asyncio-100-1000"),
        obstacle=obstacles.tasks,
    ),
    Goal(
        "asyncio, 100 tasks, one key: throughput to the best library",
        ">=",
        15,
        ratio("asyncio-100-1"),
        obstacle=obstacles.tasks_on_one_key,
    ),
    *_crowds_of_tasks(),
    Goal(
        "sync, 1 thread, 1,000 keys: time to that of the bare socket that sends the swap",
        "<=",
        1.3,
        worst("<=", {plan.text: times_as_long_as(plan.table("sync-1-1000"), SOCKET) for plan in PLANS}),
        obstacle=obstacles.one_thread,
    ),
    Goal(
        "sync, 1 thread, 1,000 keys: throughput to the best library",
        ">",
        1,
        ratio("sync-1-1000"),
        obstacle=obstacles.one_thread,
    ),
    Goal(
        "sync, 16 threads, 1,000 keys: throughput to the best library",
        ">=",
        2.2,
        _of_plans(">=", "sync-16-1000"),
        obstacle=obstacles.threads,
    ),
    Goal("32 processes, one key: throughput to GCRA", ">=", 1.1, to_one(MANY, GCRA), obstacle=obstacles.crowd),
    Goal(
        "32 processes, one key: p99 to that of GCRA", "<=", 0.9, to_one(MANY, GCRA, "p99_us"), obstacle=obstacles.crowd
    ),
    Goal(
        "32 processes, one key: min/max share, worst round",
        ">",
        0.7,
        value_of(MANY, "share", min),
        "{:.2f}",
        obstacles.shares,
    ),
    Goal(
        "32 processes, one key: mean round trips per decision",
        "<",
        1.3,
        value_of(MANY, "trips"),
        "{:.2f}",
        _CROWD,
    ),
    Goal(
        "32 processes, one key: most round trips of a decision",
        "<=",
        3,
        value_of(MANY, "most_trips", max),
        "{:.0f}",
        _CROWD,
    ),
    Goal(
        "server time, by the script that decides: to GCRA",
        "<=",
        0.85,
        _server(FORGETFUL),
        obstacle=obstacles.server_takes,
    ),
    Goal("server time, by the swap: to GCRA", "<=", 0.65, _server(OURS, native=False), obstacle=obstacles.server_takes),
    Goal("server time, by SET IFEQ: to GCRA", "<=", 0.1, _server(OURS, native=True), obstacle=obstacles.server_takes),
    *(
        Goal(
            f"{title}, asyncio, 100 tasks: throughput to the best library that does several limits",
            ">=",
            4,
            ratio(id, wanted=_several),
            obstacle=obstacles.each_takes([(id, title)], (REDIS_PY,)),
        )
        for id, title in _BANDWIDTHS
    ),
    Goal(
        "in process, 1 thread, 1,000 keys: throughput to the best library",
        ">=",
        1.5,
        _of_plans(">=", "memory-1-1000", plans=(NEVER_REACHED, PER_DAY)),
        obstacle=obstacles.each_takes(_MEMORY),
    ),
    Goal(
        "in process, 1 thread, one key: throughput to the best library",
        ">=",
        1.5,
        ratio("memory-1-1"),
        obstacle=obstacles.each_takes(_MEMORY),
    ),
    Goal(
        "rejections with skip-sync-on-zero, 1 thread: throughput to the best library that asks Redis",
        ">=",
        20,
        ratio("rejections-sync", ours=SKIP_SYNC, wanted=_asking),
        obstacle=obstacles.each_takes([("rejections-sync", "refused, sync")], ours=SKIP_SYNC),
    ),
    Goal(
        "rejections with skip-sync-on-zero, 100 tasks: throughput to the best library that asks Redis",
        ">=",
        20,
        ratio("rejections-asyncio", ours=SKIP_SYNC, wanted=_asking),
        obstacle=obstacles.each_takes([("rejections-asyncio", "refused, asyncio")], ours=SKIP_SYNC),
    ),
    *_several_buckets(),
    Goal("round trips per decision, uncontended", "<=", 1.005, _uncontended, "{:.2f}", obstacles.uncontended),
)
