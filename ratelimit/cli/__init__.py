"""The command line: ``ratelimit try | inspect | reset | remove | demo``."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

from ratelimit.cli import buckets
from ratelimit.demo.errors import DemoError
from ratelimit.errors import RateLimitError
from ratelimit.keys import Key
from ratelimit.runtime.signals import Interrupted, interruptible
from ratelimit.stores.urls import DEFAULT_URL, URL_VARIABLE, default_url

DISTRIBUTION = "ratelimit-redis"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    :param argv: the arguments, without the name of the program; those of the process when None.
    :returns: the exit status: 0 for admitted or done; 1 for refused, missing or broken; 2 for an error, which is
        printed on stderr, in one line, or in several where it shows a place in the limits; 128 plus the number of the
        signal that has ended the command.
    :raises SystemExit: for arguments that are not valid (status 2), and after ``--help`` and ``--version``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may lack some of the characters of a key.
            stream.reconfigure(errors="backslashreplace")
    try:
        with interruptible():
            return _run(argv)
    except Interrupted as interruption:
        return interruption.exit_status
    except BrokenPipeError:
        # The process that read stdout has gone. What is still buffered for it must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except (RateLimitError, DemoError) as error:
        print(f"ratelimit: {error}", file=sys.stderr)
        return 2
    return status


def _demo(arguments: argparse.Namespace) -> int:
    if find_spec("rich") is None:
        raise DemoError("the demo needs rich: pip install 'ratelimit-redis[demo]'")
    from ratelimit.demo.command import demo

    return demo(arguments.url, buckets.parsed_limits(arguments.limit), arguments.processes, arguments.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ratelimit",
        description="Token buckets that are shared through Redis.",
        epilog="Exit status: 0 admitted or done, 1 refused, missing or broken, 2 an error.",
    )
    parser.add_argument("--version", action="version", version=f"{DISTRIBUTION} {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    bucket = argparse.ArgumentParser(add_help=False)
    bucket.add_argument("key", metavar="KEY", type=_key)
    bucket.add_argument(
        "--url",
        default=default_url(),
        help=f"where the buckets are; by default ${URL_VARIABLE}, else {DEFAULT_URL}",
    )
    bucket.add_argument("--prefix", default="", type=_key, help="what stands before every key in Redis")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON object")

    command = commands.add_parser(
        "try", parents=[bucket, as_json], help="consume tokens if they are there; status 1 if not"
    )
    command.add_argument(
        "--limit", required=True, help="limits of a new bucket: '10/minute', '10/second burst 50; 1000/hour'"
    )
    command.add_argument("--tokens", type=int, default=1, metavar="N")
    command.add_argument(
        "--wait",
        nargs="?",
        type=float,
        const=float("inf"),
        metavar="SECONDS",
        help="wait for the tokens, without SECONDS for as long as it takes; after KEY, or as --wait=SECONDS",
    )
    command.set_defaults(run=buckets.try_)

    command = commands.add_parser("inspect", parents=[bucket, as_json], help="show a bucket; status 1 if there is none")
    command.set_defaults(run=buckets.inspect)

    command = commands.add_parser("reset", parents=[bucket], help="fill a bucket; status 1 if there is none")
    command.set_defaults(run=buckets.reset)

    command = commands.add_parser("remove", parents=[bucket], help="forget a bucket; status 1 if there is none")
    command.set_defaults(run=buckets.remove)

    command = commands.add_parser(
        "demo", help="let processes share buckets in a Redis of their own; status 1 if a limit was broken"
    )
    command.add_argument("--url", help="a Redis of yours instead; the keys are removed at the end")
    command.add_argument("--limit", default="50/second burst 100", help="limits of each bucket (%(default)s)")
    command.add_argument("--processes", type=_processes, default=7, metavar="N", help="2 to 64 (%(default)s)")
    command.add_argument("--seconds", type=_seconds, default=5.0, help="above 0, at most 3600 (%(default)g)")
    command.set_defaults(run=_demo)
    return parser


def _version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _key(argument: str) -> Key:
    """Return a key as it was typed: text, or its bytes where they are not text."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument)
    return argument


def _processes(argument: str) -> int:
    if argument.isdecimal() and 2 <= int(argument) <= 64:
        return int(argument)
    raise argparse.ArgumentTypeError(f"must be a number from 2 to 64; got {argument!r}")


def _seconds(argument: str) -> float:
    try:
        seconds = float(argument)
    except ValueError:
        seconds = 0
    if 0 < seconds <= 3600:
        return seconds
    raise argparse.ArgumentTypeError(f"must be a number above 0, and at most 3600; got {argument!r}")
