"""A directory and a PATH for a program that starts others, and what it leaves behind there."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

import psutil

MARK = "RATELIMIT_TEST_DEMO"
"""A variable of the environment by which the processes of a program are known."""


class Surroundings(NamedTuple):
    """What a program finds, and where to look for what it leaves behind."""

    mark: str
    temporary: Path
    programs: Path

    def processes(self) -> list[psutil.Process]:
        """Return the processes that the program has started and that still run, whatever their parents are by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if self._owns(process) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _owns(self, process: psutil.Process) -> bool:
        # A server writes its title over its environment, but it works in its directory.
        return process.environ().get(MARK) == self.mark or str(self.temporary) in process.cwd()

    def has_server(self) -> bool:
        # A program that is a script runs under a name of its own.
        return any(str(self.temporary) in process.cwd() for process in self.processes())

    def files(self) -> list[Path]:
        return list(self.temporary.iterdir())

    def check_that_nothing_is_left(self) -> None:
        assert (self.processes(), self.files()) == ([], [])
