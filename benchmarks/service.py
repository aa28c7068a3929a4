"""A service: workers of uvicorn behind one port, and many clients, with and without a limit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from benchmarks.applications import addresses
from benchmarks.applications.fastapi import SERVED
from benchmarks.http_load import Clients, Visit
from benchmarks.measure import USED_UP, Turn, WrongAnswerError, check, expected, interleaved, shares, visits
from benchmarks.model import (
    NEVER_REACHED,
    OURS,
    PER_MINUTE,
    Contender,
    Entrant,
    Kind,
    Plan,
    Results,
    Sample,
    Table,
    of_latencies,
)
from benchmarks.served import LIMIT, NAME, URL
from benchmarks.server import Server

WORKERS: Final = 4
CLIENTS: Final = 200
USERS: Final = 1_000
ROUNDS: Final = 5
SECONDS: Final = 1.5
WARM_UP: Final = 0.5
PLANS: Final = (NEVER_REACHED, PER_MINUTE)
WITHOUT, LIMITED, *_ = SERVED
FAMILY: Final = "service"
_START_SECONDS: Final = 60
_ROOT: Final = Path(__file__).parents[1]


def contenders() -> list[Contender]:
    """Return the applications; the one without a limit is the floor."""
    kinds = {WITHOUT: Kind.FLOOR}
    return [
        Contender(Entrant(name, kinds.get(name, Kind.OURS if name.startswith(OURS) else Kind.PEER))) for name in SERVED
    ]


def run(results: Results, server: Server, rounds: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Fill a table for each plan, with all services running, and asked in turns."""
    clients = Clients()
    try:
        for plan in PLANS:
            title = f"{WORKERS} workers, {CLIENTS} clients, {USERS:,} users"
            table = Table(plan.table(FAMILY), FAMILY, plan.title(title), "requests")
            results.tables[table.id] = table
            with ExitStack() as stack:
                turns: list[Turn] = []
                for contender in contenders():
                    tell(f"{table.title}: starting, {contender.name}")
                    try:
                        port = stack.enter_context(served(contender.name, server, plan))
                    except RuntimeError as error:
                        table.failures[contender.name] = [f"{type(error).__name__}: {error}"]
                    else:
                        turns.append(Turn(table, contender, _slice(clients, server, plan, port, seconds)))
                interleaved(turns, rounds, tell)
    finally:
        clients.close()


def _slice(clients: Clients, server: Server, plan: Plan, port: int, seconds: float) -> Callable[[Contender], Sample]:
    users = addresses(USERS)
    used_up = [*users[:USED_UP]] * (plan.limits[0].capacity + 20) if plan.refused else []
    # The users that are used up would come one after the other otherwise.
    (order,) = shares(visits(users, plan), 1)
    visit = Visit(port, CLIENTS, order, used_up, WARM_UP, seconds)

    def slice(contender: Contender) -> Sample:
        server.flush()
        answers = clients.visit(visit)
        if unknown := set(answers.statuses) - {200, 429}:
            raise WrongAnswerError(f"answers have the status {min(unknown)}")
        requests = answers.statuses.total()
        check(answers.statuses[200], requests, granted=expected(contender, plan))
        sample = {"requests": requests / answers.seconds, **of_latencies(answers.latencies)}
        return {**sample, "refused": answers.statuses[429] / requests} if plan.refused else sample

    return slice


@contextmanager
def served(name: str, server: Server, plan: Plan) -> Generator[int]:
    """Run an application behind a free port of this machine, for the time of this block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (limit,) = plan.limits
    command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.served:application"]
    command += ["--port", str(port), "--workers", str(WORKERS), "--no-access-log"]
    environment = {**os.environ, NAME: name, URL: server.url, LIMIT: f"{limit.tokens} {limit.seconds}"}
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that its workers can be ended with it
        )
        try:
            _started(process, Path(log.name))
            yield port
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _started(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if log.read_text().count("Application startup complete") >= WORKERS:
            return
        time.sleep(0.1)
    lines = log.read_text().splitlines() or ["no word from it"]
    raise RuntimeError(f"the service does not start: {lines[-1]}")
