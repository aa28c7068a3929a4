"""What is measured: each scenario fills tables, with the same work for every contender."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from benchmarks import contenders
from benchmarks.contenders import REDIS_PY, SKIP_SYNC, SOCKET
from benchmarks.delay_proxy import delayed
from benchmarks.measure import async_slice, check, interleaved, keys, sync_slice
from benchmarks.model import OURS, ROOMY, TIGHT, Contender, Limit, Results, Sample, Setup, Table, of_latencies
from benchmarks.server import Counts, Server, reads, short_name, url_of
from benchmarks.workers import Job, Workers

SLIM = (SOCKET, REDIS_PY, OURS, "textbook token bucket", "limits fixed window", "throttled-py token bucket")
"""The contenders of a scenario that takes long: the floors, ours, and the best of each kind of peer."""

BANDWIDTHS = (ROOMY, Limit(60_000_000, 60), Limit(2_000_000_000, 3_600), Limit(10_000_000_000, 86_400))


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
        interleaved(table, which, rounds or self.rounds, slice, self.tell)


def _syncs(run: Run, only: Sequence[str] = ()) -> list[Contender]:
    found = run.chosen([each for each in contenders.REDIS if each.sync], only)
    return [each for each in found if each.name != SKIP_SYNC or SKIP_SYNC in only]


def _asyncios(run: Run, only: Sequence[str] = ()) -> list[Contender]:
    found = run.chosen([each for each in contenders.REDIS if each.asyncio], only)
    return [each for each in found if each.name != SKIP_SYNC or SKIP_SYNC in only]


def _sync_round(
    run: Run, url: str, where: list[str], threads: int, limits: tuple[Limit, ...] = (ROOMY,), *, granted: bool = True
) -> Callable[[Contender], Sample]:
    setup = Setup(url, limits, threads, own_keys=len(where) == 1)

    def slice(contender: Contender) -> Sample:
        run.server.flush()
        return sync_slice(contender, setup, where, threads, run.seconds, granted=granted)

    return slice


def _async_round(
    run: Run, url: str, where: list[str], tasks: int, limits: tuple[Limit, ...] = (ROOMY,), *, granted: bool = True
) -> Callable[[Contender], Sample]:
    setup = Setup(url, limits, tasks)

    def slice(contender: Contender) -> Sample:
        run.server.flush()
        seconds = run.seconds * max(1, tasks / 400)  # many decisions of each task, also where there are many tasks
        return asyncio.run(async_slice(contender, setup, where, tasks, seconds, granted=granted))

    return slice


def _on(number: int) -> str:
    return "one key" if number == 1 else f"{number:,} keys"


def sync(run: Run) -> None:
    for threads in (1, 16):
        for number in (1_000, 1):
            title = f"{threads} thread{'s' * (threads > 1)}, {_on(number)}"
            table = run.table(f"sync-{threads}-{number}", "sync", title)
            which = _syncs(run) + (run.chosen([each for each in contenders.PARTS if each.sync]) if number > 1 else [])
            run.interleave(table, which, _sync_round(run, run.server.url, keys(number), threads))


def asyncio_tasks(run: Run) -> None:
    for tasks in (1, 100) if run.quick else (1, 10, 100, 1_000):
        for number in (1_000, 1):
            title = f"{tasks:,} task{'s' * (tasks > 1)}, {_on(number)}"
            table = run.table(f"asyncio-{tasks}-{number}", "asyncio", title)
            which = _asyncios(run)
            if number == 1 and tasks < 1_000:
                which += run.chosen([contenders.WAITING])
            if number > 1:
                which += run.chosen([each for each in contenders.PARTS if each.asyncio])
            rounds = run.rounds if tasks in (1, 100) else min(run.rounds, 3)
            run.interleave(table, which, _async_round(run, run.server.url, keys(number), tasks), rounds)


def processes(run: Run) -> None:
    counts = (32,) if run.quick else (2, 8, 32)
    seconds = 0.3 if run.quick else 1.0
    only = (*SLIM, "textbook GCRA", "throttled-py GCRA") if not run.quick else SLIM
    run.tell(f"starting {counts[-1]} processes")
    workers = Workers(counts[-1])
    try:
        for number in counts:
            table = run.table(f"processes-{number}", "processes", f"{number} processes, one key")

            def slice(contender: Contender, number: int = number) -> Sample:
                job = Job(contender.name, Setup(run.server.url, own_keys=True))
                return _in_processes(run, workers, job, number, seconds)

            which = _syncs(run, only) + run.chosen([each for each in contenders.PARTS if each.sync])
            run.interleave(table, which, slice, min(run.rounds, 3))
    finally:
        workers.close()


def shared_keys(run: Run) -> None:
    """Let processes share 1,000 keys, as the workers of a service do whose requests go to any of them."""
    counts = (4,) if run.quick else (2, 4, 8)
    seconds = 0.3 if run.quick else 1.0
    only = (*SLIM[2:], "textbook GCRA", "throttled-py GCRA")
    workers = Workers(counts[-1])
    try:
        for number in counts:
            table = run.table(f"shared-{number}", "shared", f"{number} processes, 1,000 shared keys")

            def slice(contender: Contender, number: int = number) -> Sample:
                job = Job(contender.name, Setup(run.server.url), keys=1_000, warm_up=1.0)
                return _in_processes(run, workers, job, number, seconds)

            run.interleave(table, _syncs(run, only), slice, min(run.rounds, 3))
    finally:
        workers.close()


def _in_processes(run: Run, workers: Workers, job: Job, number: int, seconds: float) -> Sample:
    run.server.flush()
    with workers.prepared(job, number) as work:
        before = run.server.counts()
        reports = work(seconds, False)
        after = run.server.counts()
        # Again, with each decision's round trips counted, which takes time of its own.
        traced = work(seconds / 2, True) if job.contender == OURS else []
    latencies = array("q")
    for report in reports:
        latencies.extend(report.latencies)
    decisions = len(latencies)
    check(sum(report.granted for report in reports), decisions, granted=True)
    done = [len(report.latencies) for report in reports]
    sample = {
        "rate": decisions / seconds,
        **of_latencies(latencies),
        "trips": reads(before, after) / decisions,
        "share": min(done) / max(done),
    }
    if trips := [trip for report in traced for trip in report.trips]:
        sample["most_trips"] = max(trips)
    return sample


def latency(run: Run) -> None:
    for milliseconds in (0.5,) if run.quick else (0.5, 2):
        with delayed(run.server.port, milliseconds / 1_000) as port:
            url = url_of(port)
            for threads in (1, 16):
                title = f"{milliseconds} ms more per round trip, {threads} thread{'s' * (threads > 1)}, 1,000 keys"
                table = run.table(f"latency-{milliseconds}-sync-{threads}", "latency", title)
                where = keys(1_000 if threads > 1 else 100)  # fewer, as the warm-up would take longer than the slice
                run.interleave(table, _syncs(run, SLIM), _sync_round(run, url, where, threads), min(run.rounds, 3))
                table.title = title.replace("1,000 keys", _on(len(where)))
            table = run.table(
                f"latency-{milliseconds}-asyncio-100",
                "latency",
                f"{milliseconds} ms more per round trip, 100 tasks, 1,000 keys",
            )
            run.interleave(table, _asyncios(run, SLIM), _async_round(run, url, keys(1_000), 100), min(run.rounds, 3))


def rejections(run: Run) -> None:
    skipping = [each.name for each in contenders.REDIS if each.name == SKIP_SYNC]
    only = [each.name for each in contenders.REDIS if each.entrant.is_peer] + [OURS, *skipping]
    table = run.table("rejections-sync", "rejections", "1 thread, one key that is exhausted")
    run.interleave(table, _syncs(run, only), _sync_round(run, run.server.url, keys(1), 1, (TIGHT,), granted=False))
    table = run.table("rejections-asyncio", "rejections", "100 tasks, one key that is exhausted")
    which = _asyncios(run, only)
    run.interleave(table, which, _async_round(run, run.server.url, keys(1), 100, (TIGHT,), granted=False))


def bandwidths(run: Run) -> None:
    only = [name for name in SLIM if name not in (SOCKET, REDIS_PY)] + ["pyrate-limiter token bucket"]
    for number in (1, 4) if run.quick else (1, 2, 4):
        title = f"{number} bandwidth{'s' * (number > 1)}, 1 thread, 1,000 keys"
        table = run.table(f"bandwidths-{number}", "bandwidths", title)
        slice = _sync_round(run, run.server.url, keys(1_000), 1, BANDWIDTHS[:number])
        run.interleave(table, _syncs(run, only), slice, min(run.rounds, 3))


def in_process(run: Run) -> None:
    for threads in (1,) if run.quick else (1, 4):
        for number in (1_000, 1):
            title = f"{threads} thread{'s' * (threads > 1)}, {_on(number)}"
            table = run.table(f"memory-{threads}-{number}", "memory", title)
            setup = Setup("memory://", connections=threads)

            def slice(
                contender: Contender, setup: Setup = setup, threads: int = threads, number: int = number
            ) -> Sample:
                return sync_slice(contender, setup, keys(number), threads, run.seconds)

            run.interleave(table, run.chosen(contenders.MEMORY), slice)


def server_time(run: Run) -> None:
    """The server's own account of what a decision costs it, on each server that was named."""
    for server in run.servers:
        table = run.table(f"server-{short_name(server.version)}", "server", server.version, "server_us")
        if server.swaps_natively():
            run.results.native.add(table.id)

        def slice(contender: Contender, server: Server = server) -> Sample:
            return _server_time(contender, server, run.seconds)

        run.interleave(table, [each for each in _syncs(run) if each.asyncio is not None], slice, min(run.rounds, 3))


def _server_time(contender: Contender, server: Server, seconds: float) -> Sample:
    """Count what one client sends to an idle server, and measure what a decision costs one that 100 tasks keep busy."""
    assert contender.sync is not None
    server.flush()
    where = keys(1_000)
    with contender.sync(Setup(server.url)) as hit:
        for key in where:
            hit(key)
        before = server.counts()
        for key in where:
            hit(key)
        after = server.counts()

        def some() -> None:
            for key in islice(where, 50):
                hit(key)

        sent, inner = server.watched(some)
    trips = reads(before, after) / len(where)
    before, after, decisions = asyncio.run(_at_work(contender, server, where, max(1, int(seconds * 20))))
    micros = after.micros - before.micros
    # A script's time contains that of its commands, which are counted under their own names as well.
    top = sum(count * sent[name] / (sent[name] + inner[name]) for name, count in micros.items() if sent[name])
    return {
        "server_us": top / decisions,
        "cpu_us": (after.cpu - before.cpu) / decisions * 1e6,
        "trips": trips,
        "commands": sent.total() / 50,
        "inner": inner.total() / 50,
    }


async def _at_work(
    contender: Contender, server: Server, where: Sequence[str], rounds: int
) -> tuple[Counts, Counts, int]:
    """Return the server's counts before and after ``rounds`` visits of every key by 100 tasks, and the decisions."""
    assert contender.asyncio is not None
    async with contender.asyncio(Setup(server.url, connections=100)) as hit:

        async def visit(number: int, times: int) -> None:
            for _ in range(times):
                for key in where[number::100]:
                    await hit(key)

        await asyncio.gather(*(visit(number, 2) for number in range(100)))
        before = server.counts()
        await asyncio.gather(*(visit(number, rounds) for number in range(100)))
        return before, server.counts(), rounds * len(where)


def bytes_per_key(run: Run) -> None:
    number = 1_000 if run.quick else 10_000
    table = run.table("bytes", "bytes", f"memory of the server, {number:,} keys of about 10 bytes", "bytes")

    def slice(contender: Contender) -> Sample:
        assert contender.sync is not None
        run.server.flush()
        with contender.sync(Setup(run.server.url, (Limit(1_000_000, 60),))) as hit:
            hit("user:warm")
            before, stored = run.server.used_memory(), int(run.server.client.dbsize())
            for key in keys(number):
                hit(key)
            after = run.server.used_memory()
            names = list(islice(run.server.client.scan_iter(count=200), 200))
            usage = [run.server.client.memory_usage(name, samples=0) or 0 for name in names]
            each = (int(run.server.client.dbsize()) - stored) / number
        return {"bytes": sum(usage) / len(usage) * each, "used_bytes": (after - before) / number}

    limiters = [each for each in _syncs(run) if each.name not in (SOCKET, REDIS_PY)]
    run.interleave(table, limiters, slice, 1)


_COPY = """
for i = tonumber(ARGV[1]), tonumber(ARGV[2]) do
  for _, name in ipairs(KEYS) do
    local copy = string.gsub(name, 'user:seed', 'user:' .. i)
    redis.call('COPY', name, copy, 'REPLACE')
    redis.call('PEXPIRE', copy, 3600000)
  end
end
"""


def number_of_keys(run: Run) -> None:
    """Visit keys at random, with more and more keys in the server, which is filled by copying one bucket."""
    sizes = (1_000, 10_000) if run.quick else (1_000, 10_000, 100_000, 1_000_000)
    only = [name for name in SLIM if name not in (SOCKET, REDIS_PY)]
    for number in sizes:
        table = run.table(f"keys-{number}", "keys", f"{number:,} keys, 1 process")

        def slice(contender: Contender, number: int = number, table: Table = table) -> Sample:
            samples = _with_keys(run, contender, number)
            table.rows[contender.name] = samples[:-1]
            return samples[-1]

        run.interleave(table, _syncs(run, only), slice, 1)
    run.server.flush()


def _with_keys(run: Run, contender: Contender, number: int) -> list[Sample]:
    assert contender.sync is not None
    server = run.server
    server.flush()
    before = server.used_memory()
    with contender.sync(Setup(server.url)) as hit:
        hit("user:seed")
        names: Any = server.client.keys("*user:seed*")
    copy = server.client.register_script(_COPY)
    for first in range(0, number, 10_000):
        copy(keys=names, args=[first, min(number, first + 10_000) - 1])
    filled = server.used_memory()
    workers = Workers(1)
    samples: list[Sample] = []
    try:
        warm_up = 0.5 if run.quick else 2.0
        with workers.prepared(Job(contender.name, Setup(server.url), number, warm_up), 1) as work:
            for _ in range(3):
                counts = server.counts()
                (report,) = work(run.seconds, False)
                decisions = len(report.latencies)
                check(report.granted, decisions, granted=True)
                samples.append(
                    {
                        "rate": decisions / run.seconds,
                        **of_latencies(report.latencies),
                        "trips": reads(counts, server.counts()) / decisions,
                        "server_mib": (filled - before) / 2**20,
                        "client_mib": report.grown / 2**20,
                    }
                )
    finally:
        workers.close()
    return samples


SCENARIOS: dict[str, Callable[[Run], None]] = {
    "sync": sync,
    "asyncio": asyncio_tasks,
    "processes": processes,
    "shared": shared_keys,
    "rejections": rejections,
    "bandwidths": bandwidths,
    "memory": in_process,
    "latency": latency,
    "server": server_time,
    "bytes": bytes_per_key,
    "keys": number_of_keys,
}


def run_all(run: Run, names: Sequence[str]) -> None:
    """Run the named scenarios, or all of them."""
    for name, scenario in SCENARIOS.items():
        if not names or name in names:
            scenario(run)
