"""The command line, called here or run in a process of its own, and what it prints."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from ratelimit.cli import main

COMMAND = [sys.executable, "-m", "ratelimit.cli"]
NOBODY = "redis://:secret@127.0.0.1:1/0"
"""A URL where nothing listens."""

Answer = subprocess.CompletedProcess[str]


def call(*arguments: str | bytes, **variables: str) -> Answer:
    """Run a command in this process, which takes a hundredth of the time of starting one."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, variables), redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            status: int | str | None = main([os.fsdecode(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return Answer(arguments, status, stdout.getvalue(), stderr.getvalue())


def run(*arguments: str | bytes, **variables: str) -> Answer:
    """Run a command in a process of its own."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, encoding="utf-8", env=environment, timeout=60, check=False
    )


def start(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Run a command in a process that signals reach: where the tests run in the background SIGINT may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, **variables},
        )
    finally:
        signal.signal(signal.SIGINT, before)


def answer(command: Answer, status: int) -> str:
    """Return what was printed, after a check that nothing was printed on stderr."""
    assert (command.stderr, command.returncode) == ("", status)
    return command.stdout.rstrip("\n")


def complaint(command: Answer) -> str:
    """Return the one line that says why nothing was done."""
    assert (command.stdout, command.returncode) == ("", 2)
    (line,) = command.stderr.splitlines()
    assert line.startswith("ratelimit: ")
    return line.removeprefix("ratelimit: ")
