"""A mixed load on a real server over a network with faults, for minutes; then schedules, and a fuzzer.

``python -m tests.promises.soak --minutes 10`` ends with PASS, or with FAIL and the reasons, and leaves a chart in
``tests/promises/soak/out``.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final

import psutil

from ratelimit import ProxyManager
from tests.promises.soak import fuzz
from tests.promises.soak.faults import FaultyProxy
from tests.promises.soak.load import DELAYED, KINDS, LEDGER, LONGEST, RATE, RATE_BURST, RATE_TOKENS, limits_of, serve
from tests.promises.soak.verdict import growth, ledger, panels, trend
from tests.support.servers import RedisServer, find_server

NAME: Final = "soak"
# Written down before it is answered, so that a restart loses nothing that was acknowledged.
DURABLE: Final = ("--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0")
TIMEOUTS: Final = "socket_timeout=0.5&socket_connect_timeout=0.5&max_connections=20"
LONGEST_DECISION: Final = 30.0  # seconds; half a second is a timeout, and a crowd has to wait for others
END: Final = 60
BEHIND: Final = 0.1  # seconds that a client of a busy machine may be behind the server
MEGABYTE: Final = 2**20
SLACK: Final = {"memory, MB": 8.0, "connections": 8.0, "open files": 12.0}
SCHEDULES_A_MINUTE: Final = 100_000


@dataclass
class Run:
    """What has been seen of a run so far."""

    begin: float = field(default_factory=time.monotonic)
    samples: dict[str, dict[str, list[tuple[float, float]]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    faults: list[tuple[float, float]] = field(default_factory=list)
    books: dict[str, Counter[str]] = field(default_factory=dict)
    ended: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    @property
    def now(self) -> float:
        return time.monotonic() - self.begin

    def hear(self, kind: str, report: Connection) -> None:
        """Take in what a process has sent."""
        try:
            while report.poll():
                what, told = report.recv()
                if what == "error":
                    self.reasons.append(f"{kind}: {told}")
                else:
                    self.books[kind] = Counter(told)
                if what == "end":
                    self.ended.add(kind)
        except (EOFError, OSError):
            if kind not in self.ended:
                self.ended.add(kind)
                self.reasons.append(f"{kind}: the process died")

    def total(self, entry: str) -> int:
        return sum(book[entry] for book in self.books.values())


def storm(chance: random.Random, proxy: FaultyProxy, server: RedisServer, run: Run) -> Generator[None]:
    """Faults, one after the other, each followed by a calm; a step takes about a second.

    To close the generator ends a fault that is under way.
    """
    while True:
        kind = chance.choice(["delays", "losses", "reset", "silence", "restart", "crash"])
        begin = run.now
        if kind == "delays":
            proxy.delay = 0.05
            yield from [None] * 3
        elif kind == "losses":
            proxy.losses = 0.02
            yield from [None] * 3
        elif kind == "reset":
            proxy.reset()
        elif kind == "silence":
            proxy.silent.set()
            yield
        elif kind == "restart":
            server.restart()
        else:
            server.kill()
            try:
                yield
            finally:
                server.restart()
        proxy.calm()
        run.faults.append((begin, run.now - begin))
        yield from [None] * chance.randrange(2, 5)


def sample(run: Run, server: RedisServer, processes: dict[str, Any]) -> None:
    """Note what is used, and how far everybody has got."""
    for kind, process in processes.items():
        if process.is_alive():
            seen = psutil.Process(process.pid)
            run.samples["memory, MB"][kind].append((run.now, seen.memory_info().rss / MEGABYTE))
            run.samples["open files"][kind].append((run.now, seen.num_fds()))
        if kind in run.books:
            run.samples["turns"][kind].append((run.now, run.books[kind]["turns"]))
    try:
        run.samples["memory, MB"]["server"].append((run.now, psutil.Process(server.pid).memory_info().rss / MEGABYTE))
        with server.client(socket_timeout=1, client_name=f"{NAME}-observer") as client:
            named = [one for one in client.client_list() if one["name"] == NAME]
        run.samples["connections"]["server"].append((run.now, len(named)))
    except Exception as error:  # noqa: BLE001  # it is down
        print(f"{run.now:6.0f} s  the server: {type(error).__name__}", flush=True)


def load(minutes: float, seed: int) -> list[str]:
    """Run the load, and judge it; what was wrong."""
    binary = find_server()
    if binary is None:
        return ["there is no redis-server on this machine"]
    chance, run, spawn = random.Random(seed), Run(), get_context("spawn")
    stop = spawn.Event()
    with RedisServer.start(binary, *DURABLE) as server, FaultyProxy(server.port, chance) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0?client_name={NAME}&{TIMEOUTS}"
        with server.client() as client:
            begin = float(client.time()[0])
        processes: dict[str, Any] = {}
        reports: dict[str, Connection] = {}
        for number, kind in enumerate(KINDS):
            reports[kind], theirs = spawn.Pipe(duplex=False)
            processes[kind] = spawn.Process(target=serve, args=(kind, url, seed + number, stop, theirs), daemon=True)
            processes[kind].start()
            theirs.close()
        faults = storm(chance, proxy, server, run)
        while run.now < minutes * 60 and len(run.ended) < len(KINDS):
            next(faults)
            time.sleep(1)
            for kind, report in reports.items():
                run.hear(kind, report)
            sample(run, server, processes)
        # The end may come in the middle of a fault, while the server is down for instance.
        faults.close()
        proxy.calm()
        stop.set()
        patience = run.now + END
        while len(run.ended) < len(KINDS) and run.now < patience:
            for kind, report in reports.items():
                run.hear(kind, report)
            time.sleep(0.1)
        for kind, process in processes.items():
            process.join(max(5, patience - run.now))
            if process.is_alive():
                run.reasons.append(f"{kind}: does not end")
                process.kill()
        # What is known is shown before it is judged, which asks the server once more.
        show(run)
        judge(run, server, begin)
    return run.reasons


def show(run: Run) -> None:
    """Draw the chart, and print the books and how far what is measured went up or down."""
    fuzz.OUT.mkdir(parents=True, exist_ok=True)
    chart = fuzz.OUT / "soak.svg"
    chart.write_text(panels(run.samples, run.faults))
    for kind, book in run.books.items():
        print(f"{kind}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(book.items())))
    for group in SLACK:
        trends = {name: trend(series) for name, series in run.samples[group].items()}
        print(
            f"{group}: " + ", ".join(f"{name} {seen[0]:.0f} to {seen[1]:.0f}" for name, seen in trends.items() if seen)
        )
    print(f"{len(run.faults)} faults in {run.now:,.0f} s; chart: {chart}", flush=True)


def judge(run: Run, server: RedisServer, begin: float) -> None:
    """Compare the books with what is stored, and the samples with each other."""
    with ProxyManager.from_url(f"{server.url}?socket_timeout=10", limits_of) as manager, server.client() as client:
        stored = {key: manager.snapshot(key).consumed_tokens for key in (LEDGER, DELAYED)}
        seconds = float(client.time()[0]) + 1 - begin
    run.reasons += ledger(LEDGER, run.total(LEDGER), stored[LEDGER], run.total(f"{LEDGER} in doubt"))
    if stored[DELAYED] < run.total(DELAYED):  # those in doubt are rather stored twice
        run.reasons.append(f"{DELAYED}: {run.total(DELAYED)} tokens acknowledged, {stored[DELAYED]} stored")
    most = RATE_BURST + RATE_TOKENS * (seconds + BEHIND)
    if run.total(RATE) > most:
        run.reasons.append(f"{RATE}: {run.total(RATE)} tokens admitted, where the limit allows {most:.0f}")
    for group, slack in SLACK.items():
        for name, series in run.samples[group].items():
            run.reasons += growth(f"{group} of {name}", series, slack)
    for kind, series in run.samples["turns"].items():
        if series[-1][1] <= series[len(series) // 2][1]:
            run.reasons.append(f"{kind}: nobody gets an answer any more")
    for kind, book in run.books.items():
        if book[LONGEST] > LONGEST_DECISION * 1000:
            run.reasons.append(f"{kind}: a decision took {book[LONGEST] / 1000:.0f} s")


def simulation(schedules: int, seed: int) -> list[str]:
    """Schedules of a simulated store, if there is a simulation here."""
    if importlib.util.find_spec("tests.promises.simulation") is None:
        print("there is no simulation here")
        return []
    command = [sys.executable, "-m", "tests.promises.simulation", "--schedules", str(schedules), "--seed", str(seed)]
    done = subprocess.run(command, cwd=fuzz.ROOT, check=False)
    return [] if done.returncode == 0 else ["the simulation: see above"]


def main() -> int:
    """Run all steps; 1 where one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of load; a tenth of it, and more, is for the fuzzer")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--only", choices=["load", "simulation", "fuzz"], help="a single step")
    options = parser.parse_args()
    steps: dict[str, Callable[[], list[str]]] = {
        "load": lambda: load(options.minutes, options.seed),
        "simulation": lambda: simulation(round(options.minutes * SCHEDULES_A_MINUTE), options.seed),
        "fuzz": lambda: fuzz.run(max(20, options.minutes * 6)),
    }
    print(f"seed {options.seed}", flush=True)
    verdicts: list[str] = []
    failed = False
    for name, step in steps.items():
        if options.only in (None, name):
            print(f"== {name}", flush=True)
            try:
                reasons = step()
            except Exception as error:  # noqa: BLE001  # the verdict of the other steps is wanted as well
                traceback.print_exc(file=sys.stdout)
                reasons = [f"{type(error).__name__}: {error}"]
            failed |= bool(reasons)
            verdicts += [f"{'FAIL' if reasons else 'PASS'} {name}", *(f"  {reason}" for reason in reasons)]
    # All of it comes at the end, where a log that is cut off still has it.
    print("\n".join(verdicts), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
