"""What is measured: each scenario fills tables, with the same work for every contender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final

from benchmarks import contenders
from benchmarks.contenders import CONNECTION, GCRA, SKIP_SYNC
from benchmarks.delay_proxy import delayed
from benchmarks.measure import USED_UP, Turn, expected, keys, sync_slice, use_up, visits
from benchmarks.model import (
    NEVER_REACHED,
    OURS,
    PER_DAY,
    ROOMY,
    TIGHT,
    Contender,
    Hit,
    Limit,
    Plan,
    Sample,
    Setup,
)
from benchmarks.processes import number_of_keys, one_key, shared_keys
from benchmarks.run import FEW, LIMITERS, SLIM, Run, async_round, asyncios, of_plan, on, sync_round, syncs
from benchmarks.server import url_of
from benchmarks.server_time import bytes_per_key, server_time
from benchmarks.several import several

BANDWIDTHS: Final = (ROOMY, Limit(60_000_000, 60), Limit(2_000_000_000, 3_600), Limit(10_000_000_000, 86_400))
EXHAUSTED: Final = Plan("exhausted", "10/day", (TIGHT,), refused=1.0)


def sync(run: Run) -> None:
    for threads in (1, 16):
        title = f"{threads} thread{'s' * (threads > 1)}"
        for plan in run.plans:
            table = run.table(plan.table(f"sync-{threads}-1000"), "sync", plan.title(f"{title}, 1,000 keys"))
            which = syncs(run, of_plan(plan) if plan.refused else ())
            if not plan.refused:
                which += run.chosen([each for each in contenders.PARTS if each.sync])
            run.interleave(table, which, sync_round(run, run.server.url, visits(keys(1_000), plan), threads, plan))
        table = run.table(f"sync-{threads}-1", "sync", f"{title}, one key")
        run.interleave(table, syncs(run, SLIM), sync_round(run, run.server.url, keys(1), threads), min(run.rounds, 3))


def asyncio_tasks(run: Run) -> None:
    _more_and_more_tasks(run)
    where = run.server.url
    for plan in run.plans:
        if plan.refused:
            table = run.table(plan.table("asyncio-100-1000"), "asyncio", plan.title("100 tasks, 1,000 keys"))
            which = asyncios(run, of_plan(plan))
            run.interleave(table, which, async_round(run, where, visits(keys(1_000), plan), 100, plan))
    table = run.table("asyncio-100-1000-uvloop", "asyncio", "100 tasks, 1,000 keys, uvloop")
    which = asyncios(run, SLIM) + run.chosen([each for each in contenders.PARTS if each.name == CONNECTION])
    run.interleave(table, which, async_round(run, where, keys(1_000), 100, loop=_uvloop))
    table = run.table("asyncio-100-1", "asyncio", "100 tasks, one key")
    which = asyncios(run) + run.chosen([contenders.WAITING])
    run.interleave(table, which, async_round(run, where, keys(1), 100))


def _uvloop() -> Any:
    return import_module("uvloop").new_event_loop()


def _more_and_more_tasks(run: Run) -> None:
    """Let 1 to 10,000 tasks visit the same keys, all in the same rounds, since they are compared with each other."""
    turns: list[Turn] = []
    for tasks in (1, 100, 1_000) if run.quick else (1, 10, 100, 1_000, 10_000):
        title = f"{tasks:,} task{'s' * (tasks > 1)}, 1,000 keys"
        table = run.table(f"asyncio-{tasks}-1000", "asyncio", title)
        if tasks == 100:
            which = asyncios(run) + run.chosen([each for each in contenders.PARTS if each.asyncio])
        else:
            # Peers need a connection for each task, which is too many of them at 10,000.
            which = asyncios(run, FEW if tasks < 10_000 else (OURS,))
        # There are many decisions of each task, also where there are many tasks.
        seconds = run.seconds * min(8.0, max(1.0, tasks / 400))
        slice = async_round(run, run.server.url, keys(1_000), tasks, seconds=seconds, patient=tasks < 1_000)
        turns += [Turn(table, contender, slice) for contender in which]
    run.interleave_all(turns)


def latency(run: Run) -> None:
    for milliseconds in (0.5,) if run.quick else (0.5, 2):
        with delayed(run.server.port, milliseconds / 1_000) as port:
            url = url_of(port)
            for threads in (1, 16):
                where = keys(1_000 if threads > 1 else 100)  # fewer, as the warm-up would take longer than the slice
                title = (
                    f"{milliseconds} ms more per round trip, {threads} thread{'s' * (threads > 1)}, {on(len(where))}"
                )
                table = run.table(f"latency-{milliseconds}-sync-{threads}", "latency", title)
                run.interleave(table, syncs(run, FEW), sync_round(run, url, where, threads), min(run.rounds, 2))
            title = f"{milliseconds} ms more per round trip, 100 tasks, 1,000 keys"
            table = run.table(f"latency-{milliseconds}-asyncio-100", "latency", title)
            run.interleave(table, asyncios(run, FEW), async_round(run, url, keys(1_000), 100), min(run.rounds, 2))


def rejections(run: Run) -> None:
    only = (*LIMITERS, SKIP_SYNC, "limits sliding window counter", "limits moving window")
    table = run.table("rejections-sync", "rejections", "1 thread, one key that is exhausted")
    rounds = min(run.rounds, 3)
    run.interleave(table, syncs(run, only), sync_round(run, run.server.url, keys(1), 1, EXHAUSTED), rounds)
    table = run.table("rejections-asyncio", "rejections", "100 tasks, one key that is exhausted")
    run.interleave(table, asyncios(run, only), async_round(run, run.server.url, keys(1), 100, EXHAUSTED), rounds)


def bandwidths(run: Run) -> None:
    know_several = [each.name for each in contenders.REDIS if each.entrant.several]
    once_each = ("limits fixed window", GCRA)
    for number in (1, 4) if run.quick else (1, 2, 4):
        title = f"{number} bandwidth{'s' * (number > 1)}"
        plan = Plan("", title, BANDWIDTHS[:number])
        table = run.table(f"bandwidths-asyncio-{number}", "bandwidths", f"{title}, 100 tasks, 1,000 keys")
        which = asyncios(run, know_several if number > 1 else (*know_several, *once_each))
        run.interleave(table, which, async_round(run, run.server.url, keys(1_000), 100, plan))
        table = run.table(f"bandwidths-sync-{number}", "bandwidths", f"{title}, 1 thread, 1,000 keys")
        slice = sync_round(run, run.server.url, keys(1_000), 1, plan)
        run.interleave(table, syncs(run, (*know_several, *once_each)), slice, min(run.rounds, 3))


def in_process(run: Run) -> None:
    best = (OURS, "limits fixed window", "throttled-py token bucket", "pyrate-limiter token bucket")
    for threads, number, plan in (
        (1, 1_000, NEVER_REACHED),
        (1, 1_000, PER_DAY),
        (1, 1, NEVER_REACHED),
        (4, 1_000, NEVER_REACHED),
    ):
        title = plan.title(f"{threads} thread{'s' * (threads > 1)}, {on(number)}")
        table = run.table(plan.table(f"memory-{threads}-{number}"), "memory", title)
        which = run.chosen(contenders.MEMORY, () if threads == 1 and not plan.refused else best)
        run.interleave(table, which, _in_memory(run, visits(keys(number), plan), threads, plan))


def _in_memory(run: Run, where: list[str], threads: int, plan: Plan) -> Callable[[Contender], Sample]:
    setup = Setup("memory://", plan.limits, threads)

    def spend(hit: Hit) -> None:
        if plan.refused:
            use_up(hit, keys(USED_UP), plan)

    def slice(contender: Contender) -> Sample:
        granted = expected(contender, plan)
        return sync_slice(contender, setup, where, threads, run.seconds, granted=granted, before=spend)

    return slice


SCENARIOS: dict[str, Callable[[Run], None]] = {
    "sync": sync,
    "asyncio": asyncio_tasks,
    "processes": one_key,
    "shared": shared_keys,
    "rejections": rejections,
    "bandwidths": bandwidths,
    "memory": in_process,
    "latency": latency,
    "several": several,
    "server": server_time,
    "bytes": bytes_per_key,
    "keys": number_of_keys,
}


def run_all(run: Run, names: Sequence[str]) -> None:
    """Run the named scenarios, or all of them."""
    for name, scenario in SCENARIOS.items():
        if not names or name in names:
            scenario(run)
