"""``python -m benchmarks``: run the scenarios, print the goals, write the page."""

from __future__ import annotations

import argparse
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import report
from benchmarks.command import Progress, allow_many_files, environment, terminated
from benchmarks.contenders import ENTRANTS
from benchmarks.model import Results
from benchmarks.run import Run
from benchmarks.scenarios import SCENARIOS, run_all
from benchmarks.server import binaries, running

HERE = Path(__file__).parent
PACKAGES = ("redis", "hiredis", "uvloop", "limits", "throttled-py", "pyrate-limiter", "self-limiters")


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
    signal.signal(signal.SIGTERM, terminated)
    allow_many_files()
    results = Results(dict(ENTRANTS), environment=environment(PACKAGES))
    try:
        with ExitStack() as stack:
            servers = [stack.enter_context(running(binary)) for binary in binaries()]
            results.environment["servers"] = ", ".join(server.version for server in servers)
            run_all(Run(results, servers, rounds, seconds, quick, Progress(begin)), only)
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
    parser.add_argument("--quick", action="store_true", help="the short form, of some three minutes")
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(SCENARIOS)}")
    parser.add_argument("--rounds", type=int, help="rounds over all contenders")
    parser.add_argument("--seconds", type=float, help="length of a slice")
    return parser.parse_args()


if __name__ == "__main__":
    main()
