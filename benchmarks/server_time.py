"""What decisions cost the server: its time, and its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice

from benchmarks import contenders
from benchmarks.contenders import REDIS_PY, SOCKET
from benchmarks.measure import keys
from benchmarks.model import PER_DAY, PER_MINUTE, Contender, Limit, Plan, Sample, Setup
from benchmarks.run import FEW, Run, asyncios, syncs
from benchmarks.server import Counts, Server, reads, short_name

PER_HOUR = Plan("hour", "100000/hour", (Limit(100_000, 3_600),))
_PLANS = (PER_MINUTE, PER_DAY, PER_HOUR)


def server_time(run: Run) -> None:
    """Let each server that was named say what a decision costs it, with some limits that people have."""
    for server in run.servers:
        for plan in _PLANS[:1] if run.quick else _PLANS:
            id = plan.table(f"server-{short_name(server.version)}")
            table = run.table(id, "server", plan.title(server.version), "server_us")
            if server.swaps_natively():
                run.results.native.add(table.id)

            def slice(contender: Contender, server: Server = server, plan: Plan = plan) -> Sample:
                return _server_time(contender, server, plan, run.seconds)

            which = [*asyncios(run, (*FEW, REDIS_PY)), contenders.NOTHING_REMEMBERED]
            run.interleave(table, which, slice, min(run.rounds, 3))


def _server_time(contender: Contender, server: Server, plan: Plan, seconds: float) -> Sample:
    """Count what one client sends to an idle server, and measure what a decision costs one that 100 tasks keep busy."""
    assert contender.sync is not None
    server.flush()
    where = keys(1_000)
    some = where[:200]
    with contender.sync(Setup(server.url, plan.limits)) as hit:
        for key in some:
            hit(key)
        before = server.counts()
        for key in some:
            hit(key)
        after = server.counts()

        def fewer() -> None:
            for key in islice(some, 50):
                hit(key)

        sent, inner = server.watched(fewer)
    trips = reads(before, after) / len(some)
    rounds = max(1, int(seconds * 20))
    before, after, decisions = asyncio.run(_at_work(contender, server, plan, where, rounds))
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
    contender: Contender, server: Server, plan: Plan, where: Sequence[str], rounds: int
) -> tuple[Counts, Counts, int]:
    """Return the server's counts before and after ``rounds`` visits of every key by 100 tasks, and the decisions."""
    assert contender.asyncio is not None
    async with contender.asyncio(Setup(server.url, plan.limits, connections=100)) as hit:

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

    limiters = [each for each in syncs(run) if each.name not in (SOCKET, REDIS_PY)]
    run.interleave(table, limiters, slice, 1)
