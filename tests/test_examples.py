"""The examples, run as their readers run them: real servers, two instances of each, and requests over HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from ratelimit import ProxyManager
from ratelimit.integrations.http import api_key
from tests.support import servers
from tests.support.surroundings import MARK, Surroundings

for package in ("aiohttp", "django", "fastapi", "flask", "gunicorn", "http_sf", "httpx", "uvicorn"):
    pytest.importorskip(package)

import aiohttp  # noqa: E402  # it may be missing
import http_sf  # noqa: E402

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "examples/run.py")]
PATIENCE = 120
"""Seconds, for what takes a few."""
HOUR = 3600
EXAMPLES = ["fastapi", "flask", "django"]
WHOSE = ("user", "organisation")


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Generator[Surroundings]:
    """A directory of its own for temporary files; and whatever is started in a test ends with it."""
    with tempfile.TemporaryDirectory(prefix="ratelimit-", dir="/tmp") as temporary:
        found = Surroundings(secrets.token_hex(), Path(temporary), Path(temporary))
        monkeypatch.setenv(MARK, found.mark)
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.delenv("RATELIMIT_URL", raising=False)
        monkeypatch.delenv("RATELIMIT_LIMIT", raising=False)
        yield found
        for process in found.processes():
            process.kill()


def check_that_nothing_is_left(surroundings: Surroundings) -> None:
    # Processes that did not end by themselves in time were killed a moment ago.
    servers.wait_until(lambda: not surroundings.processes(), "all that was started has ended")
    assert surroundings.files() == []


def told_by(*arguments: str, **variables: str) -> str:
    """What an example prints that ends well."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **variables},
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


class Requests(NamedTuple):
    """The lines about requests in what was printed, of its last attempt."""

    numbers: list[int]
    ports: list[str]
    statuses: list[int]
    left: list[int]

    @classmethod
    def read(cls, told: str) -> Requests:
        last = told.rpartition("all over again.")[2]
        rows = re.findall(r'^ +(\d+)  port (\d+)  (\d+)  RateLimit: "[\w-]+";r=(\d+)', last, re.MULTILINE)
        numbers, ports, statuses, left = zip(*rows, strict=True)
        return cls(list(map(int, numbers)), list(ports), list(map(int, statuses)), list(map(int, left)))


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes


class Served(NamedTuple):
    """Instances that wait for requests."""

    process: subprocess.Popen[str]
    redis_url: str
    ports: list[int]

    def ask(self, instance: int, path: str = "/", **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with closing(http.client.HTTPConnection("127.0.0.1", self.ports[instance], timeout=PATIENCE)) as connection:
            connection.request("GET", path, headers=named)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())

    def answers(self, key: str, ask: Callable[[], list[Answer]]) -> list[Answer]:
        """What is answered on a bucket of this key that is new: once more where Redis was too slow for an instance."""
        with self.manager() as manager:
            for _ in range(5):
                manager.remove(key)
                answers = ask()
                if all(answer.status != 503 for answer in answers):
                    return answers
        raise AssertionError("Redis was too slow each time")

    def manager(self) -> ProxyManager:
        return ProxyManager.from_url(self.redis_url, "1/hour", prefix="ratelimit:", timeout=PATIENCE)


@contextmanager
def served(name: str, *arguments: str, **variables: str) -> Generator[Served]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run in background
    try:
        process = subprocess.Popen(
            [*COMMAND, name, "--serve", *arguments],
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, **variables},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            told = ""
            assert process.stdout
            for line in process.stdout:
                told += line
                if line == "Ctrl-C ends it.\n":
                    break
            url = re.search("^RATELIMIT_URL=(.*)$", told, re.MULTILINE)
            assert url, told
            yield Served(
                process, url[1], [int(port) for port in re.findall(r"^http://127.0.0.1:(\d+)/$", told, re.MULTILINE)]
            )
        finally:
            process.terminate()
            process.wait(PATIENCE)


class TestStories:
    @pytest.mark.parametrize("name", EXAMPLES)
    def test_ten_tokens_for_fifteen_requests(self, surroundings: Surroundings, name: str) -> None:
        told = told_by(name)
        requests = Requests.read(told)
        assert requests.numbers == list(range(1, 16))
        assert requests.statuses == [200] * 10 + [429] * 5
        assert requests.left == [*reversed(range(10)), 0, 0, 0, 0, 0]
        assert len(set(requests.ports)) == 2
        assert requests.ports == requests.ports[:2] * 7 + requests.ports[:1]
        assert told.endswith("\nTen were admitted, and five were refused until the next token comes.\n")
        check_that_nothing_is_left(surroundings)

    def test_a_new_plan_counts_on_the_live_bucket(self, surroundings: Surroundings) -> None:
        requests = Requests.read(told_by("plans"))
        refused = [number for number, status in zip(requests.numbers, requests.statuses, strict=True) if status == 429]
        assert refused == [21, 22, 41, 42, 101, 102, 101, 102]
        last = {20: [0], 40: [0], 100: [0, 0]}
        for number, left in last.items():
            assert [rest for each, rest in zip(requests.numbers, requests.left, strict=True) if each == number] == left
        check_that_nothing_is_left(surroundings)

    def test_workers_at_the_limit_of_an_api(self, surroundings: Surroundings) -> None:
        """What it is about does not depend on the machine: nothing is refused, whatever stalls."""
        told = told_by("outbound", "--seconds", "5")
        refused, calls = re.findall(r"^refused: (\d+) of (\d+)$", told, re.MULTILINE)[0]
        assert int(refused) == 0
        assert int(calls) > 50
        rows = re.findall(r"^ +(\d+) +(\d+) +[\d.]+ s( +\(killed\))?$", told, re.MULTILINE)
        assert len({worker for worker, *_ in rows}) == 8
        assert [bool(killed) for *_, killed in rows].count(True) == 1
        check_that_nothing_is_left(surroundings)

    def test_tokens_of_a_model_are_settled_to_the_token(self, surroundings: Surroundings) -> None:
        told = told_by("llm-proxy", "--seconds", "5")
        rows = re.findall(r"^ +([\d,]+) +([\d,]+)  llm-(\w+):(\w+):\{acme\}", told, re.MULTILINE)
        assert len(rows) == 12
        assert all(used == charged for used, charged, *_ in rows)
        for what in ("requests", "tokens"):
            of = {whose: [int(row[0].replace(",", "")) for row in rows if row[2:] == (what, whose)] for whose in WHOSE}
            assert of["organisation"] == [sum(of["user"])]
            assert len(of["user"]) == 5
        check_that_nothing_is_left(surroundings)

    def test_a_redis_that_is_given_is_left_as_it_was(
        self, surroundings: Surroundings, server_binary: servers.ServerBinary
    ) -> None:
        with servers.RedisServer.start(server_binary) as server, server.client() as client:
            client.set("flask-example:203.0.113.7", "not the example's")
            with ProxyManager.from_url(server.url, "10/hour", prefix="ratelimit:") as manager:
                manager.try_consume("flask-example:127.0.0.1", 10)  # as if somebody had stopped it half-way
            Requests.read(told_by("flask", RATELIMIT_URL=server.url))
            assert client.keys() == [b"flask-example:203.0.113.7"]
        check_that_nothing_is_left(surroundings)

    def test_a_story_that_does_not_come_true(self, surroundings: Surroundings) -> None:
        done = subprocess.run(
            [*COMMAND, "flask"],
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "RATELIMIT_LIMIT": "9/hour"},
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert done.stdout.endswith("\nBut: the policy is not what it should be.\n")
        check_that_nothing_is_left(surroundings)


class TestEnds:
    def test_ctrl_c_ends_all_of_it(self, surroundings: Surroundings) -> None:
        with served("fastapi") as instances:
            assert len(surroundings.processes()) >= 6
            instances.process.send_signal(signal.SIGINT)
            assert instances.process.wait(PATIENCE) == 128 + signal.SIGINT
        check_that_nothing_is_left(surroundings)

    def test_nothing_outlives_it_when_it_is_killed(self, surroundings: Surroundings) -> None:
        with served("django") as instances:
            instances.process.kill()
        servers.wait_until(lambda: not surroundings.processes(), "all that was started has ended", PATIENCE)

    def test_an_instance_that_does_not_start(self, surroundings: Surroundings) -> None:
        done = subprocess.run(
            [*COMMAND, "fastapi"],
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "RATELIMIT_LIMIT": "ten an hour"},
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 2
        assert "InvalidConfigurationError" in done.stderr
        check_that_nothing_is_left(surroundings)


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("name", EXAMPLES)
def test_fields_of_answers(name: str) -> None:
    """What the fields say, read by a parser of structured fields; and a client's own header gives it no new bucket."""
    with served(name, RATELIMIT_LIMIT="3/hour") as instances:
        policy = f"{name}-example"
        addresses = [f"203.0.113.{number}" for number in range(5)]
        answers = instances.answers(
            f"{policy}:127.0.0.1",
            lambda: [
                instances.ask(number % 2, X_Forwarded_For=address, Forwarded=f"for={address}")
                for number, address in enumerate(addresses)
            ],
        )
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    for number, answer in enumerate(answers):
        assert parsed(answer, "RateLimit-Policy") == [(policy, {"q": 3, "w": HOUR})]
        ((of, parameters),) = parsed(answer, "RateLimit")
        assert (of, parameters.keys(), parameters["r"]) == (policy, {"r", "t"}, max(0, 2 - number))
        assert HOUR / 3 - PATIENCE < parameters["t"] <= HOUR / 3
        if answer.status == 429:
            assert parsed(answer, "Retry-After", "item") == (parameters["t"], {})
            assert answer.headers["Content-Type"] == "application/problem+json"
            problem = json.loads(answer.body)
            assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
            assert (problem["status"], problem["violated-policies"]) == (429, [policy])
        else:
            assert "Retry-After" not in answer.headers
            assert json.loads(answer.body) == {"hello": "world"}


def parsed(answer: Answer, name: str, kind: str = "list") -> Any:
    (value,) = answer.headers.get_all(name) or [""]
    return http_sf.parse(value.encode(), tltype=kind)


def test_keys_of_customers_are_not_stored(surroundings: Surroundings) -> None:
    hashed = api_key(secret="a secret for examples only").hashed("key-of-globex")
    key = rf"plans-example|:{hashed}|/reports/\(year\)"
    with served("plans") as instances:
        (answer,) = instances.answers(key, lambda: [instances.ask(0, "/reports/1999", X_API_Key="key-of-globex")])
        assert answer.status == 200
        with instances.manager() as manager:
            snapshot = manager.snapshot(key)
        assert (snapshot.consumed_tokens, snapshot.configuration_version) == (1, 1)
        (database,) = surroundings.temporary.glob("*/customers.sqlite3")
        assert hashed.encode() in database.read_bytes()
        assert b"key-of-" not in database.read_bytes()


class TestUnderLoad:
    LIMIT = 1000
    REQUESTS = 4000
    CLIENTS = 100

    async def test_eight_processes_of_two_instances_admit_what_the_limit_says(self, surroundings: Surroundings) -> None:
        """Whoever is told 503, as Redis was too slow, may have paid a token; without one it is exact."""
        limit = f"{self.LIMIT}/7d"
        with served("fastapi", "--workers", "4", RATELIMIT_LIMIT=limit) as instances:
            serving = [process for process in surroundings.processes() if "spawn_main" in " ".join(cmdline(process))]
            assert len(serving) == 8
            statuses = await self.load(instances.ports)
            with instances.manager() as manager:
                snapshot = manager.snapshot("fastapi-example:127.0.0.1")
        assert statuses.keys() <= {200, 429, 503}
        assert statuses.total() == self.REQUESTS
        assert snapshot.consumed_tokens == self.LIMIT
        assert snapshot.available_tokens == 0
        assert self.LIMIT - statuses[503] <= statuses[200] <= self.LIMIT
        assert statuses[503] < self.LIMIT / 2

    async def load(self, ports: list[int]) -> Counter[int]:
        """The statuses of all requests, of which each client makes its own, to the instances in turn."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def client(number: int) -> Counter[int]:
                statuses = Counter[int]()
                for turn in range(self.REQUESTS // self.CLIENTS):
                    port = ports[(number + turn) % len(ports)]
                    async with session.get(f"http://127.0.0.1:{port}/", timeout=patience) as response:
                        statuses[response.status] += 1
                        await response.read()
                    if response.status == 503:
                        await asyncio.sleep(0.2)  # until it is left alone no more
                return statuses

            patience = aiohttp.ClientTimeout(PATIENCE)
            return sum(await asyncio.gather(*map(client, range(self.CLIENTS))), Counter[int]())


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()  # type: ignore[no-any-return]  # psutil has no types
    except psutil.Error:
        return []
