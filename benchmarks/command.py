"""What the benchmarks' command lines share."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import resource
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NoReturn


class Progress:
    """A line that changes on a terminal; elsewhere a line for each round."""

    def __init__(self, begin: float) -> None:
        self._begin = begin
        self._last = ""

    def __call__(self, text: str) -> None:
        shown = f"[{time.monotonic() - self._begin:4.0f} s] {text}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{shown}", end="", file=sys.stderr, flush=True)
        elif (head := text.rpartition(",")[0]) != self._last or text.endswith("\n"):
            self._last = head
            print(shown.rstrip(), file=sys.stderr, flush=True)


def terminated(number: int, _frame: FrameType | None) -> NoReturn:
    """For a signal: end as after Ctrl-C, so that the servers are stopped."""
    raise SystemExit(128 + number)


def allow_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def environment(names: Iterable[str]) -> dict[str, str]:
    """This machine, and the versions of some packages."""
    packages: list[str] = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": ", ".join(packages),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
