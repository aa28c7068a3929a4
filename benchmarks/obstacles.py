"""What stands in the way of the goals that are missed, by the numbers of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from benchmarks.contenders import (
    CONNECTION,
    CORE,
    CORE_OVER_CONNECTION,
    FORGETFUL,
    GCRA,
    ONE_AFTER_THE_OTHER,
    REDIS_PY,
    SOCKET,
)
from benchmarks.goal import is_peer, ratio
from benchmarks.model import OURS, Entrant, Results, Table

MANY: Final = "processes-32"


def single(entrant: Entrant) -> bool:
    """Return whether the server decides, in one script."""
    return entrant.is_peer and entrant.single_script


def _micros(results: Results, table_id: str, name: str) -> float | None:
    """Return the microseconds of a scenario that one decision takes."""
    table = results.tables.get(table_id)
    rate = None if table is None else table.median(name, "rate")
    return 1e6 / rate if rate else None


def _to_best(results: Results, table_id: str, name: str, wanted: Callable[[Entrant], bool]) -> str:
    """Say how the throughput of one compares with the best peer's."""
    measured = ratio(table_id, ours=name, wanted=wanted)(results)
    return "" if measured is None else f" ({measured.value:.2f}x the best peer)"


def _costs(
    results: Results, table_id: str, names: Iterable[str], wanted: Callable[[Entrant], bool] = is_peer
) -> list[str] | None:
    """Say what a decision takes with each of them; None where one was not measured."""
    costs: list[str] = []
    for name in names:
        micros = _micros(results, table_id, name)
        if micros is None:
            return None
        costs.append(f"{micros:.0f} us{_to_best(results, table_id, name, wanted)}")
    return costs


def one_thread(results: Results) -> str | None:
    socket, core, redis_py, ours = (_micros(results, "sync-1-1000", name) for name in (SOCKET, CORE, REDIS_PY, OURS))
    if socket is None or core is None or redis_py is None or ours is None:
        return None
    return (
        f"One thread, 1,000 keys: a swap takes {socket:.0f} us over a bare socket; with nothing more than the decision"
        f" computed before it (the refill, the bytes, the time to live) {core:.0f} us, which is {core / socket:.2f}x."
        f" What else there is here (to find the bucket and a connection, to merge, to keep a deadline, to remember what"
        f" was seen) takes {ours - core:.0f} us. redis-py's `evalsha`, which decides nothing, takes {redis_py:.0f} us."
    )


def threads(results: Results) -> str | None:
    costs = _costs(results, "sync-16-1000", (SOCKET, CORE, OURS))
    if costs is None:
        return None
    socket, core, ours = costs
    return (
        f"16 threads take turns in one interpreter, and hand it over at each call of the system: a swap over bare"
        f" sockets takes {socket} of it; with nothing more than the decision {core}; here {ours}."
    )


def tasks(results: Results) -> str | None:
    costs = _costs(results, "asyncio-100-1000", (CONNECTION, CORE_OVER_CONNECTION, OURS))
    if costs is None:
        return None
    alone, core, ours = costs
    return (
        f"100 tasks, 1,000 keys: they are one thread. A command over the shared connection takes {alone} of it, to"
        f" suspend and wake its task included; with nothing more than the decision {core}; here {ours}."
    )


def tasks_on_one_key(results: Results) -> str | None:
    redis_py, ours = (_micros(results, "asyncio-100-1", name) for name in (REDIS_PY, OURS))
    if redis_py is None or ours is None:
        return None
    return (
        f"100 tasks, one key: they are one thread, of which a decision takes {ours:.1f} us, to suspend and wake its"
        f" task included; redis-py's `evalsha`, which decides nothing, takes {redis_py:.1f} us."
    )


def crowd(results: Results) -> str | None:
    costs = _costs(results, MANY, (SOCKET, CORE, OURS), single)
    if costs is None:
        return None
    socket, core, ours = costs
    return (
        f"32 processes keep all cores busy, so that the time of a decision is processor time: a swap over bare sockets"
        f" takes {socket}; with nothing more than the decision {core}; here {ours}."
    )


def shares(results: Results) -> str | None:
    table = results.tables.get(MANY)
    socket, core = ([] if table is None else table.values(name, "share") for name in (SOCKET, CORE))
    if not socket or not core:
        return None
    return (
        "Shares of 32 processes: with a key for each process, where nobody can lose to anybody, the least share is"
        f" {min(socket):.2f} of the largest over bare sockets, and {min(core):.2f} with nothing more than the decision,"
        " in their worst rounds. There are fewer cores than processes, and the system shares them out."
    )


def several_processes(table_id: str, title: str) -> Callable[[Results], str | None]:
    """Return how to say what the server and the clients take of the cores, beside the best library and GCRA."""

    def find(results: Results) -> str | None:
        table = results.tables.get(table_id)
        if table is None:
            return None
        said = [
            f"{rate:,.0f} a second with {cpu:.0f} us of the server's processor each ({trips:.2f} round trips) {name}"
            for name, name_of in _beside(results, table)
            if (rate := table.median(name_of, "rate")) is not None
            and (cpu := table.median(name_of, "cpu_us")) is not None
            and (trips := table.median(name_of, "trips")) is not None
        ]
        return f"{title}: {'; '.join(said)}. Clients and server share the cores." if said else None

    return find


def _beside(results: Results, table: Table) -> list[tuple[str, str]]:
    """Return what to call them, and the names of ours, of the best library, and of the textbook's best."""
    best = results.best(table, wanted=is_peer)
    return [("here", OURS), *((f"with {name}", name) for name in (best, GCRA) if name is not None)]


def each_takes(
    tables: Sequence[tuple[str, str]], others: Sequence[str] = (), *, ours: str = OURS
) -> Callable[[Results], str | None]:
    """Return how to say what a decision takes in each of some tables: here, with the best library, and with others."""

    def find(results: Results) -> str | None:
        said: list[str] = []
        for table_id, title in tables:
            table = results.tables.get(table_id)
            micros = _micros(results, table_id, ours)
            if table is None or micros is None:
                continue
            best = results.best(table, wanted=is_peer)
            parts = [f"{micros:.1f} us here"]
            parts += [
                f"{theirs:.1f} us with {name}"
                for name in dict.fromkeys((best, *others))
                if name is not None and (theirs := _micros(results, table_id, name)) is not None
            ]
            said.append(f"{title}: a decision takes {', '.join(parts)}")
        return f"{'; '.join(said)}." if said else None

    return find


def uncontended(results: Results) -> str | None:
    """Say what one client sends that has seen all keys."""
    said = [
        f"{table.title}: {trips:.3f} round trips and {commands:.2f} commands"
        for table in results.tables.values()
        if table.family == "server"
        and (trips := table.median(OURS, "trips")) is not None
        and (commands := table.median(OURS, "commands")) is not None
    ]
    return f"One client that has seen all keys takes for a decision: {'; '.join(said)}." if said else None


def server_takes(results: Results) -> str | None:
    """Say what the server spends on each kind of decision, in each table of its time."""
    said: list[str] = []
    for table in results.tables.values():
        if table.family != "server":
            continue
        named = (
            ("SET IFEQ" if table.id in results.native else "a swap", OURS),
            ("a script that decides", FORGETFUL),
            ("the swap of the floor", REDIS_PY),
            (GCRA, GCRA),
        )
        parts = [f"{what} {micros:.1f} us" for what, name in named if (micros := table.median(name)) is not None]
        said.append(f"{table.title}: {', '.join(parts)}")
    return f"In the server, by the medians: {'; '.join(said)}." if said else None


def several_buckets(results: Results) -> str | None:
    """Say what a decision about several buckets takes, and what as many decisions take."""
    said = [
        f"{table.title}: {together:,.0f} us ({trips:.2f} round trips), one after the other {apart:,.0f} us"
        for table in results.tables.values()
        if table.family == "several"
        and (together := table.median(OURS, "p50_us")) is not None
        and (trips := table.median(OURS, "trips")) is not None
        and (apart := table.median(ONE_AFTER_THE_OTHER, "p50_us")) is not None
    ]
    return f"A decision about several buckets takes, by its median: {'; '.join(said)}." if said else None
