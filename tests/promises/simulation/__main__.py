"""Run schedules, or one of them, and show what happens in it.

``python -m tests.promises.simulation --schedules 1000000 --seed 0``
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

from tests.promises.simulation import several
from tests.promises.simulation.schedules import LIMITS, SLIDING, WINDOWS, simulate
from tests.promises.simulation.world import ViolationError, World

_PROGRESS_EVERY = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.promises.simulation", description=__doc__)
    parser.add_argument("--schedules", type=int, default=100_000, help="how many, with consecutive seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first of them, or the one to replay")
    parser.add_argument("--replay", action="store_true", help="run one schedule, and print all that happens in it")
    parser.add_argument("--windows", action="store_true", help="limit by the second algorithm, that of the tests")
    parser.add_argument("--sliding", action="store_true", help="limit by sliding windows")
    parser.add_argument("--several", action="store_true", help="decide about several buckets at once")
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first violation")
    arguments = parser.parse_args()
    return _replay(arguments) if arguments.replay else _run(arguments)


def _simulating(arguments: argparse.Namespace) -> Callable[..., World]:
    """Return what runs the schedule of a seed."""
    if arguments.several:
        return several.simulate
    return partial(simulate, limits=WINDOWS if arguments.windows else SLIDING if arguments.sliding else LIMITS)


def _replay(arguments: argparse.Namespace) -> int:
    try:
        world = _simulating(arguments)(arguments.seed, tracing=True)
    except ViolationError as error:
        print(*error.lines, sep="\n")
        print(f"violation: {error}")
        return 1
    print(*world.lines, sep="\n")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    begin, violations = time.monotonic(), 0
    option = " --windows" * arguments.windows + " --sliding" * arguments.sliding + " --several" * arguments.several
    simulate_one = _simulating(arguments)
    for count in range(1, arguments.schedules + 1):
        seed = arguments.seed + count - 1
        try:
            simulate_one(seed)
        except ViolationError as error:
            violations += 1
            print(f"seed {seed}: {error}\n  python -m tests.promises.simulation --seed {seed} --replay{option}")
            if not arguments.keep_going:
                return 1
        if count % _PROGRESS_EVERY == 0 or count == arguments.schedules:
            seconds = time.monotonic() - begin
            print(f"{count} schedules in {seconds:.0f} s, {count / seconds:.0f}/s", flush=True)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
