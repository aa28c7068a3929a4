"""Work beside the caller, and waiting for it, by threads or by greenlets.

gevent and eventlet replace the sockets of the standard library, and by default its threads, locks and events as well,
so that all of them are greenlets' own. A program may let them replace the sockets alone. There a thread cannot use the
sockets that another one has made, and a thread that waits for an event stops all of its greenlets, perhaps also the
one that it waits for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Final, Protocol

_PAUSE: Final = 0.005  # seconds
_EVENTS: Final = {"gevent": "gevent.event", "eventlet": "eventlet.green.threading"}
"""Modules that have events which stop no greenlets, whatever was replaced."""


class EndingError(RuntimeError):
    """The interpreter is about to end, and runs no other thread any more."""


class Event(Protocol):
    """What there is of ``threading.Event`` everywhere."""

    def set(self) -> object: ...

    def wait(self, timeout: float | None = None) -> bool: ...

    def is_set(self) -> bool: ...


def block_greenlets() -> bool:
    """Return whether a thread that waits for an event stops greenlets, which share its sockets."""
    return _library() is not None


def start(work: Callable[[], Any], name: str) -> None:
    """Run some work beside the caller.

    :raises EndingError: where the interpreter is about to end.
    :raises RuntimeError: where there are too many threads.
    """
    if sys.is_finalizing():
        # Python 3.11 would start a thread that never runs, and wait for it without an end.
        raise EndingError
    library = _library()
    if library == "gevent":
        import_module("gevent").spawn(work)
    elif library == "eventlet":
        import_module("eventlet").spawn_n(work)
    else:
        try:
            threading.Thread(target=work, name=name, daemon=True).start()
        except RuntimeError as error:
            if "interpreter shutdown" in str(error):
                raise EndingError from error
            raise


def event() -> Event:
    """Return an event for what :func:`start` runs."""
    library = _library()
    module: Any = threading if library is None else import_module(_EVENTS[library])
    made: Event = module.Event()
    return made


def sleep(seconds: float) -> None:
    """Let other threads or greenlets run for this long."""
    event().wait(seconds)


def pause() -> None:
    """Let other threads or greenlets run, before looking again for what cannot be waited for."""
    sleep(_PAUSE)


@contextmanager
def taken(lock: threading.Lock) -> Generator[None]:
    """Hold a lock, and let greenlets run while it is waited for, also where it was made before they were there."""
    while not lock.acquire(blocking=False):
        pause()
    try:
        yield
    finally:
        lock.release()


def _library() -> str | None:
    """Return the name of the library that has replaced the sockets and not the threads; mostly there is none."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("socket") and not monkey.is_module_patched("threading"):
        return "gevent"
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("socket") and not patcher.is_monkey_patched("thread"):
        return "eventlet"
    return None
