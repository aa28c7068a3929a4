"""What benchmarks make of its measurements: medians, ratios, verdicts, tables and charts. No time is judged here."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncGenerator, Generator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from benchmarks import charts, integrations, ours, report, service
from benchmarks.applications import ALONE, BARE, FRAMEWORKS, REDIS_PY, addresses
from benchmarks.applications.calls import asgi
from benchmarks.contenders import (
    CONNECTION,
    CORE,
    CORE_OVER_CONNECTION,
    ENTRANTS,
    FORGETFUL,
    GCRA,
    ONE_AFTER_THE_OTHER,
    REDIS,
    SKIP_SYNC,
    SOCKET,
)
from benchmarks.goal import Goal, Measured, Relation, worst
from benchmarks.goals import GOALS
from benchmarks.http_load import Answers, Client, length_of
from benchmarks.measure import (
    USED_UP,
    Turn,
    WrongAnswerError,
    async_slice,
    check,
    interleaved,
    keys,
    shares,
    use_up,
    visits,
)
from benchmarks.model import (
    METRICS,
    NEVER_REACHED,
    OURS,
    PEOPLES,
    PER_DAY,
    PER_MINUTE,
    PLANS,
    TWO_LIMITS,
    AsyncHit,
    Contender,
    Entrant,
    Hit,
    Kind,
    Limit,
    Results,
    Sample,
    Setup,
    Table,
    of_latencies,
    spread,
)
from benchmarks.ours import configuration_of
from benchmarks.overhead import Load, Opened, measure, sample
from benchmarks.run import of_plan
from benchmarks.scenarios import SCENARIOS
from benchmarks.served import Served
from benchmarks.server import running
from ratelimit import BucketConfiguration
from tests.support.servers import ServerBinary

PEER, SCRIPT = "limits fixed window", "textbook token bucket"
BUCKET = "throttled-py token bucket"


def table_with(id: str, family: str, metric: str, values: dict[str, list[float]]) -> Table:
    rows = {name: [{metric: value} for value in rounds] for name, rounds in values.items()}
    return Table(id, family, id.replace("-", " "), metric, rows)


def results_with(*tables: Table) -> Results:
    entrants = {**ENTRANTS, SKIP_SYNC: Entrant(SKIP_SYNC, Kind.OURS, asks_redis=False)}
    return Results(entrants, {table.id: table for table in tables}, environment={"Python": "3.11"})


def verdicts(results: Results) -> dict[str, str]:
    return {goal.text: goal.verdict(goal.find(results)) for goal in GOALS}


@pytest.fixture
def results() -> Results:
    sync = table_with(
        "sync-1-1000", "sync", "rate", {SOCKET: [100, 120, 110], OURS: [99, 100, 140], PEER: [50, 60, 40]}
    )
    sync.failures = {"pyrate-limiter log": ["ValueError: <none> & nothing"], PEER: ["TimeoutError: slow"]}
    script = table_with("server-a", "server", "server_us", {OURS: [6.0], FORGETFUL: [8.0], PEER: [1.0], GCRA: [10.0]})
    native = table_with("server-b", "server", "server_us", {OURS: [2.0], FORGETFUL: [9.0], PEER: [1.0], GCRA: [10.0]})
    many = [table_with(f"keys-1-{number}", "keys", "rate", {OURS: [9.0], PEER: [8.0]}) for number in (1_000, 10_000)]
    made = results_with(sync, script, native, *many)
    made.native.add("server-b")
    return made


def test_medians_and_spreads() -> None:
    table = table_with("t", "sync", "rate", {OURS: [3, 1, 2], PEER: [4, 1]})
    assert table.median(OURS) == 2
    assert table.median(PEER) == 2.5
    assert table.median("nobody") is None
    assert table.median(OURS, "p99_us") is None
    assert spread([90, 100, 130]) == 0.2
    assert spread([0, 0]) == 0


def test_latencies_are_in_microseconds() -> None:
    assert of_latencies([*range(1_000, 100_000, 1_000), 5_000_000]) == {"p50_us": 51, "p99_us": 5_000, "max_us": 5_000}
    assert of_latencies([2_500]) == {"p50_us": 2.5, "p99_us": 2.5, "max_us": 2.5}


def test_the_best_peer_is_neither_ours_nor_a_floor(results: Results) -> None:
    assert results.best(results.tables["sync-1-1000"]) == PEER
    assert results.best(results.tables["server-a"]) == PEER  # less is better
    assert results.best(results.tables["server-a"], wanted=lambda each: each.kind is Kind.TEXTBOOK) == GCRA
    assert results.best(results.tables["server-a"], wanted=lambda each: each.kind is Kind.FLOOR) is None


def test_goals_are_judged_by_medians(results: Results) -> None:
    found = {goal.text: goal.find(results) for goal in GOALS}
    judged = verdicts(results)
    best = "sync, 1 thread, 1,000 keys: throughput to the best library"
    assert (found[best], judged[best]) == (Measured(2.0, PEER), "reached")
    scripts = [text for text in judged if text.startswith("server time")]
    assert [found[text] for text in scripts] == [
        Measured(0.9, f"{GCRA}, server b"),
        Measured(0.6, f"{GCRA}, server a"),
        Measured(0.2, f"{GCRA}, server b"),
    ]
    assert [judged[text] for text in scripts] == ["NOT reached", "reached", "NOT reached"]
    for trips, verdict in ((1.0, "reached"), (1.01, "NOT reached")):
        results.tables["server-a"].rows[OURS] = [{"server_us": 6.0, "trips": trips}]
        assert verdicts(results)["round trips per decision, uncontended"] == verdict
    assert judged["32 processes, one key: most round trips of a decision"] == "not measured"


def test_goals_compare_with_libraries_and_mention_the_textbook(results: Results) -> None:
    results.tables["sync-1-1000"].rows[SCRIPT] = [{"rate": 200.0}]
    found = {goal.text: goal.find(results) for goal in GOALS}
    assert found["sync, 1 thread, 1,000 keys: throughput to the best library"] == Measured(
        2.0, f"{PEER}; 0.50x {SCRIPT}"
    )


def test_what_stands_in_the_way_is_told_of_a_goal_that_is_missed() -> None:
    rows = {SOCKET: [10_000.0], CORE: [8_000.0], "redis-py evalsha": [8_000.0], OURS: [5_000.0], PEER: [1.0]}
    missed = results_with(table_with("sync-1-1000", "sync", "rate", rows))
    (told,) = report.obstacles(missed)
    assert "takes 100 us over a bare socket" in told
    assert "the time to live) 125 us, which is 1.25x" in told
    assert "takes 75 us. redis-py's" in told
    rows[OURS] = [9_900.0]
    assert report.obstacles(results_with(table_with("sync-1-1000", "sync", "rate", rows))) == []


def test_what_stands_in_the_way_is_told_with_what_its_parts_reach() -> None:
    sync = {SOCKET: [40_000.0], CORE: [20_000.0], OURS: [10_000.0], PEER: [8_000.0]}
    tasks = {CONNECTION: [50_000.0], CORE_OVER_CONNECTION: [40_000.0], OURS: [25_000.0], PEER: [10_000.0]}
    asyncio, threads = report.obstacles(
        results_with(
            table_with("sync-16-1000", "sync", "rate", sync), table_with("asyncio-100-1000", "asyncio", "rate", tasks)
        )
    )
    assert "takes 25 us (5.00x the best peer) of it" in threads
    assert "than the decision 50 us (2.50x the best peer); here 100 us (1.25x the best peer)." in threads
    assert "takes 20 us (5.00x the best peer) of it" in asyncio
    assert "than the decision 25 us (4.00x the best peer); here 40 us (2.50x the best peer)." in asyncio


def test_what_stands_in_the_way_of_processes_is_told_once() -> None:
    rows: dict[str, list[Sample]] = {
        SOCKET: [{"rate": 20_000.0, "share": 0.5, "p99_us": 1.0}],
        CORE: [{"rate": 10_000.0, "share": 0.6, "p99_us": 1.0}, {"rate": 10_000.0, "share": 0.4, "p99_us": 1.0}],
        OURS: [{"rate": 5_000.0, "share": 0.3, "p99_us": 9.0}],
        GCRA: [{"rate": 8_000.0, "share": 0.9, "p99_us": 1.0}],
    }
    made = results_with(Table("processes-32", "processes", "32 processes, one key", "rate", rows))
    crowd, shares = report.obstacles(made)
    assert "takes 50 us (2.50x the best peer); with nothing more than the decision 100 us (1.25x" in crowd
    assert "least share is 0.50 of the largest over bare sockets, and 0.40 with nothing more" in shares


def test_goals_for_processes_take_the_worst_round_where_they_say_so() -> None:
    rounds: list[Sample] = [
        {"rate": 80.0, "p99_us": 5.0, "share": share, "trips": 1.2, "most_trips": most}
        for share, most in ((0.9, 2), (0.6, 4), (0.8, 2))
    ]
    table = Table("processes-32", "processes", "32 processes", "rate", {OURS: rounds})
    table.rows[GCRA] = [{"rate": 100.0, "p99_us": 6.0}]
    table.rows[SOCKET] = [{"rate": 500.0, "p99_us": 1.0}]
    judged = [verdict for text, verdict in verdicts(results_with(table)).items() if text.startswith("32 processes")]
    assert judged == ["NOT reached", "reached", "NOT reached", "reached", "NOT reached"]


@pytest.mark.parametrize(
    ("relation", "value", "against", "verdict"),
    [(">=", 2.0, "day", "reached"), ("<=", 4.0, "minute, best", "NOT reached")],
)
def test_the_worst_of_several_is_named(relation: Relation, value: float, against: str, verdict: str) -> None:
    goal = Goal(
        "text",
        relation,
        2,
        worst(relation, {"minute": lambda _: Measured(4.0, "best"), "day": lambda _: Measured(2.0)}),
    )
    found = goal.find(results_with())
    assert found == Measured(value, against)
    assert goal.verdict(found) == verdict


def test_what_was_measured_in_part_is_not_reached() -> None:
    find = worst(">=", {"minute": lambda _: Measured(4.0), "day": lambda _: None})
    found = find(results_with())
    assert found == Measured(4.0, "minute; not measured: day", ("day",))
    assert Goal("text", ">=", 2, find).verdict(found) == "not measured"
    assert Goal("text", ">=", 5, find).verdict(found) == "NOT reached"
    assert worst(">=", {"minute": lambda _: None})(results_with()) is None


def test_goals_with_people_s_limits_are_about_the_worst_of_them() -> None:
    rates = {"": 70.0, "minute": 65.0, "day": 50.0, "two": 99.0}
    tables = [
        table_with(plan.table("asyncio-100-1000"), "asyncio", "rate", {OURS: [rates[plan.id]], PEER: [10.0]})
        for plan in PLANS
    ]
    title = "asyncio, 100 tasks, 1,000 keys: throughput to the best library"
    made = results_with(*tables)
    assert {goal.text: goal.find(made) for goal in GOALS}[title] == Measured(5.0, f"{PER_DAY.text}, {PEER}")
    assert verdicts(made)[title] == "NOT reached"
    tables[2].rows[OURS] = [{"rate": 60.0}]
    assert verdicts(made)[title] == "reached"
    del made.tables[tables[3].id]
    assert verdicts(made)[title] == "not measured"


def test_more_tasks_are_compared_with_a_hundred() -> None:
    hundred = table_with("asyncio-100-1000", "asyncio", "rate", {OURS: [100.0], PEER: [10.0]})
    rounds: list[Sample] = [{"rate": 90.0, "errors": 0}, {"rate": 90.0, "errors": 3}]
    crowd = Table("asyncio-10000-1000", "asyncio", "10,000 tasks", "rate", {OURS: rounds})
    made = results_with(hundred, crowd)
    found = {goal.text: goal.find(made) for goal in GOALS if "10,000 tasks" in goal.text}
    assert list(found.values()) == [Measured(0.9), Measured(3)]
    assert [verdicts(made)[text] for text in found] == ["NOT reached", "NOT reached"]
    assert "100 tasks: a decision takes 10000.0 us here, 100000.0 us with" in "".join(report.obstacles(made))


def test_processes_say_what_the_server_takes() -> None:
    rows: dict[str, list[Sample]] = {
        name: [{"rate": rate, "p99_us": 5.0, "cpu_us": cpu, "trips": 1.0}]
        for name, rate, cpu in ((OURS, 1_200.0, 30.0), (PEER, 1_000.0, 20.0), (GCRA, 900.0, 40.0))
    }
    made = results_with(Table("shared-4", "shared", "4 processes", "rate", rows))
    (told,) = report.obstacles(made)
    assert "1,200 a second with 30 us of the server's processor each (1.00 round trips) here" in told
    assert "1,000 a second with 20 us of the server's processor each (1.00 round trips) with limits fixed" in told
    assert "900 a second with 40 us" in told


def test_several_buckets_are_compared_with_as_many_decisions() -> None:
    rows: dict[str, list[Sample]] = {
        OURS: [{"rate": 500.0, "p50_us": 2_000.0, "trips": 1.2}],
        ONE_AFTER_THE_OTHER: [{"rate": 200.0, "p50_us": 5_000.0, "trips": 2.0}],
    }
    made = results_with(*(Table(f"several-{ms}-2", "several", f"2 buckets, {ms} ms", rows=rows) for ms in ("0.2", 1)))
    judged = {text: verdict for text, verdict in verdicts(made).items() if "buckets in one decision" in text}
    assert [verdict for text, verdict in judged.items() if text.startswith("2")] == ["NOT reached", "reached"]
    assert {verdict for text, verdict in judged.items() if not text.startswith("2")} == {"not measured"}
    (told,) = report.obstacles(made)
    assert "2 buckets, 1 ms: 2,000 us (1.20 round trips), one after the other 5,000 us" in told


@pytest.mark.redis
def test_several_buckets_are_measured(redis_url: str) -> None:
    for opens in (ours.together(3), ours.one_after_the_other(3)):
        with opens(Setup(redis_url)) as hit:
            assert all(hit(key) for key in keys(2))
    with redis.Redis.from_url(redis_url) as client:
        assert sorted(client.keys()) == sorted(b"%d:user:%d" % (n, key) for n in range(3) for key in range(2))


def test_the_server_s_time_is_told_of_each_kind_of_decision(results: Results) -> None:
    told = "".join(report.obstacles(results))
    assert "server a: a swap 6.0 us, a script that decides 8.0 us, textbook GCRA 10.0 us" in told
    assert "server b: SET IFEQ 2.0 us" in told


def test_nothing_is_reached_that_was_not_measured() -> None:
    assert set(verdicts(results_with()).values()) == {"not measured"}
    goal = Goal("text", ">", 1, lambda _: None)
    assert goal.verdict(Measured(1.0)) == "NOT reached"
    assert goal.wanted == "above 1.00x"


def test_goals_name_tables_that_scenarios_fill() -> None:
    assert set(SCENARIOS) == set(report.FAMILIES)


def test_goals_have_texts_and_obstacles() -> None:
    goals = (*GOALS, *integrations.GOALS)
    assert len({goal.text for goal in goals}) == len(goals)
    nothing = Goal("", ">", 1, lambda _: None).obstacle
    assert [goal.text for goal in goals if goal.obstacle is nothing] == []


def test_the_page_shows_goals_ratios_and_missing_peers(results: Results, tmp_path: Path) -> None:
    page = tmp_path / "RESULTS.md"
    report.write(results, page, command="make bench", rounds=3, seconds=0.4)
    text = page.read_text()
    rows = {cells[1].strip(" *"): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) > 3}
    title = "sync, 1 thread, 1,000 keys: time to that of the bare socket that sends the swap"
    assert [cell.strip() for cell in rows[title][2:5]] == [
        "at most 1.30x",
        f"1.10x ({NEVER_REACHED.text}, {SOCKET}; not measured: {', '.join(plan.text for plan in PEOPLES)})",
        "not measured",
    ]
    sync = text[text.index("### Sync 1 1000") : text.index("## What a decision costs")]
    assert f"| **{OURS}**" in sync
    assert [cell.strip() for cell in next(line for line in sync.splitlines() if OURS in line).split("|")[2:6]] == [
        "100",
        "20%",
        "0.91x",
        "2.00x",
    ]
    assert "Left out: pyrate-limiter log (ValueError: <none> & nothing)." in text
    assert f"{PEER} has failed in 1 of 4 rounds (TimeoutError: slow)." in text
    for name in (tmp_path / "charts").iterdir():
        assert f"(charts/{name.name})" in text


def test_tables_are_whole(results: Results) -> None:
    for table in results.tables.values():
        lines = report.table_of(results, table).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1
        assert len(lines) == 2 + len(table.rows)


def test_charts_are_svg(results: Results) -> None:
    drawn = report.draw(results)
    assert {"sync-rate.svg", "server-server_us.svg", "keys-rate.svg"} <= set(drawn)
    for svg in drawn.values():
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.find("{http://www.w3.org/2000/svg}rect") is not None  # a background of its own


def test_charts_bear_odd_values() -> None:
    bar = charts.Bar("<a> & b", Kind.PEER, 0.0, 0.0, 0.0)
    ET.fromstring(charts.bars("<title>", "µs", {"group": [bar], "empty": []}))
    ET.fromstring(charts.lines("title", "MiB", {}, "keys"))
    ET.fromstring(charts.lines("title", "MiB", {"one": [(1_000, 0.0)]}, "keys"))


def test_names_of_lines_go_on_in_another_row() -> None:
    names = {f"{number} a name of some length": [(1, 1.0), (2, 2.0)] for number in range(9)}
    root = ET.fromstring(charts.lines("title", "unit", names, "keys"))
    found = [each for each in root if (each.text or "").endswith("of some length")]
    assert len({each.attrib["y"] for each in found}) == 3
    assert all(float(each.attrib["x"]) + 7 * 23 < charts.WIDTH for each in found)


def test_growth_is_drawn_over_the_numbers_of_tables() -> None:
    tables = [
        table_with(f"shared-{number}", "shared", "rate", {PEER: [1.0], OURS: [float(number)]}) for number in (8, 2, 4)
    ]
    other = table_with("shared-asyncio-2", "shared", "rate", {OURS: [1.0]})
    drawn = report.draw(results_with(*tables, other))
    assert list(drawn) == ["shared-rate.svg"]
    svg = drawn["shared-rate.svg"]
    assert svg.index(OURS) < svg.index(PEER)
    assert [svg.index(f">{number}<") for number in (2, 4, 8)] == sorted(
        svg.index(f">{number}<") for number in (2, 4, 8)
    )


def test_a_contender_that_fails_twice_is_left_out_and_the_others_go_on() -> None:
    contenders = [Contender(Entrant(name, Kind.PEER)) for name in ("a", "b", "c")]
    order: list[str] = []

    def slice(contender: Contender) -> Sample:
        order.append(contender.name)
        if contender.name == "b":
            raise ValueError("no\nmore")
        return {"rate": float(len(order))}

    table = Table("t", "sync", "title")
    interleaved([Turn(table, contender, slice) for contender in contenders], 3, lambda _: None)
    assert order == ["a", "b", "c", "c", "a", "a", "c"] or order[0] == "a"
    assert [order.count(name) for name in "abc"] == [3, 2, 3]
    assert list(table.rows) == ["a", "c"]
    assert [len(samples) for samples in table.rows.values()] == [3, 3]
    assert table.failures == {"b": ["ValueError: no"] * 2}
    assert len({*order[:3]}) == 3
    assert order[0] != order[3]  # rounds begin with another one


def test_wrong_answers_do_not_count() -> None:
    check(10, 10, granted=1)
    check(0, 10, granted=0)
    with pytest.raises(WrongAnswerError, match="9 of 10 granted, although all should be"):
        check(9, 10, granted=1)
    with pytest.raises(WrongAnswerError, match="1 of 10 granted, although none should be"):
        check(1, 10, granted=0)


def test_errors_are_counted_and_are_not_decisions() -> None:
    @asynccontextmanager
    async def failing(_: Setup) -> AsyncGenerator[AsyncHit]:
        asked = 0

        async def hit(_: str) -> bool:
            nonlocal asked
            await asyncio.sleep(0)
            asked += 1
            if asked % 2:
                raise TimeoutError
            return True

        yield hit

    contender = Contender(Entrant("failing", Kind.OURS), asyncio=failing)
    measured = async_slice(contender, Setup("memory://"), keys(10), 2, 0.02, counting=True)
    found = asyncio.run(measured)
    assert found["errors"] > 10
    # Half of what was asked in 20 ms, and of the warm-up before it, has failed.
    assert found["rate"] * 0.02 < found["errors"]


def test_about_a_tenth_is_refused() -> None:
    check(9_100, 10_000, granted=0.9)
    check(8_900, 10_000, granted=0.9)
    for count in (8_000, 9_600, 10_000):
        with pytest.raises(WrongAnswerError, match=f"{count} of 10000 granted, although about 90% should be"):
            check(count, 10_000, granted=0.9)
    check(17, 20, granted=0.9)  # as it may be by chance


def test_keys_that_are_used_up_get_a_tenth_of_the_visits() -> None:
    where = visits(keys(1_000), PER_MINUTE)
    assert len({*where}) == 1_000
    used_up = {f"user:{number}" for number in range(USED_UP)}
    assert sum(key in used_up for key in where) / len(where) == pytest.approx(0.1, abs=0.002)
    assert visits(keys(10), NEVER_REACHED) == [f"user:{number}" for number in range(10)]


def test_keys_are_used_up_until_they_are_refused() -> None:
    asked: list[str] = []

    def hit(key: str) -> bool:
        asked.append(key)
        return asked.count(key) <= 100

    use_up(hit, ["a", "b"], PER_MINUTE)
    assert asked == ["a"] * 101 + ["b"] * 101
    with pytest.raises(WrongAnswerError, match="210 granted by 100/minute"):
        use_up(lambda _: True, ["a"], PER_MINUTE)


def test_plans_are_what_their_texts_say() -> None:
    for plan in PLANS:
        assert configuration_of(Setup("memory://", plan.limits)) == BucketConfiguration.parse(plan.text)


def test_only_those_that_know_several_limits_take_part_where_there_are_several() -> None:
    entrants = {each.name: each.entrant for each in REDIS}
    assert all(name == SOCKET or entrants[name].several for name in of_plan(TWO_LIMITS))
    assert OURS in of_plan(TWO_LIMITS)
    assert len(of_plan(PER_DAY)) > len(of_plan(TWO_LIMITS))


def test_each_worker_visits_all_keys_in_an_order_of_its_own() -> None:
    first, second = shares(keys(100), 2)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(keys(100))


def test_every_metric_has_a_form() -> None:
    for metric in METRICS.values():
        assert metric.form.format(1.5)


# What a limit adds to a request of an application.

LIMITED = f"{OURS}, middleware"


def overheads(framework: str, scenario: str, values: dict[str, float]) -> Table:
    rows: dict[str, list[Sample]] = {
        name: [{"overhead_us": value, "request_us": value + 50}] for name, value in values.items()
    }
    title = f"{framework}, {scenario}"
    return Table(f"{framework}-{scenario}", framework, title, "overhead_us", rows)


def limited(framework: str) -> list[str]:
    """This library's parts of a framework."""
    contenders = next(each for each in FRAMEWORKS if each.id == framework).contenders
    return [each.name for each in contenders if each.entrant.kind is Kind.OURS and each.name not in ALONE]


def answers(framework: str) -> dict[str, list[bool]]:
    """What applications say to two requests of one client and one of another, with a limit of one, in memory."""
    found = next(each for each in FRAMEWORKS if each.id == framework)
    load = Load(
        Setup("memory://", (Limit(1, 86_400),)),
        (),
        asynchronous=found.asynchronous,
        tasks=1,
        rounds=1,
        seconds=0,
        granted=True,
    )
    said: dict[str, list[bool]] = {}
    with Opened(load) as opened:
        for contender in found.contenders:
            if contender.name in (BARE, *limited(framework)):
                batch = opened.open(contender)
                said[contender.name] = [batch([key])[0] == 1 for key in ("10.0.0.1", "10.0.0.1", "10.0.0.2")]
    return said


def expected(framework: str) -> dict[str, list[bool]]:
    return {BARE: [True, True, True]} | {name: [True, False, True] for name in limited(framework)}


@pytest.mark.parametrize("framework", ["starlette", "fastapi", "flask"])
def test_applications_admit_and_refuse(framework: str) -> None:
    pytest.importorskip(framework)
    assert answers(framework) == expected(framework)


def test_applications_of_django_admit_and_refuse() -> None:
    pytest.importorskip("rest_framework")
    # In a process of their own, because a process can have one set of settings.
    code = "from tests.test_benchmarks import answers; print([answers(each) for each in %r])"
    named = ["django", "django-asgi", "rest-framework"]
    done = subprocess.run([sys.executable, "-c", code % named], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([expected(each) for each in named])


def test_what_is_added_is_taken_from_within_a_turn() -> None:
    took = {BARE: [10.0, 100.0, 10.0], LIMITED: [15.0, 106.0, 14.0], REDIS_PY: [4.0, 40.0, 4.0]}
    assert sample(LIMITED, took) == {"overhead_us": 5.0, "request_us": 15.0}
    assert sample(BARE, took) == {"overhead_us": 0.0, "request_us": 10.0}
    assert sample(REDIS_PY, took) == {"overhead_us": 4.0, "request_us": 4.0}  # asked without an application around it


@pytest.mark.redis
def test_an_application_that_fails_is_left_out_and_round_trips_are_counted(server_binary: ServerBinary) -> None:
    @contextmanager
    def bare(_: Setup) -> Generator[Hit]:
        yield lambda _: True

    @contextmanager
    def asking_twice(setup: Setup) -> Generator[Hit]:
        with redis.Redis.from_url(setup.url) as client:
            yield lambda key: bool(client.incr(key) and client.incr(key))

    @contextmanager
    def refusing(_: Setup) -> Generator[Hit]:
        yield lambda _: False

    def missing(_: Setup) -> AbstractContextManager[Hit]:
        raise ImportError("no such package")

    contenders = [
        Contender(Entrant(BARE, Kind.FLOOR), bare),
        Contender(Entrant("missing", Kind.PEER), missing),
        Contender(Entrant("refusing", Kind.PEER), refusing),
        Contender(Entrant("asking twice", Kind.PEER), asking_twice),
    ]
    table = Table("t", "flask", "title", "overhead_us")
    with running(str(server_binary.path)) as server:
        load = Load(Setup(server.url), addresses(5), asynchronous=False, tasks=1, rounds=2, seconds=0.0, granted=True)
        measure(table, contenders, load, server, lambda _: None)
    assert list(table.rows) == [BARE, "asking twice"]
    assert table.values("asking twice", "trips") == [2.0, 2.0]
    assert table.failures == {
        "missing": ["ImportError: no such package"],
        "refusing": ["WrongAnswerError: 0 of 5 granted, although all should be"],
    }


def test_the_page_of_integrations_compares_with_peers_of_the_same_framework(tmp_path: Path) -> None:
    flask = overheads("flask", "admitted", {BARE: 0, f"{OURS}, extension": 90, "flask-limiter": 120, REDIS_PY: 60})
    django = overheads("django", "admitted", {BARE: 0, LIMITED: 80, "django-ratelimit": 400})
    django.failures = {f"{OURS}, decorator": ["ValueError: no"]}
    results = Results(integrations.entrants(), {table.id: table for table in (flask, django)})
    page = tmp_path / "INTEGRATIONS.md"
    integrations.write(results, page, 2.5)
    text = page.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines() if line.startswith("| ")]
    assert ["Flask: extension", "50", "90", "0.75x (flask-limiter)"] in rows
    assert ["Django, WSGI: middleware", "50", "80", "0.20x (django-ratelimit)"] in rows
    assert [f"**{OURS}, extension**", "90", "0%", "1.50x"] in rows
    assert "Left out: ratelimit-redis, decorator (ValueError: no)." in text
    charts_drawn = [file.name for file in (tmp_path / "charts" / "integrations").iterdir()]
    assert charts_drawn == ["admitted.svg"]
    assert "(charts/integrations/admitted.svg)" in text


def found_goals(results: Results) -> dict[str, tuple[str, str]]:
    """What is said of each goal for integrations that was measured, and its verdict."""
    said: dict[str, tuple[str, str]] = {}
    for goal in integrations.GOALS:
        if (found := goal.find(results)) is not None:
            said[goal.text] = (f"{found.value:.2f}x {found.against.partition(';')[0]}", goal.verdict(found))
    return said


def test_goals_for_integrations_are_about_the_worst_row_and_peers_that_send_fields() -> None:
    dependency, middleware = f"{OURS}, dependency", f"{OURS}, middleware"
    rows = {dependency: 80.0, middleware: 60.0, "slowapi decorator": 70.0, "slowapi decorator, headers": 100.0}
    admitted = overheads("fastapi", "admitted", {BARE: 0, f"{OURS}, bucket alone": 40, **rows})
    rows |= {dependency: 110.0, "slowapi decorator": 120.0, "fastapi-limiter": 10.0}
    refused = overheads("fastapi", "refused", {BARE: 0, f"{OURS}, bucket alone": 40, **rows})
    made = Results(integrations.entrants(), {table.id: table for table in (admitted, refused)})
    all_peers, slowapi = found_goals(made).values()
    worst = "1.10x all refused: dependency, slowapi decorator, headers"
    assert all_peers == (worst, "NOT reached")
    assert slowapi == ("1.14x all admitted: dependency, slowapi decorator", "NOT reached")
    first, second = report.obstacles(made, integrations.GOALS)
    assert first == (
        "fastapi, refused: the dependency adds 110 us, of which the bucket alone takes 40 us;"
        " slowapi decorator, headers adds 100 us."
    )
    assert "fastapi, admitted: the dependency adds 80 us" in second
    admitted.rows[dependency] = refused.rows[dependency] = [{"overhead_us": 50.0}]
    # Rows that were not measured could be worse.
    assert [verdict for _, verdict in found_goals(made).values()] == ["not measured", "not measured"]


def test_every_framework_that_has_a_goal_has_peers() -> None:
    for goal in integrations.GOALS:
        assert goal.find(Results({})) is None
        assert "none sends header fields" not in goal.text or goal.text.startswith("Django")


def service_with(plan: str, values: dict[str, tuple[float, float]]) -> Table:
    rows: dict[str, list[Sample]] = {
        name: [{"requests": requests, "p99_us": p99}] for name, (requests, p99) in values.items()
    }
    return Table("-".join(filter(None, ("service", plan))), "service", "4 workers", "requests", rows)


def test_a_service_is_compared_with_the_peer_that_is_nearest_to_none() -> None:
    values = {
        service.WITHOUT: (1_000.0, 10_000.0),
        service.LIMITED: (900.0, 12_000.0),
        "slowapi decorator": (800.0, 20_000.0),
        "fastapi-limiter": (500.0, 11_000.0),
    }
    tables = [service_with(plan.id, values) for plan in service.PLANS]
    made = Results(integrations.entrants(), {table.id: table for table in tables})
    rate, p99 = found_goals(made).values()
    without = f"{NEVER_REACHED.text}, to those without a limit {service.LIMITED}"
    assert rate == (f"1.12x {without} 0.90x, slowapi decorator 0.80x", "reached")
    assert p99 == (f"1.09x {without} 1.20x, fastapi-limiter 1.10x", "NOT reached")
    (told,) = report.obstacles(made, integrations.GOALS)
    assert f"{service.LIMITED} 1,111 us of all 4 workers for a request, p99 12 ms" in told
    assert {"service-requests.svg", "service-p99_us.svg"} <= set(integrations.draw(made))
    assert "## A service" in integrations.page(made, {}, 2.5)


def test_the_length_of_an_answer_is_read_from_its_head() -> None:
    answer = b"HTTP/1.1 200 OK\r\nServer: uvicorn\r\nContent-Length: 4\r\n\r\n"
    assert length_of(answer[:-1]) is None
    assert length_of(answer + b"ok") == len(answer) + 4
    with pytest.raises(ValueError, match="without a length"):
        length_of(b"HTTP/1.1 200 OK\r\n\r\n")


def test_clients_of_a_service_count_answers_that_come_in_pieces() -> None:
    class Transport:
        def __init__(self, client: Client) -> None:
            self.asked: list[bytes] = []
            self._client = client

        def write(self, request: bytes) -> None:
            self.asked.append(request)
            status = b"429" if len(self.asked) == 2 else b"200"
            answer = b"HTTP/1.1 %b said\r\ncontent-length: 2\r\n\r\nok" % status
            for piece in (answer[:20], answer[20:-1], answer[-1:]):
                asyncio.get_running_loop().call_soon(self._client.data_received, piece)

    async def ask() -> tuple[Answers, Transport]:
        client = Client()
        transport: Any = Transport(client)
        client.connection_made(transport)
        answers = Answers.none()
        await client.ask(iter(["10.0.0.1", "10.0.0.2"]), None, answers)
        return answers, transport

    answers, transport = asyncio.run(ask())
    assert answers.statuses == {200: 1, 429: 1}
    assert len(answers.latencies) == 2
    assert [b"x-forwarded-for: 10.0.0.%d\r\n" % number in transport.asked[number - 1] for number in (1, 2)] == [
        True
    ] * 2


def test_a_client_that_loses_its_connection_says_so() -> None:
    async def ask() -> None:
        client = Client()
        transport: Any = type("Transport", (), {"write": lambda *_: client.connection_lost(None)})()
        client.connection_made(transport)
        await client.ask(iter(["10.0.0.1"]), None, Answers.none())

    with pytest.raises(ConnectionError, match="the service has closed a connection"):
        asyncio.run(ask())


def test_a_worker_opens_its_application_before_the_first_request() -> None:
    pytest.importorskip("fastapi")

    async def run() -> list[str]:
        served = Served(service.LIMITED, Setup("memory://", (Limit(1, 86_400),)))
        to_come = iter(["lifespan.startup", "lifespan.shutdown"])
        sent: list[str] = []
        stopping = asyncio.Event()

        async def receive() -> dict[str, str]:
            type = next(to_come)
            if type == "lifespan.shutdown":
                await stopping.wait()
            return {"type": type}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        running = asyncio.create_task(served({"type": "lifespan"}, receive, send))
        while not sent:
            await asyncio.sleep(0)
        hit = asgi(served)
        sent += [str(await hit("10.0.0.1")), str(await hit("10.0.0.1"))]
        stopping.set()
        await running
        return sent

    assert asyncio.run(run()) == ["lifespan.startup.complete", "True", "False", "lifespan.shutdown.complete"]


def test_a_run_of_the_other_benchmarks_leaves_the_charts_of_integrations(results: Results, tmp_path: Path) -> None:
    kept = tmp_path / "charts" / "integrations" / "admitted.svg"
    kept.parent.mkdir(parents=True)
    kept.touch()
    report.write(results, tmp_path / "RESULTS.md", command="make bench", rounds=3, seconds=0.4)
    assert kept.exists()
    assert "(INTEGRATIONS.md)" in (tmp_path / "RESULTS.md").read_text()


def test_a_peer_that_adds_nothing_is_not_divided_by() -> None:
    table = overheads("flask", "memory", {BARE: 0, LIMITED: 9, "flask-limiter": -1})
    results = Results(integrations.entrants(), {table.id: table})
    assert "to best peer" not in report.table_of(results, table)


def test_applications_have_names_of_their_own() -> None:
    for framework in FRAMEWORKS:
        names = [each.name for each in framework.contenders]
        assert len({*names}) == len(names)
        assert names[0] == BARE
        assert all((each.asyncio if framework.asynchronous else each.sync) for each in framework.contenders)
