"""Decisions while the interpreter ends, when it starts no threads any more, or takes the modules apart."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Generator

import pytest

PROGRAM = """
import asyncio, atexit, sys, threading, time
from ratelimit import AsyncProxyManager, ProxyManager, RateLimitError

when, used, url = sys.argv[1:]
manager = ProxyManager.from_url(url, "1000000000/day", timeout=0.7)
amanager = AsyncProxyManager.from_url(url, "1000000000/day", timeout=0.7)


def decide(clock=time.monotonic, errors=RateLimitError, out=sys.stdout):
    begun = clock()
    try:
        answer = manager.try_consume("exit")
    except errors as error:
        answer = type(error).__name__
    print(answer, clock() - begun < 5, file=out, flush=True)


async def adecide():
    try:
        return await amanager.try_consume("exit")
    except RateLimitError as error:
        return type(error).__name__


class Job:
    def __del__(self):
        decide()


if used == "used":
    manager.try_consume("exit")
if when == "del":
    job = Job()
elif when == "atexit":
    atexit.register(decide)
elif when == "threads":
    threading._register_atexit(decide)
elif when == "asyncio":
    atexit.register(lambda: print(asyncio.run(adecide()), True))
elif when == "closed":
    loop = asyncio.new_event_loop()
    loop.run_until_complete(adecide())
    loop.close()
    atexit.register(lambda: print(asyncio.run(adecide()), True))
elif when == "daemons":
    def always():
        while True:
            decide(out=sys.stderr)

    for _ in range(4):
        threading.Thread(target=always, daemon=True).start()
    time.sleep(0.1)
    atexit.register(decide)
"""


def ended(when: str, used: str, url: str) -> str:
    """Return what a process has printed that ended by itself."""
    command = [sys.executable, "-c", PROGRAM, when, used, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if when != "daemons":
        assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture
def silent() -> Generator[str]:
    """Return the URL of a server that accepts connections and never answers."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as listener:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.redis
@pytest.mark.parametrize("when", ["atexit", "threads", "asyncio", "closed", "daemons"])
def test_a_decision_is_made(redis_url: str, when: str) -> None:
    assert ended(when, "used", redis_url) == "True True\n"


@pytest.mark.redis
def test_a_finalizer_gets_an_answer_or_an_error(redis_url: str) -> None:
    # Finalizers of what is left at the end run in any order: a connection may have been closed by its own before.
    assert ended("del", "used", redis_url) in {"True True\n", "StoreUnavailableError True\n"}


@pytest.mark.redis
def test_a_connection_is_made_until_modules_are_taken_apart(redis_url: str) -> None:
    assert ended("atexit", "new", redis_url) == "True True\n"
    assert ended("del", "new", redis_url) == "StoreUnavailableError True\n"


@pytest.mark.parametrize("when", ["atexit", "asyncio", "closed"])
def test_a_silent_server_costs_the_timeout(silent: str, when: str) -> None:
    assert ended(when, "new", silent) == "StoreTimeoutError True\n"


@pytest.mark.parametrize("kind", ["redis+cluster", "redis+sentinel"])
def test_other_connections_are_given_up_in_time(silent: str, kind: str) -> None:
    url = silent.replace("redis", kind) + "/main" * (kind == "redis+sentinel")
    for when in ("del", "atexit"):
        answer, in_time = ended(when, "new", url).split()
        assert answer in {"StoreUnavailableError", "StoreTimeoutError"}
        assert in_time == "True"
