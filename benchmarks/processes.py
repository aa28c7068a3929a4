"""Scenarios of several processes, as the workers of a service are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from benchmarks import contenders
from benchmarks.contenders import BY_NAME, SOCKET
from benchmarks.measure import check, expected
from benchmarks.model import (
    NEVER_REACHED,
    OURS,
    Contender,
    Sample,
    Setup,
    of_latencies,
)
from benchmarks.run import LIMITERS, SLIM, Run, asyncios, of_plan, spend, syncs
from benchmarks.server import Counts, reads
from benchmarks.workers import Job, Report, Workers

TASKS = 50
"""Tasks of each asyncio worker."""


def one_key(run: Run) -> None:
    counts = (32,) if run.quick else (2, 8, 32)
    seconds = 0.3 if run.quick else 1.0
    run.tell(f"starting {counts[-1]} processes")
    with _workers(counts[-1]) as workers:
        for number in counts:
            table = run.table(f"processes-{number}", "processes", f"{number} processes, one key")

            def slice(contender: Contender, number: int = number) -> Sample:
                job = Job(contender.name, Setup(run.server.url, own_keys=True))
                return _in_processes(run, workers, job, number, seconds)

            which = syncs(run, (*SLIM, "throttled-py GCRA") if number == 32 else LIMITERS)
            if number == 32:
                which += run.chosen([each for each in contenders.PARTS if each.sync])
            run.interleave(table, which, slice, min(run.rounds, 3))


def shared_keys(run: Run) -> None:
    """Let processes share 1,000 keys, as the workers of a service do whose requests go to any of them."""
    threads, loops = ((4,), (4,)) if run.quick else ((2, 4, 8), (2, 4))
    seconds = 0.3 if run.quick else 0.6
    with _workers(max(threads)) as workers:
        for plan in run.plans:
            for tasks, counts in ((0, threads), (TASKS, loops)):
                for number in counts:
                    kind, of_each = ("asyncio-", f" of {tasks} tasks") if tasks else ("", "")
                    id = plan.table(f"shared-{kind}{number}")
                    title = plan.title(f"{number} processes{of_each}, 1,000 shared keys")
                    only = of_plan(plan) if plan.refused else (*LIMITERS, "throttled-py GCRA")
                    which = [each for each in (asyncios if tasks else syncs)(run, only) if each.name != SOCKET]
                    job = Job("", Setup(run.server.url, plan.limits, tasks or 1), 1_000, 0.5, plan, tasks)

                    def slice(contender: Contender, job: Job = job, number: int = number) -> Sample:
                        own = replace(job, contender=contender.name)
                        return _in_processes(run, workers, own, number, seconds)

                    run.interleave(run.table(id, "shared", title), which, slice, min(run.rounds, 3))


@contextmanager
def _workers(number: int) -> Generator[Workers]:
    workers = Workers(number)
    try:
        yield workers
    finally:
        workers.close()


def _in_processes(run: Run, workers: Workers, job: Job, number: int, seconds: float) -> Sample:
    run.server.flush()
    with workers.prepared(job, number) as work:
        # Only now, because tokens come back while the workers warm up.
        spend(run.server, BY_NAME[job.contender], job.setup, job.plan)
        before = run.server.counts()
        reports = work(seconds, False)
        after = run.server.counts()
        # Again, with what each decision sends counted, which takes time of its own.
        traced = _traced(run, work, job, seconds) if job.contender == OURS else {}
    return {**_sample(job, reports, seconds, before, after), **traced}


def _sample(job: Job, reports: Sequence[Report], seconds: float, before: Counts, after: Counts) -> Sample:
    latencies = array("q")
    for report in reports:
        latencies.extend(report.latencies)
    decisions, granted = len(latencies), sum(report.granted for report in reports)
    check(granted, decisions, granted=expected(BY_NAME[job.contender], job.plan))
    done = [len(report.latencies) for report in reports]
    sample = {
        "rate": decisions / seconds,
        **of_latencies(latencies),
        "trips": reads(before, after) / decisions,
        "cpu_us": (after.cpu - before.cpu) / decisions * 1e6,
        "share": min(done) / max(done),
    }
    return {**sample, "refused": 1 - granted / decisions} if job.plan.refused else sample


def _traced(run: Run, work: Callable[[float, bool], list[Report]], job: Job, seconds: float) -> Sample:
    """Count what decisions send: the round trips of single ones, or the commands of tasks, which go together."""
    reports: list[Report] = []
    if job.tasks:
        sent, _ = run.server.watched(lambda: reports.extend(work(seconds / 4, False)))
        return {"asked": sent.total() / sum(len(report.latencies) for report in reports)}
    trips = [trip for report in work(seconds / 2, True) for trip in report.trips]
    return {"most_trips": max(trips)} if trips else {}


def number_of_keys(run: Run) -> None:
    """Visit keys at random, with more and more keys in the server, which is filled by copying one bucket."""
    sizes = (1_000, 10_000) if run.quick else (1_000, 10_000, 100_000, 1_000_000)
    with _workers(4) as workers:
        for number in sizes:
            many = number == sizes[-1] if run.quick else number == 100_000
            for plan in run.plans if many else (NEVER_REACHED,):
                for processes in (1, 4) if many else (1,):
                    title = f"{number:,} keys, {processes} process{'es' * (processes > 1)}"
                    table = run.table(plan.table(f"keys-{processes}-{number}"), "keys", plan.title(title))
                    job = Job("", Setup(run.server.url, plan.limits), number, 0.3 if run.quick else 1.0, plan)
                    which = [each for each in syncs(run, of_plan(plan)) if each.name != SOCKET]

                    def slice(contender: Contender, job: Job = job, processes: int = processes) -> Sample:
                        return _with_keys(run, workers, replace(job, contender=contender.name), processes)

                    run.interleave(table, which, slice, 1 if run.quick or number > 100_000 else min(run.rounds, 2))
    run.server.flush()


def _with_keys(run: Run, workers: Workers, job: Job, processes: int) -> Sample:
    contender, server = BY_NAME[job.contender], run.server
    server.flush()
    empty = server.used_memory()
    assert contender.sync is not None
    with contender.sync(job.setup) as hit:
        hit("user:seed")
    server.copy("user:seed", 0, job.keys)
    filled = server.used_memory()
    with workers.prepared(job, processes) as work:
        spend(server, contender, job.setup, job.plan)
        before = server.counts()
        reports = work(run.seconds, False)
        after = server.counts()
    sample = _sample(job, reports, run.seconds, before, after)
    grown = max(report.grown for report in reports)
    return {**sample, "server_mib": (filled - empty) / 2**20, "client_mib": grown / 2**20}
