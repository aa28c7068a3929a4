"""Bucket4j in a process of its own, which does what a line of JSON says: see ``Peer.java``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ratelimit import BucketConfiguration, Expiration
from tests.support import vectors

TARGET = Path(__file__).parent / "target"


class JavaError(Exception):
    """What Java has thrown."""


class Peer:
    """Like a manager without limits of its own: which limits and which clock, says each call."""

    def __init__(self, url: str) -> None:
        if not (TARGET / "classes" / "Peer.class").exists():
            raise FileNotFoundError("the program in Java is not built: run `make interop`")
        command = ["java", "-cp", f"{TARGET / 'classes'}:{TARGET / 'lib' / '*'}", "Peer", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(
        self,
        op: str,
        key: str | None = None,
        limits: BucketConfiguration | None = None,
        *,
        now: int | None = None,
        implicit: dict[str, Any] | None = None,
        expiration: Expiration | None = None,
        threads: int = 0,
        **args: Any,
    ) -> Any:
        """Do what a step of the recorded traces does, and give the result in the same words.

        :param now: the time by a clock that stands still; None: by Java's own.
        :param implicit: the ``version`` and the ``strategy`` of an implicit replacement.
        """
        request = {
            "op": op,
            "key": key,
            "configuration": limits and vectors.as_recorded(limits),
            "now": now,
            "implicit_replacement": implicit,
            "expiration": expiration and {"kind": expiration.kind, "duration_millis": expiration.duration_millis},
            "threads": threads,
            "args": args,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = json.loads(self._process.stdout.readline())
        if "error" in reply:
            raise JavaError(reply["error"])
        return reply["result"]
