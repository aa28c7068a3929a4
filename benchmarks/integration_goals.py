"""The goals for integrations: what a limit adds to a request, and to a service, beside the peers of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks import service
from benchmarks.applications import ALONE, BUCKET, FRAMEWORKS, Framework
from benchmarks.goal import Find, Goal, Measured, Relation, is_peer, of, ratio, worst
from benchmarks.model import OURS, Entrant, Kind, Results, Table

SLOWAPI: Final = "slowapi decorator"
DEPENDENCY: Final = f"{OURS}, dependency"
_BOUND: Final = ("starlette", "fastapi", "flask", "django", "django-asgi")
"""The frameworks that there are goals for."""


@dataclass(frozen=True)
class Row:
    """What one integration adds in one scenario."""

    table_id: str
    title: str
    name: str


def goals(scenarios: Mapping[str, Sequence[tuple[str, str]]]) -> tuple[Goal, ...]:
    """Return the goals.

    :param scenarios: the ids and titles of those that there are for each framework, by its id.
    """
    made: list[Goal] = []
    for framework in FRAMEWORKS:
        if framework.id in _BOUND:
            made.append(_added(framework, scenarios[framework.id]))
        if framework.id == "fastapi":
            made.append(_dependency(scenarios[framework.id]))
    return (*made, *_service())


def _added(framework: Framework, scenarios: Sequence[tuple[str, str]]) -> Goal:
    headers = any(each.entrant.kind is Kind.PEER and each.entrant.headers for each in framework.contenders)
    rows = [
        Row(f"{framework.id}-{id}", title, each.name)
        for id, title in scenarios
        for each in framework.contenders
        if each.entrant.kind is Kind.OURS and each.name not in ALONE
    ]
    which = "the best peer that sends header fields" if headers else "the best peer (none sends header fields)"
    text = f"{framework.title}: what a limit adds, to {which}, in each row"
    return _goal(text, "<", rows, lambda each: is_peer(each) and (each.headers or not headers))


def _dependency(scenarios: Sequence[tuple[str, str]]) -> Goal:
    rows = [Row(f"fastapi-{id}", title, DEPENDENCY) for id, title in scenarios]
    text = "FastAPI: what the dependency adds, to slowapi's decorator without header fields, in each row"
    return _goal(text, "<=", rows, lambda each: each.name == SLOWAPI)


def _goal(text: str, relation: Relation, rows: Sequence[Row], wanted: Callable[[Entrant], bool]) -> Goal:
    parts = {
        f"{row.title}: {_short(row.name)}": ratio(row.table_id, metric="overhead_us", ours=row.name, wanted=wanted)
        for row in rows
    }
    return Goal(text, relation, 1, worst(relation, parts), obstacle=_what_is_added(rows, wanted))


def _short(name: str) -> str:
    return name.removeprefix(f"{OURS}, ")


def _what_is_added(rows: Sequence[Row], wanted: Callable[[Entrant], bool]) -> Callable[[Results], str | None]:
    """Return how to say what is in the way, in the rows that miss."""

    def find(results: Results) -> str | None:
        said: list[str] = []
        for row in rows:
            table = results.tables.get(row.table_id)
            best = None if table is None else results.best(table, wanted=wanted)
            if table is None or best is None:
                continue
            ours, bucket, theirs = (table.median(name) for name in (row.name, BUCKET, best))
            if ours is not None and bucket is not None and theirs is not None and ours >= theirs:
                said.append(
                    f"{table.title}: the {_short(row.name)} adds {ours:,.0f} us, of which the bucket alone takes"
                    f" {bucket:,.0f} us; {best} adds {theirs:,.0f} us{_trips(table, best)}"
                )
        return f"{'; '.join(said)}." if said else None

    return find


def _trips(table: Table, name: str) -> str:
    trips = table.median(name, "trips")
    return "" if trips is None else f" ({trips:.0f} round trips)"


def _service() -> list[Goal]:
    nearest = "to the nearest peer to those without a limit"
    return [
        Goal(f"a service: requests/s, {nearest}", ">", 1, _of_plans(">", "requests"), obstacle=_of_service),
        Goal(f"a service: p99, {nearest}", "<", 1, _of_plans("<", "p99_us"), obstacle=_of_service),
    ]


def _of_plans(relation: Relation, metric: str) -> Find:
    parts = {plan.text: _beside_without(plan.table(service.FAMILY), metric) for plan in service.PLANS}
    return worst(relation, parts)


def _beside_without(table_id: str, metric: str) -> Find:
    """Return how to compare with the peer that is nearest to the service without a limit.

    Nobody is faster than that, so that the nearest one is the best by the metric.
    """

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        best = None if table is None else results.best(table, metric, is_peer)
        if table is None or best is None:
            return None
        found = of(table, service.LIMITED, best, metric)
        shares = [
            f"{name} {share.value:.2f}x"
            for name in (service.LIMITED, best)
            if (share := of(table, name, service.WITHOUT, metric)) is not None
        ]
        if found is None or len(shares) < 2:
            return None
        return Measured(found.value, f"to those without a limit {', '.join(shares)}")

    return find


def _of_service(results: Results) -> str | None:
    said: list[str] = []
    for plan in service.PLANS:
        table = results.tables.get(plan.table(service.FAMILY))
        parts = [
            f"{name} {1e6 / rate:,.0f} us of all {service.WORKERS} workers for a request, p99 {p99 / 1_000:,.0f} ms"
            for name in (table.rows if table is not None else ())
            if table is not None
            and (rate := table.median(name, "requests"))
            and (p99 := table.median(name, "p99_us")) is not None
        ]
        if table is not None and parts:
            said.append(f"{table.title}: {'; '.join(parts)}.")
    return " ".join(said) or None
