"""A real uvicorn on a port of the loopback interface: in the loop of the test, or with processes of its own."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from tests.integrations.gunicorns import ROOT, awaited_address


@asynccontextmanager
async def serving(app: Any, **settings: Any) -> AsyncGenerator[tuple[str, int]]:
    """Serve an application in this process; the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="websockets-sansio", **settings))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            while not server.started:
                assert not task.done(), "the server has ended before it began"
                await asyncio.sleep(0.01)
            yield listener.getsockname()
        finally:
            server.should_exit = True
            await task


@contextmanager
def workers(program: str, directory: Path, *, redis_url: str) -> Generator[tuple[str, int]]:
    """Serve ``app`` of a program by two processes; the address."""
    (directory / "served.py").write_text(program)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(directory), "--port", "0", "--workers", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RATELIMIT_URL": redis_url}
    log = directory / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(
            [*command, "served:app"], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment
        )
    try:
        yield awaited_address(server, log, _address)
    finally:
        server.terminate()
        server.wait()


def _address(text: str) -> tuple[str, int] | None:
    match = re.search(r"running on http://([\d.]+):(\d+) ", text)
    return (match[1], int(match[2])) if match and _listens((match[1], int(match[2]))) else None


def _listens(address: tuple[str, int]) -> bool:
    """Whether a worker has begun to; the port is told before."""
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def program(text: str, directory: Path, *, redis_url: str) -> Generator[tuple[str, int]]:
    """Serve ``application`` of a program by a process of its own; the address."""
    (directory / "served.py").write_text(text)
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(directory), "--port", "0", "served:application"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(directory), "RATELIMIT_URL": redis_url}
    log = directory / "log"
    with log.open("wb") as errors:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment)
    try:
        while not (match := re.search(r"running on http://([\d.]+):(\d+) ", log.read_text())):
            assert server.poll() is None, log.read_text()
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.02)
        yield match[1], int(match[2])
    finally:
        server.terminate()
        server.wait()
