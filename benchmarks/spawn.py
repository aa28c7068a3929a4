"""Processes of the benchmark's own, which leave Ctrl-C to it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any


def spawned(serve: Callable[..., None], *arguments: Any) -> tuple[Any, Connection]:
    """A new process in which ``serve(connection, *arguments)`` runs, and the other end of its connection."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, *arguments), daemon=True)
    resource_tracker.ensure_running()  # now, since this unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which the process inherits
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    theirs.close()
    return process, ours
