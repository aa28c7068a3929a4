"""The goals, each a ratio within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from benchmarks.contenders import CONNECTION, CORE, CORE_OVER_CONNECTION, REDIS_PY, SKIP_SYNC, SOCKET
from benchmarks.model import OURS, Entrant, Kind, Results, Table

Verdict = Literal["reached", "NOT reached", "not measured"]


@dataclass(frozen=True)
class Measured:
    """A value, and what it was taken against."""

    value: float
    against: str = ""


@dataclass(frozen=True)
class Goal:
    """A bound, and how its value is found in the results: None where it was not measured."""

    text: str
    relation: Literal[">=", "<=", ">", "<"]
    bound: float
    find: Callable[[Results], Measured | None]
    form: str = "{:.2f}x"
    obstacle: Callable[[Results], str | None] = lambda _: None
    """What stands in the way, by the numbers of the same run."""

    def verdict(self, measured: Measured | None) -> Verdict:
        if measured is None:
            return "not measured"
        value, bound = measured.value, self.bound
        reached = {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[self.relation]
        return "reached" if reached else "NOT reached"

    @property
    def wanted(self) -> str:
        relation = {">=": "at least ", "<=": "at most ", ">": "above ", "<": "below "}[self.relation]
        return relation + self.form.format(self.bound)


def _is_peer(entrant: Entrant) -> bool:
    """Return whether this is a library that people install; the textbook's scripts are compared with separately."""
    return entrant.kind is Kind.PEER


def _is_textbook(entrant: Entrant) -> bool:
    return entrant.kind is Kind.TEXTBOOK


def _ratio(
    table_id: str,
    *,
    metric: str = "rate",
    ours: str = OURS,
    wanted: Callable[[Entrant], bool] = _is_peer,
    chosen_by: str | None = None,
) -> Callable[[Results], Measured | None]:
    """Return how to compare ours with the best of the wanted ones; the best by this metric, or by ``chosen_by``."""

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        best = None if table is None else results.best(table, chosen_by or metric, wanted)
        if table is None or best is None:
            return None
        measured = _of(table, ours, best, metric)
        textbook = results.best(table, metric, _is_textbook) if wanted is _is_peer else None
        besides = None if textbook is None else _of(table, ours, textbook, metric)
        if measured is None or besides is None:
            return measured
        return Measured(measured.value, f"{measured.against}; {besides.value:.2f}x {besides.against}")

    return find


def _of(table: Table, name: str, other: str, metric: str) -> Measured | None:
    value, base = table.median(name, metric), table.median(other, metric)
    return None if value is None or not base else Measured(value / base, other)


def _floor(results: Results) -> Measured | None:
    """How many times as long as the bare socket a decision takes."""
    table = results.tables.get("sync-1-1000")
    found = None if table is None else _of(table, SOCKET, OURS, "rate")
    return None if found is None else Measured(found.value, SOCKET)


def _value(
    table_id: str, metric: str, of: Callable[[Iterable[float]], float] | None = None
) -> Callable[[Results], Measured | None]:
    """Return how to get the median of ours, or another value (``of``) of its rounds."""

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        values = [] if table is None else table.values(OURS, metric)
        if table is None or not values:
            return None
        return Measured(table.median(OURS, metric) or 0.0 if of is None else of(values))

    return find


def _server(*, native: bool) -> Callable[[Results], Measured | None]:
    """Return how to find the worst ratio among the servers whose ``SET`` can compare, or among all others."""

    def find(results: Results) -> Measured | None:
        found: list[Measured] = []
        for table in results.tables.values():
            if table.family == "server" and (table.id in results.native) is native:
                ratio = _ratio(table.id, metric="server_us", wanted=lambda each: _is_peer(each) and each.token_bucket)
                if (measured := ratio(results)) is not None:
                    found.append(Measured(measured.value, f"{measured.against}, {table.title}"))
        return max(found, key=lambda measured: measured.value, default=None)

    return find


def _uncontended(results: Results) -> Measured | None:
    """Return the round trips of a client that has seen all keys, from the tables of server time; the worst server's."""
    tables = [table for table in results.tables.values() if table.family == "server"]
    return max(
        (Measured(trips, table.title) for table in tables if (trips := table.median(OURS, "trips")) is not None),
        key=lambda measured: measured.value,
        default=None,
    )


def _single(entrant: Entrant) -> bool:
    return entrant.is_peer and entrant.single_script


def _asking(entrant: Entrant) -> bool:
    return _is_peer(entrant) and entrant.asks_redis


def _micros(results: Results, table_id: str, name: str) -> float | None:
    """Return the microseconds of a scenario that one decision takes."""
    table = results.tables.get(table_id)
    rate = None if table is None else table.median(name, "rate")
    return 1e6 / rate if rate else None


def _to_best(results: Results, table_id: str, name: str, wanted: Callable[[Entrant], bool]) -> str:
    """Say how the throughput of one compares with the best peer's."""
    measured = _ratio(table_id, ours=name, wanted=wanted)(results)
    return "" if measured is None else f" ({measured.value:.2f}x the best peer)"


def _costs(
    results: Results, table_id: str, names: Iterable[str], wanted: Callable[[Entrant], bool] = _is_peer
) -> list[str] | None:
    """Say what a decision takes with each of them; None where one was not measured."""
    costs: list[str] = []
    for name in names:
        micros = _micros(results, table_id, name)
        if micros is None:
            return None
        costs.append(f"{micros:.0f} us{_to_best(results, table_id, name, wanted)}")
    return costs


def _one_thread(results: Results) -> str | None:
    socket, core, redis_py, ours = (_micros(results, "sync-1-1000", name) for name in (SOCKET, CORE, REDIS_PY, OURS))
    if socket is None or core is None or redis_py is None or ours is None:
        return None
    return (
        f"One thread, 1,000 keys: a swap takes {socket:.0f} us over a bare socket; with nothing more than the decision"
        f" computed before it (the refill, the bytes, the time to live) {core:.0f} us, which is {core / socket:.2f}x."
        f" What else there is here (to find the bucket and a connection, to merge, to keep a deadline, to remember what"
        f" was seen) takes {ours - core:.0f} us. redis-py's `evalsha`, which decides nothing, takes {redis_py:.0f} us."
    )


def _threads(results: Results) -> str | None:
    costs = _costs(results, "sync-16-1000", (SOCKET, CORE, OURS))
    if costs is None:
        return None
    socket, core, ours = costs
    return (
        f"16 threads take turns in one interpreter, and hand it over at each call of the system: a swap over bare"
        f" sockets takes {socket} of it; with nothing more than the decision {core}; here {ours}."
    )


def _tasks(results: Results) -> str | None:
    costs = _costs(results, "asyncio-100-1000", (CONNECTION, CORE_OVER_CONNECTION, OURS))
    if costs is None:
        return None
    alone, core, ours = costs
    return (
        f"100 tasks, 1,000 keys: they are one thread. A command over the shared connection takes {alone} of it, to"
        f" suspend and wake its task included; with nothing more than the decision {core}; here {ours}."
    )


def _tasks_on_one_key(results: Results) -> str | None:
    redis_py, ours = (_micros(results, "asyncio-100-1", name) for name in (REDIS_PY, OURS))
    if redis_py is None or ours is None:
        return None
    return (
        f"100 tasks, one key: they are one thread, of which a decision takes {ours:.1f} us, to suspend and wake its"
        f" task included; redis-py's `evalsha`, which decides nothing, takes {redis_py:.1f} us."
    )


def _crowd(results: Results) -> str | None:
    costs = _costs(results, _MANY, (SOCKET, CORE, OURS), _single)
    if costs is None:
        return None
    socket, core, ours = costs
    return (
        f"32 processes keep all cores busy, so that the time of a decision is processor time: a swap over bare sockets"
        f" takes {socket}; with nothing more than the decision {core}; here {ours}."
    )


def _shares(results: Results) -> str | None:
    table = results.tables.get(_MANY)
    socket, core = ([] if table is None else table.values(name, "share") for name in (SOCKET, CORE))
    if not socket or not core:
        return None
    return (
        "Shares of 32 processes: with a key for each process, where nobody can lose to anybody, the least share is"
        f" {min(socket):.2f} of the largest over bare sockets, and {min(core):.2f} with nothing more than the decision,"
        " in their worst rounds. There are fewer cores than processes, and the system shares them out."
    )


_MANY = "processes-32"

GOALS = (
    Goal("sync, 1 thread, 1,000 keys: time to that of the bare socket", "<=", 1.15, _floor, obstacle=_one_thread),
    Goal("sync, 1 thread, 1,000 keys: throughput to the best peer", ">", 1, _ratio("sync-1-1000")),
    Goal(
        "sync, 16 threads, 1,000 keys: throughput to the best peer", ">=", 2, _ratio("sync-16-1000"), obstacle=_threads
    ),
    Goal(
        "asyncio, 100 tasks, 1,000 keys: throughput to the best peer",
        ">=",
        6,
        _ratio("asyncio-100-1000"),
        obstacle=_tasks,
    ),
    Goal(
        "asyncio, 100 tasks, one key: throughput to the best peer",
        ">=",
        12,
        _ratio("asyncio-100-1"),
        obstacle=_tasks_on_one_key,
    ),
    Goal(
        "32 processes, one key: throughput to the best single-script peer",
        ">=",
        0.9,
        _ratio(_MANY, wanted=_single),
        obstacle=_crowd,
    ),
    Goal(
        "32 processes, one key: p99 to that of the same peer",
        "<=",
        1,
        _ratio(_MANY, metric="p99_us", wanted=_single, chosen_by="rate"),
        obstacle=_crowd,
    ),
    Goal("32 processes, one key: min/max share, worst round", ">", 0.7, _value(_MANY, "share", min), "{:.2f}", _shares),
    Goal("32 processes, one key: mean round trips per decision", "<", 1.3, _value(_MANY, "trips"), "{:.2f}"),
    Goal("32 processes, one key: most round trips of a decision", "<=", 3, _value(_MANY, "most_trips", max), "{:.0f}"),
    *(
        Goal(
            f"{number} processes, 1,000 shared keys: throughput to the best peer",
            ">=",
            1.5,
            _ratio(f"shared-{number}"),
        )
        for number in (2, 4, 8)
    ),
    *(
        Goal(
            f"{number} processes, 1,000 shared keys: p99 to that of the same peer",
            "<",
            1,
            _ratio(f"shared-{number}", metric="p99_us", chosen_by="rate"),
        )
        for number in (2, 4, 8)
    ),
    *(
        Goal(
            f"{number} processes, 1,000 shared keys: mean round trips per decision",
            "<=",
            1.05,
            _value(f"shared-{number}", "trips"),
            "{:.2f}",
        )
        for number in (2, 4, 8)
    ),
    Goal(
        "rejections with skip-sync-on-zero, 1 thread: throughput to the best peer that asks Redis",
        ">=",
        20,
        _ratio("rejections-sync", ours=SKIP_SYNC, wanted=_asking),
    ),
    Goal(
        "rejections with skip-sync-on-zero, 100 tasks: throughput to the best peer that asks Redis",
        ">=",
        20,
        _ratio("rejections-asyncio", ours=SKIP_SYNC, wanted=_asking),
    ),
    Goal("server time, by script: to the cheapest token-bucket peer", "<=", 0.6, _server(native=False)),
    Goal("server time, by SET IFEQ: to the cheapest token-bucket peer", "<=", 0.15, _server(native=True)),
    Goal("in-process, 1 thread, 1,000 keys: throughput to the best peer", ">", 1, _ratio("memory-1-1000")),
    Goal("in-process, 1 thread, one key: throughput to the best peer", ">", 1, _ratio("memory-1-1")),
    Goal("round trips per decision, uncontended", "<=", 1.005, _uncontended, "{:.2f}"),
)
