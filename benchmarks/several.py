"""Decisions about several buckets: all of them in one, beside as many decisions one after the other."""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable
from typing import Final

from benchmarks import contenders, ours
from benchmarks.contenders import ONE_AFTER_THE_OTHER
from benchmarks.delay_proxy import delayed
from benchmarks.measure import check, keys, loop
from benchmarks.model import OURS, Contender, Sample, Setup, of_latencies
from benchmarks.run import Run
from benchmarks.server import reads, url_of

BUCKETS: Final = (2, 3, 5)
MILLISECONDS: Final = (0.2, 1.0)
"""What is added to each round trip."""


def table_id(milliseconds: float, buckets: int) -> str:
    return f"several-{milliseconds:g}-{buckets}"


def several(run: Run) -> None:
    rounds = min(run.rounds, 3)
    for milliseconds in MILLISECONDS[-1:] if run.quick else MILLISECONDS:
        with delayed(run.server.port, milliseconds / 1_000) as port:
            for buckets in BUCKETS:
                title = f"{buckets} buckets, {milliseconds:g} ms more per round trip, 1 thread, 20 keys of each"
                table = run.table(table_id(milliseconds, buckets), "several", title)
                which = [
                    Contender(contenders.ENTRANTS[OURS], ours.together(buckets)),
                    Contender(contenders.ENTRANTS[ONE_AFTER_THE_OTHER], ours.one_after_the_other(buckets)),
                ]
                run.interleave(table, which, _round(run, url_of(port)), rounds)


def _round(run: Run, url: str) -> Callable[[Contender], Sample]:
    # There are few keys, since a warm-up over many of them would take longer than the slice.
    where = keys(20)

    def slice(contender: Contender) -> Sample:
        assert contender.sync is not None
        run.server.flush()
        with contender.sync(Setup(url)) as hit:
            for key in where:
                hit(key)
            gc.collect()
            latencies = array("q")
            before, begin = run.server.counts(), time.perf_counter_ns()
            count = loop(hit, where, begin + int(run.seconds * 1e9), latencies)
            elapsed, after = time.perf_counter_ns() - begin, run.server.counts()
        check(count, len(latencies), granted=1.0)
        trips = reads(before, after) / len(latencies)
        return {"rate": len(latencies) / elapsed * 1e9, **of_latencies(latencies), "trips": trips}

    return slice
