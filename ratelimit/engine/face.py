"""The two faces: how callers of sync code wait, and how those of asyncio do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ratelimit.core.numbers import NANOS_PER_SECOND
from ratelimit.runtime import threads
from ratelimit.runtime.clock import monotonic
from ratelimit.runtime.steps import Steps, arun, run


@dataclass(frozen=True, slots=True)
class Face:
    """How the callers of a manager wait.

    :param asynchronous: whether they are tasks of asyncio.
    :param pause: waits for a number of nanoseconds between two attempts, in real time.
    :param spawn: runs steps beside the caller.
    :param finish: runs steps to their end; for asyncio it returns an awaitable of the result.
    :param monotonic: the clock of deadlines, in seconds.
    """

    asynchronous: bool
    pause: Callable[[int], Any]
    spawn: Callable[[Steps[None]], None]
    finish: Callable[[Steps[Any]], Any]
    monotonic: Callable[[], float] = monotonic


def _pause(nanos: int) -> None:
    time.sleep(nanos / NANOS_PER_SECOND)


def _spawn(steps: Steps[None]) -> None:
    threads.start(partial(run, steps))


async def _apause(nanos: int) -> None:
    await asyncio.sleep(nanos / NANOS_PER_SECOND)


_spawned: Final[set[asyncio.Task[None]]] = set()
"""Event loops do not keep their tasks alive."""


def _aspawn(steps: Steps[None]) -> None:
    task = asyncio.get_running_loop().create_task(arun(steps))
    _spawned.add(task)
    task.add_done_callback(_spawned.discard)


SYNC: Final = Face(asynchronous=False, pause=_pause, spawn=_spawn, finish=run)
ASYNCIO: Final = Face(asynchronous=True, pause=_apause, spawn=_aspawn, finish=arun)
