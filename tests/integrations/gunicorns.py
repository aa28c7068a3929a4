"""A real gunicorn on a port of the loopback interface, and clients that come to it all at once."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def gunicorn(program: str, directory: Path, *, redis_url: str) -> Generator[tuple[str, int]]:
    """Serve ``application`` of a program by two processes of four threads; the address.

    The program runs before they are forked, so that they have whatever it has opened.
    """
    (directory / "served.py").write_text(program)
    command = [sys.executable, "-m", "gunicorn", "--chdir", str(directory), "--bind", "127.0.0.1:0", "--preload"]
    command += ["--workers", "2", "--threads", "4", "--worker-tmp-dir", str(directory), "served:application"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(directory), "RATELIMIT_URL": redis_url}
    log = directory / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment)
    try:
        yield _address(server, log)
    finally:
        server.terminate()
        server.wait()


def _address(server: subprocess.Popen[bytes], log: Path) -> tuple[str, int]:
    while server.poll() is None:
        if match := re.search(r"Listening at: http://([\d.]+):(\d+) ", log.read_text()):
            return match[1], int(match[2])
        try:
            server.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError(log.read_text())


def statuses(address: tuple[str, int], path: str, requests: int) -> Counter[int]:
    """The answers to so many requests, of which eight are under way at any time."""

    def status(_: int) -> int:
        connection = HTTPConnection(*address, timeout=60)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as threads:
        return Counter(threads.map(status, range(requests)))
