"""``python -m benchmarks.integrations``: what a limit adds to a request in each framework, and the page about it."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import charts, integration_goals, report, service
from benchmarks.applications import ALONE, BARE, FRAMEWORKS, REDIS_PY, Framework, addresses
from benchmarks.command import Progress, allow_many_files, environment, terminated
from benchmarks.measure import USED_UP
from benchmarks.model import METRICS, PER_MINUTE, Contender, Entrant, Kind, Limit, Results, Setup, Table
from benchmarks.overhead import BATCH, Load, measure
from benchmarks.server import Server, binaries, running

HERE = Path(__file__).parent
PACKAGES = (
    "redis",
    "hiredis",
    "starlette",
    "fastapi",
    "flask",
    "django",
    "djangorestframework",
    "slowapi",
    "fastapi-limiter",
    "flask-limiter",
    "django-ratelimit",
    "uvicorn",
    "uvloop",
    "limits",
    "pyrate-limiter",
)
ROUNDS = 5
CLIENTS = 100
ROOMY: Final = Limit(1_000_000, 60)
TIGHT: Final = Limit(1, 86_400)


@dataclass(frozen=True)
class Scenario:
    """What is asked of the applications of each framework."""

    id: str
    title: str
    granted: bool = True
    tasks: int = 1
    in_memory: bool = False

    def contenders(self, framework: Framework) -> list[Contender]:
        if self.tasks > 1 and not framework.asynchronous:
            return []
        return [each for each in framework.contenders if not self.in_memory or each.name != REDIS_PY]

    def load(self, framework: Framework, server: Server, seconds: float) -> Load:
        limits = (ROOMY if self.granted else TIGHT,)
        return Load(
            Setup("memory://" if self.in_memory else server.url, limits, self.tasks),
            addresses(CLIENTS),
            asynchronous=framework.asynchronous,
            tasks=self.tasks,
            rounds=ROUNDS,
            seconds=seconds,
            granted=self.granted,
        )


SCENARIOS: Final = (
    Scenario("admitted", "all admitted"),
    Scenario("refused", "all refused", granted=False),
    Scenario("admitted-100", "100 at a time, all admitted", tasks=100),
    Scenario("refused-100", "100 at a time, all refused", granted=False, tasks=100),
    Scenario("memory", "in memory, all admitted", in_memory=True),
)


GOALS: Final = integration_goals.goals(
    {
        framework.id: [(each.id, each.title) for each in SCENARIOS if each.contenders(framework)]
        for framework in FRAMEWORKS
    }
)


def table_id(framework: Framework, scenario: Scenario) -> str:
    return f"{framework.id}-{scenario.id}"


def run(results: Results, server: Server, seconds: float, only: Sequence[str], tell: Callable[[str], None]) -> None:
    """Fill a table for each framework in each scenario."""
    for framework in FRAMEWORKS:
        for scenario in SCENARIOS if not only or framework.id in only else ():
            contenders = scenario.contenders(framework)
            if not contenders:
                continue
            title = f"{framework.title}, {scenario.title}"
            table = Table(table_id(framework, scenario), framework.id, title, "overhead_us")
            results.tables[table.id] = table
            try:
                measure(table, contenders, scenario.load(framework, server, seconds), server, tell)
            except ImportError as error:  # of the framework itself
                table.failures[BARE] = [f"{type(error).__name__}: {error}"]


def entrants() -> dict[str, Entrant]:
    """Return the entrants by name, without the bare application: nothing is compared with that."""
    found = {each.name: each.entrant for framework in FRAMEWORKS for each in framework.contenders}
    del found[BARE]
    return {each.name: each.entrant for each in service.contenders()} | found


NOTES: Final = """\
What a limit adds to a request: the time of a small application with it, less that of the same application without it.
The applications are called in this process as a server would call them (WSGI, ASGI), without one: no socket between
client and application, so that what is added can be seen. Ratios within one run are what counts.

- In each table all applications are open together, and are asked in turns of {batch} requests one after the other, or
  of one each of {tasks} tasks of one event loop. What is added is the difference within a turn, of medians where it is
  one request after the other; shown is the median of {rounds} rounds, together {seconds} s, of the medians of their
  turns. Each turn begins with another application. `±` is half the distance from the worst round to the best.
- {clients} clients, by address, all of which have been there before. A limit of 1,000,000 per minute that is never
  reached, or of one per day that is used up. Answers are counted: 200 and 429, and nothing else, as the scenario wants.
- The same Redis for all, over TCP to 127.0.0.1, with redis-py and hiredis. `round trips` is what the server has read.
- `to floor` compares with redis-py's `evalsha` of a swap of two states, which decides nothing; `to best peer` with the
  best of the other libraries in the same framework. `bucket alone` is this library without a framework, with the same
  result. In memory there is no Redis: that is what the integration costs by itself.
- This library sends `RateLimit-Policy` and `RateLimit` with every answer, and a problem of RFC 9457 with a refusal. Its
  peers send no fields unless they say `headers`, for which they ask Redis twice more; `fastapi-limiter` and
  `django-ratelimit` have none.
- `slowapi` blocks the event loop while Redis answers: requests that come together wait for each other.
  `fastapi-limiter` admits one request at a time, behind a lock; by itself it has one bucket for all clients, and is
  given a factory of buckets here. `django-ratelimit` decorates sync views only, which Django calls in threads under
  ASGI, each of which connects to Redis. Django does without its signal handlers for databases, which it would call in
  threads as well. REST framework's own throttle keeps a list of the times of all requests of a client, which is of some
  hundred here; it neither counts refused requests nor decides in one step.
"""


SERVICE_NOTE: Final = (
    f"An application of FastAPI, run by uvicorn with {service.WORKERS} workers, and {service.CLIENTS} clients that ask "
    f"again as soon as they are answered, over connections that stay open, from a process of their own on the same "
    f"machine. {service.USERS:,} users, by the address that a proxy would give. All services of a table run at the "
    f"same time and are asked in turns, {service.ROUNDS} rounds of {service.SECONDS} s each; shown are medians. With "
    f"`{PER_MINUTE.text}`, {USED_UP} users are used up and send a tenth of the requests. `to floor` compares with the "
    "application without a limit."
)


def page(results: Results, drawn: Mapping[str, str], seconds: float) -> str:
    """The page, whose charts are in ``charts/integrations/`` beside it."""
    notes = NOTES.format(batch=BATCH, tasks=CLIENTS, rounds=ROUNDS, seconds=seconds, clients=CLIENTS)
    parts = [
        "# What an integration costs",
        "Made by `make bench-integrations`, which overwrites it. [RESULTS.md](RESULTS.md) is about the limiters alone.",
        notes.rstrip(),
        "\n".join(["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in results.environment.items()]),
        "## Goals",
        report.goals_table(results, GOALS),
        *_obstacles(results),
        "## Microseconds per request",
        summary(results),
        *(f"![{name}](charts/integrations/{name})" for name in drawn),
    ]
    for framework in FRAMEWORKS:
        parts += _section(results, framework.id, framework.title)
    parts += _section(results, service.FAMILY, "A service", SERVICE_NOTE)
    return "\n\n".join(parts) + "\n"


def _obstacles(results: Results) -> list[str]:
    found = report.obstacles(results, GOALS)
    if not found:
        return []
    return ["What stands in the way, by the medians of this run:", "\n".join(f"- {each}" for each in found)]


def _section(results: Results, family: str, title: str, *notes: str) -> list[str]:
    tables = [table for table in results.tables.values() if table.family == family]
    parts = [f"## {title}", *notes] if tables else []
    for table in tables:
        parts.append(f"### {report.sentence(table.title)}")
        if table.rows:
            parts.append(report.table_of(results, table))
        parts += [report.failed(table, name) for name in table.failures]
    return parts


def summary(results: Results) -> str:
    """What each integration adds, beside the best peer of its framework."""
    shown = SCENARIOS[:3]
    header = ["", "bare"]
    for scenario in shown:
        header += [scenario.title, "to best peer"]
    rows: list[list[str]] = []
    for framework in FRAMEWORKS:
        tables = [results.tables.get(table_id(framework, scenario)) for scenario in shown]
        for contender in framework.contenders:
            if contender.entrant.kind is not Kind.OURS or contender.name in ALONE:
                continue
            cells = [cell for table in tables for cell in _beside_best(results, table, contender.name)]
            bare = None if tables[0] is None else tables[0].median(BARE, "request_us")
            if any(cells):
                name = contender.name.partition(", ")[2]
                rows.append([f"{framework.title}: {name}", "" if bare is None else f"{bare:,.0f}", *cells])
    return report.markdown(header, rows)


def _beside_best(results: Results, table: Table | None, name: str) -> list[str]:
    own = None if table is None else table.median(name)
    if table is None or own is None:
        return ["", ""]
    shown = METRICS[table.primary].form.format(own)
    best = results.best(table)
    peer = None if best is None else table.median(best)
    return [shown, f"{own / peer:.2f}x ({best})" if peer else ""]


def draw(results: Results) -> dict[str, str]:
    """A chart for each scenario, by the name of its file."""
    drawn: dict[str, str] = {}
    for scenario in SCENARIOS:
        groups = {
            framework.title: report.bars_of(results, table, "overhead_us")
            for framework in FRAMEWORKS
            if (table := results.tables.get(table_id(framework, scenario))) is not None
        }
        if any(groups.values()):
            title = f"What a limit adds to a request, {scenario.title}"
            drawn[f"{scenario.id}.svg"] = charts.bars(title, "µs", groups)
    tables = [table for table in results.tables.values() if table.family == service.FAMILY and table.rows]
    for metric, unit in (("requests", "requests/s"), ("p99_us", "p99 µs")) if tables else ():
        groups = {table.title: report.bars_of(results, table, metric) for table in tables}
        drawn[f"service-{metric}.svg"] = charts.bars("A service", unit, groups)
    return drawn


def write(results: Results, path: Path, seconds: float) -> None:
    directory = path.parent / "charts" / "integrations"  # of its own, as the other page empties its own
    directory.mkdir(parents=True, exist_ok=True)
    drawn = draw(results)
    for old in directory.glob("*.svg"):
        old.unlink()
    for name, svg in drawn.items():
        (directory / name).write_text(svg)
    path.write_text(page(results, drawn, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.integrations", description=__doc__)
    names = [*(framework.id for framework in FRAMEWORKS), service.FAMILY]
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(names)}")
    parser.add_argument("--seconds", type=float, default=2.5, help="for each table")
    arguments = parser.parse_args()
    only: list[str] = arguments.only.split(",") if arguments.only else []
    if unknown := set(only) - set(names):
        parser.error(f"no such framework: {', '.join(sorted(unknown))}")
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, terminated)
    allow_many_files()
    results = Results(entrants(), environment=environment(PACKAGES))
    try:
        with running(binaries()[0]) as server:
            results.environment["server"] = server.version
            tell = Progress(begin)
            run(results, server, arguments.seconds, only, tell)
            if not only or service.FAMILY in only:
                rounds = max(1, round(service.ROUNDS * min(1.0, arguments.seconds / parser.get_default("seconds"))))
                service.run(results, server, rounds, service.SECONDS, tell)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    took = time.monotonic() - begin
    results.environment["took"] = f"{took / 60:.1f} minutes"
    whole = not only and arguments.seconds == parser.get_default("seconds")
    path = HERE / ("INTEGRATIONS.md" if whole else "out/INTEGRATIONS.md")
    write(results, path, arguments.seconds)
    print(f"\n{report.goals_table(results, GOALS)}\n\n{summary(results)}")
    print(f"\n{took:.0f} s; the page is {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
