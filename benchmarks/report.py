"""The results as a page of Markdown with charts beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import charts
from benchmarks.goals import GOALS, Goal
from benchmarks.model import METRICS, Kind, Results, Table, spread


@dataclass(frozen=True)
class Family:
    """A section of the page.

    :param charts: metrics that get a chart of bars each; lines over the number of keys where ``over_keys``.
    """

    title: str
    note: str
    charts: tuple[str, ...] = ("rate",)
    over_keys: bool = False


FAMILIES: Final = {
    "sync": Family(
        "Threads",
        "Threads of one process in a closed loop. On one key, the floors use a key for each thread, so that their "
        "swaps succeed; elsewhere, one that another thread has overtaken counts as well.",
    ),
    "asyncio": Family(
        "asyncio",
        "Tasks of one event loop in a closed loop. `self-limiters` hands out times to sleep until, at least some of a "
        "millisecond, and cannot refuse; it is shown where tasks share a key. On one key, a swap of the floor that "
        "another task has overtaken counts as well.",
    ),
    "processes": Family(
        "Processes on one key",
        "Each process asks in a closed loop, with one thread and one connection. Round trips are the server's reads "
        "per decision; `most round trips` is of single decisions of this library, counted by the kernel in a slice of "
        "its own. A share is what one process got of all decisions. The processes of the floors, and of the core over "
        "a bare socket, use a key each.",
        ("rate", "p99_us", "share"),
    ),
    "shared": Family(
        "Processes that share keys",
        "As the workers of a service, whose requests go to any of them: each process visits 1,000 keys at random, "
        "after a warm-up in which it has visited each of them once. Round trips are the server's reads per decision.",
        ("rate", "p99_us", "trips"),
    ),
    "rejections": Family(
        "Rejections",
        "A limit of 10 per day that is exhausted: every answer is no.",
    ),
    "bandwidths": Family(
        "Several bandwidths",
        "1,000,000/second; then also 60,000,000/minute; then also two per hour and per day. `limits`, `throttled-py` "
        "and the textbook script know one limit at a time, and are called once for each, not in one step.",
    ),
    "memory": Family(
        "In-process",
        "No server: the memory store of each library. The log of `pyrate-limiter` and the moving window of `limits` "
        "store an entry for each decision.",
    ),
    "latency": Family(
        "A slower network",
        "Through a process that holds every byte back, half of the time in each direction, and that takes processor "
        "time of its own.",
    ),
    "server": Family(
        "What a decision costs the server",
        "`server µs` is the time that the server says it spent in the commands of clients (`INFO commandstats`), "
        "scripts with all that they run; `server CPU` is its processor time, which includes reading and writing "
        "sockets. 1 thread, 1,000 keys, all of them known.",
        ("server_us",),
    ),
    "bytes": Family(
        "Memory of the server",
        "By `MEMORY USAGE` of the keys of a bucket, and by what `used_memory` grew with many of them, after one "
        "decision each.",
        ("used_bytes",),
    ),
    "keys": Family(
        "Many keys",
        "One process visits keys at random, all alike; before, it visits them in order for two seconds, so that it has "
        "seen all keys only where there are few. The server was filled by copying one bucket. One contender after "
        "the other, not interleaved, three slices each. `client MiB grown` includes the connections and the lists of "
        "the measurement.",
        ("rate", "trips"),
        over_keys=True,
    ),
}

_NOTES: Final = """\
Ratios within one run are what counts; absolute numbers depend on the machine, and on what else it does.

- A closed loop: each thread, task or process asks again as soon as it is answered.
- Slices of {seconds} s (longer for 1,000 tasks, and for processes), {rounds} rounds, fewer where a scenario takes
  long; each round begins with another contender. Every slice starts with an empty server, new connections, and a
  warm-up that visits every key. Shown are medians over the rounds, and `±`, half the distance from the worst round to
  the best.
- All contenders have the same limit, 1,000,000 per second, where nothing else is said; it is never reached. Answers are
  counted: a contender that refuses where it should grant, or the other way round, has failed. One that has failed
  loses the round, and at the second time the scenario.
- redis-py with hiredis for all of them, TCP to 127.0.0.1, without TLS; as many connections as threads or tasks for the
  peers, and the pool that `from_url` gives for this library; timeouts of 30 s.
- `to floor` compares with the better floor of the table: a bare socket with hiredis, or redis-py's `evalsha`, which
  send the command that replaces a state of 107 bytes and do nothing else. `to best peer` compares with the best of
  published libraries and textbook scripts. The goals are about published libraries, and also give the ratio to the
  better of the textbook scripts; for 32 processes they are about both. For times and sizes less is better, also as a
  ratio.
- `core ...` and `shared connection alone` are parts of this library without the rest, which show where its time
  goes; none of them is a limiter that anybody could use.
- `slowapi` decides by `limits`, `fastapi-limiter` by `pyrate-limiter`; they are not measured apart here. What they and
  the integrations of this library add to a request is in [INTEGRATIONS.md](INTEGRATIONS.md).
"""


def write(results: Results, page: Path, *, command: str, rounds: int, seconds: float) -> None:
    """Write the page, and its charts in ``charts/`` beside it."""
    directory = page.parent / "charts"
    directory.mkdir(parents=True, exist_ok=True)
    drawn = draw(results)
    for old in directory.glob("*.svg"):
        old.unlink()
    for name, svg in drawn.items():
        (directory / name).write_text(svg)
    page.write_text(render(results, list(drawn), command=command, rounds=rounds, seconds=seconds))


def render(results: Results, drawn: Sequence[str], *, command: str, rounds: int, seconds: float) -> str:
    """The page."""
    parts = [
        "# Benchmarks",
        f"Made by `{command}`, which overwrites this page.",
        _NOTES.format(rounds=rounds, seconds=seconds).rstrip(),
        "\n".join(["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in results.environment.items()]),
        "## Goals",
        goals_table(results),
    ]
    if found := obstacles(results):
        parts += ["What stands in the way, by the medians of this run:", "\n".join(f"- {each}" for each in found)]
    for id, family in FAMILIES.items():
        tables = [table for table in results.tables.values() if table.family == id and (table.rows or table.failures)]
        if not tables:
            continue
        parts += [f"## {family.title}", family.note]
        parts += [f"![{family.title}](charts/{name})" for name in drawn if name.split("-", 1)[0] == id]
        for table in tables:
            parts += [f"### {sentence(table.title)}", table_of(results, table)]
            parts += [failed(table, name) for name in table.failures]
    return "\n\n".join(parts) + "\n"


def failed(table: Table, name: str) -> str:
    """What is said of a contender that has lost rounds."""
    reasons = table.failures[name]
    if not table.rows.get(name):
        return f"Left out: {name} ({reasons[0]})."
    return f"{name} has failed in {len(reasons)} of {len(reasons) + len(table.rows[name])} rounds ({reasons[0]})."


def goals_table(results: Results, goals: Sequence[Goal] = GOALS) -> str:
    rows: list[list[str]] = []
    for goal in goals:
        found = goal.find(results)
        measured = "" if found is None else goal.form.format(found.value)
        if found is not None and found.against:
            measured += f" ({found.against})"
        rows.append([goal.text, goal.wanted, measured, goal.verdict(found)])
    return markdown(["goal", "wanted", "measured", "verdict"], rows)


def obstacles(results: Results, goals: Sequence[Goal] = GOALS) -> list[str]:
    """What is known of the goals that are not reached."""
    missed = [goal for goal in goals if goal.verdict(goal.find(results)) == "NOT reached"]
    return list(dict.fromkeys(found for goal in missed if (found := goal.obstacle(results)) is not None))


def table_of(results: Results, table: Table) -> str:
    """The contenders of a scenario, the best first, with their ratios."""
    metric = METRICS[table.primary]
    others = [name for name in table.metrics() if name != table.primary]
    floor = table.median(best) if (best := results.best(table, wanted=lambda each: each.kind is Kind.FLOOR)) else None
    peer = max(0.0, table.median(best) or 0.0) if (best := results.best(table)) else None
    header = ["", metric.header, "±", *(["to floor"] if floor else []), *(["to best peer"] if peer else [])]
    rows: list[list[str]] = []
    names = sorted(table.rows, key=lambda name: table.median(name) or 0.0, reverse=metric.more_is_better)
    for name in names:
        value = table.median(name) or 0.0
        shown = f"**{name}**" if name in results.entrants and results.entrants[name].kind is Kind.OURS else name
        row = [shown, metric.form.format(value), f"{spread(table.values(name, table.primary)):.0%}"]
        row += [f"{value / base:.2f}x" for base in (floor, peer) if base]
        for other in others:
            median = table.median(name, other)
            row.append("" if median is None else METRICS[other].form.format(median))
        rows.append(row)
    return markdown([*header, *(METRICS[other].header for other in others)], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns that line up in the source as well; numbers to the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    right = [column > 0 and any(row[column][:1].isdigit() for row in rows) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        "-" * (width + 1) + (":" if to_right else "-") for width, to_right in zip(widths, right, strict=True)
    )
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])


def draw(results: Results) -> dict[str, str]:
    """The charts, by the names of their files."""
    drawn: dict[str, str] = {}
    for id, family in FAMILIES.items():
        tables = [table for table in results.tables.values() if table.family == id and table.rows]
        for metric in family.charts if tables else ():
            title, header = family.title, METRICS[metric].header
            if family.over_keys:
                drawn[f"{id}-{metric}.svg"] = charts.lines(title, header, _over_keys(tables, metric), "keys")
            else:
                groups = {table.title: bars_of(results, table, metric) for table in tables}
                drawn[f"{id}-{metric}.svg"] = charts.bars(title, header, groups, METRICS[metric].form)
    return drawn


def bars_of(results: Results, table: Table, metric: str) -> list[charts.Bar]:
    """The contenders of a scenario, the best first."""
    made: list[charts.Bar] = []
    for name in table.rows:
        values = table.values(name, metric)
        if values and name in results.entrants:
            median = table.median(name, metric) or 0.0
            made.append(charts.Bar(name, results.entrants[name].kind, median, min(values), max(values)))
    return sorted(made, key=lambda bar: bar.value, reverse=METRICS[metric].more_is_better)


def _over_keys(tables: Sequence[Table], metric: str) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        number = float(table.id.rpartition("-")[2])
        for name in table.rows:
            if (value := table.median(name, metric)) is not None:
                series.setdefault(name, []).append((number, value))
    return series


def sentence(title: str) -> str:
    return title[:1].upper() + title[1:]
