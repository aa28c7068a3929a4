"""The results as a page of Markdown with charts beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import charts
from benchmarks.goal import Goal
from benchmarks.goals import GOALS
from benchmarks.measure import USED_UP
from benchmarks.model import METRICS, OURS, PEOPLES, PER_MINUTE, Kind, Results, Table, spread
from benchmarks.processes import TASKS
from benchmarks.several import MILLISECONDS


@dataclass(frozen=True)
class Growth:
    """A chart of lines, over a number in the ids of tables.

    :param id: the end of the name of its file.
    :param over: what the number is one of.
    :param tables: a regular expression for the ids, whose only group is the number.
    """

    id: str
    metric: str
    over: str
    tables: str
    title: str


@dataclass(frozen=True)
class Family:
    """A section of the page.

    :param charts: metrics that get a chart of bars each, with all tables.
    """

    title: str
    note: str
    charts: tuple[str, ...] = ("rate",)
    growth: tuple[Growth, ...] = ()


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
        "another task has overtaken counts as well. With 1,000 and 10,000 tasks this library has 2 s for each "
        "decision, and its errors are counted; its peers have 30 s, and need a connection for each task, with which "
        "they do not take part at 10,000.",
        growth=(Growth("tasks", "rate", "tasks", r"asyncio-(\d+)-1000", "1,000 keys, more and more tasks"),),
    ),
    "processes": Family(
        "Processes on one key",
        "Each process asks in a closed loop, with one thread and one connection. Round trips are the server's reads "
        "per decision; `most round trips` is of single decisions of this library, counted by the kernel in a slice of "
        "its own. A share is what one process got of all decisions. The processes of the floors, and of the core over "
        "a bare socket, use a key each.",
        ("share",),
        (
            Growth("rate", "rate", "processes", r"processes-(\d+)", "One key, more and more processes"),
            Growth("p99_us", "p99_us", "processes", r"processes-(\d+)", "One key, more and more processes"),
        ),
    ),
    "shared": Family(
        "Processes that share keys",
        "As the workers of a service, whose requests go to any of them: each process visits 1,000 keys at random, "
        "after a warm-up in which it has visited each of them once, as far as half a second allows. Round trips are "
        f"the server's reads per decision. asyncio processes have {TASKS} tasks each: what they send together is one "
        "read, so that `scripts or commands` are what the server got in a slice of its own, by its `MONITOR`.",
        (),
        tuple(
            Growth(
                "-".join((*prefix, *plan, metric)),
                metric,
                "processes",
                "-".join(("shared", *prefix, r"(\d+)", *plan)),
                ", ".join(("1,000 shared keys", *prefix, *text)),
            )
            for prefix in ((), ("asyncio",))
            for plan, text in (((), ()), ((PER_MINUTE.id,), (PER_MINUTE.text,)))
            for metric in ("rate", "p99_us")
        ),
    ),
    "rejections": Family(
        "Rejections",
        "A limit of 10 per day that is exhausted: every answer is no.",
    ),
    "bandwidths": Family(
        "Several bandwidths",
        "1,000,000/second; then also 60,000,000/minute; then also two per hour and per day. `limits` and the textbook "
        "script know one limit at a time: with one thread they are called once for each, not in one step, and with "
        "tasks they take part where there is one limit.",
        (),
        tuple(
            Growth(f"{kind}-rate", "rate", "bandwidths", rf"bandwidths-{kind}-(\d)", f"1,000 keys, {title}")
            for kind, title in (("asyncio", "100 tasks"), ("sync", "1 thread"))
        ),
    ),
    "memory": Family(
        "In-process",
        "No server: the memory store of each library. The log of `pyrate-limiter` and the moving window of `limits` "
        "store an entry for each decision. Of people's limits only 1,000 per day can be shown: the others are used up "
        "at once at these rates.",
    ),
    "latency": Family(
        "A slower network",
        "Through a process that holds every byte back, half of the time in each direction, and that takes processor "
        "time of its own.",
    ),
    "several": Family(
        "Several buckets",
        "`all_of` charges a bucket of each of several managers in one decision. Beside it the same buckets are charged "
        "by a decision each, one after the other. The network is that of the section before.",
        (),
        tuple(
            Growth(f"{milliseconds:g}-p50_us", "p50_us", "buckets", rf"several-{milliseconds:g}-(\d)", title)
            for milliseconds in MILLISECONDS
            for title in (f"{milliseconds:g} ms more per round trip, more and more buckets",)
        ),
    ),
    "server": Family(
        "What a decision costs the server",
        "`server µs` is the time that the server says it spent in the commands of clients (`INFO commandstats`), "
        "scripts with all that they run; `server CPU` is its processor time, which includes reading and writing "
        "sockets. 1 thread, 1,000 keys, all of them known, with limits as people have them. With `nothing remembered` "
        "the script decides each time; otherwise this library swaps, on newer servers by `SET IFEQ`.",
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
        "Processes visit keys at random; before, they visit them in order for a second, so that they have seen all "
        "keys only where there are few. The server was filled by copying one bucket. This library has 16 MiB of memory "
        "in each process, which is what it takes where nothing is said. `client MiB grown` includes the connections "
        "and the lists of the measurement.",
        (),
        (
            Growth("rate", "rate", "keys", r"keys-1-(\d+)", "1 process, more and more keys"),
            Growth("trips", "trips", "keys", r"keys-1-(\d+)", "1 process, more and more keys"),
        ),
    ),
}

_NOTES: Final = """\
Ratios within one run are what counts; absolute numbers depend on the machine, and on what else it does.

- A closed loop: each thread, task or process asks again as soon as it is answered.
- Slices of {seconds} s (longer for 1,000 tasks, and for processes), {rounds} rounds, fewer where a scenario takes
  long; each round begins with another contender. Every slice starts with an empty server, new connections, and a
  warm-up that visits every key. Shown are medians over the rounds, and `±`, half the distance from the worst round to
  the best.
- All contenders have the same limit, 1,000,000 per second, where nothing else is said; it is never reached. Beside it
  there are limits as people have them: {plans}.
  With these, {used_up} keys are used up before, and get a tenth of the decisions, as users that go on asking; the
  others stay below their limits. `10/second burst 50; 1000/hour` is left out for those that cannot decide two limits in
  one step.
- Answers are counted: a contender that refuses where it should grant, or the other way round, has failed; where a tenth
  is to be refused, if another share than about a tenth is. One that has failed loses the round, and at the second time
  the scenario.
- redis-py with hiredis for all of them, TCP to 127.0.0.1, without TLS; as many connections as threads or tasks for the
  peers, and the pool that `from_url` gives for this library; timeouts of 30 s.
- `to floor` compares with the better floor of the table: a bare socket with hiredis, or redis-py's `evalsha`, which
  send the command that replaces a state of 107 bytes and do nothing else. `to best peer` compares with the best of
  published libraries and textbook scripts. The goals are about published libraries, and also give the ratio to the
  better of the textbook scripts; for 32 processes and for the server's time they are about the textbook's GCRA. Where
  there are several limits, a goal is about the one with which it is furthest from being reached. For times and sizes
  less is better, also as a ratio.
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
        _NOTES.format(rounds=rounds, seconds=seconds, plans=_texts(), used_up=USED_UP).rstrip(),
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
        for growth in family.growth:
            if series := _growing(tables, growth):
                unit = METRICS[growth.metric].header
                drawn[f"{id}-{growth.id}.svg"] = charts.lines(growth.title, unit, series, growth.over)
        for metric in family.charts if tables else ():
            groups = {table.title: bars_of(results, table, metric) for table in tables}
            drawn[f"{id}-{metric}.svg"] = charts.bars(
                family.title, METRICS[metric].header, groups, METRICS[metric].form
            )
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


def _growing(tables: Sequence[Table], growth: Growth) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each contender, ours first; none where there are fewer than two numbers."""
    numbered = [(int(found[1]), table) for table in tables if (found := re.fullmatch(growth.tables, table.id))]
    if len(numbered) < 2:
        return {}
    names = dict.fromkeys(name for _, table in numbered for name in table.rows)
    series = {
        name: [
            (float(number), value)
            for number, table in sorted(numbered, key=lambda pair: pair[0])
            if (value := table.median(name, growth.metric)) is not None
        ]
        for name in sorted(names, key=lambda name: name != OURS)
    }
    return {name: points for name, points in series.items() if len(points) > 1}


def _texts() -> str:
    return ", ".join(f"`{plan.text}`" for plan in PEOPLES)


def sentence(title: str) -> str:
    return title[:1].upper() + title[1:]
