"""Processes that cannot outlive the command that has started them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import IO, Any, cast


class Child:
    """A process that runs a module of this package, and exchanges lines of JSON with this process.

    The child has to end when it reads the end of its stdin. That comes when this process closes the pipe, or ends in
    whatever way. The child has a session of its own, so that the signals of a terminal do not reach it.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            # The child imports the same packages as this process.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
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
        """Send the child a line. If it has died, nothing happens here: its answer will be missing."""
        with suppress(BrokenPipeError):
            print(json.dumps(values), file=self._stdin, flush=True)

    def hear(self) -> dict[str, Any] | None:
        """Return the next line that the child sends, or None when it has ended."""
        line = self._stdout.readline()
        return json.loads(line) if line else None

    def end(self, patience: float | None = None) -> None:
        """Make the child end, and wait for that; kill it if it takes more than ``patience`` seconds."""
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the child, and read no more from it."""
        self.end()
        self._stdout.close()


def tell(**values: Any) -> None:
    """Send a line to the process that has started this one; if that has gone, end this process."""
    try:
        # Unbuffered, so that nothing is left that could fail at exit.
        os.write(1, json.dumps(values).encode() + b"\n")
    except BrokenPipeError:
        raise SystemExit from None
