"""A real gunicorn on a port of the loopback interface, and clients that come to it all at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def gunicorn(
    program: str, directory: Path, *, redis_url: str, worker: str = "gthread", preload: bool = True
) -> Generator[tuple[str, int]]:
    """Serve ``application`` of a program by two processes, of four threads or of greenlets; the address.

    :param preload: whether the program runs before they are forked, so that they have whatever it has opened.
    """
    (directory / "served.py").write_text(program)
    command = [sys.executable, "-m", "gunicorn", "--chdir", str(directory), "--bind", "127.0.0.1:0"]
    command += ["--preload"] * preload + ["--worker-class", worker, "--workers", "2", "--threads", "4"]
    # A worker that is still starting does not hear of the end.
    command += ["--graceful-timeout", "3", "--worker-tmp-dir", str(directory), "served:application"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(directory), "RATELIMIT_URL": redis_url}
    with served(command, directory / "log", environment) as address:
        yield address


@contextmanager
def served(command: list[str], log: Path, environment: dict[str, str]) -> Generator[tuple[str, int]]:
    """Run a server until the end of the block; it writes its address into its log, as gunicorn does."""
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment)
    try:
        yield awaited_address(server, log, _address)
    finally:
        server.terminate()
        server.wait()


def _address(text: str) -> tuple[str, int] | None:
    match = re.search(r"Listening at: http://([\d.]+):(\d+) ", text)
    return match and (match[1], int(match[2]))


def awaited_address(
    server: subprocess.Popen[bytes], log: Path, find: Callable[[str], tuple[str, int] | None]
) -> tuple[str, int]:
    """Wait until the address of a server can be found in its log."""
    while server.poll() is None:
        if address := find(log.read_text()):
            return address
        try:
            server.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(log.read_text())


def statuses(address: tuple[str, int], path: str, requests: int, at_once: int = 8) -> Counter[int]:
    """The answers to so many requests, of which so many are under way at any time."""

    def status(_: int) -> int:
        connection = HTTPConnection(*address, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    with ThreadPoolExecutor(at_once) as threads:
        return Counter(threads.map(status, range(requests)))
