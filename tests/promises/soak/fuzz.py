"""Looks for inputs that break the decoder, the text form, and URLs, by what code they reach.

``python -m tests.promises.soak.fuzz --seconds 60`` gives each target its share of the time. Atheris guides the search
where it is installed (``pip install ratelimit-redis[soak]``); it has wheels for Linux on x86-64. Elsewhere hypothesis
draws far more examples than in a test, without guidance. An input that breaks something is left in the directory of the
results.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[3]
OUT: Final = ROOT / "tests" / "promises" / "soak" / "out"
TARGETS: Final = ("state", "verbs", "limits", "url")
_INSTRUMENTED: Final = ["ratelimit.core", "ratelimit.stores.urls"]
_LONGEST_INPUT: Final = 2_000
_MEGABYTES: Final = 1_024
_SECONDS_OF_ONE: Final = 20
_GRACE: Final = 60
_EXAMPLES_A_SECOND: Final = 50  # of each test, where a machine has other things to do


def guided() -> bool:
    """Whether a fuzzer is here that knows which code an input reaches."""
    return importlib.util.find_spec("atheris") is not None


def run(seconds: float) -> list[str]:
    """Fuzz all targets, one after the other; what went wrong."""
    if not guided():
        print("atheris is not installed here: hypothesis draws examples without guidance", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "tests/promises/test_fuzzing.py", "-k", "any"]
        examples = {"RATELIMIT_TEST_EXAMPLES": f"{max(100, round(seconds * _EXAMPLES_A_SECOND))}"}
        done = subprocess.run(
            [*command, "--hypothesis-profile=soak"], cwd=ROOT, env={**os.environ, **examples}, check=False
        )
        return [] if done.returncode == 0 else ["an example of hypothesis breaks something"]
    share = max(1, round(seconds / len(TARGETS)))
    return [f"{target}: see what was printed above" for target in TARGETS if not _holds(target, share)]


def _holds(target: str, seconds: int) -> bool:
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(_seeds(target)):
            (Path(corpus) / f"{number}").write_bytes(seed)
        command = [sys.executable, "-m", "tests.promises.soak.fuzz", "--target", target, "--", corpus]
        command += [f"-max_total_time={seconds}", f"-max_len={_LONGEST_INPUT}", f"-rss_limit_mb={_MEGABYTES}"]
        command += [f"-timeout={_SECONDS_OF_ONE}", f"-artifact_prefix={OUT}/{target}-", "-print_final_stats=1"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds + _GRACE, check=False
        )
    said = done.stdout + done.stderr
    runs = [line for line in said.splitlines() if line.startswith("Done ")]
    print(f"{target}: {runs[-1] if runs else 'broken'}", flush=True)
    if done.returncode != 0:
        print(said[-8_000:], flush=True)
    return done.returncode == 0


def _seeds(target: str) -> Iterator[bytes]:
    from tests.support import vectors

    if target in ("state", "verbs"):
        recorded = vectors.load("state-bytes.json")
        for case in (*recorded["initial"], *recorded["after_operations"], *recorded["decoding"]):
            yield bytes.fromhex(case["hex"])
    elif target == "limits":
        yield from (b"100/minute", b"1_000 per 5min burst 3 initial 0; 7/250 ms id login", b'5/d id "a \\u00e9"')
        yield from (b"5/day aligned 2024-01-01T12:00+02:00 adaptive", b"2/2 weeks intervally; 3/ns aligned @0")
    else:
        yield from (b"redis://user:pass@host:6379/0?socket_timeout=0.2", b"unix:///path?db=1", b"memory://")
        yield from (b"redis+sentinel://:pass@a:1,b/service/2?sentinel_password=x", b"rediss+cluster://[::1]:7000")


def _fuzz(target: str, arguments: list[str]) -> None:
    """Never comes back: the fuzzer ends the process."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=_INSTRUMENTED):
        fuzzing = importlib.import_module("tests.support.fuzzing")
    check: Callable[[Any], None] = getattr(fuzzing, f"check_{target}")

    def check_text(data: bytes) -> None:
        check(data.decode(errors="replace"))

    atheris.Setup([sys.argv[0], *arguments], check if target in ("state", "verbs") else check_text)
    atheris.Fuzz()


def main() -> int:
    """Run as a program; 1 where something broke."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises.soak.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--target", choices=TARGETS, help="of a single run, with options of the fuzzer's after --")
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.target:
        _fuzz(options.target, options.arguments)
    failures = run(options.seconds)
    for failure in failures:
        print(f"FAIL {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
