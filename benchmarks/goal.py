"""What a goal is, and how its value is found in the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.model import OURS, Entrant, Kind, Results, Table

Relation = Literal[">=", "<=", ">", "<"]
Find = Callable[[Results], "Measured | None"]
Verdict = Literal["reached", "NOT reached", "not measured"]


@dataclass(frozen=True)
class Measured:
    """A value, and what it was taken against.

    :param missing: the parts that were not measured, where the value is the worst of several.
    """

    value: float
    against: str = ""
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Goal:
    """A bound, and how its value is found in the results: None where it was not measured."""

    text: str
    relation: Relation
    bound: float
    find: Find
    form: str = "{:.2f}x"
    obstacle: Callable[[Results], str | None] = lambda _: None
    """What stands in the way, by the numbers of the same run."""

    def verdict(self, measured: Measured | None) -> Verdict:
        if measured is None:
            return "not measured"
        value, bound = measured.value, self.bound
        reached = {">=": value >= bound, "<=": value <= bound, ">": value > bound, "<": value < bound}[self.relation]
        if not reached:
            return "NOT reached"
        return "not measured" if measured.missing else "reached"

    @property
    def wanted(self) -> str:
        relation = {">=": "at least ", "<=": "at most ", ">": "above ", "<": "below "}[self.relation]
        return relation + self.form.format(self.bound)


def is_peer(entrant: Entrant) -> bool:
    """Return whether this is a library that people install; the textbook's scripts are compared with separately."""
    return entrant.kind is Kind.PEER


def _is_textbook(entrant: Entrant) -> bool:
    return entrant.kind is Kind.TEXTBOOK


def ratio(
    table_id: str,
    *,
    metric: str = "rate",
    ours: str = OURS,
    wanted: Callable[[Entrant], bool] = is_peer,
    chosen_by: str | None = None,
) -> Find:
    """Return how to compare ours with the best of the wanted ones; the best by this metric, or by ``chosen_by``."""

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        best = None if table is None else results.best(table, chosen_by or metric, wanted)
        if table is None or best is None:
            return None
        measured = of(table, ours, best, metric)
        textbook = results.best(table, metric, _is_textbook) if wanted is is_peer else None
        besides = None if textbook is None else of(table, ours, textbook, metric)
        if measured is None or besides is None:
            return measured
        return Measured(measured.value, f"{measured.against}; {besides.value:.2f}x {besides.against}")

    return find


def of(table: Table, name: str, other: str, metric: str) -> Measured | None:
    """Compare one with another one of the same table."""
    value, base = table.median(name, metric), table.median(other, metric)
    return None if value is None or base is None or base <= 0 else Measured(value / base, other)


def to_one(table_id: str, other: str, metric: str = "rate", ours: str = OURS) -> Find:
    """Return how to compare ours with another one that is named."""

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        return None if table is None else of(table, ours, other, metric)

    return find


def times_as_long_as(table_id: str, other: str) -> Find:
    """Return how to find how many times as long as with another one a decision takes."""

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        found = None if table is None else of(table, other, OURS, "rate")
        return None if found is None else Measured(found.value, other)

    return find


def to_other_table(table_id: str, other_id: str, metric: str = "rate") -> Find:
    """Return how to compare ours in one table with ours in another one."""

    def find(results: Results) -> Measured | None:
        table, other = results.tables.get(table_id), results.tables.get(other_id)
        value, base = (None if each is None else each.median(OURS, metric) for each in (table, other))
        return None if value is None or not base else Measured(value / base)

    return find


def value_of(table_id: str, metric: str, choose: Callable[[Iterable[float]], float] | None = None) -> Find:
    """Return how to get the median of ours, or another value (``choose``) of its rounds."""

    def find(results: Results) -> Measured | None:
        table = results.tables.get(table_id)
        values = [] if table is None else table.values(OURS, metric)
        if table is None or not values:
            return None
        return Measured(table.median(OURS, metric) or 0.0 if choose is None else choose(values))

    return find


def worst(relation: Relation, parts: Mapping[str, Find]) -> Find:
    """Return how to find the worst of several values, which are named; it says so where some were not measured."""

    def find(results: Results) -> Measured | None:
        named = {name: part(results) for name, part in parts.items()}
        found = {name: measured for name, measured in named.items() if measured is not None}
        if not found:
            return None
        choose = min if relation in (">=", ">") else max
        name = choose(found, key=lambda name: found[name].value)
        missing = tuple(name for name, measured in named.items() if measured is None)
        against = ", ".join(filter(None, (name, found[name].against)))
        if missing:
            against += f"; not measured: {', '.join(missing)}"
        return replace(found[name], against=against, missing=missing)

    return find
