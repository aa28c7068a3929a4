"""Processes that cannot outlive the command that has started them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any, cast


class Child:
    """A module of this package, run in a process of its own; the two speak JSON, a line at a time.

    Its life hangs on its stdin: it has to end when it reads the end of the file there, which it does when this process
    closes the pipe, or ends in whatever way. A session of its own keeps the signals of a terminal from it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # so that it imports what was imported here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        self._stdin, self._stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, **values: Any) -> None:
        """Send it a line; nothing happens where it has died, since what it should have answered will be missing."""
        with suppress(BrokenPipeError):
            print(json.dumps(values), file=self._stdin, flush=True)

    def hear(self) -> dict[str, Any] | None:
        """The next line that it tells; None when it has ended."""
        line = self._stdout.readline()
        return json.loads(line) if line else None

    def end(self, patience: float | None = None) -> None:
        """Make it end, and wait until it has; where it does not within this many seconds it is killed."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End it, and hear no more of it."""
        self.end()
        self._stdout.close()


def tell(**values: Any) -> None:
    """Send a line to the process that has started this one; the end of this one where that has gone."""
    try:
        os.write(1, json.dumps(values).encode() + b"\n")  # unbuffered, so that nothing is left to fail at exit
    except BrokenPipeError:
        raise SystemExit from None
