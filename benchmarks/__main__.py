"""``python -m benchmarks``: run the scenarios, print the goals, write the page."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import platform
import resource
import signal
import sys
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NoReturn

from benchmarks import report
from benchmarks.contenders import ENTRANTS
from benchmarks.model import Results
from benchmarks.scenarios import SCENARIOS, Run, run_all
from benchmarks.server import binaries, running

HERE = Path(__file__).parent
PACKAGES = ("redis", "hiredis", "limits", "throttled-py", "pyrate-limiter", "self-limiters")


def main() -> None:
    arguments = _arguments()
    quick: bool = arguments.quick
    rounds: int = arguments.rounds or (2 if quick else 5)
    seconds: float = arguments.seconds or (0.1 if quick else 0.4)
    only: list[str] = arguments.only.split(",") if arguments.only else []
    if unknown := set(only) - set(SCENARIOS):
        raise SystemExit(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}")
    whole = not (quick or only or arguments.rounds or arguments.seconds)
    page = HERE / "RESULTS.md" if whole else HERE / "out" / "RESULTS.md"
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, _terminated)
    _allow_many_files()
    results = Results(dict(ENTRANTS), environment=_environment())
    try:
        with ExitStack() as stack:
            servers = [stack.enter_context(running(binary)) for binary in binaries()]
            results.environment["servers"] = ", ".join(server.version for server in servers)
            run_all(Run(results, servers, rounds, seconds, quick, _Progress(begin)), only)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    took = time.monotonic() - begin
    results.environment["took"] = f"{took / 60:.1f} minutes"
    command = "make bench-quick" if quick else "make bench"
    report.write(results, page, command=command, rounds=rounds, seconds=seconds)
    print(f"\n{report.goals_table(results)}")
    print(f"\n{took:.0f} s; the page is {page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short form, of less than two minutes")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(SCENARIOS)}")
    parser.add_argument("--rounds", type=int, help="rounds over all contenders")
    parser.add_argument("--seconds", type=float, help="length of a slice")
    return parser.parse_args()


class _Progress:
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


def _terminated(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _allow_many_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _environment() -> dict[str, str]:
    packages: list[str] = []
    for name in PACKAGES:
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


if __name__ == "__main__":
    main()
